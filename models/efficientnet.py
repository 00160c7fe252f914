"""EfficientNet-Lite0 as an ONNX graph, from the weights of its PyTorch package.

Invariants: PyTorch is not needed and nothing in the file is run: its pickle may name tensors of float32 and int64 and
ordered dictionaries, no more. Batch normalization is folded into the convolutions. The graph takes `x`
(batch, 3, 224, 224) float32, (pixel - 127) / 128, and gives `scores` (batch, 1000) of the ImageNet classes.
Sources: Tan and Le 2019, arXiv:1905.11946; the Lite variant has ReLU6 and no squeeze-and-excitation.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.errors import ModelError
from models.fetch import Progress, quiet

BLOCKS = ((1, 1, 16), (2, 2, 24), (2, 2, 40), (3, 2, 80), (3, 1, 112), (4, 2, 192), (1, 1, 320))
"""(repeats, stride of the first, channels out)."""
EPSILON = 1e-3
_MAX = 64 << 20
_DTYPES = {"FloatStorage": "<f4", "LongStorage": "<i8"}


def make(source: Path, target: Path, _: Progress = quiet) -> Path:
    """Write the graph of a weight file. Raises ModelError when it is another file."""
    try:
        weights = read(source.read_bytes())
        model = _graph(weights)
    except (LookupError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ModelError(f"{source.name} holds no EfficientNet-Lite0 weights: {error}") from error
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return target


def read(data: bytes) -> dict[str, NDArray[Any]]:
    """Tensors by name of a file that PyTorch wrote before 1.6: five pickles, then the storages in the listed order."""
    stream = io.BytesIO(data[:_MAX])
    for _ in range(3):  # magic number, protocol, sizes of the writing machine
        _Limited(stream).load()
    reader = _Limited(stream)
    tensors, keys = reader.load(), _Limited(stream).load()
    for key in keys:
        dtype, count = reader.storages[key]
        if int.from_bytes(stream.read(8), "little") != count:
            raise ValueError("a storage has another length than its tensor")
        reader.values[key] = np.frombuffer(stream.read(count * np.dtype(dtype).itemsize), dtype)
    return {name: tensor.of(reader.values[tensor.key]) for name, tensor in tensors.items()}


class _Tensor:
    """A tensor before its storage is read; offset and strides count values."""

    def __init__(self, key: str, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any) -> None:
        self.key, self.offset, self.shape, self.strides = key, offset, shape, strides

    def of(self, storage: NDArray[Any]) -> NDArray[Any]:
        places = np.array(self.offset)
        for size, stride in zip(self.shape, self.strides, strict=True):
            places = places[..., None] + np.arange(size) * stride
        return np.asarray(storage[places])  # an index past the storage is an IndexError


class _Limited(pickle.Unpickler):
    """Builds tensors and ordered dictionaries only."""

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self.storages: dict[str, tuple[str, int]] = {}
        self.values: dict[str, NDArray[Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Tensor
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> str:
        _, dtype, key, _, count, *_ = pid
        self.storages[key] = (dtype, count)
        return str(key)


def _graph(weights: dict[str, NDArray[Any]]) -> onnx.ModelProto:
    nodes: list[onnx.NodeProto] = []
    kept: list[onnx.TensorProto] = [numpy_helper.from_array(np.float32(v), n) for n, v in (("low", 0), ("high", 6))]

    def add(op: str, inputs: list[str], **attributes: Any) -> str:
        name = f"{op}_{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [name], name, **attributes))
        return name

    def convolve(x: str, layer: str, norm: str, stride: int = 1, clip: bool = True) -> str:
        w = weights[f"{layer}.weight"]
        gamma, beta, mean, var = (weights[f"{norm}.{p}"] for p in ("weight", "bias", "running_mean", "running_var"))
        scale = gamma / np.sqrt(var + EPSILON)
        for suffix, value in ((".w", w * scale[:, None, None, None]), (".b", beta - mean * scale)):
            kept.append(numpy_helper.from_array(value.astype(np.float32), layer + suffix))
        group = w.shape[0] if "depthwise" in layer else 1
        out = add("Conv", [x, f"{layer}.w", f"{layer}.b"], group=group, strides=[stride] * 2, auto_pad="SAME_UPPER")
        return add("Clip", [out, "low", "high"]) if clip else out

    x, number, channels = convolve("x", "_conv_stem", "_bn0", 2), 0, 32
    for repeats, first, out in BLOCKS:
        for repeat in range(repeats):
            block, stride, before = f"_blocks.{number}", first if repeat == 0 else 1, x
            if f"{block}._expand_conv.weight" in weights:
                x = convolve(x, f"{block}._expand_conv", f"{block}._bn0")
            x = convolve(x, f"{block}._depthwise_conv", f"{block}._bn1", stride)
            x = convolve(x, f"{block}._project_conv", f"{block}._bn2", clip=False)
            if stride == 1 and channels == out:
                x = add("Add", [x, before])
            number, channels = number + 1, out
    x = add("Flatten", [add("GlobalAveragePool", [convolve(x, "_conv_head", "_bn1")])])
    kept += [numpy_helper.from_array(weights[f"_fc.{p}"].copy(), f"_fc.{p}") for p in ("weight", "bias")]
    nodes.append(helper.make_node("Gemm", [x, "_fc.weight", "_fc.bias"], ["scores"], "classes", transB=1))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 224, 224])]
    outputs = [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 1000])]
    graph = helper.make_graph(nodes, "efficientnet-lite0", inputs, outputs, kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
