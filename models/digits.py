"""A small convolutional network for 8x8 handwritten digits: random convolutions, and a last layer solved for.

Invariants: the same data, seed and library give the same network; only the training part of the data is seen. The
published graph takes `x` (batch, 1, 8, 8) float32, 0 to 1, and gives `scores` (batch, 10), the largest being the class.
Source: Huang, Zhu and Siew 2006 (extreme learning machines): ridge regression on features of random layers.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.fetch import Progress
from models.tasks import digits

Floats = NDArray[np.float32]
CHANNELS, RIDGE = (1, 48, 96), 0.01


def make(_: Path, target: Path, progress: Progress) -> Path:
    """Train and write the network."""
    pictures, classes = digits("training")
    dice, values = np.random.default_rng(1), list[Floats]()
    for before, after in pairwise(CHANNELS):
        kernels = dice.normal(0, np.sqrt(2 / (9 * before)), (after, before, 3, 3))
        values += [kernels.astype(np.float32), dice.normal(0, 0.1, after).astype(np.float32)]
    progress("training", 0, 0)
    session = ort.InferenceSession(graph(values).SerializeToString(), providers=["CPUExecutionProvider"])
    features = np.asarray(session.run(None, {"x": pictures})[0], np.float64)
    middle, wanted = features.mean(0), np.eye(10)[classes]
    apart = features - middle
    kernel = apart @ apart.T + RIDGE * len(apart) * np.eye(len(apart))
    weight = np.linalg.solve(kernel, wanted - wanted.mean(0)).T @ apart
    values += [weight.astype(np.float32), (wanted.mean(0) - weight @ middle).astype(np.float32)]
    onnx.save(graph(values), str(target))
    return target


def probe() -> dict[str, Any]:
    """A picture that training did not see."""
    return {"x": digits("evaluation")[0][:1]}


def graph(values: list[Floats]) -> onnx.ModelProto:
    """The network of weights and biases in turn; without those of the last layer it gives its features."""
    weights = [numpy_helper.from_array(value, f"w{i}") for i, value in enumerate(values)]
    nodes, name = [], "x"
    for i in range(len(CHANNELS) - 1):
        names = [name, f"w{2 * i}", f"w{2 * i + 1}"]
        nodes.append(helper.make_node("Conv", names, [f"c{i}"], f"conv{i}", pads=[1] * 4, strides=[i + 1] * 2))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [name := f"r{i}"], f"relu{i}"))
    last = 2 * len(CHANNELS) - 2
    whole = len(values) > last
    nodes.append(helper.make_node("Flatten", [name], ["flat" if whole else "scores"], "flatten"))
    if whole:
        names = ["flat", f"w{last}", f"w{last + 1}"]
        nodes.append(helper.make_node("Gemm", names, ["scores"], "classes", transB=1))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10 if whole else "features"])
    drawn = helper.make_graph(nodes, "digits", [x], [scores], weights)
    model = helper.make_model(drawn, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model
