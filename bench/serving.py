"""Networks through the worker and the device API, against raw ONNX Runtime and LitServe: equal payloads and threads.

Invariants: every figure is of rounds that take turns (raw, in process, ours over HTTP, LitServe's), the ratio is the
median of theirs (raw: the faster of threads that spin and that do not); one client in a process of its own asks both
servers in the same way and order, and both answer what the model does. LitServe runs with the fastest of `SETTINGS`,
found in the same minute; while nobody asks it, it is stopped, as it polls for a fifth of a core that the others then
lack. Cases: the label reader with lines of one width (`rec`) and with those of a logistics label (`lines`), and the
label finder (`det`). Rows:
`X.1.overhead`, milliseconds that the worker adds to a caller alone (peer: the raw run); `X.16.inprocess.raw`,
`X.1.http.raw`, `X.16.http.raw`, requests/s against raw runs one after the other; `X.16.http.litserve`, requests/s
against LitServe that batches, `X.16.http.litserve.single` against LitServe that does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

import numpy as np
import onnxruntime

from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.errors import Fatal, Refused
from edge_agent.hosting import Hosting
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.update.slots import Installed
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, public_jwk
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tensor import Tensor
from edge_agent.wire.tokens import issue_access_token

ROUNDS, ROUND_S, CALLERS = 5, 3.0, 16
SETTINGS = [(workers, batch) for workers in (1, 2) for batch in (1, 2, 4, 8)]
"""Of LitServe: processes that share the threads, and rows of a batch."""
LABEL = (
    "ACME AQUACULTURE SUPPLIES B.V.", "17 HARBOUR ROAD, 1975 IJMUIDEN", "SSCC", "3 9012345 000000001 8", "CONTENT",
    "09012345 678908", "COUNT", "48", "BATCH/LOT", "K4821-B", "USE BY", "2027-11-30", "GROSS WEIGHT (KG)", "612.5",
    "(02)09012345678908(15)271130(37)48", "(00)390123450000000018(10)K4821-B",
)  # fmt: skip
"""Headings, values and codes, laid out as in GS1's guideline for logistics labels."""


class _Case(NamedTuple):
    """A network and the requests to it, which come round and round."""

    name: str
    folder: Path
    xs: list[np.ndarray]

    @property
    def inputs(self) -> list[dict[str, Tensor]]:
        return [{"x": Tensor("float32", list(x.shape), x.tobytes())} for x in self.xs]


def run() -> Iterator[dict[str, Any]]:
    """The rows; about ten minutes. Raises Refused when LitServe is not installed."""
    if find_spec("litserve") is None:
        raise Refused("litserve is not installed", "pip install 'outrider[bench]'")
    from models.fetch import default_cache
    from models.package import package

    dice = np.random.default_rng(1)
    noise = [dice.uniform(-1, 1, shape).astype(np.float32) for shape in ((1, 3, 48, 320), (1, 3, 480, 640))]
    for name, short, xs in (("rec", "rec", noise[:1]), ("lines", "rec", _lines(dice)), ("det", "det", noise[1:])):
        bundle, _ = package(f"ppocr-{short}", default_cache())
        yield from asyncio.run(_race(_Case(name, bundle / "files", xs), bundle))


def _lines(dice: np.random.Generator) -> list[np.ndarray]:
    """Four labels line by line, each line a picture 48 pixels high and as wide as its text."""
    from PIL import Image, ImageDraw, ImageFont

    font, lines = ImageFont.load_default(size=38), list[np.ndarray]()
    for text in LABEL * 4:
        image = Image.new("L", (int(font.getbbox(text)[2]) + int(dice.integers(8, 28)), 48), 235)
        ImageDraw.Draw(image).text((4, 2), text, fill=20, font=font)
        pixels = np.asarray(image, float) + dice.normal(0, 8, (48, image.width))
        lines.append(np.repeat(pixels.clip(0, 255)[None, None] / 127.5 - 1, 3, 1).astype(np.float32))
    return lines


