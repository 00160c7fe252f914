"""A Q/DQ graph as it is fastest on CPUs, in the form that TensorRT takes: the same numbers.

Activations that count as uint8 from 128 count as int8 from 0, and an INT32 bias behind a DequantizeLinear becomes a
float constant. Devices have no `onnx` package: this names the few fields of onnx.proto (their numbers never change) to
protobuf, which onnxruntime brings; protobuf keeps all others as they are. Graphs inside If and Loop are left alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from edge_agent.errors import Refused

_INT32, _MANY = 6, "*"
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", _INT32: "int32", 10: "float16"}
_FIELDS = {
    "Model": {"graph": (7, "Graph")},
    "Graph": {"node": (1, "Node*"), "initializer": (5, "Tensor*")},
    "Node": {"input": (1, "string*"), "output": (2, "string*"), "op_type": (4, "string")},
    "Tensor": {
        "dims": (1, "int64*"), "data_type": (2, "int32"), "float_data": (4, "float*"), "int32_data": (5, "int32*"),
        "name": (8, "string"), "raw_data": (9, "bytes"),
    },
}  # fmt: skip
_KINDS = {"float": 2, "int64": 3, "int32": 5, "string": 9, "message": 11, "bytes": 12}


def for_tensorrt(model: bytes) -> bytes:
    """The model in TensorRT's form; what has no Q/DQ comes back as it is. Raises Refused when it is no ONNX model."""
    if b"QuantizeLinear" not in model:
        return model
    try:
        onnx = _message("Model").FromString(model)
    except DecodeError as error:
        raise Refused(f"this is no ONNX model: {error}", "cut short? fetch it again") from error
    graph = onnx.graph
    weights = {weight.name: weight for weight in graph.initializer}
    points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    for name in points & weights.keys():
        if _DTYPES.get(weights[name].data_type) == "uint8":
            _fill(weights[name], (_array(weights[name]).astype(np.int16) - 128).astype(np.int8))
    for node in [node for node in graph.node if node.op_type == "DequantizeLinear"]:
        bias, scale = weights.get(node.input[0]), weights.get(node.input[1])
        if bias is not None and scale is not None and bias.data_type == _INT32:
            factor = _array(scale)
            made = graph.initializer.add(name=node.output[0])
            made.dims.extend(bias.dims)
            _fill(made, (_array(bias) * factor).astype(factor.dtype))
            graph.node.remove(node)
    return bytes(onnx.SerializeToString())


def _array(tensor: Any) -> np.ndarray:
    dtype = np.dtype(_DTYPES[tensor.data_type])
    if tensor.raw_data:
        return np.frombuffer(tensor.raw_data, dtype)
    numbers = np.array(tensor.float_data or tensor.int32_data)
    return numbers.astype(np.uint16).view(dtype) if dtype == np.float16 else numbers.astype(dtype)


def _fill(tensor: Any, values: np.ndarray) -> None:
    tensor.data_type = next(number for number, name in _DTYPES.items() if name == values.dtype.name)
    tensor.ClearField("float_data")
    tensor.ClearField("int32_data")
    tensor.raw_data = values.tobytes()


@cache
def _message(name: str) -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="outrider/onnx.proto", package="outrider.onnx", syntax="proto2")
    for message, fields in _FIELDS.items():
        made = file.message_type.add(name=message)
        for field, (number, kind) in fields.items():
            label, kind = (3, kind[:-1]) if kind.endswith(_MANY) else (1, kind)
            known = _KINDS.get(kind, _KINDS["message"])
            about = made.field.add(name=field, number=number, label=label, type=known)
            if kind not in _KINDS:
                about.type_name = f".outrider.onnx.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)  # type: ignore[no-untyped-call,unused-ignore]
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"outrider.onnx.{name}"))
