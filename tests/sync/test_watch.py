"""What cancelling does to work under way, and how far it says it is."""

import asyncio
from collections.abc import Collection
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.fleet import Device as FleetDevice
from bench.fleet import Hub, running, until
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.policy import Forbidden
from edge_agent.agent.tool import tool
from edge_agent.agent.transcript import Transcripts, migrations
from edge_agent.audit import Audit
from edge_agent.errors import Refused
from edge_agent.store import Store
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import TERMINAL, Job, JobKind, JobReport, JobState
from edge_agent.work import Work
from tests.agent.test_approval import Device, device
from tests.fakes import LocalTools, ScriptedModel
from tests.hub.rig import until as eventually
from tests.sync.brokers import until as soon

FLOW = """workflow: w
version: "1"
steps:
  - {id: a, tool: look}
  - {id: b, tool: look, depends_on: [a]}
  - {id: c, tool: look, depends_on: [b]}
"""


@tool()
def look() -> str:
    """Look."""
    return "calm"


class Rig:
    """A device's work; `hold` keeps its tool calls waiting until the test lets one through."""

    def __init__(self, store: Store, outbox: Outbox, *says: str) -> None:
        self.store, self.outbox, self.inbox, self.transcripts = store, outbox, Inbox(store, outbox), Transcripts(store)
        self.called, self.let = asyncio.Event(), asyncio.Event()
        tools = Held(self, look)
        loop = AgentLoop(ScriptedModel(*says), tools, self.transcripts, lambda *_: True)
        self.work = Work(self.inbox, loop, self.transcripts, tools, Audit(store, outbox), lambda *_: True)

    async def give(self, kind: JobKind, body: dict[str, Any]) -> None:
        await self.inbox.accept(Job("j", kind, body, "ann", ["admin"], 1.0, 9e9))

    async def cancel(self) -> None:
        await self.inbox.accept(Job("cancel-j", JobKind.CANCEL, {"job": "j"}, "bob", [], 1.0, 9e9))

    async def ended(self) -> JobReport:
        await eventually(lambda: _in(self.inbox, TERMINAL))
        line = await self.store.read(lambda db: db.execute("SELECT report FROM jobs WHERE id = 'j'").fetchone())
        return msgspec.json.decode(line[0], type=JobReport)


class Held(LocalTools):
    def __init__(self, rig: Rig, *tools: Any) -> None:
        super().__init__(*tools)
        self.rig = rig

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        self.rig.called.set()
        await self.rig.let.wait()
        return await super().call(name, args, timeout_s)


@pytest.fixture
async def rig(tmp_path: Path) -> Any:
    store = Store(tmp_path / "s.db", migrations)
    made = Rig(store, await Outbox.open(store), "look()", "look()", 'answer("done")')
    work = asyncio.create_task(made.work.run())
    try:
        async with asyncio.timeout(20):
            yield made
    finally:
        work.cancel()
        await asyncio.wait([work])
        store.close()


async def test_a_tool_call_is_broken_off_and_its_effect_said_to_be_unknown(rig: Rig) -> None:
    await rig.give(JobKind.TOOL, {"tool": "look", "args": {}})
    await rig.called.wait()
    await rig.cancel()
    report = await rig.ended()
    assert report.state is JobState.CANCELLED
    assert "cancelled by bob" in report.error
    assert "effect is unknown" in report.error


async def test_a_task_stops_after_the_step_it_is_at(rig: Rig) -> None:
    await rig.give(JobKind.TASK, {"text": "look twice"})
    await rig.called.wait()
    await rig.cancel()
    rig.let.set()
    report = await rig.ended()
    assert report.state is JobState.CANCELLED
    assert [call["text"] for call in report.result["steps"] if call["role"] == "tool"] == ["calm"], "it was finished"
    task = await rig.transcripts.get("j")
    assert task is not None
    assert task.state == "failed"


async def test_a_person_at_the_device_ends_a_task_that_runs_and_one_that_waits_its_turn(rig: Rig) -> None:
    ann = Subject("ann", ["operator"], 1.0)
    runs, waits = [await rig.work.submit("look", ann) for _ in range(2)]
    await rig.called.wait()
    assert (await rig.work.call("cancel_task", {"id": waits}, ann))["state"] == "cancelled"
    assert (await rig.work.call("cancel_task", {"id": runs}, ann))["state"] == "running"
    rig.let.set()
    for id in (runs, waits):
        await eventually(lambda id=id: _is_over(rig, id))
        task = await rig.work.task(id)
        assert task is not None
        assert task.error.startswith("cancelled by ann")
        assert len(task.steps) == (3 if id == runs else 0), "the step it was at was finished, and no other"
    with pytest.raises(Refused, match="has cancelled already"):
        await rig.work.call("cancel_task", {"id": runs}, ann)
    with pytest.raises(Refused, match="no task"):
        await rig.work.call("cancel_task", {"id": "local-9"}, ann)
    assert [each["task"] for each in await bodies(rig.outbox, "audit") if each["event"] == "cancel"] == [waits, runs]


async def _is_over(rig: Rig, id: str) -> bool:
    return await rig.inbox.state(id) in TERMINAL


async def test_who_may_give_no_tasks_ends_none(rig: Rig) -> None:
    id = await rig.work.submit("look", Subject("ann", ["operator"], 1.0))
    rig.work._verdicts._allowed = lambda _subject, action, _: action != "run:task"
    with pytest.raises(Forbidden, match="eve may not run:task"):
        await rig.work.call("cancel_task", {"id": id}, Subject("eve", ["viewer"], 1.0))


