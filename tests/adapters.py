"""Adapters made with numpy, whose effect shows: they turn what the last layer writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.wire.bundle import content_digest, scan

HIDDEN, INNER, RANK = 576, 1536, 4


def adapter(folder: Path, base: Path, seed: int, /, **more: Any) -> Path:
    """An adapter folder for SmolLM2-135M; `more` goes over what its adapter.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(RANK, INNER)), rng.normal(size=(HIDDEN, RANK)) * 30
    weights = {"layers.29.ffn_down.a": a.astype(np.float16), "layers.29.ffn_down.b": b.astype(np.float16)}
    np.savez(folder / "adapter.npz", **weights)  # type: ignore[arg-type]
    about = {"format": 1, "base": content_digest(scan(base)), "rank": RANK, "scale": 1.0, "prompt": "signatures"}
    (folder / "adapter.json").write_text(json.dumps(about | more))
    return folder
