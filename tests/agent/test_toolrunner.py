"""The tool runner as a real process: results, ordinary errors, bugs, inference, time-outs."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from edge_agent.agent.ports import RunnerTools
from edge_agent.agent.tool import ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.wire.tensor import Tensor
from tests.agent import plant


async def double(model: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    if model != "doubler":
        raise Refused("no such model")
    x = np.frombuffer(inputs["x"].data, np.float32) * 2
    return {"y": Tensor("float32", [1], x.tobytes())}


@asynccontextmanager
async def runner(state: Path, *more: str, answer: object = double) -> AsyncIterator[WorkerProcess]:
    argv = [sys.executable, "-m", "edge_agent.agent.toolrunner", "--pack", "tests.agent.plant", "--state", str(state)]
    worker = WorkerProcess("tools", [*argv, *more], answer=answer, grace_s=0.2, backoff_s=(0.05, 0.2))  # type: ignore[arg-type]
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running


async def test_specs_results_and_errors_cross_the_process(tmp_path: Path) -> None:
    async with runner(tmp_path / "state") as worker:
        tools = RunnerTools(worker)
        assert list(await tools.specs()) == [tool.spec for tool in plant.ALL]
        assert (tmp_path / "state").is_dir()
        assert await tools.call("set_speed", {"line": 1, "percent": 40.0}, 5) == "line 1 runs at 40 %"
        assert await tools.call("double", {"value": 21.0}, 5) == 42.0
        for name, told in [
            ("jam", "the feeder is jammed"),
            ("crash", "ZeroDivisionError: a bug"),
            ("stamp", "TypeError: .*missing"),
            ("launch", "unknown tool launch"),
            ("flood", "limit is 65536"),
        ]:
            with pytest.raises(ToolError, match=told):
                await tools.call(name, {}, 5)
        assert worker.starts == 1


async def test_a_refused_inference_is_an_ordinary_error_of_the_tool(tmp_path: Path) -> None:
    async def refuse(model: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        raise Refused("doubler is not installed", "assign its bundle")

    async with runner(tmp_path, answer=refuse) as worker:
        with pytest.raises(ToolError, match="not installed"):
            await RunnerTools(worker).call("double", {"value": 1.0}, 5)


async def test_a_tool_that_hangs_is_killed_and_the_next_runner_serves(tmp_path: Path) -> None:
    async with runner(tmp_path) as worker:
        tools = RunnerTools(worker)
        with pytest.raises(Retry):
            await tools.call("hang", {}, 0.3)
        while worker.starts == 1:  # noqa: ASYNC110 - the restart has no event of its own
            await asyncio.sleep(0.02)
        assert await tools.call("stamp", {"text": "x"}, 5) == "stamped x 1"


async def test_concurrent_tools_run_at_once_and_others_wait_their_turn_without_losing_time(tmp_path: Path) -> None:
    async with runner(tmp_path) as worker:
        tools = RunnerTools(worker)
        assert sorted(await asyncio.gather(*(tools.call("meet", {}, 10) for _ in range(4)))) == [0, 0, 1, 1]
        assert await asyncio.gather(*(tools.call("nap", {}, 0.4) for _ in range(6))) == ["rested"] * 6
        assert worker.starts == 1


async def test_many_readings_go_together_and_each_has_its_own_end(tmp_path: Path) -> None:
    async with runner(tmp_path) as worker:
        tools = RunnerTools(worker)
        *_, doubled = values = await tools.read([("jam", {}), ("launch", {}), ("double", {"value": 2.0})], 5)
        assert [str(value) for value in values[:2]] == ["the feeder is jammed", values[1].args[0]]
        assert doubled == 4.0
        values = await tools.read([("nap", {})] * 9, 0.6)
        assert values[:1] == ["rested"]
        assert "took too long" in str(values[-1]), "each may take its time, so that not all can"
        assert worker.starts == 1
        with pytest.raises(Retry):
            await tools.read([("double", {"value": 1.0}), ("hang", {})], 0.3)


async def test_options_reach_the_pack(tmp_path: Path) -> None:
    async with runner(tmp_path, "--option", "only=jam") as worker:
        assert [spec.name for spec in await RunnerTools(worker).specs()] == ["jam"]


@pytest.mark.parametrize(
    ("pack", "told"), [("no.such", "ModuleNotFound"), ("tests.agent.plant:nope", "AttributeError")]
)
def test_a_pack_that_does_not_load_says_why(tmp_path: Path, pack: str, told: str) -> None:
    with pytest.raises(Fatal, match=told):
        load(pack, tmp_path, {})