async def test_a_workflow_tells_how_far_it_is_and_stops_after_its_step(rig: Rig) -> None:
    folder = rig.transcripts.folder / "workflows"
    folder.mkdir(exist_ok=True)
    (folder / "w.yaml").write_text(FLOW)
    await rig.give(JobKind.TOOL, {"tool": "run_workflow", "args": {"name": "w"}})
    await rig.called.wait()
    await rig.cancel()
    rig.let.set()
    report = await rig.ended()
    assert report.state is JobState.CANCELLED, report
    assert [step["role"] for step in report.result["steps"]] == ["plan", "intent", "tool"]


async def test_a_workflow_that_runs_tells_its_steps(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_agent.watch.PROGRESS_S", 0.0)
    folder = rig.transcripts.folder / "workflows"
    folder.mkdir(exist_ok=True)
    (folder / "w.yaml").write_text(FLOW)
    rig.let.set()
    await rig.give(JobKind.TOOL, {"tool": "run_workflow", "args": {"name": "w"}})
    assert (await rig.ended()).state is JobState.SUCCEEDED
    told = await progress(rig.outbox)
    assert [(each["done"], each["total"]) for each in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[0]["text"] == "a: look()"


async def test_each_call_in_a_task_and_its_end_are_in_the_devices_chain(rig: Rig) -> None:
    rig.let.set()
    await rig.give(JobKind.TASK, {"text": "look twice"})
    await rig.ended()
    await eventually(lambda: _told(rig.outbox, "end"))
    told = [each for each in await bodies(rig.outbox, "audit") if each["event"] in ("call", "end")]
    assert [each["event"] for each in told] == ["call", "call", "end"]
    assert {(each["task"], each["call"], each["ok"], each["subject"]) for each in told[:2]} == {
        ("j", "look()", True, "ann")
    }
    assert (told[2]["job"], told[2]["state"]) == ("j", "succeeded")


async def _told(outbox: Outbox, event: str) -> bool:
    return any(each["event"] == event for each in await bodies(outbox, "audit"))


async def test_progress_is_told_at_a_bounded_rate(rig: Rig) -> None:
    rig.let.set()
    await rig.give(JobKind.TASK, {"text": "look twice"})
    assert (await rig.ended()).state is JobState.SUCCEEDED
    assert len(await progress(rig.outbox)) == 1, "two steps in the same second"


async def progress(outbox: Outbox) -> list[dict[str, Any]]:
    return [each["progress"] for each in await bodies(outbox, "job") if each.get("progress")]


async def bodies(outbox: Outbox, kind: str) -> list[dict[str, Any]]:
    part = await outbox.batch(0)
    assert part is not None
    text = b"\n".join(part.lines if hasattr(part, "lines") else part.blocks)
    records = [msgspec.json.decode(line) for line in text.split(b"\n")]
    return [each["body"] for each in records if each["kind"] == kind]


async def test_one_that_waits_for_an_approval_goes_no_further(tmp_path: Path) -> None:
    async with device(tmp_path, "purge(line=2)") as made:
        await _cancel_waiting(made)


async def _in(inbox: Inbox, states: Collection[JobState]) -> bool:
    return await inbox.state("j") in states


async def _cancel_waiting(made: Device) -> None:
    await made.inbox.accept(Job("j", JobKind.TASK, {"text": "empty line 2"}, "otto", ["operator"], 1.0, 9e9))
    await made.until("j", "waiting")
    await made.inbox.accept(Job("cancel-j", JobKind.CANCEL, {"job": "j"}, "bob", [], 1.0, 9e9))
    task = await made.until("j", "failed")
    assert "cancelled by bob" in task.error
    await eventually(lambda: _in(made.inbox, {JobState.CANCELLED}))
    assert made.purged == []


async def test_a_job_cancelled_before_the_daemon_died_does_not_go_on_afterwards(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", migrations)
    made = Rig(store, await Outbox.open(store), "look()")
    await made.give(JobKind.TASK, {"text": "look"})
    await made.inbox.next()
    await made.cancel()
    after = Rig(store, made.outbox, "look()")
    work = asyncio.create_task(after.work.run())
    async with asyncio.timeout(10):
        report = await after.ended()
    work.cancel()
    await asyncio.wait([work])
    assert (report.state, after.called.is_set()) == (JobState.CANCELLED, False)
    store.close()


async def test_over_the_true_wire_a_running_tool_is_killed_and_its_next_call_works(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        device = FleetDevice("press-1", tmp_path, hub)
        token = (await hub.post("/v1/enrolments", {"name": "press-1"}))["token"]
        await device.start("--hub", hub.url, "--token", token, "--pack", "tests.sync.slow_pack")
        try:
            await until("the device", 60, _there, hub)
            job = await hub.post("/v1/devices/press-1/jobs", {"kind": "tool", "body": {"tool": "press"}})
            await soon(lambda: list(tmp_path.rglob("began")), 30)
            await hub.post(f"/v1/jobs/{job['id']}/cancel", {})
            seen = await until("the end", 10, _ended, hub, job["id"])
            assert (seen["state"], seen["cancelled_by"]) == ("cancelled", "admin")
            assert "effect is unknown" in seen["error"]
            job = await hub.post("/v1/devices/press-1/jobs", {"kind": "tool", "body": {"tool": "look"}})
            assert (await until("the next", 30, _ended, hub, job["id"]))["state"] == "succeeded"
        finally:
            await device.stop()


async def _there(hub: Hub) -> bool | None:
    return any(each["presence"]["online"] for each in await hub.get("/v1/devices")) or None


async def _ended(hub: Hub, job: str) -> dict[str, Any] | None:
    seen: dict[str, Any] = await hub.get(f"/v1/jobs/{job}")
    return seen if seen["state"] in TERMINAL and "confirmed" not in seen["error"] else None
