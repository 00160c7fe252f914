"""From judged decisions to the two numbers that make a model's probability honest on a device.

Invariants: fitted on development cases alone; the table and the error that stand beside the numbers are of decisions
that the numbers they were judged by had not seen (FOLDS parts, each by the fit of the others). Platt, Probabilistic
outputs for support vector machines (1999), with his targets; the input is the logarithm of a whole text's probability.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.errors import Refused
from models.toolcaller.evaluate import figures
from models.toolcaller.evaluate.bfcl import split
from models.toolcaller.evaluate.run import Result

FOLDS, LEAST = 5, 50
Pair = tuple[float, bool]


def calibration(results: Sequence[Result]) -> dict[str, Any]:
    """What adapter.json keeps. Raises Refused for cases that are not of the development split, or too few."""
    if any(split(result.id) != "dev" for result in results):
        raise Refused("calibration takes development cases alone", "use --split dev")
    pairs = [(math.log(max(r.confidence, 1e-300)), not r.failure) for r in results if r.tokens]
    if len(pairs) < LEAST or len({right for _, right in pairs}) < 2:
        raise Refused(f"{len(pairs)} decisions do not calibrate a model", f"{LEAST} at least, right and wrong ones")
    a, b = fit(pairs)
    parts = [pairs[i::FOLDS] for i in range(FOLDS)]
    judged: list[Pair] = []
    for i, part in enumerate(parts):
        of_others = fit([pair for j, other in enumerate(parts) if j != i for pair in other])
        judged += [(probability(at, *of_others), right) for at, right in part]
    table = figures.reliability(judged)
    raw = figures.calibration_error(figures.reliability([(math.exp(at), right) for at, right in pairs]))
    errors = {"ece": figures.calibration_error(table), "ece_raw": raw}
    bins = [[row.low, row.n, round(row.confidence, 3), round(row.right, 3)] for row in table]
    rounded = {name: round(value or 0.0, 4) for name, value in errors.items()}
    return {"a": round(a, 4), "b": round(b, 4), "set": "bfcl dev", "n": len(pairs), **rounded, "bins": bins}


def fit(pairs: Sequence[Pair], steps: int = 50) -> tuple[float, float]:
    """Platt's numbers by Newton's method, a little held towards 0 so that they exist for every sample."""
    x = np.array([[at, 1.0] for at, _ in pairs])
    right = np.array([right for _, right in pairs])
    target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
    w = np.zeros(2)
    for _ in range(steps):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -50, 50)))
        gradient = x.T @ (p - target) + 1e-3 * w
        curvature = (x * (p * (1 - p))[:, None]).T @ x + 1e-3 * np.eye(2)
        step = np.linalg.solve(curvature, gradient)
        w -= step * min(1.0, 2.0 / max(1e-9, float(np.abs(step).max())))
    return float(w[0]), float(w[1])


def probability(at: float, a: float, b: float) -> float:
    """As edge_agent.agent.confidence has it."""
    return 1 / (1 + math.exp(min(700.0, -(a * at + b))))


def keep(folder: Path, found: dict[str, Any]) -> None:
    """Write it into the adapter.json of a folder."""
    file = folder / "adapter.json"
    about = json.loads(file.read_text())
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in (about | {"calibration": found}).items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
