"""Golden inputs and answers of networks, stored in their bundles.

Invariants: the picture is drawn here, so no data set is needed and it is the same everywhere; a good reading network
is sure of every character of it, so small differences between processors do not change its answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.engines.choose import PROFILE
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.engines.tensorrt_build import Profile
from edge_agent.wire import durable
from edge_agent.wire.tensor import Tensor
from models.errors import ModelError

DIGITS = {
    "4": ("00010", "00110", "01010", "10010", "11111", "00010", "00010"),
    "2": ("01110", "10001", "00001", "00110", "01000", "10000", "11111"),
    "1": ("00100", "01100", "00100", "00100", "00100", "00100", "01110"),
    "7": ("11111", "00001", "00010", "00100", "01000", "01000", "01000"),
}
TEXT = "4217"


def picture(batch: int, channels: int, height: int, width: int) -> NDArray[np.float32]:
    """`TEXT`, dark (-1) on light (1), in the middle of each picture and channel."""
    glyphs = [np.pad(np.array([list(row) for row in DIGITS[c]], np.float32), ((0, 0), (0, 1))) for c in TEXT]
    line = np.kron(np.concatenate(glyphs, axis=1), np.ones((4, 4), np.float32))
    page = np.ones((height, width), np.float32)
    top, left = (height - line.shape[0]) // 2, (width - line.shape[1]) // 2
    page[top : top + line.shape[0], left : left + line.shape[1]] -= 2 * line
    return np.broadcast_to(page, (batch, channels, height, width))


def answered(model: Path, inputs: dict[str, Tensor]) -> bytes:
    """Inputs and what the serving engine answers, as msgpack {inputs, outputs}."""
    network = OnnxNetwork(model, probe=inputs)
    try:
        return msgspec.msgpack.encode({"inputs": inputs, "outputs": network.infer(inputs)})
    finally:
        network.close()


def tensors(arrays: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """Arrays as the engine takes them."""
    return {n: Tensor(a.dtype.name, list(a.shape), np.ascontiguousarray(a).tobytes()) for n, a in arrays.items()}


def arrays(tensors: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """What the engine gives, as arrays."""
    return {n: np.frombuffer(t.data, t.dtype).reshape(t.shape) for n, t in tensors.items()}


def signature(model: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What a network takes and gives: name, dtype (numpy's), shape (-1 is free)."""
    import onnx

    from models.inspect import described

    graph = onnx.load(str(model), load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    both = ([v for v in graph.input if v.name not in weights], graph.output)
    takes, gives = ([described(v) for v in values] for values in both)
    for value in (*takes, *gives):
        value["shape"] = [d if isinstance(d, int) else -1 for d in value["shape"]]
    return takes, gives


def write_profile(folder: Path, ranges: Profile) -> None:
    """Put profile.json beside a folder's model.onnx, where it has free dimensions to range over. Raises ModelError."""
    free = {v["name"]: v["shape"] for v in signature(folder / "model.onnx")[0] if -1 in v["shape"]}
    if not ranges:
        return
    if ranges.keys() != free.keys():
        raise ModelError(f"the profile names {', '.join(sorted(ranges))}", f"inputs with free dimensions: {list(free)}")
    for name, shapes in ranges.items():
        fits = all(len(shape) == len(free[name]) for shape in shapes) and all(
            0 < low <= usual <= high and (dim == -1 or dim == low == high)
            for dim, low, usual, high in zip(free[name], *shapes, strict=True)
        )
        if not fits:
            raise ModelError(f"the profile of {name} is {shapes} for {free[name]}", "smallest, usual, largest shape")
    durable.write(folder / PROFILE, msgspec.json.encode(ranges))
