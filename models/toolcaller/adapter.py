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

from edge_agent.wire.bundle import content_digest, scan
from models.errors import ModelError
from models.gguf_weights import Floats


def write_adapter(run: Path, out: Path, base: str, bias: Mapping[str, float] | None = None) -> str:
    """Write the adapter of a run into the folder `out`; returns its content digest. Raises ModelError.

    `bias`: of the words that a decision may begin with.
    """
    try:
        plan = json.loads((run / "plan.json").read_text())
        about = {"format": 1, "base": base, "rank": plan["rank"], "scale": plan["alpha"] / plan["rank"]}
        with np.load(run / "adapter.npz") as file:
            arrays = {name: np.asarray(file[name], np.float32) for name in sorted(file.files)}
        if strange := [name for name in arrays if not name.endswith((".a", ".b"))]:
            raise ValueError(f"{strange[0]} is no part of an adapter: a full run is merged, not shipped")
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        hint = "outrider models toolcaller train makes one"
        raise ModelError(f"{run} is not a training run with an adapter: {error}", hint) from error
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(out / "adapter.npz", "w") as archive:
        for name, value in arrays.items():
            quants, scale = rounded(value, 1 if name.endswith(".a") else 0)
            _add(archive, name, quants)
            _add(archive, f"{name}.scale", scale)
    about |= {"prompt": "signatures"} | ({"logit_bias": dict(bias)} if bias else {})
    (out / "adapter.json").write_text(json.dumps(about, indent=1) + "\n")
    return content_digest(scan(out))


def rounded(value: Floats, axis: int) -> tuple[NDArray[np.int8], Floats]:
    """int8 and one scale for each direction of the rank; `axis` is the other one."""
    scale = np.maximum(np.abs(value).max(axis) / 127, np.float32(1e-12))
    return np.rint(value / np.expand_dims(scale, axis)).astype(np.int8), scale


def _add(archive: zipfile.ZipFile, name: str, value: NDArray[Any]) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as file:  # its date is always 1980
        np.lib.format.write_array(file, np.ascontiguousarray(value), allow_pickle=False)
