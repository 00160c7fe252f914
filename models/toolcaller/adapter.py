"""From a training run to the adapter folder that ships: int8 matrices, beside the exact 4-bit weights of the base.

    adapter.npz     layers.{i}.{matrix}.{a|b} int8, A (rank, in) and B (out, rank), each with `….scale` (rank,) float32
    adapter.json    format, base (content digest of the base model's folder), rank, scale (alpha / rank), prompt,
                    logit_bias (see edge_agent/engines/adapters.py) where one is asked for

Invariants: the same run gives the same bytes; what a rounding changes is about 1 % of the adapter's own change.
edge_agent/engines/adapters.py reads it.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_agent.engines.adapters import DAMAGED, read_arrays
from edge_agent.wire.bundle import content_digest, scan
from models.errors import ModelError
from models.gguf_weights import Floats


def write_adapter(run: Path, out: Path, base: str, bias: Mapping[str, float] | None = None, *more: Path) -> str:
    """Write the adapter of a run into the folder `out`; returns its content digest. Raises ModelError.

    `bias`: of the words that a decision may begin with. `more`: further runs, and it is the mean of all; what began
    from one adapter may be averaged (Wortsman et al. 2022, arXiv:2203.05482).
    """
    (about, arrays), *others = map(_read, (run, *more))
    for path, (theirs, values) in zip(more, others, strict=True):
        if theirs != about or {n: v.shape for n, v in values.items()} != {n: v.shape for n, v in arrays.items()}:
            raise ModelError(f"{path} and {run} are not of one form", "a mean needs one rank over the same matrices")
    arrays = {name: np.mean([value, *(v[name] for _, v in others)], 0) for name, value in arrays.items()}
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out / "adapter.npz", "w") as archive:
        for name, value in arrays.items():
            quants, scale = rounded(value, 1 if name.endswith(".a") else 0)
            _add(archive, name, quants)
            _add(archive, f"{name}.scale", scale)
    about = {"format": 1, "base": base} | about | {"prompt": "signatures"}
    about |= {"logit_bias": dict(bias)} if bias else {}
    (out / "adapter.json").write_text(json.dumps(about, indent=1) + "\n")
    return content_digest(scan(out))


def form_of(folder: Path) -> dict[str, Any]:
    """`rank`, and `scale` (alpha / rank), of a run or of what ships of one. Raises `DAMAGED`."""
    if (plan := folder / "plan.json").exists():
        run = json.loads(plan.read_text())
        return {"rank": run["rank"], "scale": run["alpha"] / run["rank"]}
    about = json.loads((folder / "adapter.json").read_text())
    return {"rank": about["rank"], "scale": about["scale"]}


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Floats]]:
    try:
        about, arrays = form_of(folder), read_arrays(folder / "adapter.npz")
        if strange := [name for name in arrays if not name.endswith((".a", ".b"))]:
            raise ValueError(f"{strange[0]} is no part of an adapter: a full run is merged, not shipped")
    except DAMAGED as error:
        hint = "outrider models toolcaller train makes one"
        raise ModelError(f"{folder} is not a training run with an adapter: {error}", hint) from error
    return about, dict(sorted(arrays.items()))


def rounded(value: Floats, axis: int) -> tuple[NDArray[np.int8], Floats]:
    """int8 and one scale for each direction of the rank; `axis` is the other one."""
    scale = np.maximum(np.abs(value).max(axis) / 127, np.float32(1e-12))
    return np.rint(value / np.expand_dims(scale, axis)).astype(np.int8), scale


def _add(archive: zipfile.ZipFile, name: str, value: NDArray[Any]) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:  # its date is always 1980
        np.lib.format.write_array(file, np.ascontiguousarray(value), allow_pickle=False)