async def _race(case: _Case, bundle: Path) -> list[dict[str, Any]]:
    raw = OnnxNetwork(case.folder)
    right = [b"".join(t.data for t in raw.infer(inputs).values()) for inputs in case.inputs]
    threads, path = int(raw.info.extra["threads"]), f"/v2/models/ppocr-{case.folder.parent.name.split('-')[1]}/infer"
    raw.close()
    worker = WorkerProcess.engine("network")
    running = asyncio.create_task(worker.run())
    try:
        await worker.load("m", case.folder)
        with _ours(bundle) as (port, token):
            ours = _Target(port, path, [oip(x, token) for x in case.xs])
            await asyncio.to_thread(_await, ours, right)
            await _inside(worker, case)
            rates = {each: await asyncio.to_thread(_try, case, each, threads, right) for each in SETTINGS}
            best = [max((s for s in SETTINGS if (s[1] > 1) is many), key=lambda s: rates[s]) for many in (True, False)]
            with _litserve(case, best[0], threads) as theirs, _litserve(case, best[1], threads) as single:
                for target in (theirs, single):
                    with target.awake():
                        await asyncio.to_thread(_await, target, right)
                return await _rounds(case, worker, (ours, theirs, single), threads, best)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


def _try(case: _Case, setting: tuple[int, int], threads: int, right: list[bytes]) -> float:
    if setting[0] > threads:
        return 0.0
    with _litserve(case, setting, threads) as target:
        with target.awake():
            _await(target, right)
        return max(_clients(target, CALLERS) for _ in range(2))


