"""Networks through the worker and the device API, against raw ONNX Runtime and LitServe: equal payloads and threads.

Invariants: every figure is of rounds that take turns (raw, in process, ours over HTTP, LitServe's), the ratio is the
median of theirs; one client in a process of its own asks both servers in the same way, whose answers are
the raw session's. Rows, for the label reader (`rec`) and the label finder (`det`): `X.1.overhead`, milliseconds that
the worker adds to a caller alone (peer: the raw run); `X.16.inprocess.raw`, `X.1.http.raw`, `X.16.http.raw`, requests/s
against raw runs one after the other; `X.16.http.litserve`, requests/s against LitServe.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.errors import Fatal, Refused
from edge_agent.hosting import Hosting
from edge_agent.serving.schedule import NORMAL
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.update.slots import Installed
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, public_jwk
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tensor import Tensor
from edge_agent.wire.tokens import issue_access_token

SHAPES = {"rec": (1, 3, 48, 320), "det": (1, 3, 480, 640)}
ROUNDS, ROUND_S, CALLERS = 5, 3.0, 16


class _Case(NamedTuple):
    """A network and one request to it."""

    name: str
    folder: Path
    x: np.ndarray
    version: str

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"x": Tensor("float32", list(self.x.shape), self.x.tobytes())}


def run() -> Iterator[dict[str, Any]]:
    """The rows; about three minutes. Raises Refused when LitServe is not installed."""
    if find_spec("litserve") is None:
        raise Refused("litserve is not installed", "pip install 'outrider[bench]'")
    from models.fetch import default_cache
    from models.package import open_bundle, package

    for short, shape in SHAPES.items():
        bundle, _ = package(f"ppocr-{short}", default_cache())
        x = np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)
        case = _Case(short, bundle / "files", x, open_bundle(bundle).version)
        yield from asyncio.run(_race(case, bundle))


async def _race(case: _Case, bundle: Path) -> list[dict[str, Any]]:
    raw = OnnxNetwork(case.folder)
    right = b"".join(t.data for t in raw.infer(case.inputs).values())
    worker = WorkerProcess.engine("network")
    running = asyncio.create_task(worker.run())
    threads = str(raw.info.extra["threads"])
    try:
        await worker.load("m", case.folder)
        with _ours(bundle) as (port, token), _litserve(case, threads) as peer:
            ours = _Target(port, f"/v2/models/ppocr-{case.name}/infer", *_oip(case, token))
            theirs = _Target(peer, "/predict", case.x.tobytes(), {"Content-Type": "application/octet-stream"})
            for target in (ours, theirs):
                await asyncio.to_thread(_await, target, right)
            return await _rounds(case, raw, worker, ours, theirs)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def _rounds(case: _Case, raw: OnnxNetwork, worker: WorkerProcess, ours: _Target, theirs: _Target) -> list[Any]:
    seen: dict[str, list[float]] = {key: [] for key in ("raw", "inside", "one", "sixteen", "peer", "added", "alone")}
    for _ in range(ROUNDS):
        added, alone = await _overhead(case, raw, worker)
        seen["added"].append(added)
        seen["alone"].append(alone)
        seen["raw"].append(await asyncio.to_thread(_raw, raw, case))
        seen["inside"].append(await _inside(worker, case))
        for key, target, callers in (("one", ours, 1), ("sixteen", ours, CALLERS), ("peer", theirs, CALLERS)):
            seen[key].append(await asyncio.to_thread(_clients, target, callers))
    name, none = case.name, {"n": ROUNDS}
    against = [
        (f"{name}.{CALLERS}.inprocess.raw", "inside", "raw"),
        (f"{name}.1.http.raw", "one", "raw"),
        (f"{name}.{CALLERS}.http.raw", "sixteen", "raw"),
        (f"{name}.{CALLERS}.http.litserve", "sixteen", "peer"),
    ]
    rows: list[dict[str, Any]] = [
        {
            "name": f"{name}.1.overhead", "value": round(median(seen["added"]), 3), "unit": "ms",
            "peer": "onnxruntime", "peer_value": round(median(seen["alone"]), 3), "ratio": None, **none,
        }
    ]  # fmt: skip
    for row, mine, other in against:
        ratio = median(a / b for a, b in zip(seen[mine], seen[other], strict=True))
        peer = "onnxruntime" if other == "raw" else "litserve"
        values = {"value": round(median(seen[mine]), 1), "peer_value": round(median(seen[other]), 1)}
        rows.append({"name": row, "unit": "requests/s", "peer": peer, **values, "ratio": round(ratio, 3), **none})
    return rows


async def _overhead(case: _Case, raw: OnnxNetwork, worker: WorkerProcess) -> tuple[float, float]:
    """Median milliseconds that the worker adds to a run, and of the run; raw and served take turns."""
    raw_ms, served_ms = list[float](), list[float]()
    until = time.perf_counter() + ROUND_S
    while time.perf_counter() < until or len(raw_ms) < 10:
        began = time.perf_counter()
        raw.infer(case.inputs)
        between = time.perf_counter()
        await worker.infer("m", case.inputs)
        raw_ms.append((between - began) * 1000)
        served_ms.append((time.perf_counter() - between) * 1000)
    return median(served_ms) - median(raw_ms), median(raw_ms)


def _raw(raw: OnnxNetwork, case: _Case) -> float:
    return _rate(lambda: raw.infer(case.inputs))


def _rate(ask: Callable[[], object]) -> float:
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < ROUND_S:
        ask()
        count += 1
    return count / (time.perf_counter() - began)


async def _inside(worker: WorkerProcess, case: _Case) -> float:
    began, count = time.perf_counter(), 0

    async def call() -> None:
        nonlocal count
        while time.perf_counter() - began < ROUND_S:
            await worker.infer("m", case.inputs)
            count += 1

    await asyncio.gather(*(call() for _ in range(CALLERS)))
    return count / (time.perf_counter() - began)


class _Target(NamedTuple):
    """Where the client asks, and what."""

    port: int
    path: str
    body: bytes
    headers: dict[str, str]


def _oip(case: _Case, token: str) -> tuple[bytes, dict[str, str]]:
    data = case.x.tobytes()
    tensor = {
        "name": "x",
        "shape": list(case.x.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": len(data)},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + data, {
        "Authorization": f"Bearer {token}",
        "Inference-Header-Content-Length": str(len(head)),
        "Content-Type": "application/octet-stream",
    }


def _ask(connection: http.client.HTTPConnection, target: _Target) -> bytes:
    connection.request("POST", target.path, target.body, target.headers)
    answer = connection.getresponse()
    data = answer.read()
    if answer.status != 200:
        raise Fatal(f"{target.path} answered {answer.status}: {data[:200]!r}")
    return data[int(answer.headers.get("Inference-Header-Content-Length", 0)) :]


def _await(target: _Target, right: bytes) -> None:
    """Wait until the server answers; it must answer rightly."""
    for _ in range(300):
        with contextlib.suppress(OSError, http.client.HTTPException):
            found = _ask(http.client.HTTPConnection("127.0.0.1", target.port, timeout=60), target)
            pair = [np.frombuffer(data, np.uint8) for data in (found, right)]
            if len(found) != len(right) or np.mean(pair[0] == pair[1]) < 0.9:  # last bits may differ
                raise Fatal(f"{target.path} does not answer what the model does")
            return
        time.sleep(0.2)
    raise Fatal(f"the server of {target.path} does not answer")


def _clients(target: _Target, callers: int) -> float:
    """Requests/s by `callers` threads with a connection each, in a process of their own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_client, args=(target, callers, theirs))
    process.start()
    theirs.close()
    try:
        return float(ours.recv())
    except EOFError as error:
        raise Fatal("the client of the benchmark failed", "its reason stands above") from error
    finally:
        process.join()


