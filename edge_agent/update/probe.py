"""Golden probes: what a bundle's manifest says a good model answers.

    onnx  {"file": "probe.msgpack", "rtol": …, "atol": …}   the file: msgpack {"inputs": {name: Tensor}, "outputs": …}
    llm   {"prompt": …, "text": …, "max_tokens": n}          greedy text of a good model, compared from its beginning

Invariant: standard library only, so the daemon can compare while the worker computes. A bundle without a probe is
loaded and no more.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from operator import eq, mul
from typing import Any, NamedTuple

import msgspec

from edge_agent.engines.base import Generate, Piece, bundle_path
from edge_agent.errors import Refused
from edge_agent.update.slots import Installed
from edge_agent.wire.tensor import Tensor

_CODES = {"float32": "f", "float64": "d", "int8": "b", "uint8": "B", "int32": "i", "int64": "q", "bool": "?"}
_COMPARED = 1 << 15


class _Float(NamedTuple):
    itemsize: int
    read: Callable[[bytes], Sequence[float]]


_FLOATS = {
    "float16": _Float(2, lambda data: struct.unpack(f"{len(data) // 2}e", data)),  # a view of it needs Python 3.12
    "float32": _Float(4, lambda data: memoryview(data).cast("f")),
    "float64": _Float(8, lambda data: memoryview(data).cast("d")),
}


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


def agreement(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> float:
    """How alike two answers are, 0 to 1: the least alike output counts, by the cosine of the two.

    Whole numbers by the share that is equal, single numbers by 1 % of their size; at most _COMPARED values an output.
    """
    return min((_alike(tensor, new.get(name)) for name, tensor in old.items()), default=0.0)


def _alike(old: Tensor, new: Tensor | None) -> float:
    if new is None or (old.dtype, old.shape) != (new.dtype, new.shape):
        return 0.0
    if old.dtype not in _FLOATS or not old.data:
        return sum(map(eq, old.data[:_COMPARED], new.data)) / len(old.data[:_COMPARED]) if old.data else 1.0
    count = len(old.data) // _FLOATS[old.dtype].itemsize
    a, b = (_FLOATS[old.dtype].read(tensor.data)[:: max(1, -(-count // _COMPARED))] for tensor in (old, new))
    if not all(map(math.isfinite, (*a, *b))):
        return float(old.data == new.data)
    if len(a) <= 1:
        return float(all(abs(y - x) <= 0.01 * abs(x) + 1e-6 for x, y in zip(a, b, strict=True)))
    dot, sizes = sum(map(mul, a, b)), math.sqrt(sum(map(mul, a, a)) * sum(map(mul, b, b)))
    return float(list(a) == list(b)) if sizes == 0 else min(1.0, max(0.0, dot / sizes))


def shown(inputs: Mapping[str, Tensor], values: int = 24) -> str:
    """Inputs in a line: what they are, their first values, a hash of all."""
    parts = []
    for name, tensor in inputs.items():
        first = ""
        if tensor.dtype in _CODES:
            first = ", ".join(f"{value:.6g}" for value in _numbers(tensor)[:values])
        digest = hashlib.sha256(tensor.data).hexdigest()[:16]
        parts.append(f"{name} {tensor.dtype}{tensor.shape} [{first}, …] sha256 {digest}")
    return "; ".join(parts)


def said_alike(old: Piece, new: Piece) -> float:
    """Whether two language models answer a request alike: the same calls, else the same words."""
    if old.calls is not None and new.calls is not None:
        return float(old.calls == new.calls)
    return float(old.text.split() == new.text.split())


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
