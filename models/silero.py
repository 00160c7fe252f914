"""The Silero voice activity network, finished so that its sample rate is fixed.

Invariants: the published file takes its sample rate as an input and branches on it; the finished one is for 16 kHz
and takes `input` (batch, 576: 64 samples of context and 512 new ones) and `state` (2, batch, 128), both float32, and
gives `output` (batch, 1), the chance of speech, and `stateN`, the next state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from models.errors import ModelError
from models.fetch import Progress, quiet

RATE, SAMPLES = 16000, 576


def finish(source: Path, target: Path, _: Progress = quiet) -> Path:
    """Fix the rate and the length of `input`, and fold what depends on them. Raises ModelError for another network."""
    import onnxslim

    model = onnx.load(str(source))
    graph = model.graph
    inputs = {value.name: value for value in graph.input}
    if inputs.keys() != {"input", "state", "sr"}:
        raise ModelError(f"{source.name} is no Silero voice activity network: it takes {sorted(inputs)}")
    graph.input.remove(inputs["sr"])
    graph.initializer.append(numpy_helper.from_array(np.array(RATE, np.int64), "sr"))
    inputs["input"].CopyFrom(helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", SAMPLES]))
    model = onnxslim.slim(model)
    model = onnxslim.slim(_ranks_folded(onnx.shape_inference.infer_shapes(model, data_prop=True)))
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return target


def _ranks_folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Size(Shape(x)) is the rank of x, known without running."""
    graph = model.graph
    ranks = {v.name: len(v.type.tensor_type.shape.dim) for v in graph.value_info}
    shapes = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Shape"}
    for node in [node for node in graph.node if node.op_type == "Size"]:
        rank = ranks.get(shapes.get(node.input[0], ""))
        if rank is not None:
            graph.initializer.append(numpy_helper.from_array(np.array(rank, np.int64), node.output[0]))
            graph.node.remove(node)
    return model


def probe() -> dict[str, Any]:
    """A hum that falls in pitch, with an empty state."""
    time = np.arange(SAMPLES) / RATE
    hum = np.sum([np.sin(2 * np.pi * k * (160 - 900 * time) * time) / k for k in range(1, 12)], axis=0)
    return {"input": (0.2 * hum[None]).astype(np.float32), "state": np.zeros((2, 1, 128), np.float32)}