def _client(target: _Target, callers: int, told: Any) -> None:
    counts, began = [0] * callers, time.perf_counter()

    def call(index: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=60)
        while time.perf_counter() - began < ROUND_S:
            _ask(connection, target)
            counts[index] += 1

    threads = [threading.Thread(target=call, args=(index,)) for index in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.send(sum(counts) / (time.perf_counter() - began))


@contextlib.contextmanager
def _litserve(case: _Case, threads: str) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    shape = ",".join(map(str, case.x.shape[1:]))
    file = next(case.folder.glob("*.onnx"))
    argv = [sys.executable, "-m", "bench.litserve_peer", str(file), shape, threads, str(NORMAL.max_batch), str(port)]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        yield port
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


@contextlib.contextmanager
def _ours(bundle: Path) -> Iterator[tuple[int, str]]:
    """The device API over the bundle in a process of its own, as a daemon has it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(bundle, theirs))
    process.start()
    theirs.close()
    try:
        yield ours.recv()
    finally:
        process.terminate()
        process.join()


def _serve(bundle: Path, told: Any) -> None:
    asyncio.run(_serve_until_killed(bundle, told))


async def _serve_until_killed(bundle: Path, told: Any) -> None:
    from edge_agent.api.app import LocalApi
    from models.package import open_bundle

    manifest = open_bundle(bundle)
    worker = WorkerProcess.engine("network")
    device = _Device(Hosting({"network": worker, "language": worker}))
    api = LocalApi(device, "127.0.0.1:0")
    tasks = [asyncio.create_task(worker.run()), asyncio.create_task(api.run())]
    await device.models.switch(manifest.name, Installed("0" * 64, bundle / "files", manifest))
    told.send((int(api.url.rsplit(":", 1)[1]), device.token))
    await asyncio.gather(*tasks)


class _Device:
    """A device that has models and no other work."""

    def __init__(self, models: Hosting) -> None:
        key = SigningKey.generate()
        self.models, self.work = models, self
        self.token = issue_access_token(key, "bench", ["operator"], now=time.time(), lifetime_s=3600)
        self._grants = Grants(1, 0.0, 1e12, dict(SHIPPED_ROLES), [public_jwk(key.public)])

    def grants(self) -> Grants:
        return self._grants

    def healthy(self) -> bool:
        return True

    async def status(self) -> dict[str, Any]:
        return {}

    async def submit(self, text: str, subject: Any) -> str:
        raise Refused("a benchmark takes no tasks")

    async def task(self, id: str) -> None:
        return None

    async def tasks(self) -> Sequence[Any]:
        return []

    async def call(self, name: str, args: dict[str, Any], subject: Any) -> Any:
        raise Refused("a benchmark has no tools")
