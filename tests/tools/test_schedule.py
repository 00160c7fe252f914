"""What is scheduled starts when it is due, as who asked, once each time, whatever ends in between."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from edge_agent.agent import schedule
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.policy import Forbidden
from edge_agent.agent.tool import Tool, ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.agent.transcript import Transcripts, migrations
from edge_agent.audit import Audit
from edge_agent.errors import Refused, Retry
from edge_agent.store import Store
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed
from edge_agent.wire.messages import TERMINAL, JobState
from edge_agent.work import Work
from tests.agent import plant
from tests.fakes import LocalTools, ScriptedModel
from tests.tools.conftest import EngineContext
from tools.schedule import _time

ADA, EVE = Subject("ada", ["operator"], 100.0), Subject("eve", ["operator"], 100.0)
START = datetime(2027, 1, 15, 12, 0, 0).timestamp()
FLOW = 'workflow: look\nversion: "1"\ninputs: [{name: line, kind: int}]\nsteps:\n  - {id: a, tool: read_sensor, args: '
FLOW += '{sensor: vibration, line: "${inputs.line}"}}\n'


class Clock:
    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


class WithContext(LocalTools):
    """Gives tools the context that they ask for."""

    def __init__(self, clock: Clock, *tools: Tool) -> None:
        super().__init__(*tools)
        self._clock = clock

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        more = {"ctx": EngineContext({}, self._clock())} if self._tools[name].wants_context else {}
        return await super().call(name, args | more, timeout_s)


class Device:
    """A device's work and its journal, with the schedule's pack."""

    def __init__(self, store: Store, outbox: Outbox, folder: Path, clock: Clock, grants: Grants) -> None:
        self.clock, self.inbox, self.transcripts = clock, Inbox(store, outbox), Transcripts(store)
        tools = WithContext(clock, *plant.ALL, *load("tools.schedule", folder / "tools", {}))

        def permit(who: Subject, action: str, of: str) -> bool:
            return allowed(grants, who, action, of, now=clock())

        model = ScriptedModel('read_sensor(sensor="vibration", line=1)')
        agent = AgentLoop(model, tools, self.transcripts, permit, clock=clock)
        self.work = Work(self.inbox, agent, self.transcripts, tools, Audit(store, outbox), permit, clock)
        self.schedule = schedule.Schedule(folder / "tools" / "schedule.db")

    async def look(self) -> list[str]:
        """One round; the ids of all jobs there are."""
        await self.work._intake.schedule.look()
        return [entry.id for entry in self.schedule.all()]

    async def ends(self, id: str) -> JobState | None:
        async with asyncio.timeout(10):
            while (state := await self.inbox.state(id)) not in TERMINAL:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        return state


@asynccontextmanager
async def device(folder: Path, clock: Clock, revoked: dict[str, float] | None = None) -> AsyncIterator[Device]:
    store = Store(folder / "s.db", migrations)
    grants = Grants(1, 0.0, 1e12, SHIPPED_ROLES, [], revoked=revoked or {})
    try:
        yield Device(store, await Outbox.open(store), folder, clock, grants)
    finally:
        store.close()


async def test_a_request_in_some_minutes_becomes_a_task_of_who_asked_once(tmp_path: Path) -> None:
    clock = Clock()
    async with device(tmp_path, clock) as before:
        made = await before.work.call("schedule_request", {"text": "check line 1", "in_minutes": 30}, ADA, "k")
        again = await before.work.call("schedule_request", {"text": "check line 1", "in_minutes": 30}, ADA, "k")
        assert made == again, "the same call, made again after a crash, is the same entry"
        assert (made["at"], made["every_minutes"], made["what"]) == ("2027-01-15 12:30", 0, "check line 1")
        assert await before.look() == [made["id"]]
    clock.now += 1801
    id = f"{made['id']}-{START + 1800:.0f}"
    async with device(tmp_path, clock) as after:
        entry = after.schedule.all()[0]
        await after.work._intake.scheduled(id, entry)  # and the device ends before the entry is taken out
    async with device(tmp_path, clock) as last:
        assert await last.look() == []
        running = asyncio.create_task(last.work.run())
        assert await last.ends(id) is JobState.SUCCEEDED
        running.cancel()
        await asyncio.wait([running])
        task = await last.transcripts.get(id)
        assert task is not None
        assert (task.text, task.subject.name, task.subject.issued_at, task.result["value"]) == (
            "check line 1", "ada", 100.0, 41.5,
        )  # fmt: skip
        assert len(await last.transcripts.latest()) == 1


async def test_a_call_made_again_after_its_entry_started_or_was_taken_out_makes_no_other(tmp_path: Path) -> None:
    clock = Clock()
    async with device(tmp_path, clock) as here:

        async def call(tool: str, key: str, who: Subject = ADA, **args: Any) -> Any:
            return await here.work.call(tool, args, who, key)

        made = await call("schedule_request", "a", text="purge line 2", in_minutes=1)
        clock.now += 61
        assert await here.look() == []
        assert await call("schedule_request", "a", text="purge line 2", in_minutes=1) == made
        with pytest.raises(Refused, match="there is nothing"):
            await call("cancel_schedule", "b", id=made["id"])
        other = await call("schedule_request", "c", text="purge line 3", every_minutes=5)
        for _ in range(2):
            assert await call("cancel_schedule", "d", id=other["id"]) == f"{other['id']} is taken out"
        with pytest.raises(Refused, match="there is nothing"):
            await call("cancel_schedule", "e", EVE, id=other["id"])
        assert await call("schedule_request", "c", text="purge line 3", every_minutes=5) == other
        clock.now += 3000
        assert await here.look() == []
        ids = [f"{made['id']}-{START + 60:.0f}", f"{other['id']}-{START + 361:.0f}"]
        assert [await here.inbox.state(id) for id in ids] == [JobState.DELIVERED, None]


def test_what_is_gone_is_known_for_a_bounded_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "MAX_GONE", 3)
    kept = schedule.Schedule(tmp_path / "schedule.db")
    for n in range(5):
        kept.add(schedule.Entry(f"{n}", ADA, START))
        kept.remove(f"{n}", "ada")
    assert [n for n in range(5) if kept.removed(f"{n}", "ada")] == [2, 3, 4]


@pytest.mark.parametrize(
    ("asked", "text", "due"),
    [
        ("2027-03-27 20:00", "07:30", "2027-03-28 07:30"),
        ("2027-10-30 20:00", "07:30", "2027-10-31 07:30"),
        ("2027-03-28 01:50", "07:30", "2027-03-28 07:30"),
        ("2027-03-28 01:50", "02:30", "2027-03-28 03:30"),
        ("2027-06-01 07:30", "07:30", "2027-06-02 07:30"),
        ("2027-03-27 20:00", "2027-03-28 07:30", "2027-03-28 07:30"),
    ],
)
def test_a_time_is_the_clocks_also_over_a_night_in_which_it_is_set(
    monkeypatch: pytest.MonkeyPatch, asked: str, text: str, due: str
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        now = datetime.fromisoformat(asked).timestamp()
        assert f"{datetime.fromtimestamp(_time(text, now)):%Y-%m-%d %H:%M}" == due
        assert _time(text, now) > now
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("every_min", "first", "looks", "next_"),
    [  # Europe/Berlin sets its clock on at 02:00 of 28 March and back at 03:00 of 31 October 2027
        (1440, "03-26 06:00", ["03-26 06:20", "03-27 06:00", "03-28 06:59", "03-29 06:00"], "03-30 06:00"),
        (1440, "10-30 06:00", ["10-30 06:00", "10-31 06:30", "11-01 06:00"], "11-02 06:00"),
        (1440, "03-27 02:30", ["03-27 02:30", "03-28 03:40", "03-29 02:30"], "03-30 02:30"),
        (2880, "03-26 06:00", ["03-26 06:20", "03-28 06:00"], "03-30 06:00"),
        (720, "03-27 12:00", ["03-27 12:00", "03-28 00:00", "03-28 13:00"], "03-29 01:00"),
        (1440, "03-20 06:00", ["03-30 06:20"], "03-31 06:00"),
        (10, "03-26 06:00", ["03-26 11:09"], "03-26 11:10"),
    ],
)
async def test_each_time_follows_from_the_first_however_late_a_start_was_and_an_outage_is_made_up_for_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every_min: int, first: str, looks: list[str], next_: str
) -> None:
    def at(text: str) -> float:
        return datetime.fromisoformat(f"2027-{text}").timestamp()

    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        started, path = list[str](), tmp_path / "schedule.db"

        async def start(id: str, _: schedule.Entry) -> None:
            started.append(id)

        schedule.Schedule(path).add(schedule.Entry("e", ADA, at(first), every_min * 60.0))
        for look in looks:
            for _ in range(2):  # each time in a new process
                await schedule.Scheduled(path, start, lambda look=look: at(look)).look()  # type: ignore[misc]
        assert len(set(started)) == len(started) == len(looks)
        (entry,) = schedule.Schedule(path).all()
        assert f"{datetime.fromtimestamp(entry.due):%m-%d %H:%M}" == next_
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_clock_that_was_years_ahead_for_a_while_puts_what_comes_again_off_for_no_years(
    tmp_path: Path, restarted: bool
) -> None:
    clock, path, started = Clock(), tmp_path / "schedule.db", list[str]()

    async def start(id: str, _: schedule.Entry) -> None:
        started.append(id)

    far = START + 400 * schedule.DAY_S
    schedule.Schedule(path).add(schedule.Entry("e", ADA, START, schedule.DAY_S))
    schedule.Schedule(path).add(schedule.Entry("far", ADA, far, schedule.DAY_S))
    runs = schedule.Scheduled(path, start, clock)
    ahead, tomorrow = START + 73 * 365 * schedule.DAY_S + 3 * schedule.LATE_S, START + schedule.DAY_S
    for clock.now in (START, ahead, START + 7200.0, START + 7201.0, tomorrow):
        if restarted:
            runs = schedule.Scheduled(path, start, clock)
        await runs.look()
    assert started == [f"e-{START:.0f}", f"e-{tomorrow:.0f}"]
    assert [entry.due for entry in schedule.Schedule(path).all()] == [tomorrow + schedule.DAY_S, far]


async def test_a_workflow_runs_again_and_again_until_it_is_taken_out(tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "look.yaml").write_text(FLOW)
    async with device(tmp_path, clock) as here:
        made = await here.work.call(
            "schedule_workflow", {"name": "look", "inputs": {"line": 2}, "every_minutes": 10}, ADA, "k"
        )
        for _ in range(3):
            clock.now += 600
            assert await here.look() == [made["id"]]
        clock.now += 3 * 600 - 1
        await here.look()
        dues = [START + 600 * n for n in (1, 2, 3, 4, 6)]
        states = [await here.inbox.state(f"{made['id']}-{due:.0f}") for due in dues]
        assert states == [JobState.DELIVERED] * 4 + [None], "what was missed is made up for once"
        with pytest.raises(Refused, match="there is no 'x' in your schedule; there is later-"):
            await here.work.call("cancel_schedule", {"id": "x"}, ADA)
        with pytest.raises(Refused, match="there is nothing"):
            await here.work.call("cancel_schedule", {"id": made["id"]}, EVE)
        assert (await here.work.call("list_schedule", {}, EVE))["scheduled"] == []
        assert len((await here.work.call("list_schedule", {}, Subject("max", ["admin"], 1.0)))["scheduled"]) == 1
        await here.work.call("cancel_schedule", {"id": made["id"]}, ADA)
        clock.now += 600
        assert await here.look() == []


async def test_what_passed_long_ago_or_may_no_longer_run_is_told_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    async with device(tmp_path, clock) as here:
        await here.work.call("schedule_request", {"text": "one", "in_minutes": 5}, ADA, "a")
        await here.work.call("schedule_workflow", {"name": "gone", "in_minutes": 200}, ADA, "b")
        await here.work.call("schedule_request", {"text": "two", "in_minutes": 200}, EVE, "c")
        clock.now += 200 * 60
    with caplog.at_level(logging.INFO, "outrider"):
        async with device(tmp_path, clock, revoked={"eve": START + 60}) as here:
            assert await here.look() == []
            running = asyncio.create_task(here.work.run())
            (task,) = await here.transcripts.latest()
            assert await here.ends(task.id) is JobState.FAILED
            running.cancel()
            await asyncio.wait([running])
            assert "eve may not run:task" in caplog.text, "she was revoked since she asked"
    assert "while the device was off: left out" in caplog.text
    assert "is not started: there is no workflow 'gone'" in caplog.text


async def test_it_is_bounded_and_needs_the_permission_to_run_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "MAX_ENTRIES", 2)
    async with device(tmp_path, Clock()) as here:
        for n in range(2):
            await here.work.call("schedule_request", {"text": "x", "in_minutes": 1}, ADA, f"{n}")
        with pytest.raises(Refused, match="2 things are scheduled already"):
            await here.work.call("schedule_request", {"text": "x", "in_minutes": 1}, ADA, "n")
        with pytest.raises(Forbidden, match="may not use schedule_request"):
            await here.work.call("schedule_request", {"text": "x", "in_minutes": 1}, Subject("a", ["auditor"], 1.0))


async def test_a_full_queue_delays_and_loses_nothing(tmp_path: Path) -> None:
    async with device(tmp_path, Clock()) as here:
        await here.work.call("schedule_request", {"text": "x", "in_minutes": 1}, ADA, "n")
        here.clock.now += 60
        here.inbox.limit = 0
        with pytest.raises(Retry, match="too many tasks wait"):
            await here.look()
        assert len(here.schedule.all()) == 1
        here.inbox.limit = 9
        assert await here.look() == []


@pytest.mark.parametrize(
    ("args", "at", "told"),
    [
        ({"at": "13:30"}, "2027-01-15 13:30", ""),
        ({"at": "07:30"}, "2027-01-16 07:30", ""),
        ({"at": "2027-02-01 06:00", "every_minutes": 60}, "2027-02-01 06:00", ""),
        ({"every_minutes": 15}, "2027-01-15 12:15", ""),
        ({}, "", "say when"),
        ({"at": "13:30", "in_minutes": 3}, "", "say when"),
        ({"at": "2026-01-01 00:00"}, "", "has passed: it is 2027-01-15 12:00"),
        ({"at": "soon"}, "", "'soon' is no time: 07:30"),
        ({"at": "2027-13-01 00:00"}, "", "is no time"),
        ({"every_minutes": 4}, "", "every 4 minutes is too often: 5 at least"),
    ],
)
def test_times_are_said_in_three_ways(tmp_path: Path, args: dict[str, Any], at: str, told: str) -> None:
    (tmp_path / "schedule.toml").write_text("least_every_minutes = 5")
    add = load("tools.schedule", tmp_path, {})[0].function
    who = {"name": "ada", "roles": ["operator"], "issued_at": 1.0}
    more = {"text": "x", "key": "k", "subject": who, "ctx": EngineContext({}, START)}
    if told:
        with pytest.raises(ToolError, match=told):
            add(**more, **args)
    else:
        assert add(**more, **args)["at"] == at
