"""Requests through a model that is replaced again and again: none fails, none is answered by half of a version.

Invariants: the versions are of one form and differ in what they add, so each answer tells which of them gave it;
callers never pause, and the swaps come by the very path of an update (load beside, prove, switch, drain, unload). Rows:
`failed` and `wrong` (an answer of no whole version, or of an older one than this caller was answered by before), `p99`
in milliseconds while swaps go on, against the same without (`peer`).
"""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_agent.errors import OutriderError
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.wire.tensor import Tensor

REQUESTS, SWAPS, CALLERS = 10_000, 20, 4
WIDTH, LAYERS = 512, 4


def run() -> Iterator[dict[str, Any]]:
    """The rows; about a minute."""
    with tempfile.TemporaryDirectory(prefix="outrider-swap-") as folder:
        versions = [_version(Path(folder) / f"v{number}", number) for number in range(SWAPS + 1)]
        yield from asyncio.run(_race(versions))


def _version(folder: Path, number: int) -> Path:
    """A small dense network whose answers have the version in their first column."""
    folder.mkdir()
    rng, names, nodes, weights = np.random.default_rng(1), itertools.count(), [], []
    last = "x"
    for _ in range(LAYERS):
        weights.append(
            numpy_helper.from_array(rng.normal(0, 0.05, (WIDTH, WIDTH)).astype(np.float32), f"w{next(names)}")
        )
        nodes += [helper.make_node("MatMul", [last, weights[-1].name], [f"m{next(names)}"])]
        nodes += [helper.make_node("Tanh", [nodes[-1].output[0]], [f"t{next(names)}"])]
        last = nodes[-1].output[0]
    weights.append(numpy_helper.from_array(np.float32(10 * (number + 1)), "version"))
    nodes.append(helper.make_node("Add", [last, "version"], ["y"]))
    shape = ["batch", WIDTH]
    graph = helper.make_graph(
        nodes,
        "swap",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))
    return folder


async def _race(versions: Sequence[Path]) -> list[dict[str, Any]]:
    worker = WorkerProcess.engine("network")
    running = asyncio.create_task(worker.run())
    try:
        await worker.load("m", versions[0])
        await _callers(worker, REQUESTS // 10)
        calm = await _callers(worker, REQUESTS // 4)
        swapping = asyncio.create_task(_swap(worker, versions[1:]))
        busy = await _callers(worker, REQUESTS, swapping)
        await swapping
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    shared = {"n": len(busy.times) + busy.failed, "swaps": SWAPS, "callers": CALLERS}
    none = {"peer": None, "peer_value": None, "ratio": None}
    p99, still = (float(np.percentile(np.array(taken.times) * 1000, 99)) for taken in (busy, calm))
    return [
        {"name": "failed", "value": busy.failed, "unit": "requests", **none, **shared},
        {"name": "wrong", "value": busy.wrong, "unit": "requests", **none, **shared},
        {
            "name": "p99", "value": round(p99, 2), "unit": "ms", "peer": "without swaps", "peer_value": round(still, 2),
            "ratio": round(p99 / still, 2), **shared,
        },
    ]  # fmt: skip


class _Taken:
    """What the callers saw."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.failed = self.wrong = 0


async def _callers(worker: WorkerProcess, count: int, during: asyncio.Task[None] | None = None) -> _Taken:
    """Ask `count` times, and on while something goes on."""
    taken, left = _Taken(), iter(range(count))

    async def call(number: int) -> None:
        x = np.random.default_rng(number).normal(size=(1, WIDTH)).astype(np.float32)
        inputs, seen = {"x": Tensor("float32", [1, WIDTH], x.tobytes())}, 1
        while next(left, None) is not None or (during and not during.done()):
            began = time.perf_counter()
            try:
                outputs = await worker.infer("m", inputs)
            except OutriderError:
                taken.failed += 1
                continue
            taken.times.append(time.perf_counter() - began)
            y = np.frombuffer(outputs["y"].data, np.float32)
            version = round(float(y.mean()) / 10)
            taken.wrong += version < seen or not np.all(np.abs(y - 10 * version) <= 1.0)
            seen = version

    await asyncio.gather(*(call(number) for number in range(CALLERS)))
    return taken


async def _swap(worker: WorkerProcess, versions: Sequence[Path]) -> None:
    for path in versions:
        await worker.load("m", path)
        await asyncio.sleep(0.05)
