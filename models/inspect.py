"""What an ONNX file is, and which runtime takes which of its ops.

Invariants: a file is read once and never run; what this returns is plain data. For ONNX Runtime the answer is the
runtime's own: it loads the graph, and only where it refuses are its kernels searched for the reason. For TensorRT it
is a table of ops that its ONNX parser documents as not supported (onnx-tensorrt, docs/operators.md) and of the types
that it documents for Q/DQ; an op that the table does not name may still be refused when the engine is built.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import numpy as np
import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError
from onnx import helper

from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.errors import OutriderError
from models.errors import ModelError

MAX_BYTES = 2 << 30
_EXPORT = "export the model again, or copy the whole file again"
_STANDARD = ("", "ai.onnx")
# fmt: off
_NOT_IN_TENSORRT = frozenset([
    "BitShift", "Compress", "ConcatFromSequence", "ConvInteger", "Det", "DynamicQuantizeLinear", "MatMulInteger",
    "MaxRoiPool", "MaxUnpool", "Multinomial", "NegativeLogLikelihoodLoss", "QLinearConv", "QLinearMatMul",
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringNormalizer", "TfIdfVectorizer",
])
# fmt: on


def load(path: Path) -> onnx.ModelProto:
    """A checked model with its weights. Raises ModelError: no file, not a model, cut short, an opset not known here."""
    try:
        if not 0 < path.stat().st_size <= MAX_BYTES:
            raise ModelError(f"{path} has {path.stat().st_size} bytes", f"1 to {MAX_BYTES}; {_EXPORT}")
        model = onnx.load(str(path))
    except OSError as error:
        raise ModelError(
            f"{path} cannot be read: {error.strerror or error}", "give the path of an .onnx file"
        ) from error
    except (DecodeError, ValueError, onnx.checker.ValidationError) as error:
        raise ModelError(f"{path.name} is not an ONNX model, or it is cut short", _EXPORT) from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path.name} is not an ONNX model: it has no nodes or no opset", _EXPORT)
    version, newest = opset(model), onnx.defs.onnx_opset_version()
    if not 1 <= version <= newest:
        hint = f"export it with opset {newest} or lower, or update the onnx package"
        raise ModelError(f"{path.name} has opset {version}; this onnx {onnx.__version__} knows 1 to {newest}", hint)
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ModelError(f"{path.name} is not a valid ONNX model: {reason}", _EXPORT) from error
    return model


def opset(model: onnx.ModelProto) -> int:
    """The version of the standard operator set; 0 when the model names none."""
    return next((int(o.version) for o in model.opset_import if o.domain in _STANDARD), 0)


def inspect(path: Path) -> dict[str, Any]:
    """What the file declares, its op counts and what the runtimes say. Raises ModelError as `load` does."""
    model = load(path)
    nodes = all_nodes(model.graph)
    domains = {"", "ai.onnx"} | {node.domain for node in nodes}
    weights = {w.name: math.prod(w.dims) for w in model.graph.initializer}
    inputs = [described(v) for v in model.graph.input if v.name not in weights]
    return {
        "file": str(path),
        "bytes": path.stat().st_size,
        "opset": {o.domain or "ai.onnx": int(o.version) for o in model.opset_import if o.domain in domains},
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": inputs,
        "outputs": [described(v) for v in model.graph.output],
        "dynamic": sorted({str(d) for v in inputs for d in v["shape"] if not isinstance(d, int)}),
        "parameters": sum(weights.values()),
        "weights": dict(Counter(_dtype(w.data_type) for w in model.graph.initializer).most_common()),
        "ops": dict(Counter(_op(node) for node in nodes).most_common()),
        "runtimes": {"onnxruntime": _onnxruntime(path, model, nodes), "tensorrt": _tensorrt(model, nodes)},
    }


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a graph and of the graphs inside its control flow."""
    found = []
    for node in graph.node:
        found.append(node)
        for attribute in node.attribute:
            for inner in [attribute.g] * attribute.HasField("g") + list(attribute.graphs):
                found += all_nodes(inner)
    return found


def _op(node: onnx.NodeProto) -> str:
    return str(node.op_type if node.domain in _STANDARD else f"{node.domain}.{node.op_type}")


def _dtype(code: int) -> str:
    return str(helper.tensor_dtype_to_np_dtype(code).name) if code else "unknown"


def described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    """Name, dtype and shape; a free dimension is its name, or `?`."""
    tensor = value.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    return {"name": value.name, "dtype": _dtype(tensor.elem_type), "shape": shape}


def _onnxruntime(path: Path, model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> dict[str, Any]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    answer = {"runtime": f"onnxruntime {ort.__version__}, CPUExecutionProvider", "takes": True, "refused": []}
    try:
        ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - the runtime's exceptions share no base but Exception
        why = str(error).splitlines()[0][:300]
        missing = _without_kernel(model, nodes)
        refused = [{"op": op, "nodes": n, "why": reason} for (op, reason), n in missing.items()]
        return answer | {"takes": False, "refused": refused or [{"op": "", "nodes": 0, "why": why}]}
    return answer


def _without_kernel(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> Counter[tuple[str, str]]:
    """(op, reason) → nodes, for ops that have neither a CPU kernel of the model's opset nor a decomposition."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    versions = {o.domain if o.domain not in _STANDARD else "": int(o.version) for o in model.opset_import}
    kernels: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in state.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider":
            domain = "" if kernel.domain in _STANDARD else kernel.domain
            kernels.setdefault((domain, kernel.op_name), []).append(kernel.version_range)
    missing: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        domain = "" if node.domain in _STANDARD else node.domain
        ranges, version = kernels.get((domain, node.op_type), []), versions.get(domain, 0)
        known = onnx.defs.has(node.op_type, version, domain) if version else False
        if any(first <= version <= last for first, last in ranges):
            continue
        if known and onnx.defs.get_schema(node.op_type, version, domain).has_function:
            continue
        reason = (
            f"no CPU kernel at opset {version}"
            if ranges
            else f"the provider has no op of domain {domain or 'ai.onnx'!r} by this name"
        )
        missing[_op(node), reason] += 1
    return missing


def _tensorrt(model: onnx.ModelProto, nodes: list[onnx.NodeProto]) -> dict[str, Any]:
    refused: Counter[tuple[str, str]] = Counter()
    points = {w.name: onnx.numpy_helper.to_array(w) for w in model.graph.initializer if w.data_type in (2, 3)}
    for node in nodes:
        if node.domain not in _STANDARD:
            refused[_op(node), "not a standard op"] += 1
        elif node.op_type in _NOT_IN_TENSORRT:
            refused[_op(node), "its ONNX parser has no such op"] += 1
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and len(node.input) > 2:
            point = points.get(node.input[2])
            if point is not None and (point.dtype != np.int8 or point.any()):
                refused[_op(node), "Q/DQ must be int8 with zero points of 0: quantize with --activations int8"] += 1
    rows = [{"op": op, "nodes": n, "why": why} for (op, why), n in refused.items()]
    return {"runtime": "TensorRT, by its documented ops", "takes": not rows, "refused": rows}


def network(path: Path, **options: Any) -> OnnxNetwork:
    """The serving engine on a model. Raises ModelError."""
    try:
        return OnnxNetwork(path, **options)
    except OutriderError as error:
        raise ModelError(f"{path.name} does not run: {error.message}", error.hint) from error
