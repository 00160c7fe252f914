"""FP16 and INT8 forms of an ONNX network, and which layers an altered form hurts.

Invariants: precision is decided in the graph, never by a builder's flag. INT8 is Q/DQ, symmetric, per channel, with
ranges measured on calibration data: without data there is no INT8, and no input is ever made up. FP16 keeps in FP32
each node with a weight, or with data given an activation, past FP16's range. Inputs and outputs keep their types. A
file appears under its name only when complete. The work is done by onnxslim and onnxruntime's own tools.

INT8 activations are written as int8 with zero point 0, or as uint8 with zero point 128: the same numbers, shifted.
TensorRT takes the first only. ONNX Runtime's CPU kernels are made for the second; it shifts by itself only where a
tensor has one reader, and computes the other layers in FP32.
"""

from __future__ import annotations

import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper, version_converter

from edge_agent.wire import durable
from models.errors import ModelError
from models.inspect import inspect, load, opset
from models.metrics import relative_error

Feeds = dict[str, NDArray[Any]]
METHODS = ("minmax", "entropy", "percentile")
OPS = ("Conv", "MatMul", "Gemm")
MIN_OPSET, OPSET = 13, 20  # per-channel Q/DQ begins at 13; at 20 GELU is one op
MAX_FEEDS, HISTOGRAM_FEEDS, COMPARED_FEEDS = 2000, 16, 4  # histograms and comparisons hold every activation in memory
FORM = "a folder of .npz files (each {input: array}), or one .npz with samples along each array's first axis"
FP16_MAX = float(np.finfo(np.float16).max)


def feeds(path: Path | None, model: Path) -> list[Feeds]:
    """Calibration inputs from .npz files, see `samples`. Raises ModelError: none given, or not what the model takes."""
    if path is None:
        raise ModelError("INT8 needs calibration data: real inputs of the model", f"--calibration: {FORM}")
    loaded = samples(path, "calibration data")[:MAX_FEEDS]
    declared = {value["name"]: value for value in inspect(model)["inputs"]}
    for feed in loaded:
        check(feed, declared)
    return loaded


def samples(path: Path, what: str) -> list[Feeds]:
    """The samples in a folder of .npz files, or in one whose arrays' first axis is the samples. Raises ModelError."""
    try:
        loaded = [_arrays(file) for file in (sorted(path.glob("*.npz")) if path.is_dir() else [path])]
    except (OSError, ValueError, BadZipFile) as error:
        raise ModelError(f"{path} has no {what}: {error}", FORM) from error
    if not path.is_dir():
        whole = loaded[0]
        count = min((len(a) if a.ndim else 0 for a in whole.values()), default=0)
        loaded = [{name: a[i : i + 1] for name, a in whole.items()} for i in range(count)]
    if not loaded:
        raise ModelError(f"{path} has no {what}", FORM)
    return loaded


def _arrays(file: Path) -> Feeds:
    with np.load(file, allow_pickle=False) as archive:
        if not hasattr(archive, "files"):
            raise ValueError(f"{file.name} is no .npz file")
        return {name: archive[name] for name in archive.files}


def check(feed: Feeds, declared: dict[str, dict[str, Any]], what: str = "calibration data") -> None:
    """Raises ModelError for inputs that the model does not take."""
    for name in declared.keys() | feed.keys():
        want, have = declared.get(name), feed.get(name)
        if want is None or have is None:
            raise ModelError(f"{what} has {sorted(feed)}", f"the model takes {sorted(declared)}")
        fits = have.ndim == len(want["shape"]) and all(
            w == h for w, h in zip(want["shape"], have.shape, strict=True) if isinstance(w, int)
        )
        if have.dtype.name != want["dtype"] or not fits or not have.size:
            raise ModelError(
                f"{what}: {name} is {have.dtype}{list(have.shape)}",
                f"the model takes {want['dtype']}{want['shape']}",
            )
        if have.dtype.kind == "f" and not np.isfinite(have).all():
            raise ModelError(f"{what}: {name} has NaN or infinite values", "remove these samples")


def simplify(source: Path, target: Path) -> Path:
    """Constants folded, normalizations merged, every node named, the opset raised to OPSET. Raises ModelError."""
    model = load(source)
    with _tools(f"{source.name} cannot be simplified"):
        if opset(model) < OPSET:
            model = version_converter.convert_version(model, OPSET)
        import onnxslim

        model = onnxslim.slim(model)
        for index, node in enumerate(model.graph.node):
            node.name = node.name or f"{node.op_type}_{index}"
    return _save(model, target)


