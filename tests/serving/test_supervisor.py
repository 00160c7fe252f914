"""A child may crash, hang or lie: its requests end with a reason, a new child comes, the daemon goes on."""

import asyncio
import logging
import os
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_agent.engines.base import Generate
from edge_agent.errors import Refused, Retry
from edge_agent.serving import frames
from edge_agent.serving.schedule import Serving
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.wire.tensor import Tensor

CHILD = [sys.executable, str(Path(__file__).with_name("child.py"))]
X = {"x": Tensor("uint8", [3], b"abc")}


@asynccontextmanager
async def child(kind: str = "echo", **options: Any) -> AsyncIterator[WorkerProcess]:
    shared = {"backoff_s": (0.05, 0.2), "ping_s": 0.2, "shares": kind == "echo"}
    worker = WorkerProcess(kind, [*CHILD, kind], **(shared | options))
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - the condition is another process's
            await asyncio.sleep(0.01)


async def say(worker: WorkerProcess, prompt: str, adapter: str = "", **options: Any) -> str:
    return "".join([p.text async for p in worker.generate("m", Generate("", prompt, adapter=adapter), **options)])


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_a_loaded_model_streams_and_infers(tmp_path: Path) -> None:
    async with child() as worker:
        info = await worker.load("m", tmp_path)
        assert info.engine == "echo"
        assert worker.infos["m"] == info
        assert await say(worker, "one two") == "one two "
        assert await worker.infer("m", X) == X
        pid = worker.pid
    assert pid is not None
    assert gone(pid)


async def test_a_refusal_reaches_the_caller_and_the_worker_lives(tmp_path: Path) -> None:
    async with child() as worker:
        with pytest.raises(Refused, match="install it"):
            await worker.load("m", tmp_path / "absent")
        with pytest.raises(Refused, match="not loaded"):
            await worker.infer("m", X)
        await worker.load("m", tmp_path)
        with pytest.raises(Refused, match="it takes x"):
            await worker.infer("m", {"bad": X["x"]})
        assert await say(worker, "fine") == "fine "
        assert worker.starts == 1


