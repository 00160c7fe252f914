"""A small convolutional network for 8x8 handwritten digits, trained in numpy.

Invariants: the same data, seed and library give the same network; only the training part of the data is seen. The
published graph takes `x` (batch, 1, 8, 8) float32, 0 to 1, and gives `scores` (batch, 10), the largest being the class.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.fetch import Progress
from models.tasks import digits

Floats = NDArray[np.float32]
CHANNELS = (1, 32, 64, 64)
EPOCHS, BATCH, RATE, MOMENTUM = 6, 50, 0.05, 0.9


def make(target: Path, progress: Progress) -> Path:
    """Train and write the network."""
    return write(train(*digits("training"), progress), target)


def train(pictures: Floats, classes: NDArray[Any], progress: Progress, epochs: int = EPOCHS) -> list[Floats]:
    """Weights and biases of the convolutions and of the last layer, by stochastic gradient descent."""
    dice = np.random.default_rng(1)
    shapes = [(b, a, 3, 3) for a, b in pairwise(CHANNELS)] + [(10, CHANNELS[-1] * 16)]
    weights = [dice.normal(0, np.sqrt(2 / np.prod(s[1:])), s).astype(np.float32) for s in shapes]
    values = [v for w in weights for v in (w, np.zeros(len(w), np.float32))]
    speeds = [np.zeros_like(v) for v in values]
    for epoch in range(epochs):
        progress("training", epoch, epochs)
        order = dice.permutation(len(classes))
        for some in np.split(order, range(BATCH, len(order), BATCH)):
            slopes = _slopes(values, pictures[some], classes[some])
            for value, speed, slope in zip(values, speeds, slopes, strict=True):
                speed *= MOMENTUM
                speed -= RATE * (1 - epoch / epochs) * slope
                value += speed
    return values


def _patches(x: Floats) -> Floats:
    """(n, c, h, w) → (n, h, w, c * 9): the 3x3 neighbourhood of each pixel."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.ascontiguousarray(windows.transpose(0, 2, 3, 1, 4, 5)).reshape(*windows.shape[:1], *x.shape[2:], -1)


def _slopes(values: list[Floats], x: Floats, classes: NDArray[Any]) -> list[Floats]:
    """Gradients of the mean cross-entropy by each value."""
    convolutions = [(values[i], values[i + 1]) for i in range(0, len(values) - 2, 2)]
    patches, outputs = [], []
    for depth, (w, b) in enumerate(convolutions):
        patches.append(_patches(x))
        out = np.maximum(patches[-1] @ w.reshape(len(w), -1).T + b, 0).transpose(0, 3, 1, 2)
        outputs.append(out)
        x = out[:, :, ::2, ::2] if depth == 1 else out
    flat = x.reshape(len(x), -1)
    scores = flat @ values[-2].T + values[-1]
    chances = np.exp(scores - scores.max(1, keepdims=True))
    error = chances / chances.sum(1, keepdims=True)
    error[np.arange(len(classes)), classes] -= 1
    error /= len(classes)
    slopes = [error.T @ flat, error.sum(0)]
    back = (error @ values[-2]).reshape(x.shape)
    for depth in reversed(range(len(convolutions))):
        w, _ = convolutions[depth]
        if depth == 1:
            whole = np.zeros_like(outputs[depth])
            whole[:, :, ::2, ::2] = back
            back = whole
        back = back * (outputs[depth] > 0)
        rows = back.transpose(0, 2, 3, 1).reshape(-1, len(w))
        slopes = [(rows.T @ patches[depth].reshape(len(rows), -1)).reshape(w.shape), rows.sum(0), *slopes]
        if depth == 0:
            break
        turned = w[:, :, ::-1, ::-1].transpose(1, 0, 2, 3).reshape(w.shape[1], -1)
        back = (_patches(back) @ turned.T).transpose(0, 3, 1, 2)
    return slopes


def write(values: list[Floats], target: Path) -> Path:
    """The ONNX graph of the weights."""
    weights = [numpy_helper.from_array(np.ascontiguousarray(v), f"w{i}") for i, v in enumerate(values)]
    nodes, name = [], "x"
    for i in range(len(CHANNELS) - 1):
        strides = [2, 2] if i == 1 else [1, 1]
        names = [name, f"w{2 * i}", f"w{2 * i + 1}"]
        nodes.append(helper.make_node("Conv", names, [f"c{i}"], f"conv{i}", pads=[1] * 4, strides=strides))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"r{i}"], f"relu{i}"))
        name = f"r{i}"
    last = len(values) - 2
    nodes.append(helper.make_node("Flatten", [name], ["flat"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", f"w{last}", f"w{last + 1}"], ["scores"], "classes", transB=1))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 1, 8, 8])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])
    graph = helper.make_graph(nodes, "digits", [x], [scores], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, str(target))
    return target
