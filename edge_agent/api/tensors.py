"""Requests and responses of the Open Inference Protocol v2 (REST) with the binary tensor data extension, as tensors.

Invariants: pure; what is wrong is Refused with what to send instead; JSON becomes numbers only as far as MAX_JSON, as
they take many times its size; numbers that JSON cannot carry (NaN, infinities) are refused, never written as null.
Binary data is little-endian, in C order, in the order of the tensors it belongs to.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any, cast

import msgspec

from edge_agent.errors import Refused
from edge_agent.serving.schedule import LOWEST
from edge_agent.wire.tensor import Tensor

MAX_JSON = 16 * 1024 * 1024
MAX_DIMENSIONS = 32
LENGTH = "Inference-Header-Content-Length"
_TYPES: dict[str, tuple[str, str, type]] = {
    "BOOL": ("bool", "?", bool), "FP16": ("float16", "e", float), "FP32": ("float32", "f", float),
    "FP64": ("float64", "d", float), "INT8": ("int8", "b", int), "INT16": ("int16", "h", int),
    "INT32": ("int32", "i", int), "INT64": ("int64", "q", int), "UINT8": ("uint8", "B", int),
    "UINT16": ("uint16", "H", int), "UINT32": ("uint32", "I", int), "UINT64": ("uint64", "Q", int),
}  # fmt: skip
DATATYPES = {dtype: datatype for datatype, (dtype, _, _) in _TYPES.items()}
NORMAL, WITHIN_S = 2, 60.0
_UNKNOWN = ("shared_memory_region", "classification", "sequence_id")
_NESTED = re.compile(rb"\s*\[\s*\[")


class Output(msgspec.Struct, frozen=True):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] = {}


class _Input(msgspec.Struct, frozen=True):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, Any] = {}
    data: msgspec.Raw = msgspec.Raw()


class _Request(msgspec.Struct, frozen=True):
    inputs: list[_Input]
    outputs: list[Output] = []
    id: str = ""
    parameters: dict[str, Any] = {}


class Asked(msgspec.Struct, frozen=True):
    """A request: the inputs, the outputs that are asked for (none: all of them), whether they come as binary data.

    `priority` is the serving class, 0 (first) to 3; `within_s` is how long it may take.
    """

    inputs: dict[str, Tensor]
    outputs: list[Output]
    id: str
    binary: bool
    priority: int = NORMAL
    within_s: float = WITHIN_S


def json_length(size: int, header: str | None) -> int:
    """How much of a body of `size` bytes is JSON, by its header (None: all of it). Raises Refused."""
    length = size if header is None else int(header) if header.isdecimal() and len(header) < 20 else -1
    if not 0 < length <= size:
        raise Refused(f"the JSON cannot be {header} of {size} bytes", f"give the length of the JSON in {LENGTH}")
    if length > MAX_JSON:
        raise Refused(f"{length} bytes of JSON, at most {MAX_JSON}", "send the tensors as binary data")
    return length


def parse(body: bytes | bytearray, length: int) -> Asked:
    """Read a request whose first `length` bytes are JSON. Raises Refused."""
    view = memoryview(body)
    try:
        request = msgspec.json.decode(view[:length], type=_Request)
    except (msgspec.DecodeError, RecursionError) as error:
        hint = "inputs with name, datatype, shape, data; NaN and infinity go as binary data, JSON has none"
        raise Refused(f"the request cannot be read: {error}", hint) from error
    inputs: dict[str, Tensor] = {}
    at = length
    for given in request.inputs:
        if given.name in inputs:
            raise Refused(f"the input {given.name} is given twice", "each input once")
        size = given.parameters.get("binary_data_size")
        if size is not None and (not isinstance(size, int) or not 0 <= size <= len(body) - at):
            left = f"{len(body) - at} bytes are left in the body"
            raise Refused(f"binary_data_size of {given.name} is {size!r}, {left}", "send all of its data")
        data = None if size is None else cast(bytes, view[at : at + size])
        inputs[given.name] = _tensor(given, data)
        at += size or 0
    if at != len(body):
        raise Refused(f"{len(body) - at} bytes are left over", f"mend binary_data_size or {LENGTH}")
    for parameters in [request.parameters, *(output.parameters for output in request.outputs)]:
        _known(parameters)
    binary = request.parameters.get("binary_data_output") is True
    return Asked(inputs, request.outputs, request.id, binary, *_urgency(request.parameters))


def _urgency(parameters: Mapping[str, Any]) -> tuple[int, float]:
    """Class and seconds, of Triton's `priority` (1 is first, 0 the default) and `timeout` (microseconds, 0: none)."""
    priority, timeout = parameters.get("priority", 0), parameters.get("timeout", 0)
    for name, value in (("priority", priority), ("timeout", timeout)):
        if not isinstance(value, int) or value < 0:
            raise Refused(f"the parameter {name} is {value!r}", "give a whole number, not below 0")
    return min(priority - 1, LOWEST) if priority else NORMAL, min(timeout / 1e6, WITHIN_S) if timeout else WITHIN_S


