"""A run does what its definition says, once, by the rights of whom it runs as; triggers start it when they should."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent.calls import Call
from edge_agent.agent.tool import Check, ToolError, tool
from edge_agent.agent.transcript import Step, Task, Transcripts, migrations
from edge_agent.agent.workflow import Trigger
from edge_agent.agent.workflow_run import Runner
from edge_agent.agent.workflow_triggers import Library, Threshold, Triggers
from edge_agent.errors import Refused, Retry
from edge_agent.store import Store
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed
from tests.agent import plant
from tests.agent.test_work import rig
from tests.agent.test_workflow import Gauge, read_gauge
from tests.fakes import LocalTools

ADA = Subject("ada", ["operator"], 1.0)
GRANTS = Grants(1, 0.0, 1e12, SHIPPED_ROLES, [])
HEAD = 'workflow: w\nversion: "1"\nrun_as: [operator]\n'


@tool(risk="act", idempotent=False)
def press(number: int, key: str) -> str:
    """Press a button."""
    return f"pressed {number} {key}"


def permit(subject: Subject, action: str, name: str) -> bool:
    return allowed(GRANTS, subject, action, name, now=2.0)


class Bench:
    def __init__(self, store: Store) -> None:
        self.transcripts, self.tools = Transcripts(store), LocalTools(read_gauge, press, *plant.ALL)
        self.slept: list[float] = []
        self.runner = Runner(self.tools, self.transcripts, permit, clock=lambda: 5.0, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def do(self, steps: str, subject: Subject = ADA, **inputs: Any) -> Task:
        await self.runner.accept("r1", f"{HEAD}{steps}", inputs, subject, {"id": "e"})
        return await self.runner.run("r1")


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    store = Store(tmp_path / "state.db", migrations)
    yield Bench(store)
    store.close()


GAUGE = "steps:\n  - {id: look, tool: read_gauge, args: {line: 1}}\n"


async def test_results_flow_into_arguments_and_conditions_choose(bench: Bench) -> None:
    task = await bench.do(
        GAUGE + "  - {id: off, tool: jam, depends_on: [look], when: steps.look.result.value > 9}\n"
        "  - {id: on, tool: press, depends_on: [off], args: {number: '${steps.look.result.count + 1}'}}\n"
        "result: steps.on.result\n"
    )
    assert (task.state, task.result) == ("succeeded", "pressed 2 r1:on")
    assert [name for name, _ in bench.tools.calls] == ["read_gauge", "press"]
    assert task.answer == "look succeeded, off skipped, on succeeded"


async def test_for_each_item_is_its_own_call_with_its_own_key(bench: Bench) -> None:
    task = await bench.do("steps:\n  - {id: p, tool: press, for_each: '[7, 8]', args: {number: '${item}'}}\n")
    assert task.result == {"p": ["pressed 7 r1:p[0]", "pressed 8 r1:p[1]"]}


class Overlap:
    """Tools that see how many of them run at once; each waits a while until as many as are `wanted` do."""

    def __init__(self, tools: LocalTools, wanted: int = 1) -> None:
        self.wanted = wanted
        self._call, self.now, self.most, self.order = tools.call, list[str](), 0, list[str]()
        tools.call = self.call  # type: ignore[method-assign]

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        self.now.append(name)
        self.order.append(name)
        self.most = max(self.most, len(self.now))
        assert "purge" not in self.now or len(self.now) == 1, "a dangerous call runs beside others"
        for _ in range(100):
            await asyncio.sleep(0.005)
            if self.most >= self.wanted:
                break
        try:
            return await self._call(name, args, timeout_s)
        finally:
            self.now.remove(name)


@pytest.mark.parametrize(
    ("head", "tool", "most"), [("", "read_gauge", 4), ("", "press", 1), ("parallel: 3\n", "press", 3)]
)
async def test_items_and_independent_steps_run_beside_each_other_as_far_as_they_may(
    bench: Bench, head: str, tool: str, most: int
) -> None:
    seen, args = Overlap(bench.tools, most), "line: 1" if tool == "read_gauge" else "number: '${item}'"
    steps = f"steps:\n  - {{id: a, tool: {tool}, for_each: '[1, 2, 3, 4]', args: {{{args}}}}}\n"
    task = await bench.do(head + steps + steps.replace("id: a", "id: b").partition("\n")[2])
    assert (task.state, seen.most, len(seen.order), task.answer) == ("succeeded", most, 8, "a succeeded, b succeeded")
    if tool == "press":
        assert task.result["b"] == [f"pressed {n} r1:b[{n - 1}]" for n in (1, 2, 3, 4)]


async def test_an_act_is_a_barrier_between_what_stands_before_and_after_it(bench: Bench) -> None:
    seen = Overlap(bench.tools)
    look = "  - {{id: {0}, tool: read_gauge, args: {{line: 1}}}}\n"
    steps = "steps:\n" + look.format("a") + "  - {id: p, tool: press, args: {number: 1}}\n"
    await bench.do(steps + look.format("b") + look.format("c"))
    assert (seen.order, seen.most) == (["read_gauge", "press", "read_gauge", "read_gauge"], 2)


async def test_after_a_failure_nothing_begins_and_what_is_under_way_ends(bench: Bench) -> None:
    seen = Overlap(bench.tools)
    bench.tools._fail = {"press": ToolError("stuck")}
    steps = "parallel: 2\nsteps:\n  - {id: p, tool: press, for_each: '[1, 2, 3, 4, 5]', args: {number: '${item}'}}\n"
    task = await bench.do(steps + "  - {id: later, tool: press, depends_on: [p], args: {number: 9}}\n")
    assert (task.state, len(seen.order), seen.now) == ("failed", 2, [])
    assert [entry.at for entry in task.steps if entry.role == "tool"] == ["p[0]", "p[1]"]


async def test_a_run_that_is_out_of_time_leaves_nothing_behind(bench: Bench) -> None:
    async def never(name: str, args: dict[str, Any], timeout_s: float) -> Any:
        await asyncio.Event().wait()

    bench.tools.call = never  # type: ignore[method-assign]
    before = asyncio.all_tasks()
    task = await bench.do("timeout_s: 0.05\n" + GAUGE + "  - {id: too, tool: read_gauge, args: {line: 2}}\n")
    assert (task.state, task.error, asyncio.all_tasks()) == ("failed", "out of time: 0.05 s", before)


async def test_a_failed_call_is_made_again_as_often_as_the_step_says(bench: Bench) -> None:
    task = await bench.do("steps:\n  - {id: j, tool: jam, retry: {times: 2, delay_s: 3}}\n")
    assert (task.state, len(bench.tools.calls), bench.slept) == ("failed", 3, [3.0, 3.0])
    assert "step j: the feeder is jammed" in task.error


@pytest.mark.parametrize(
    ("on_error", "state", "called"),
    [("fail", "failed", []), ("continue", "succeeded", ["press"]), ("help", "succeeded", ["stamp", "press"])],
)
async def test_an_error_ends_the_run_or_is_handled(bench: Bench, on_error: str, state: str, called: list[str]) -> None:
    steps = f"steps:\n  - {{id: j, tool: jam, on_error: {on_error}}}\n"
    steps += "  - {id: after, tool: press, depends_on: [j], args: {number: 1}}\n"
    helper = "  - {id: help, tool: stamp, args: {text: '${steps.j.error}'}}\n"
    task = await bench.do(steps + helper * (on_error == "help"))
    assert (task.state, [name for name, _ in bench.tools.calls][1:]) == (state, called)


async def test_a_step_that_handles_two_errors_at_once_runs_once_and_is_not_taken_for_cut_off(bench: Bench) -> None:
    @tool(risk="act", idempotent=False)
    def ring() -> str:
        """Ring the bell."""
        return "rung"

    bench.tools._tools["ring"] = ring
    steps = (
        "parallel: 4\nsteps:\n  - {id: a, tool: read_gauge, args: {line: 1}, on_error: halt}\n"
        "  - {id: b, tool: read_gauge, args: {line: 2}, on_error: halt}\n  - {id: halt, tool: ring}\n"
    )
    bench.tools._fail["read_gauge"] = ToolError("no signal")
    task = await bench.do(steps)
    assert (task.state, task.error) == ("succeeded", "")
    assert [name for name, _ in bench.tools.calls] == ["read_gauge", "read_gauge", "ring"]


async def test_an_effect_that_is_unknown_ends_the_run_unless_the_tool_takes_its_key(bench: Bench) -> None:
    bench.tools._fail = {"stamp": Retry("the tools process died"), "press": Retry("the tools process died")}
    task = await bench.do("steps:\n  - {id: s, tool: stamp, args: {text: x}, retry: {times: 3}}\n")
    assert (task.state, len(bench.tools.calls)) == ("failed", 1)
    assert "effect unknown of s" in task.error
    await bench.runner.accept(
        "r2", f"{HEAD}steps:\n  - {{id: p, tool: press, args: {{number: 1}}, retry: {{times: 2}}}}\n", {}, ADA
    )
    await bench.runner.run("r2")
    assert [args["key"] for name, args in bench.tools.calls if name == "press"] == ["r2:p"] * 3


async def test_an_intent_with_no_result_is_settled_after_a_crash(bench: Bench) -> None:
    task = await bench.runner.accept("r1", f"{HEAD}steps:\n  - {{id: s, tool: stamp, args: {{text: x}}}}\n", {}, ADA)
    await bench.transcripts.append(task, Step("intent", call=Call("stamp", {"text": "x"}), at="s"))
    ended = await bench.runner.run("r1")
    assert (ended.state, bench.tools.calls) == ("failed", [])
    assert "effect unknown" in ended.error


async def test_a_result_that_is_not_as_declared_fails_the_step(bench: Bench) -> None:
    async def lies(name: str, args: dict[str, Any], timeout_s: float) -> Any:
        return {"value": "much", "count": 1, "name": "g", "alarms": []}

    bench.tools.call = lies  # type: ignore[method-assign]
    task = await bench.do(GAUGE)
    assert "the value of read_gauge is 'much', which is no float" in task.error


async def test_a_run_has_the_rights_of_its_subject_at_every_call(bench: Bench) -> None:
    with pytest.raises(Refused, match="otto may not use press"):
        await bench.do("steps:\n  - {id: p, tool: press, args: {number: 1}}\n", Subject("otto", ["auditor"], 1.0))
    await bench.runner.accept("r1", f"{HEAD}{GAUGE}", {}, ADA)
    bench.runner.acts._allowed = lambda *_: False
    assert "may not use read_gauge" in (await bench.runner.run("r1")).error


async def test_inputs_are_checked_and_defaults_fill_in(bench: Bench) -> None:
    inputs = "inputs:\n  - {name: line, kind: int, low: 1, high: 3, default: 2}\n"
    steps = "steps:\n  - {id: look, tool: read_gauge, args: {line: '${inputs.line}'}}\n"
    with pytest.raises(Refused, match="out of range"):
        await bench.do(inputs + steps, line=9)
    await bench.do(inputs + steps)
    assert bench.tools.calls == [("read_gauge", {"line": 2})]


def test_a_stream_fires_once_after_its_debounce_until_it_was_quiet() -> None:
    threshold = Threshold(Trigger(above=7.0, clear=5.0, for_s=2.0))
    readings = [(0, 8), (1, 6), (2, 8), (3, 8), (4, 8), (5, 6), (6, 9), (7, 4), (8, 9), (10, 9), (11, 9)]
    assert [at for at, value in readings if threshold.feed(value, at)] == [4, 10]
    below = Threshold(Trigger(below=3.0))
    assert [below.feed(value, 0.0) for value in (4, 2, 1, 3.5, 2)] == [False, True, False, False, True]
    with pytest.raises(ValueError, match="no number"):
        Threshold(Trigger(above=7.0)).feed(float("nan"), 0.0)


def test_a_clock_that_is_set_back_does_not_hold_up_what_a_lasting_reading_starts() -> None:
    threshold = Threshold(Trigger(above=7.0, for_s=30.0))
    assert [threshold.feed(8.0, at) for at in (9000, 9010, 100, 120, 130)] == [False] * 4 + [True]


@pytest.mark.parametrize(("hour", "starts"), [(9, 0), (2, 1)], ids=["by day", "soon after its time"])
async def test_a_clock_that_is_set_right_after_a_weekend_does_not_start_the_nightly_run_by_day(
    tmp_path: Path, hour: int, starts: int
) -> None:
    (tmp_path / "w.yaml").write_text(f"{HEAD}triggers:\n  - cron: '30 2 * * *'\n  - cron: '* * * * *'\n{GAUGE}")
    now, started = [datetime(2024, 1, 5, 17, tzinfo=UTC).timestamp()], list[str]()

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        started.append(id)

    triggers = Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start, lambda: now[0])
    now[0] = datetime(2026, 1, 8, hour, 40, tzinfo=UTC).timestamp()
    before = time.process_time()
    await triggers.look()
    assert time.process_time() - before < 2.0, "it went through each minute of two years"
    assert len([id for id in started if "cron-0" in id]) == starts
    assert len([id for id in started if "cron-1" in id]) == 1


async def test_a_start_that_the_full_disk_holds_up_is_made_when_there_is_room_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "w.yaml").write_text(
        f"{HEAD}triggers:\n  - cron: '* * * * *'\n  - {{mqtt: door, debounce_s: 60}}\n"
        "  - {stream: read_gauge(line=2), value: result.value, above: 1, every_s: 5, for_s: 10}\n" + GAUGE
    )
    now, full, started = [600.0], [True], list[str]()

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        if full[0]:
            raise Retry("the disk is full")
        started.append(id)

    triggers = Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start, lambda: now[0])
    for now[0] in (601.0, 661.0, 667.0, 673.0):
        await triggers.look()
    with pytest.raises(Retry):
        await triggers.message("door", 1)
    assert caplog.text.count("w is not started: the disk is full") == 1
    full[0] = False
    now[0] = 679.0
    await triggers.look()
    await triggers.message("door", 1)
    await triggers.look()
    assert started == ["w-cron-0-660", "w-stream-2-679000", "w-mqtt-1-679000"]


async def test_cron_and_stream_start_runs_and_a_set_back_clock_starts_none_twice(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(
        f"{HEAD}triggers:\n  - cron: '* * * * *'\n"
        "  - {stream: read_gauge(line=2), value: result.value, above: 1, every_s: 5}\n" + GAUGE
    )
    now, started = [600.0], list[str]()

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        assert (subject.name, subject.roles) == ("workflow:w", ["operator"])
        started.append(id)

    triggers = Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start, lambda: now[0])
    for now[0] in (601.0, 630.0, 661.0, 655.0, 662.0):
        await triggers.look()
    assert [id for id in started if "cron" in id] == ["w-cron-0-660", "w-cron-0-660"]
    assert len([id for id in started if "stream" in id]) == 1


@pytest.mark.parametrize(
    ("zone", "site", "hour"), [("", "UTC", 2), ("Europe/Vienna", "UTC", 1), ("", "Asia/Tokyo", 17)]
)
async def test_a_cron_line_is_of_the_workflows_zone_or_the_sites(
    tmp_path: Path, zone: str, site: str, hour: int
) -> None:
    text = f"{HEAD}zone: '{zone}'\ntriggers:\n  - cron: '30 2 * * *'\n{GAUGE}"
    (tmp_path / "w.yaml").write_text(text)
    begin = datetime(2026, 1, 10, tzinfo=UTC).timestamp()
    now, started = [begin], list[str]()

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        started.append(id)

    triggers = Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start, lambda: now[0])
    triggers.zone = lambda: site
    for _ in range(24):
        now[0] += 3600
        await triggers.look()
    assert started == [f"w-cron-0-{int(begin) + hour * 3600 + 1800}"]


async def test_the_hour_that_comes_twice_starts_a_nightly_run_once_and_the_skipped_one_does_too(tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text(f"{HEAD}zone: Europe/Vienna\ntriggers:\n  - cron: '30 2 * * *'\n{GAUGE}")
    started = set[str]()

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        started.add(id)

    for day in (datetime(2026, 3, 28, 12, tzinfo=UTC), datetime(2026, 10, 24, 12, tzinfo=UTC)):
        now = [day.timestamp()]
        triggers = Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start, lambda now=now: now[0])
        started.clear()
        for _ in range(24 * 60):
            now[0] += 60
            await triggers.look()
        assert len(started) == 1


async def test_a_stream_is_sampled_at_its_interval_though_each_look_comes_late(tmp_path: Path) -> None:
    trigger = "{stream: read_gauge(line=2), value: result.value, above: 1, every_s: 5}"
    (tmp_path / "w.yaml").write_text(f"{HEAD}triggers:\n  - {trigger}\n{GAUGE}")
    now, sampled = [600.0], list[float]()

    @tool()
    def read_gauge(line: plant.Line) -> Gauge:
        """Read a gauge."""
        sampled.append(now[0])
        return {"value": 0.5, "count": 1, "name": "g", "alarms": []}

    async def start(*_: Any) -> None: ...

    triggers = Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start, lambda: now[0])
    for now[0] in (600.0, 604.9, 605.4, 609.9, 610.0, 615.0, 700.3, 705.2, 705.3, 650.0, 655.0):
        await triggers.look()
    assert sampled == [600.0, 605.4, 610.0, 615.0, 700.3, 705.3, 650.0, 655.0]


@pytest.mark.parametrize(
    ("trigger", "head"),
    [
        ("stream: 'gone(line=1)', above: 1", ""),
        ("stream: 'read_gauge(line=9)', above: 1", ""),
        ("stream: 'what?', above: 1", ""),
        ("stream: 'none()', above: 1", ""),
        ("mqtt: 'a/#/b'", ""),
        ("cron: '* *'", ""),
        ("cron: '* * * * *'", "zone: Mars/Crater\n"),
    ],
)
async def test_a_trigger_that_means_nothing_on_this_device_is_told_and_stops_nothing(
    tmp_path: Path, trigger: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "w.yaml").write_text(f"{HEAD}{head}triggers: [{{{trigger}}}]\n{GAUGE}")

    async def start(*_: Any) -> None: ...

    triggers = Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start)
    await triggers.look()
    assert triggers.topics() == set()
    assert f"w, {trigger.partition(':')[0].replace('mqtt', 'topic')} 0: " in caplog.text


async def test_a_stream_does_not_fire_again_for_the_same_excursion_after_a_restart(tmp_path: Path) -> None:
    trigger = "{stream: read_gauge(line=2), value: result.value, above: 1, every_s: 5}"
    (tmp_path / "w.yaml").write_text(f"{HEAD}triggers:\n  - {trigger}\n{GAUGE}")
    now, started, value = [600.0], list[str](), [1.5]

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        started.append(id)

    @tool()
    def read_gauge(line: plant.Line) -> Gauge:
        """Read a gauge."""
        return {"value": value[0], "count": 1, "name": "g", "alarms": []}

    def restarted() -> Triggers:
        kept = tmp_path / "triggers.json"
        return Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start, lambda: now[0], kept)

    for reading, count in ((1.5, 1), (1.5, 1), (0.5, 1), (1.5, 2), (1.5, 2)):
        value[0], now[0] = reading, now[0] + 10
        await restarted().look()
        assert len(started) == count
    (tmp_path / "triggers.json").write_text("{")
    await restarted().look()
    assert len(started) == 3


@pytest.mark.parametrize(
    ("wanted", "kind", "name", "starts"),
    [
        ("link.down", "link.down", "", True),
        ("link.down", "link.up", "", False),
        ("update.rolled_back", "update.rolled_back", "minilm", True),
        ("update.rolled_back:minilm", "update.rolled_back", "minilm", True),
        ("update.rolled_back:other", "update.rolled_back", "minilm", False),
        ("approval.denied", "approval.denied", "", True),
    ],
)
async def test_an_event_starts_what_waits_for_it(
    tmp_path: Path, wanted: str, kind: str, name: str, starts: bool
) -> None:
    (tmp_path / "w.yaml").write_text(f"{HEAD}triggers: [{{event: '{wanted}'}}]\n{GAUGE}")
    started = list[Any]()

    async def start(name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        started.append(event)

    triggers = Triggers(Library(tmp_path), LocalTools(read_gauge), permit, start)
    await triggers.event(kind, name, {"id": "1", "depth": 1})
    assert started == [{"id": "1", "depth": 1, "kind": kind, "name": name}] * starts


async def test_a_device_runs_a_workflow_by_job_and_by_the_end_of_another(tmp_path: Path) -> None:
    folder = tmp_path / "workflows"
    folder.mkdir()
    steps = "steps:\n  - {id: d, tool: double, args: {number: 4}}\n"
    (folder / "a.yaml").write_text(f'workflow: a\nversion: "1"\n{steps}')
    text = f'workflow: b\nversion: "1"\nrun_as: [operator]\ntriggers: [{{event: "workflow.succeeded:a"}}]\n{steps}'
    (folder / "b.yaml").write_text(text)
    async with rig(tmp_path / "s.db") as made:
        id = (await made.work.call("run_workflow", {"name": "a"}, ADA))["id"]
        after = f"b-event-0-{id}"
        for each in (after, id):
            report = await made.end_of(each)
            assert (report.state, report.result["result"]) == ("succeeded", {"d": 8})
        again = await made.work.task(after)
        assert again is not None
        assert again.subject.name == "workflow:b"
        with pytest.raises(Refused, match="there is no workflow 'c'"):
            await made.work.call("run_workflow", {"name": "c"}, ADA)


@pytest.mark.parametrize(
    "text", ["steps: [", "version: !!int two", "version: !!float x", "version: !!seq x", "version: !x:int y"]
)
async def test_a_file_that_is_no_workflow_stops_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    (tmp_path / "good.yaml").write_text(f"{HEAD}{GAUGE}")
    library = Library(tmp_path)
    with caplog.at_level(logging.ERROR):
        assert list(library.all()) == ["w"]
        library.all()
    assert caplog.text.count("bad.yaml is no workflow") == 1


async def test_a_tool_error_in_a_for_each_says_which_item(bench: Bench) -> None:
    bench.tools._fail = {"press": ToolError("stuck")}
    task = await bench.do("steps:\n  - {id: p, tool: press, for_each: '[7, 8]', args: {number: '${item}'}}\n")
    assert [step.at for step in task.steps if not step.ok] == ["p[0]"]


async def test_what_was_done_though_not_as_it_should_be_is_not_done_again(tmp_path: Path) -> None:
    moved = [0]

    @tool()
    def place() -> int:
        """Where it is."""
        return -1

    @tool(risk="act", idempotent=False, check=Check("place", {}, equals="$by", value=""))
    def move(by: int) -> int:
        """Move on."""
        moved[0] += by
        return moved[0]

    store = Store(tmp_path / "w.db", migrations)
    runner = Runner(LocalTools(place, move), Transcripts(store), lambda *_: True)
    steps = "steps:\n  - {id: p, tool: move, args: {by: 10}, retry: {times: 3, delay_s: 0}}\n"
    await runner.accept("r", f'workflow: w\nversion: "1"\n{steps}', {}, Subject("ada", ["operator"], 1.0))
    task = await runner.run("r")
    assert (task.state, moved) == ("failed", [10])
    store.close()
