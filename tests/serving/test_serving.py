"""Serving by a worker process: batches, classes, deadlines, the cache, swaps beside and after unloading."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from edge_agent.errors import Refused, Retry
from edge_agent.serving.schedule import WAITING, Serving
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.wire.tensor import Tensor
from tests.serving.test_supervisor import child, until

SLOW = {"slow": Tensor("uint8", [1], b"s")}


def rows(*values: int) -> dict[str, Tensor]:
    return {"rows": Tensor("uint8", [len(values), 1], bytes(values))}


async def busy(worker: WorkerProcess) -> asyncio.Task[dict[str, Tensor]]:
    """The worker is at work for 0.3 s; what is asked now waits."""
    running = asyncio.create_task(worker.infer("m", SLOW))
    await asyncio.sleep(0.1)
    return running


async def batches(worker: WorkerProcess) -> list[int]:
    """Callers that never pause, until the model runs rows of several together; how many did, by request."""
    together = list[int]()

    async def ask(*values: int) -> None:
        while not together or max(together) < 4:
            answer = await worker.infer("m", rows(*values))
            assert answer["rows"].data == bytes(values)
            together.append(answer["together"].data[0])

    async with asyncio.timeout(60):
        await asyncio.gather(*(ask(n) for n in range(1, 8)), ask(8, 9))
    return together


async def test_requests_that_wait_together_run_together_and_get_their_own_rows(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path, serving=Serving(max_batch=4))
        together = await batches(worker)
        assert max(together) == 4
        await until(lambda: "m" in worker.served and worker.served["m"].requests == len(together))
        served = worker.served["m"]
        assert (served.failed, served.batch) == (0, 4)
        assert served.runs < served.requests < served.rows


async def test_runs_go_at_the_same_time_where_that_is_faster_and_a_switch_waits_for_them(tmp_path: Path) -> None:
    paired, left, pair = list[tuple[bytes, bool]](), False, {"pair": Tensor("uint8", [1], b"n")}

    async def ask() -> None:
        while not left:
            answer = await worker.infer("m", pair)
            paired.append((answer["pair"].data, "beside" in answer))

    async with child() as worker:
        await worker.load("m", twins(tmp_path))
        asking = [asyncio.create_task(ask()) for _ in range(4)]
        await until(lambda: paired[-4:] == [(b"y", True)] * 4, 60)
        assert paired[:8].count((b"n", False)) >= 7
        left = True
        await asyncio.gather(*asking)
        assert sorted(await worker.infer("m", pair)) == ["pair"]  # a caller alone has all threads
        left, asking = False, [asyncio.create_task(ask()) for _ in range(4)]
        await worker.load("m", tmp_path)  # one run at a time
        left = True
        await asyncio.gather(*asking)
        assert (worker.starts, paired[-1]) == (1, (b"n", False))


async def test_the_first_of_a_batch_waits_for_others_and_no_longer_than_it_may(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path, serving=Serving(max_batch=4, max_delay_ms=400))
        await batches(worker)
        began = time.monotonic()
        assert (await worker.infer("m", rows(1)))["together"].data == b"\x01"
        assert 0.4 <= time.monotonic() - began < 5
        began = time.monotonic()
        answers = await asyncio.gather(*(worker.infer("m", rows(n)) for n in range(4)))
        assert ([a["together"].data[0] for a in answers], time.monotonic() - began < 0.4) == ([4] * 4, True)


async def test_one_bad_request_does_not_fail_its_neighbours(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        await batches(worker)
        await busy(worker)
        answers = await asyncio.gather(*(worker.infer("m", rows(n)) for n in (12, 13, 14)), return_exceptions=True)
        assert isinstance(answers[1], Refused)
        assert [answer["rows"].data for answer in (answers[0], answers[2]) if isinstance(answer, dict)] == [
            b"\x0c",
            b"\x0e",
        ]


async def test_a_network_whose_outputs_have_no_rows_is_served_one_by_one(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        await batches(worker)
        for _ in range(2):
            await busy(worker)
            asked = [{"sum": Tensor("uint8", [1], bytes([n]))} for n in (1, 2, 3)]
            answers = await asyncio.gather(*(worker.infer("m", inputs) for inputs in asked))
            assert [answer["sum"].data[0] for answer in answers] == [1, 2, 3]


async def test_a_better_class_overtakes_and_a_late_request_is_not_run(tmp_path: Path) -> None:
    order = list[str]()

    async def ask(name: str, value: int, priority: int) -> None:
        await worker.infer("m", {"sum": Tensor("uint8", [1], bytes([value]))}, priority=priority)
        order.append(name)

    async with child() as worker:
        await worker.load("m", tmp_path, serving=Serving(max_batch=1))
        running = await busy(worker)
        with pytest.raises(Retry):
            await worker.infer("m", rows(1), timeout_s=0.05)
        await asyncio.gather(ask("low", 1, 3), ask("normal", 2, 2), ask("first", 3, 0))
        await running
        assert order == ["first", "normal", "low"]
        await until(lambda: "m" in worker.served and worker.served["m"].requests >= 4)
        assert worker.served["m"].runs == 4
        assert worker.starts == 1


async def test_one_too_many_is_a_retry_at_once(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path, serving=Serving(max_batch=WAITING))
        await busy(worker)
        asked = [worker.infer("m", rows(1)) for _ in range(2 * WAITING)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert 0 < sum(isinstance(answer, Retry) for answer in answers) <= WAITING


async def test_equal_inputs_are_answered_from_the_cache_until_the_model_changes(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path, serving=Serving(cache_mb=1))
        for _ in range(3):
            assert (await worker.infer("m", rows(5)))["rows"].data == b"\x05"
        await until(lambda: "m" in worker.served and worker.served["m"].requests == 3)
        assert (worker.served["m"].cached, worker.served["m"].runs) == (2, 1)
        await worker.load("m", tmp_path, serving=Serving(cache_mb=1))
        await worker.infer("m", rows(5))
        await until(lambda: worker.served["m"].requests == 1)
        assert worker.served["m"].cached == 0


async def test_a_model_that_replaces_another_leaves_it_serving_until_it_is_ready(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        loading = asyncio.create_task(worker.load("m", heavy(tmp_path)))
        answered = 0
        while not loading.done():
            await worker.infer("m", rows(1))
            answered += 1
        assert answered > 3
        assert (await loading).model == "heavy"
        assert worker.starts == 1


async def test_where_memory_is_short_the_old_goes_first_and_comes_back_when_the_new_is_bad(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        with pytest.raises(Refused, match="install it"):
            await worker.load("m", tmp_path / "absent", beside=False)
        assert (await worker.infer("m", rows(1)))["rows"].data == b"\x01"
        assert (await worker.load("m", heavy(tmp_path), beside=False)).model == "heavy"
        assert (await worker.infer("m", rows(1)))["rows"].data == b"\x01"


async def test_a_new_version_that_kills_its_worker_leaves_the_old_one(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        with pytest.raises(Retry):
            await worker.load("m", tmp_path / "poison")
        assert (await worker.infer("m", rows(1)))["rows"].data == b"\x01"
        assert worker.starts == 2


async def test_large_tensors_pass_through_shared_memory_which_is_given_back(tmp_path: Path) -> None:
    async with child() as worker:
        await worker.load("m", tmp_path)
        large = [{"x": Tensor("uint8", [4_000_000], bytes([n]) * 4_000_000), "y": rows(n)["rows"]} for n in range(20)]
        for _ in range(2):  # more than fits in it at a time
            answers = await asyncio.gather(*(worker.infer("m", inputs) for inputs in large))
            assert answers == large
            del answers
            await asyncio.sleep(0)  # the event loop lets go of them
        assert worker._arena is not None
        assert worker._arena.take(large[0]) == (0, 4_000_064)


async def test_a_kept_answer_stays_right_after_later_requests_and_the_workers_death(tmp_path: Path) -> None:
    def asked(n: int) -> dict[str, Tensor]:
        return {"x": Tensor("uint8", [10_000_000], bytes([n]) * 10_000_000)}

    async with child() as worker:
        await worker.load("m", tmp_path)
        kept = [await worker.infer("m", asked(n)) for n in range(8)]  # six fit into the memory, the others go without
        assert [isinstance(answer["x"].data, memoryview) for answer in kept] == [True] * 6 + [False] * 2
        del kept[1]
        assert isinstance((await worker.infer("m", asked(9)))["x"].data, memoryview)
        with pytest.raises(Retry, match="GPU is lost"):
            await worker.infer("m", {"lost": rows(1)["rows"]})
        await until(lambda: worker.starts == 2)
        assert await worker.infer("m", asked(10)) == asked(10)
        assert [(set(bytes(answer["x"].data)), len(answer["x"].data)) for answer in kept] == [
            ({n}, 10_000_000) for n in (0, *range(2, 8))
        ]


def twins(folder: Path) -> Path:
    (folder / "twins").mkdir()
    return folder / "twins"


def heavy(folder: Path) -> Path:
    (folder / "heavy").mkdir()
    return folder / "heavy"