def to_fp16(source: Path, target: Path, data: Sequence[Feeds] = (), keep: Sequence[str] = ()) -> dict[str, Any]:
    """Write the FP16 form. Returns which nodes stay in FP32 and why: {node: reason}. Raises ModelError."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    model = load(source)
    kept = dict.fromkeys(_kept(model, keep), "asked for")
    floats = [w for w in model.graph.initializer if w.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE)]
    largest = {w.name: float(np.abs(numpy_helper.to_array(w)).max(initial=0)) for w in floats}
    for found in _activations(model, data[:MAX_FEEDS], lambda a: float(np.abs(a).max(initial=0))):
        for name, value in found.items():
            largest[name] = max(largest.get(name, 0.0), value)
    for node in model.graph.node:
        for name in [*node.input, *node.output]:
            if not largest.get(name, 0.0) <= FP16_MAX:
                kept.setdefault(node.name, f"{name} reaches {largest[name]:.3g}, FP16 ends at {FP16_MAX:.0f}")
    with _tools(f"{source.name} cannot be converted to FP16"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # tiny weights become the smallest FP16 number: meant so
        model = convert_float_to_float16(model, keep_io_types=True, node_block_list=list(kept))
        _join_kept(model.graph)
        sorted_model = OnnxModel(model)
        sorted_model.topological_sort()
        model = sorted_model.model
    _save(model, target)
    return {"kept": kept, "checked": "weights and activations" if data else "weights"}


def _join_kept(graph: onnx.GraphProto) -> None:
    """Between two nodes kept in FP32 the converter casts to FP16 and back, which loses what they are kept for."""
    casts = {n.output[0]: (n.input[0], n.attribute[0].i) for n in graph.node if n.op_type == "Cast"}
    back = {}
    for name, (source, to) in casts.items():
        before = casts.get(source)
        if to == onnx.TensorProto.FLOAT and before and before[1] == onnx.TensorProto.FLOAT16:
            back[name] = before[0]
    given = {value.name for value in graph.output}
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = back.get(name, name)
        if node.output and node.output[0] in back and node.output[0] in given:
            node.input[0], node.op_type = back[node.output[0]], "Identity"
            del node.attribute[:]
    for _ in ("back", "there"):
        read = {name for node in graph.node for name in node.input} | given
        for node in [node for node in graph.node if node.op_type == "Cast" and node.output[0] not in read]:
            graph.node.remove(node)


def to_int8(
    source: Path,
    target: Path,
    data: Sequence[Feeds],
    method: str = "minmax",
    keep: Sequence[str] = (),
    ops: Sequence[str] = OPS,
    activations: str = "int8",
) -> dict[str, Any]:
    """Write the INT8 form. Returns {kept: {node: reason}, samples, …}. Raises ModelError: no data, a method unknown."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    if not data:
        feeds(None, source)
    if method not in METHODS or activations not in ("int8", "uint8"):
        raise ModelError(f"no calibration {method!r} with {activations!r}", f"{METHODS}; activations int8 or uint8")
    model = load(source)
    if opset(model) < MIN_OPSET:
        hint = f"outrider models quantize raises it to {OPSET} by itself, models.quantize.simplify does it in Python"
        raise ModelError(f"{source.name} has opset {opset(model)}, per-channel INT8 needs {MIN_OPSET}", hint)
    used = list(data[: MAX_FEEDS if method == "minmax" else HISTOGRAM_FEEDS])
    methods = dict(zip(METHODS, ("MinMax", "Entropy", "Percentile"), strict=True))
    with tempfile.TemporaryDirectory(prefix="outrider-int8-") as scratch, _tools(f"{source.name} cannot be quantized"):
        prepared, written = Path(scratch) / "prepared.onnx", Path(scratch) / "int8.onnx"
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        ready = onnx.load(str(prepared))
        kept, ranges = _kept(ready, keep), _clipped_ranges(ready, used)
        quantize_static(
            str(prepared),
            str(written),
            _Reader(used),  # type: ignore[arg-type,unused-ignore]
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(ops),
            nodes_to_exclude=kept,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=getattr(CalibrationMethod, methods[method]),
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "TensorQuantOverrides": ranges},
        )
        model = onnx.load(str(written))
    quantized = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if not quantized:
        raise ModelError(f"{source.name} has nothing to quantize", f"it has none of {', '.join(ops)} that is not kept")
    _save(shifted(model, activations), target)
    return {"kept": dict.fromkeys(kept, "asked for"), "samples": len(used), "method": method, "points": quantized}


def shifted(model: onnx.ModelProto, activations: str) -> onnx.ModelProto:
    """The same numbers with activations as int8 around 0 or uint8 around 128."""
    points = {n.input[2] for n in model.graph.node if n.op_type == "QuantizeLinear" and len(n.input) > 2}
    for weight in model.graph.initializer:
        if weight.name in points and activations != (value := numpy_helper.to_array(weight)).dtype.name:
            moved = value.astype(np.int16) + (128 if activations == "uint8" else -128)
            weight.CopyFrom(numpy_helper.from_array(moved.astype(activations), weight.name))
    return model


