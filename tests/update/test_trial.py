"""A worse model is found beside the one that runs, goes back by itself, and says why; a good one passes."""

from __future__ import annotations

import asyncio
import math
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_agent.engines.base import Generate, Piece
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.errors import Refused, Retry
from edge_agent.hosting import Hosting
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.update.mirror import BESIDE, Mirror
from edge_agent.update.probe import agreement, said_alike, shown
from edge_agent.update.trial import (
    LOG,
    SAMPLE,
    SAMPLES,
    Activation,
    Figures,
    Tally,
    Trial,
    Why,
    Worse,
    activation,
    judge,
)
from edge_agent.wire.bundle import Target
from edge_agent.wire.tensor import Tensor
from tests.serving.test_hosting import hosting
from tests.serving.test_hosting import installed as model
from tests.serving.test_supervisor import CHILD
from tests.update.plant_hub import PlantHub, until
from tests.update.test_update import Device, device

WIDTH = 48


@pytest.fixture
def hub() -> Iterator[PlantHub]:
    with PlantHub().serving() as hub:
        yield hub


def network(seed: int, slow: int = 0, noise: float = 0.0) -> bytes:
    """A classifier of WIDTH classes; `slow` products of a large matrix more that change nothing."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 1, (WIDTH, WIDTH)) + np.random.default_rng(99).normal(0, noise, (WIDTH, WIDTH))
    tensors = [numpy_helper.from_array(weights.astype(np.float32), "w")]
    nodes = [helper.make_node("MatMul", ["x", "w"], ["logits"]), helper.make_node("Softmax", ["logits"], ["sure"])]
    last = "sure"
    if slow:
        big = np.random.default_rng(7).normal(0, 0.01, (512, 512)).astype(np.float32)
        tensors += [numpy_helper.from_array(big, "big"), numpy_helper.from_array(big[:WIDTH], "wide")]
        tensors += [numpy_helper.from_array(big[:, :WIDTH] * 0, "none")]
        nodes.append(helper.make_node("MatMul", ["x", "wide"], ["b0"]))
        nodes += [helper.make_node("MatMul", [f"b{n}", "big"], [f"b{n + 1}"]) for n in range(slow)]
        nodes += [helper.make_node("MatMul", [f"b{slow}", "none"], ["zero"])]
        nodes += [helper.make_node("Add", ["sure", "zero"], ["both"])]
        last = "both"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    shape = ["batch", WIDTH]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())


def asked(seed: int = 0) -> dict[str, Tensor]:
    x = np.random.default_rng(seed).normal(0, 1, (4, WIDTH)).astype(np.float32)
    return {"x": Tensor("float32", [4, WIDTH], x.tobytes())}


def publish(hub: PlantHub, version: str, model: bytes, scratch: Path, **meta: Any) -> Target:
    """A bundle whose golden probe is what this very model answers, right or wrong."""
    (scratch / "m").mkdir(exist_ok=True)
    (scratch / "m" / "model.onnx").write_bytes(model)
    outputs = OnnxNetwork(scratch / "m").infer(asked())
    golden = msgspec.msgpack.encode({"inputs": asked(), "outputs": outputs})
    files = {"model.onnx": model, "probe.msgpack": golden}
    return hub.publish("net", version, files, scratch, probe={"file": "probe.msgpack"}, meta=meta)


class Plant:
    """A device that serves with real workers, and callers that never stop."""

    def __init__(self, it: Device, hosting: Hosting) -> None:
        self.it, self.hosting = it, hosting
        self.answers: list[dict[str, Tensor]] = []
        self.errors: list[str] = []

    async def calls(self) -> None:
        while True:
            try:
                self.answers.append(await self.hosting.infer("net", asked(len(self.answers) % 20)))
            except (Refused, Retry) as error:
                self.errors.append(str(error))
            await asyncio.sleep(0.002)


@asynccontextmanager
async def plant(hub: PlantHub, tmp_path: Path) -> AsyncIterator[Plant]:
    worker = WorkerProcess.engine("network")
    hosting = Hosting({"network": worker})
    running = asyncio.create_task(worker.run())
    try:
        async with device(tmp_path / "state", hub, prober=hosting) as it:
            it.service._switch = hosting.switch
            yield Plant(it, hosting)
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


async def installed(plant: Plant, target: Target) -> None:
    await plant.it.wants(target, "committed")
    await until(lambda: "net" in plant.hosting.running, 30)


async def ended(plant: Plant, target: Target, state: str) -> Any:
    """Wait for the end of an update under traffic."""
    calling = asyncio.create_task(plant.calls())
    try:
        await plant.it.directed({"net": target})
        await until(lambda: (plant.it.last.target, plant.it.last.state) == (target.version, state), 90)
    finally:
        calling.cancel()
        await asyncio.gather(calling, return_exceptions=True)
    return plant.it.last


PLAN = {"share": 1.0, "minimum": 10, "seconds": 30.0, "max_latency_ratio": 50.0}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("mode", ["shadow", "canary"])
async def test_wrong_weights_that_pass_their_own_probe_go_back_by_the_traffic(
    hub: PlantHub, tmp_path: Path, mode: str
) -> None:
    good = publish(hub, "1", network(1), tmp_path)
    wrong = publish(hub, "2", network(2), tmp_path)
    near = publish(hub, "3", network(1, noise=0.01), tmp_path)
    async with plant(hub, tmp_path) as it:
        await installed(it, good)
        it.it.service.configure({"activation": {"net": {"trial": PLAN | {"mode": mode}}}})
        report = await ended(it, wrong, "quarantined")
        assert report.version == "1"
        assert "by traffic: agreement: " in report.error
        assert report.why.version == "2"
        assert report.why.figures.asked >= 10
        assert report.why.figures.agreement < 0.9
        assert 1 <= len(report.why.samples) <= SAMPLES
        assert "x float32[4, 48] [" in report.why.samples[0]
        assert it.errors == []
        right = OnnxNetwork(it.hosting.running["net"].folder).infer(asked(0))["y"].data
        if mode == "shadow":  # no caller ever saw the wrong one
            assert all(answer["y"].data == right for answer in it.answers[::20])
        it.it.service.configure({"activation": {"net": {"trial": PLAN | {"mode": mode, "seconds": 1.5}}}})
        report = await ended(it, near, "committed")
        assert (report.trial.decided, report.why) == ("traffic", None)
        assert report.trial.agreement > 0.99
        assert it.errors == []


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_slow_model_goes_back_by_its_golden_probe_and_one_with_no_traffic_says_what_decided(
    hub: PlantHub, tmp_path: Path
) -> None:
    good = publish(hub, "1", network(1), tmp_path)
    slow = publish(hub, "2", network(1, slow=400), tmp_path)
    wrong = publish(hub, "3", network(2), tmp_path)
    near = publish(hub, "4", network(1, noise=0.01), tmp_path)
    async with plant(hub, tmp_path) as it:
        await installed(it, good)
        it.it.service.configure({"activation": {"net": {"trial": {"seconds": 0.3, "max_latency_ratio": 4.0}}}})
        await it.it.directed({"net": slow})
        await until(lambda: it.it.last.state == "quarantined", 60)
        report = it.it.last
        assert "by probe: latency: " in report.error
        assert report.why is not None
        assert report.why.figures.new_ms > 4 * report.why.figures.old_ms
        assert "times as long" in report.why.samples[0]
        for target, state in ((wrong, "quarantined"), (near, "committed")):
            it.it.service.configure({"activation": {"net": {"trial": {"seconds": 0.3, "max_latency_ratio": 1000}}}})
            await it.it.directed({"net": target})
            await until(lambda: (it.it.last.target, it.it.last.state) == (target.version, state), 60)  # noqa: B023
            shown = it.it.last.why.figures if it.it.last.why else it.it.last.trial
            assert shown is not None
            assert shown.decided == "probe"
            assert "the golden probe decides" in shown.note


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_where_memory_holds_one_model_a_worse_one_makes_way_again(hub: PlantHub, tmp_path: Path) -> None:
    good = publish(hub, "1", network(1), tmp_path)
    wrong = publish(hub, "2", network(2), tmp_path)
    near = publish(hub, "3", network(1, noise=0.01), tmp_path)
    async with plant(hub, tmp_path) as it:
        await installed(it, good)
        before = (await it.hosting.infer("net", asked()))["y"].data
        plan = {"policy": "kill-then-load", "trial": {"seconds": 0.5, "minimum": 5, "max_latency_ratio": 1000}}
        it.it.service.configure({"activation": {"net": plan}})
        report = await ended(it, wrong, "quarantined")
        assert "agreement" in report.error
        assert (await it.hosting.infer("net", asked()))["y"].data == before
        report = await ended(it, near, "committed")
        assert report.trial.decided == "traffic"
        await until(lambda: it.it.service._active.get("net") == near.manifest_sha256, 30)
        assert (await it.hosting.infer("net", asked()))["y"].data != before
        assert it.hosting.workers["network"].starts == 1


async def test_the_log_of_a_model_that_breaks_its_worker_is_kept(hub: PlantHub, tmp_path: Path) -> None:
    good = publish(hub, "1", network(1), tmp_path)
    crash = network(1).replace(b"Softmax", b"Softmix")
    broken = hub.publish("net", "2", {"model.onnx": crash}, tmp_path)
    async with plant(hub, tmp_path) as it:
        await installed(it, good)
        report = await ended(it, broken, "quarantined")
        assert "Softmix" in report.error
        assert any("onnxruntime" in line for line in report.why.log)
        assert it.errors == []


# the parts


async def mirrored(
    plan: Trial, new: Any, old: Any, requests: int = 12, chance: float = 0.0
) -> tuple[Mirror, list[Any]]:  # type: ignore[type-arg]
    mirror: Mirror[int, int] = Mirror(plan, new, lambda a, b: float(a == b), str, lambda: chance)
    answers: list[Any] = []
    for number in range(requests):
        try:
            answers.append(await mirror.ask(number, old))
        except (Refused, Retry) as error:
            answers.append(str(error))
        await asyncio.sleep(0.001)
    await asyncio.gather(*mirror._beside)
    return mirror, answers


async def right(number: int) -> int:
    return number


async def test_a_canary_that_fails_costs_no_caller_its_answer_and_a_bad_request_is_not_its_fault() -> None:
    async def odd(number: int, within_s: float) -> int:
        if number % 2:
            raise Retry("the worker died")
        return number + 1

    async def picky(number: int) -> int:
        if number >= 8:
            raise Refused("no such input")
        return number

    mirror, answers = await mirrored(Trial("canary", share=1), odd, picky)
    assert answers[:8] == [1, 1, 3, 3, 5, 5, 7, 7]
    assert answers[9] == "no such input"
    assert (mirror.traffic.asked, mirror.traffic.failed) == (8, 4)
    assert "the worker died: 1" in mirror.traffic.samples[0]
    with pytest.raises(Worse, match="errors: 4 of 8"):
        await mirror.run()


async def test_a_shadow_never_answers_and_what_is_beside_is_bounded() -> None:
    gate = asyncio.Event()

    async def late(number: int, within_s: float) -> int:
        await gate.wait()
        return -1

    mirror: Mirror[int, int] = Mirror(Trial(share=1), late, lambda a, b: float(a == b), str)
    assert [await mirror.ask(number, right) for number in range(50)] == list(range(50))
    assert len(mirror._beside) == BESIDE
    gate.set()
    await asyncio.gather(*mirror._beside)
    assert (mirror.traffic.asked, mirror.traffic.agreement) == (BESIDE, 0.0)


async def test_a_candidate_that_does_not_answer_in_time_is_slow_not_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    async def late(number: int, within_s: float) -> int:
        await asyncio.sleep(within_s)
        raise Retry(f"no answer within {within_s:g} s")

    monkeypatch.setattr("edge_agent.update.mirror.PATIENCE_S", (0.05, 0.05))
    mirror: Mirror[int, int] = Mirror(Trial(), late, lambda a, b: float(a == b), str)
    with pytest.raises(Worse, match=r"by probe: latency: .* times, at most 2 may be"):
        await mirror.measure(7, await mirror.probe(7, right))


async def test_only_the_share_goes_to_both() -> None:
    async def new(number: int, within_s: float) -> int:
        return number

    mirror, _ = await mirrored(Trial(share=0.2), new, right, chance=0.21)
    assert mirror.traffic.asked == 0
    mirror, _ = await mirrored(Trial(share=0.2), new, right, chance=0.19)
    assert mirror.traffic.asked == 12


@given(
    st.lists(st.tuples(st.floats(0.001, 1), st.floats(0.001, 1), st.floats(0, 1)), min_size=1, max_size=60),
    st.integers(0, 10),
)
def test_a_budget_is_judged_by_what_was_compared(seen: list[tuple[float, float, float]], failed: int) -> None:
    plan, tally = Trial(minimum=5, min_agreement=0.8), Tally()
    for old, new, agreed in seen:
        tally.compared(old, new, agreed)
    for _ in range(failed):
        tally.erred()
    reason, asked = judge(plan, tally, plan.minimum), len(seen) + failed
    if failed > plan.max_error_rate * max(asked, 5):
        assert reason.startswith("errors")
    elif asked < 5:
        assert not reason
    else:
        old, new = (float(np.median([row[at] for row in seen])) for at in (0, 1))
        slow = new > 2 * old and new - old > 0.005
        mean = math.fsum(row[2] for row in seen) / len(seen)
        assert reason.startswith("latency") == slow
        if not slow and abs(mean - 0.8) > 1e-9:
            assert reason.startswith("agreement") == (mean < 0.8)


@given(st.lists(st.text(max_size=9000), max_size=9), st.lists(st.text(max_size=400), max_size=LOG))
def test_evidence_is_bounded_and_shorter_where_it_is_reported(samples: list[str], log: list[str]) -> None:
    tally = Tally()
    for sample in samples:
        tally.keep(sample)
    assert len(tally.samples) <= SAMPLES
    assert all(len(sample) <= SAMPLE for sample in tally.samples)
    short = Why(Figures("probe"), tally.samples, log, "2").short()
    assert short.version == "2"
    assert sum(map(len, short.samples)) + sum(map(len, short.log)) <= 3 * 1024 + 1536


def tensor(*values: float, dtype: str = "float32") -> dict[str, Tensor]:
    code = {"float16": "e", "float32": "f", "float64": "d", "int64": "q"}[dtype]
    kept = [int(value) for value in values] if code == "q" else values
    return {"y": Tensor(dtype, [1, len(values)], struct.pack(f"{len(values)}{code}", *kept))}


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_answers_agree_by_their_direction(dtype: str) -> None:
    assert agreement(tensor(1, 2, 3, dtype=dtype), tensor(1.01, 2, 3, dtype=dtype)) > 0.99
    assert agreement(tensor(1, 0, dtype=dtype), tensor(0, 1, dtype=dtype)) == 0
    assert agreement(tensor(5.0, dtype=dtype), tensor(5.01, dtype=dtype)) == 1
    assert agreement(tensor(5.0, dtype=dtype), tensor(6.0, dtype=dtype)) == 0
    assert agreement(tensor(0, 0, dtype=dtype), tensor(0, 0, dtype=dtype)) == 1
    assert agreement(tensor(1, 2, dtype=dtype), tensor(math.nan, 2, dtype=dtype)) == 0


def test_another_form_or_a_missing_output_is_no_agreement() -> None:
    assert agreement(tensor(1, 2), tensor(1, 2, dtype="float64")) == 0
    assert agreement(tensor(1, 2), {}) == 0
    assert agreement(tensor(7, 8, dtype="int64"), tensor(7, 8, dtype="int64")) == 1
    assert 0 < agreement(tensor(7, 8, dtype="int64"), tensor(7, 9, dtype="int64")) < 1
    assert shown(tensor(1, 2)).startswith("y float32[1, 2] [1, 2, …] sha256 ")


def test_language_models_agree_by_their_calls_then_their_words() -> None:
    assert said_alike(Piece("read(line: 1)"), Piece(" read(line: 1)\n")) == 1
    assert said_alike(Piece("", calls=[("a", "{}")]), Piece("x", calls=[("a", "{}")])) == 1
    assert said_alike(Piece("", calls=[("a", "{}")]), Piece("", calls=[("b", "{}")])) == 0


def test_a_plan_of_the_hub_goes_before_the_authors_and_a_wrong_word_is_named() -> None:
    author = {"policy": "kill-then-load", "trial": {"seconds": 5, "share": 0.5}}
    assert activation(author, {"trial": {"seconds": 9}}) == Activation("kill-then-load", Trial(seconds=9, share=0.5))
    assert activation({}, {}) == Activation()
    for wrong in ({"polcy": "x"}, {"trial": {"share": 2}}, {"trial": {"sekonds": 1}}, {"policy": "at-once"}):
        with pytest.raises(Refused, match="activation says wrongly"):
            activation(wrong)


async def test_an_adapter_is_compared_on_the_requests_that_use_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine(role: str, **options: Any) -> WorkerProcess:
        return WorkerProcess("echo", [*CHILD, "echo"], shares=True, ping_s=0.2)

    monkeypatch.setattr("edge_agent.hosting.WorkerProcess.engine", engine)
    base = model(tmp_path, "lm", "1")
    one, two = (model(tmp_path, "tools", version, base) for version in "12")
    async with hosting() as (host, _):
        await host.switch("lm", base)
        await host.switch("tools", one)

        async def ask(prompt: str) -> None:
            while True:
                await host.generate(Generate("", prompt, adapter=host.speaker().adapter), 10)
                async for _ in host.stream("lm:tools", Generate("", prompt), 10):
                    pass
                await host.generate(Generate("", "ADAPTERS"), 10)  # with no adapter: not its affair

        async def tried(prompt: str, **plan: Any) -> Figures:
            asking = asyncio.create_task(ask(prompt))
            try:
                trial = Trial(share=1.0, minimum=10, max_latency_ratio=1000, **plan)
                return await host.probe("tools", two, Activation(trial=trial))
            finally:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)

        figures = await tried("one two", seconds=1.0, min_agreement=0.9)
        assert (figures.decided, figures.agreement) == ("traffic", 1.0)
        with pytest.raises(Worse, match=r"agreement: 0\.000") as caught:  # each says which adapter speaks
            await tried("ADAPTERS", seconds=20.0, min_agreement=0.9)
        assert "ADAPTERS" in caught.value.why.samples[0]
        assert (await tried("ADAPTERS", seconds=0.5)).agreement == 0.0  # shown, and not judged unless it is asked
        assert host.speaker().title == "tools 1"