def _known(parameters: Mapping[str, Any]) -> None:
    for name in _UNKNOWN:
        if parameters.get(name):
            raise Refused(f"the parameter {name} is not supported", "leave it out")


def _tensor(given: _Input, data: bytes | None) -> Tensor:
    _known(given.parameters)
    name, shape = given.name, given.shape
    if given.datatype not in _TYPES:
        raise Refused(f"{name}: the datatype {given.datatype!r} is not supported", f"one of {', '.join(_TYPES)}")
    if len(shape) > MAX_DIMENSIONS or any(dim < 0 for dim in shape):
        raise Refused(f"{name}: the shape {shape[:MAX_DIMENSIONS]} is no shape", "dimensions from 0 up")
    dtype, code, _ = _TYPES[given.datatype]
    count = math.prod(shape)
    if data is None:
        data = _packed(given, count)
    elif len(data) != (size := count * struct.calcsize(code)):
        what = f"{given.datatype} of shape {shape}"
        raise Refused(f"{name}: binary_data_size is {len(data)}, {what} has {size} bytes", "mend data or shape")
    return Tensor(dtype, shape, data)


def _packed(given: _Input, count: int) -> bytes:
    """The bytes of JSON data, which is flat or nested as the shape says."""
    raw, name, shape = bytes(given.data), given.name, given.shape
    if not raw:
        raise Refused(f"{name} has no data", "give it `data`, or binary_data_size and binary data behind the JSON")
    _, code, kind = _TYPES[given.datatype]
    nested = _NESTED.match(raw) is not None
    try:
        values = [msgspec.json.decode(raw, type=_lists(kind, len(shape) if nested else 1))]
        for dim in shape if nested else [count]:
            if any(len(row) != dim for row in values):
                raise Refused(f"{name}: the data does not fit the shape {shape}", f"it has {count} values, row by row")
            values = list(itertools.chain.from_iterable(values))
        return struct.pack(f"<{count}{code}", *values)
    except (msgspec.DecodeError, RecursionError, struct.error, OverflowError) as error:
        raise Refused(f"{name}: the data is not {given.datatype}: {error}", "mend the data or the datatype") from error


@functools.cache
def _lists(kind: type, depth: int) -> Any:
    return kind if depth == 0 else list[_lists(kind, depth - 1)]  # type: ignore[misc]


def chosen(outputs: Sequence[Output], names: Sequence[str]) -> list[Output]:
    """The outputs that are asked for, of those there are. Raises Refused for another."""
    for output in outputs:
        if output.name not in names:
            raise Refused(f"there is no output {output.name}", f"the outputs are {', '.join(names)}")
    return list(outputs) or [Output(name) for name in names]


def respond(about: Mapping[str, str], asked: Asked, tensors: Mapping[str, Tensor]) -> tuple[list[bytes], int | None]:
    """The body of a response in pieces, and the length of its JSON when binary data follows. Raises Refused."""
    outputs: list[dict[str, Any]] = []
    binary: list[bytes] = []
    room = MAX_JSON
    for output in chosen(asked.outputs, list(tensors)):
        tensor = tensors[output.name]
        shown: dict[str, Any] = {"name": output.name, "datatype": DATATYPES[tensor.dtype], "shape": tensor.shape}
        if output.parameters.get("binary_data", asked.binary):
            shown["parameters"] = {"binary_data_size": len(tensor.data)}
            binary.append(tensor.data)
        else:
            room -= len(tensor.data)
            if room < 0:
                raise Refused(f"the outputs are larger than {MAX_JSON} bytes", "ask for binary_data")
            shown["data"] = _values(output.name, tensor)
        outputs.append(shown)
    text = msgspec.json.encode({**about, **({"id": asked.id} if asked.id else {}), "outputs": outputs})
    return [text, *binary], len(text) if binary else None


def _values(name: str, tensor: Tensor) -> tuple[Any, ...]:
    _, code, kind = _TYPES[DATATYPES[tensor.dtype]]
    values = struct.unpack(f"<{len(tensor.data) // struct.calcsize(code)}{code}", tensor.data)
    if kind is float and not all(map(math.isfinite, values)):
        raise Refused(f"the output {name} has NaN or infinity, which JSON cannot carry", "ask for binary_data")
    return values
