"""A label is read across the real processes: the plant's tools in the tool runner, the networks in their worker."""

from __future__ import annotations

import asyncio
import shutil
import statistics
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from edge_agent.serving.supervisor import WorkerProcess
from models.ppocr import finish
from tools.sim.camera import truth


@asynccontextmanager
async def plant_and_networks(state: Path) -> AsyncIterator[tuple[WorkerProcess, WorkerProcess]]:
    networks = WorkerProcess.engine("network", backoff_s=(0.05, 0.2))
    argv = [sys.executable, "-m", "edge_agent.agent.toolrunner", "--pack", "tools.sim.pack", "--state", str(state)]
    plant = WorkerProcess("tools", [*argv, "--option", "seed=7"], answer=networks.infer, backoff_s=(0.05, 0.2))
    running = [asyncio.create_task(process.run()) for process in (networks, plant)]
    try:
        yield plant, networks
    finally:
        for task in running:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def test_a_label_crosses_tool_runner_daemon_and_network_worker(
    tmp_path: Path, ppocr_models: dict[str, Path], capsys: Any
) -> None:
    for name in ("ppocr-det", "ppocr-rec"):
        (tmp_path / name).mkdir()
    shutil.copy(ppocr_models["det"], tmp_path / "ppocr-det")
    finish(ppocr_models["rec"], tmp_path / "ppocr-rec" / "model.onnx")
    async with plant_and_networks(tmp_path / "state") as (plant, networks):
        missing = await plant.call("read_label", {"camera": 1}, 20)
        assert (missing.ok, "ppocr-det" in missing.error) == (False, True)
        for name in ("ppocr-det", "ppocr-rec"):
            await networks.load(name, tmp_path / name)
        spent = []
        for camera in (1, 2, 3, 1, 2, 3):
            began = time.perf_counter()
            answer = await plant.call("read_label", {"camera": camera}, 20)
            spent.append(time.perf_counter() - began)
            assert answer.ok, answer.error
            want = [line.split(" ")[1] for line in truth(7, camera, answer.result["product"])]
            assert [answer.result[field] for field in ("lot", "serial", "expiry")] == want
    with capsys.disabled():
        print(f"\nread_label across processes: p50 {1000 * statistics.median(spent):.0f} ms")
