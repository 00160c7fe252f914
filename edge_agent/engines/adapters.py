"""Reads adapter folders: LoRA matrices in int8, as the float parameters that the language model's graph takes.

    adapter.json    {"format": 1, "base": content digest of the base model's folder, "scale": …, "logit_bias": {…}}
    adapter.npz     layers.{i}.{matrix}.{a|b}: A (rank, in), B (out, rank); int8 with `….scale` (rank,), or floats

Invariants: nothing of a folder is believed: other bases, damaged files, unknown names and shapes that do not fit each
other are Refused (those that do not fit the model it tells itself, see genai.py). Matrices that share an input are one
product in the graph, so their A stand side by side and their B on a diagonal. `logit_bias` is by words: each number is
added to the logit of its word's first token where a text under a grammar begins.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime

from edge_agent.errors import Refused

Floats = NDArray[np.float32]
GROUPS = {
    "qkv": ("attn_q", "attn_k", "attn_v"),
    "attn_output": ("attn_output",),
    "ffn": ("ffn_gate", "ffn_up"),
    "ffn_down": ("ffn_down",),
}
_MAX_BYTES = 1 << 28
_MAX_BIASED, _MAX_BIAS = 16, 100.0
DAMAGED = (OSError, ValueError, LookupError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


class About(msgspec.Struct, frozen=True):
    """adapter.json, as far as an engine reads it."""

    format: int
    base: str
    scale: float
    logit_bias: dict[str, float] = {}


def read_adapter(folder: Path, base: str) -> tuple[dict[str, Floats], dict[str, float]]:
    """Parameters by their names in the graph, and the bias of words.

    Raises Refused when damaged or not for the model with digest `base`.
    """
    try:
        about = msgspec.json.decode((folder / "adapter.json").read_bytes(), type=About)
        if about.format != 1:
            raise ValueError(f"its format is {about.format}, this version reads 1")
        sane = all(word and abs(by) <= _MAX_BIAS for word, by in about.logit_bias.items())
        if not sane or len(about.logit_bias) > _MAX_BIASED:
            raise ValueError(f"logit_bias is of up to {_MAX_BIASED} words, each by up to {_MAX_BIAS:g}")
        fits = about.base == base
        parameters = _grouped(read_arrays(folder / "adapter.npz"), about.scale) if fits else {}
    except DAMAGED as error:
        hint = "made by `outrider models toolcaller adapter`? then fetch it again"
        raise Refused(f"{folder.name} is no whole adapter: {error}", hint) from error
    if not fits:
        hint = "an adapter runs only on the very model it was made for"
        raise Refused(f"{folder.name} is for a base model of digest {about.base[:12]}, this is {base[:12]}", hint)
    return parameters, about.logit_bias


def write_parameters(parameters: dict[str, Floats], path: Path) -> None:
    """Write the file that onnxruntime's adapters are loaded from."""
    form = onnxruntime.AdapterFormat()
    form.set_adapter_version(1)
    form.set_model_version(1)
    form.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in parameters.items()})
    form.export_adapter(str(path))


def read_arrays(path: Path) -> dict[str, Floats]:
    """The matrices of an adapter.npz as floats. Raises what reading a damaged file raises (`DAMAGED`)."""
    with zipfile.ZipFile(path) as archive:
        if sum(entry.file_size for entry in archive.infolist()) > _MAX_BYTES:
            raise ValueError(f"adapter.npz holds more than {_MAX_BYTES >> 20} MiB")
        if broken := archive.testzip():
            raise ValueError(f"{broken} is damaged")
        raw = {}
        for entry in archive.namelist():
            with archive.open(entry) as file:
                raw[entry.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    arrays = {name: value.astype(np.float32) for name, value in raw.items() if not name.endswith(".scale")}
    for name, value in arrays.items():
        if value.ndim != 2 or not value.size:
            raise ValueError(f"{name} is no matrix")
        if raw[name].dtype == np.int8:
            value *= raw[f"{name}.scale"].reshape((-1, 1) if name.endswith(".a") else (1, -1))
    return arrays


def _grouped(arrays: dict[str, Floats], scale: float) -> dict[str, Floats]:
    """`x A B` of each product of the graph, the scale in B."""
    parameters = {}
    for layer in sorted({name.rpartition(".")[0].rpartition(".")[0] for name in arrays}):
        for group, names in GROUPS.items():
            if not any(f"{layer}.{name}.a" in arrays for name in names):
                continue
            pairs = [(arrays.pop(f"{layer}.{name}.a"), arrays.pop(f"{layer}.{name}.b")) for name in names]
            if any(a.shape[0] != b.shape[1] for a, b in pairs):
                raise ValueError(f"the ranks in {group} of {layer} do not agree")
            joined = np.zeros((sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs)), np.float32)
            rank = row = 0
            for a, b in pairs:
                joined[rank : rank + len(a), row : row + len(b)] = scale * b.T
                rank, row = rank + len(a), row + len(b)
            target = layer.replace("layers.", "blk.", 1) + "." + group
            parameters[f"{target}.a"] = np.ascontiguousarray(np.concatenate([a for a, _ in pairs]).T)
            parameters[f"{target}.b"] = joined
    if arrays or not parameters:
        raise ValueError(f"it has {next(iter(arrays))}, which no layer has" if arrays else "it is empty")
    return parameters
