"""Golden probes: what a bundle's manifest says a good model answers.

    onnx  {"file": "probe.msgpack", "rtol": …, "atol": …}   the file: msgpack {"inputs": {name: Tensor}, "outputs": …}
    llm   {"prompt": …, "text": …, "max_tokens": n}          greedy text of a good model, compared from its beginning

Invariant: standard library only, so the daemon can compare while the worker computes. A bundle without a probe is
loaded and no more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from edge_agent.engines.base import Generate, bundle_path
from edge_agent.errors import Refused
from edge_agent.update.slots import Installed
from edge_agent.wire.tensor import Tensor

_CODES = {"float32": "f", "float64": "d", "int8": "b", "uint8": "B", "int32": "i", "int64": "q", "bool": "?"}


class Golden(msgspec.Struct, frozen=True):
    """Inputs of a network and the outputs a good one gives."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def golden(candidate: Installed) -> Golden | None:
    """The tensors of a network's probe; None when the bundle has none. Raises Refused when they cannot be read."""
    name = candidate.manifest.probe.get("file")
    if name is None:
        return None
    try:
        return msgspec.msgpack.decode(bundle_path(candidate.folder, str(name)).read_bytes(), type=Golden)
    except (OSError, ValueError) as error:
        raise Refused(f"the probe of {candidate.manifest.name} cannot be read: {error}") from error


def compare(probe: Mapping[str, Any], expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raises Refused where an output differs by more than atol + rtol * |expected|, naming it."""
    rtol, atol = float(probe.get("rtol", 1e-3)), float(probe.get("atol", 1e-3))
    for name, want in expected.items():
        have = found.get(name)
        if have is None or (have.dtype, have.shape) != (want.dtype, want.shape):
            what = "is missing" if have is None else f"is {have.dtype}{have.shape}, not {want.dtype}{want.shape}"
            raise Refused(f"probe: output {name} {what}")
        if want.dtype not in _CODES:
            raise Refused(f"probe: output {name} is {want.dtype}, which no probe compares")
        pairs = zip(_numbers(have), _numbers(want), strict=True)
        worst = max((_excess(a, b, rtol, atol) for a, b in pairs), default=0.0)
        if worst > 0:
            raise Refused(f"probe: output {name} is {worst:g} beyond its tolerance", "the model or its engine is worse")


def prompt(candidate: Installed) -> Generate | None:
    """The request of a language model's probe; None when the bundle has none."""
    probe = candidate.manifest.probe
    if "prompt" not in probe:
        return None
    return Generate(prefix="", prompt=str(probe["prompt"]), max_tokens=int(probe.get("max_tokens", 8)))


def compare_text(probe: Mapping[str, Any], found: str) -> None:
    """Raises Refused when the answer does not begin as the golden one."""
    want = str(probe.get("text", ""))
    if not found.startswith(want):
        raise Refused(f"probe: the model says {found[:80]!r}, a good one {want[:80]!r}")


def _numbers(tensor: Tensor) -> memoryview:
    return memoryview(tensor.data).cast(_CODES[tensor.dtype])  # type: ignore[call-overload, no-any-return]


def _excess(found: float, want: float, rtol: float, atol: float) -> float:
    if math.isnan(found) or math.isnan(want):
        return 0.0 if math.isnan(found) and math.isnan(want) else math.inf
    return 0.0 if found == want else abs(found - want) - (atol + rtol * abs(want))