def layer_errors(reference: Path, altered: Path, data: Sequence[Feeds]) -> list[dict[str, Any]]:
    """Layers of both graphs, worst first: {node, op, error, added}, over the first COMPARED_FEEDS feeds.

    `error` is relative to the FP32 output; `added` is what of it exceeds the inputs' errors: the layer's own share.
    """
    exact, other = load(reference), load(altered)
    errors: dict[str, list[float]] = {}
    some = data[:COMPARED_FEEDS]
    pairs = zip(_activations(exact, some), _activations(other, some, lambda a: a.astype(np.float32)), strict=True)
    for wanted, found in pairs:
        for name, want in wanted.items():
            if name in found and found[name].shape == want.shape and want.size:
                errors.setdefault(name, []).append(relative_error(found[name], want))
    mean = {name: float(np.mean(some)) for name, some in errors.items()}
    rows = []
    for node in exact.graph.node:
        if (error := mean.get(node.output[0])) is not None:
            before = max((mean.get(name, 0.0) for name in node.input), default=0.0)
            rows.append({"node": node.name, "op": node.op_type, "error": error, "added": max(error - before, 0.0)})
    return sorted(rows, key=lambda row: -row["added"])


def _clipped_ranges(model: onnx.ModelProto, data: Sequence[Feeds]) -> dict[str, list[dict[str, Any]]]:
    """Ranges of tensors that only a Relu or Clip reads: what is below 0 is cut anyway, the scale need not hold it."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    cut = {r[0].input[0]: r[0].output[0] for r in readers.values() if len(r) == 1 and r[0].op_type in ("Relu", "Clip")}
    produced = {name for node in model.graph.node if node.op_type in OPS for name in node.output}
    highest: dict[str, float] = {}
    wanted = {after: before for before, after in cut.items() if before in produced}
    for found in _activations(model, data, lambda a: (float(a.min()), float(a.max())), list(wanted)):
        for name, (low, high) in found.items():
            if low >= 0 and name in wanted:
                highest[wanted[name]] = max(highest.get(wanted[name], 0.0), high)
    return {name: [{"rmin": np.float32(-high), "rmax": np.float32(high)}] for name, high in highest.items() if high > 0}


def _activations(
    model: onnx.ModelProto,
    data: Sequence[Feeds],
    reduce: Callable[[Any], Any] = lambda a: a,
    names: list[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """For each feed, `reduce` of the floating-point activations by tensor name: all of them, or those named."""
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    given = {value.name for value in whole.graph.output}
    inner = [name for node in whole.graph.node for name in node.output if name]
    new = [name for name in (inner if names is None else names) if name not in given]
    whole.graph.output.extend(onnx.ValueInfoProto(name=name) for name in new)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with _tools("the network does not run on the calibration data"):
        session = ort.InferenceSession(whole.SerializeToString(), options, providers=["CPUExecutionProvider"])
        order = [value.name for value in session.get_outputs()]
    for feed in data:
        with _tools("the network does not run on the calibration data"):
            arrays = zip(order, session.run(order, feed), strict=True)
        yield {n: reduce(a) for n, a in arrays if isinstance(a, np.ndarray) and a.dtype.kind == "f" and a.size}


def _kept(model: onnx.ModelProto, keep: Iterable[str]) -> list[str]:
    """Names of the nodes that `keep` names by node or by op. Raises ModelError for a name that is neither."""
    nodes = list(model.graph.node)
    names, ops = {node.name for node in nodes}, {node.op_type for node in nodes}
    if unknown := [name for name in keep if name not in names and name not in ops]:
        raise ModelError(f"the model has no node or op {', '.join(unknown)}", f"ops: {', '.join(sorted(ops))}")
    wanted = set(keep)
    return [node.name for node in nodes if node.name in wanted or node.op_type in wanted]


class _Reader:
    """A CalibrationDataReader of feeds."""

    def __init__(self, data: list[Feeds]) -> None:
        self._rest: Iterator[Feeds] = iter(data)

    def get_next(self) -> Feeds | None:
        return next(self._rest, None)


def _save(model: onnx.ModelProto, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    durable.write(target, model.SerializeToString())
    return target


@contextmanager
def _tools(what: str) -> Iterator[None]:
    """Errors of the tools, which share no base, as a ModelError; what they print and log for people is not shown."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise ModelError(f"{what}: {reason}", "outrider models inspect FILE shows what it is made of") from error
    finally:
        root.setLevel(level)