async def test_a_crash_in_mid_stream_is_a_retry_and_the_models_come_back(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        stream = worker.generate("m", Generate("", "one CRASH two"))
        assert (await anext(stream)).text == "one "
        with pytest.raises(Retry, match="died"):
            await anext(stream)
        assert await say(worker, "again") == "again "
        assert worker.starts == 2


async def test_a_gpu_that_is_lost_is_a_retry_and_a_new_worker_with_the_models(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        with pytest.raises(Retry, match="GPU is lost"):
            await worker.infer("m", {"lost": X["x"]})
        await until(lambda: worker.starts == 2)
        assert await worker.infer("m", X) == X
        assert "status 70" in await worker.ending(1)


async def test_inputs_that_are_not_finite_are_refused_unless_the_model_takes_them(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = {"y": Tensor("float32", [2], struct.pack("<2f", 1.0, value))}
            with pytest.raises(Refused, match="y has NaN or infinite"):
                await worker.infer("m", bad)
            with pytest.raises(Refused, match="y has NaN or infinite"):
                await worker.infer("m", {"y": Tensor("float16", [2], struct.pack("<2e", 1.0, value))})
        half = {"y": Tensor("float16", [2], struct.pack("<2e", 65504.0, -65504.0))}
        assert await worker.infer("m", half) == half
        large = {"y": Tensor("float32", [2], struct.pack("<2f", 3e38, 3e38))}
        assert await worker.infer("m", large) == large
        await worker.load("m", tmp_path, serving=Serving(finite=False))
        assert (await worker.infer("m", bad))["y"].data == bad["y"].data


async def test_a_stopped_process_is_found_out_and_replaced(tmp_path: Path) -> None:
    async with child(hang_s=0.6) as worker:
        await worker.load("m", tmp_path)
        with pytest.raises(Retry, match="died"):
            await say(worker, "HANG")
        assert await say(worker, "back") == "back "


async def test_a_request_that_does_not_let_go_costs_the_process_its_life(tmp_path: Path) -> None:
    async with child(grace_s=0.3) as worker:
        await worker.load("m", tmp_path)
        with pytest.raises(Retry, match="within"):
            await say(worker, "STUCK", timeout_s=0.3)
        await until(lambda: worker.starts == 2)
        assert await say(worker, "back") == "back "


async def test_leaving_a_stream_cancels_it_in_the_child_which_lives_on(tmp_path: Path) -> None:
    async with child(grace_s=0.5) as worker:
        await worker.load("m", tmp_path)
        stream = worker.generate("m", Generate("", "FOREVER"))
        assert (await anext(stream)).text == "again "
        await stream.aclose()
        assert await say(worker, "next") == "next "
        await asyncio.sleep(1.0)
        assert worker.starts == 1


async def test_an_oversized_frame_from_a_child_ends_that_child_only(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        with pytest.raises(Retry):
            await say(worker, "GARBAGE")
        assert await say(worker, "back") == "back "


async def test_an_oversized_request_is_refused_before_it_is_sent(tmp_path: Path, monkeypatch: Any) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        monkeypatch.setattr(frames, "MAX_FRAME", 1000)
        with pytest.raises(Refused, match="does not fit"):
            await worker.infer("m", {"x": Tensor("uint8", [2000], bytes(2000))})
        assert await say(worker, "fine") == "fine "
        assert worker.starts == 1


async def test_a_model_that_kills_its_worker_on_reload_does_not_keep_the_others_down(tmp_path: Path) -> None:
    turncoat = tmp_path / "turncoat"
    turncoat.mkdir()
    async with child() as worker:
        await worker.load("m", tmp_path)
        await worker.load("bad", turncoat)
        with pytest.raises(Retry):
            await worker.load("worse", tmp_path / "poison")
        (turncoat / "armed").touch()
        with pytest.raises(Retry):
            await say(worker, "CRASH")
        await until(lambda: worker.starts >= 4)
        assert await say(worker, "well") == "well "
        with pytest.raises(Refused, match="not loaded"):
            await worker.infer("bad", X)


def adapters(folder: Path, *names: str) -> list[Path]:
    for name in names:
        (folder / name).mkdir()
    return [folder / name for name in names]


async def test_adapters_are_switched_in_mid_stream_with_no_reload_and_come_back_after_a_crash(tmp_path: Path) -> None:
    one, two = adapters(tmp_path, "one", "two")
    async with child() as worker:
        with pytest.raises(Refused, match="not loaded"):
            await worker.adapt("m", "a@1", one)
        info = await worker.load("m", tmp_path)
        await worker.adapt("m", "a@1", one)
        stream = worker.generate("m", Generate("", "x " * 2000 + "ADAPTERS", adapter="a@1"))
        assert (await anext(stream)).text == "x "
        switching = asyncio.gather(worker.adapt("m", "a@2", two), say(worker, "ADAPTERS", "a@2"), worker.drop("a@1"))
        said = [piece.text async for piece in stream]
        assert said[-2] == "one of 1 "
        assert (await switching)[1] in ("two of 2 ", "two of 1 ")
        assert worker.adapters == {"a@2": ("m", str(two))}
        assert (worker.infos["m"], worker.starts) == (info, 1)
        with pytest.raises(Retry):
            await say(worker, "CRASH", "a@2")
        assert await say(worker, "ADAPTERS", "a@2") == "two of 1 "
        with pytest.raises(Refused, match="no adapter"):
            await say(worker, "fine", "a@1")
        await worker.load("m", tmp_path)
        assert worker.adapters == {}


async def test_an_adapter_that_is_refused_or_kills_on_reload_stays_out_and_the_model_answers(tmp_path: Path) -> None:
    good, turncoat, fades, poison = adapters(tmp_path, "good", "turncoat", "fades", "poison")
    async with child() as worker:
        await worker.load("m", tmp_path)
        for path in (good, turncoat, fades):
            await worker.adapt("m", path.name, path)
        with pytest.raises(Retry, match="died"):
            await worker.adapt("m", "poison", poison)
        assert await say(worker, "ADAPTERS", "turncoat") == "turncoat of 3 "
        (turncoat / "armed").touch()
        (fades / "absent").touch()
        with pytest.raises(Retry):
            await say(worker, "CRASH")
        await until(lambda: worker.starts >= 4 and set(worker.adapters) == {"good"})
        assert await say(worker, "ADAPTERS", "good") == "good of 1 "


async def test_secrets_of_the_daemon_do_not_reach_the_child(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("OUTRIDER_TOKEN", "secret")
    async with child(env={"PACK": "sim"}) as worker:
        await worker.load("m", tmp_path)
        names = (await say(worker, "ENVIRONMENT")).split()
        assert "OUTRIDER_TOKEN" not in names
        assert "PACK" in names


async def test_a_process_that_never_starts_is_tried_with_growing_pauses(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "outrider.broken"):
        async with child("broken") as worker:
            with pytest.raises(Retry, match="not ready"):
                await worker.ready(0.2)
            await until(lambda: "in 0.20 s" in caplog.text)
    assert "I never start" in caplog.text
    assert "in 0.05 s" in caplog.text


def summing(fail: bool = False) -> Callable[[str, dict[str, Tensor]], Awaitable[dict[str, Tensor]]]:
    async def answer(model: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if fail:
            raise Refused("no network here")
        assert model == "sum"
        return {"y": Tensor("uint8", [1], bytes([sum(inputs["x"].data)]))}

    return answer


async def test_a_tool_may_ask_the_daemon_to_infer() -> None:
    async with child("runner", answer=summing()) as runner:
        assert (await runner.call("add", {}, 5.0)).result == 3
        assert runner.specs == b"\x90"
    async with child("runner", answer=summing(fail=True)) as runner:
        assert "no network here" in (await runner.call("add", {}, 5.0)).error
    async with child("runner") as runner:
        assert "may not ask" in (await runner.call("add", {}, 5.0)).error


async def test_a_tool_past_its_timeout_is_killed_with_its_runner() -> None:
    async with child("runner", answer=summing(), grace_s=0) as runner:
        await runner.ready(10)
        with pytest.raises(Retry, match="within"):
            await runner.call("stuck", {}, 0.1)
        assert (await runner.call("add", {}, 5.0)).result == 3