async def _rounds(
    case: _Case, worker: WorkerProcess, targets: Sequence[_Target], threads: int, best: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    seen: dict[str, list[float]] = defaultdict(list)
    raw, spins = _session(case, threads, "0"), _session(case, threads, "1")
    for _ in range(ROUNDS):
        added, alone = await _overhead(case, raw, worker)
        seen["added"].append(added)
        seen["alone"].append(alone)
        seen["raw"].append(max([await asyncio.to_thread(_raw, each) for each in (raw, spins)]))
        seen["inside"].append(await _inside(worker, case))
        for key, target, callers in zip(
            ("one", "sixteen", "peer", "single"), (targets[0], *targets), (1, CALLERS, CALLERS, CALLERS), strict=True
        ):
            seen[key].append(await asyncio.to_thread(_clients, target, callers))
    added, alone, shared = median(seen["added"]), median(seen["alone"]), {"n": ROUNDS, "load": os.getloadavg()[0]}
    rows: list[dict[str, Any]] = [
        {
            "name": f"{case.name}.1.overhead", "value": round(added, 3), "unit": "ms", "peer": "onnxruntime",
            "peer_value": round(alone, 3), "ratio": None, **shared,
        }
    ]  # fmt: skip
    for row, mine, other, peer in (
        (f"{CALLERS}.inprocess.raw", "inside", "raw", "onnxruntime"),
        ("1.http.raw", "one", "raw", "onnxruntime"),
        (f"{CALLERS}.http.raw", "sixteen", "raw", "onnxruntime"),
        (f"{CALLERS}.http.litserve", "sixteen", "peer", "litserve, {} x up to {} rows".format(*best[0])),
        (f"{CALLERS}.http.litserve.single", "sixteen", "single", "litserve, {} x {} row".format(*best[1])),
    ):
        ratio = median(a / b for a, b in zip(seen[mine], seen[other], strict=True))
        values = {"value": round(median(seen[mine]), 1), "peer_value": round(median(seen[other]), 1)}
        name = f"{case.name}.{row}"
        rows.append({"name": name, "unit": "requests/s", "peer": peer, **values, "ratio": round(ratio, 3), **shared})
    return rows


def _session(case: _Case, threads: int, spins: str) -> Callable[[int], object]:
    """Runs of a plain session by the number of the request; its threads may spin while they wait, or not."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", spins)
    session = onnxruntime.InferenceSession(next(case.folder.glob("*.onnx")), options)
    return lambda number: session.run(None, {"x": case.xs[number % len(case.xs)]})


async def _overhead(case: _Case, raw: Callable[[int], object], worker: WorkerProcess) -> tuple[float, float]:
    """Median milliseconds that the worker adds to a run, and of the run; raw and served take turns."""
    added, alone, inputs = list[float](), list[float](), case.inputs
    until = time.perf_counter() + ROUND_S
    while time.perf_counter() < until or len(added) < 10:
        number = len(added)
        began = time.perf_counter()
        raw(number)
        between = time.perf_counter()
        await worker.infer("m", inputs[number % len(inputs)])
        alone.append((between - began) * 1000)
        added.append((time.perf_counter() - between) * 1000 - alone[-1])
    return median(added), median(alone)


def _raw(raw: Callable[[int], object]) -> float:
    began, number = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < ROUND_S:
        raw(number)
        number += 1
    return number / took


async def _inside(worker: WorkerProcess, case: _Case) -> float:
    began, numbers, inputs = time.perf_counter(), itertools.count(), case.inputs

    async def call() -> None:
        while time.perf_counter() - began < ROUND_S:
            await worker.infer("m", inputs[next(numbers) % len(inputs)])

    await asyncio.gather(*(call() for _ in range(CALLERS)))
    return next(numbers) / (time.perf_counter() - began)


class _Target(NamedTuple):
    """Where the client asks, and what: bodies and headers; the process group that is stopped before and after."""

    port: int
    path: str
    requests: list[tuple[bytes, dict[str, str]]]
    group: int = 0

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run meanwhile."""
        if self.group:
            os.killpg(self.group, signal.SIGCONT)
        yield
        if self.group:
            os.killpg(self.group, signal.SIGSTOP)


def oip(x: np.ndarray, token: str) -> tuple[bytes, dict[str, str]]:
    """Body and headers of an inference request with binary tensors."""
    data, size = x.tobytes(), {"binary_data_size": x.nbytes}
    tensor = {"name": "x", "shape": list(x.shape), "datatype": "FP32", "parameters": size}
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + data, {
        "Authorization": f"Bearer {token}",
        "Inference-Header-Content-Length": str(len(head)),
        "Content-Type": "application/octet-stream",
    }


def _ask(connection: http.client.HTTPConnection, target: _Target, number: int) -> bytes:
    connection.request("POST", target.path, *target.requests[number % len(target.requests)])
    answer = connection.getresponse()
    data = answer.read()
    if answer.status != 200:
        raise Fatal(f"{target.path} answered {answer.status}: {data[:200]!r}")
    return data[int(answer.headers.get("Inference-Header-Content-Length", 0)) :]


def _await(target: _Target, right: list[bytes]) -> None:
    """Wait until the server answers; it must answer rightly."""
    for _ in range(300):
        with contextlib.suppress(OSError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=60)
            for number, known in enumerate(right):
                found = _ask(connection, target, number)
                if len(found) != len(known) or np.mean(np.frombuffer(found, "V4") == np.frombuffer(known, "V4")) < 0.4:
                    raise Fatal(f"{target.path} does not answer what the model does")  # last bits of floats may differ
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
        with target.awake():
            return float(ours.recv())
    except EOFError as error:
        raise Fatal("the client of the benchmark failed", "its reason stands above") from error
    finally:
        process.join()


def _client(target: _Target, callers: int, told: Any) -> None:
    numbers, began = itertools.count(), time.perf_counter()

    def call() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=60)
        while time.perf_counter() - began < ROUND_S:
            _ask(connection, target, next(numbers))

    threads = [threading.Thread(target=call) for _ in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told.send(next(numbers) / (time.perf_counter() - began))


@contextlib.contextmanager
def _litserve(case: _Case, setting: tuple[int, int], threads: int) -> Iterator[_Target]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    workers, batch = setting
    given = map(
        str, (next(case.folder.glob("*.onnx")), *case.xs[0].shape[1:3], threads // workers, workers, batch, port)
    )
    argv = [sys.executable, "-m", "bench.litserve_peer", *given]
    requests = [(x.tobytes(), {"Content-Type": "application/octet-stream"}) for x in case.xs]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(argv, stdout=said, stderr=said, start_new_session=True)
        try:
            yield _Target(port, "/predict", requests, process.pid)
        except Fatal as error:
            said.seek(max(0, said.tell() - 500))
            raise Fatal(f"{error}; it said: {said.read().decode(errors='replace')}") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                os.killpg(process.pid, signal.SIGCONT)
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
    api = LocalApi(cast(Any, device), "127.0.0.1:0")
    tasks = [asyncio.create_task(worker.run()), asyncio.create_task(api.run())]
    await device.models.switch(manifest.name, Installed("0" * 64, bundle / "files", manifest))
    told.send((int(api.url.rsplit(":", 1)[1]), device.token))
    await asyncio.gather(*tasks)


class _Device:
    """A device that has models, and is asked for nothing else."""

    def __init__(self, models: Hosting) -> None:
        key = SigningKey.generate()
        self.models = models
        self.token = issue_access_token(key, "bench", ["operator"], now=time.time(), lifetime_s=3600)
        self._grants = Grants(1, 0.0, 1e12, dict(SHIPPED_ROLES), [public_jwk(key.public)])

    def grants(self) -> Grants:
        return self._grants

    def healthy(self) -> bool:
        return True

    async def status(self) -> dict[str, Any]:
        return {}
