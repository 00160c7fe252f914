"""A dangerous call is made once, for an approval of exactly this call by who may give it, and for nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypedDict

import msgspec
import pytest

from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Call
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.policy import Forbidden
from edge_agent.agent.tool import Undo, tool
from edge_agent.agent.transcript import Step, Task, Transcripts, migrations
from edge_agent.audit import Audit
from edge_agent.errors import Refused
from edge_agent.store import Store
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, Subject, allowed
from edge_agent.wire.messages import Job, JobKind, JobState
from edge_agent.wire.signing import SigningKey, from_text, to_text
from edge_agent.work import Work
from tests.fakes import LocalTools, ScriptedModel
from tests.sync.brokers import until


class Before(TypedDict):
    """What an act gave."""

    before: int


ANN, OTTO = Subject("ann", ["admin"], 1.0), Subject("otto", ["operator"], 1.0)
FLOW = 'workflow: w\nversion: "1"\nsteps:\n  - {id: p, tool: purge, args: {line: 2}}\n'


class Device:
    """A device's work over a store, a clock and grants that a test may change."""

    def __init__(self, store: Store, outbox: Outbox, key: SigningKey, *says: str) -> None:
        self.now, self.grants, self.purged = 1000.0, Grants(1, 0.0, 1e12, SHIPPED_ROLES, []), list[int]()
        self.store, self.inbox, self.transcripts = store, Inbox(store, outbox, lambda: self.now), Transcripts(store)

        @tool(risk="danger", idempotent=False)
        def purge(line: int) -> str:
            """Empty a line."""
            self.purged.append(line)
            return "gone"

        @tool()
        def look() -> str:
            """Look."""
            return "calm"

        @tool(risk="act", undo=Undo("set_speed", {"percent": "$result.before"}))
        def set_speed(percent: int) -> Before:
            """Set the speed."""
            before, self.speed = self.speed, percent
            return {"before": before}

        self.speed = 10
        tools, clock = LocalTools(purge, look, set_speed), lambda: self.now
        approvals = Approvals(key, self.allowed)
        model = ScriptedModel(*says)
        loop = AgentLoop(model, tools, self.transcripts, self.allowed, clock=clock, approvals=approvals)
        audit = Audit(store, outbox)
        parts = (self.inbox, loop, self.transcripts, tools, audit, self.allowed)
        self.work = Work(*parts, clock=clock, approvals=approvals)

    def allowed(self, subject: Subject, action: str, resource: str) -> bool:
        return allowed(self.grants, subject, action, resource, now=self.now)

    async def until(self, id: str, *states: str) -> Task:
        async with asyncio.timeout(20):
            while True:
                task = await self.transcripts.get(id)
                if task and task.state in states and (id in self.work._waiting or "waiting" not in states):
                    return task
                await asyncio.sleep(0.01)

    async def approve(self, id: str, by: Subject = ANN, approve: bool = True, call: str = "") -> None:
        task = await self.transcripts.get(id)
        assert task is not None
        args = {"id": id, "call": call or task.steps[-1].text, "approve": approve}
        await self.work.call("approve_call", args, by)


@asynccontextmanager
async def device(folder: Path, *says: str) -> AsyncIterator[Device]:
    store = Store(folder / "s.db", migrations)
    made = Device(store, await Outbox.open(store), SigningKey.load_or_create(folder / "key"), *says)
    running = asyncio.create_task(made.work.run())
    try:
        yield made
    finally:
        running.cancel()
        await asyncio.wait([running])
        store.close()


async def ask(made: Device) -> str:
    id = await made.work.submit("empty line 2", OTTO)
    await made.until(id, "waiting")
    return id


async def test_the_call_is_shown_waits_and_is_made_once_while_other_work_goes_on(tmp_path: Path) -> None:
    async with device(tmp_path, "purge(line=2)", "look()") as made:
        id = await ask(made)
        task = await made.transcripts.get(id)
        assert task is not None
        assert (task.steps[-1].call, made.purged) == (Call("purge", {"line": 2}), [])
        other = await made.work.submit("look", OTTO)
        assert (await made.until(other, "succeeded", "failed")).state == "succeeded"
        with pytest.raises(Forbidden, match="otto may not approve purge"):
            await made.approve(id, OTTO)
        with pytest.raises(Refused, match="not the call which waits"):
            await made.approve(id, call="0" * 64)
        await made.approve(id)
        assert (await made.until(id, "succeeded", "failed")).result == "gone"
        with pytest.raises(Refused, match="waits for no approval"):
            await made.approve(id)
        assert made.purged == [2]


async def test_an_ask_and_an_approval_outlive_a_reboot(tmp_path: Path) -> None:
    async with device(tmp_path, "purge(line=2)") as made:
        id = await ask(made)
    async with device(tmp_path) as again:
        await asyncio.sleep(0.3)
        assert (await again.until(id, "waiting")).runs == 1
        await again.transcripts.append(
            task := await again.until(id, "waiting"),
            again.work._verdicts._approvals.give(task, task.steps[-1].text, True, ANN, again.now),  # type: ignore[union-attr]
        )
    async with device(tmp_path) as third:
        assert (await third.until(id, "succeeded", "failed")).state == "succeeded"
        assert third.purged == [2]


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ("deny", "ann denied purge"),
        ("wait", "nobody approved purge(line=2) in time"),
        ("late", "by ann has expired"),
        ("revoke", "ann may no longer approve"),
        ("forge", "is not this device's"),
        ("swap", "is of another call"),
    ],
)
async def test_without_a_good_approval_it_is_never_made(tmp_path: Path, what: str, error: str) -> None:
    async with device(tmp_path, "purge(line=2)") as made:
        id = await ask(made)
        if what == "deny":
            await made.approve(id, approve=False)
        elif what == "wait":
            made.now += 3601
        else:
            job = made.work._waiting.pop(id)[0]
            await made.approve(id)
            if what == "late":
                made.now += 3601
            elif what == "revoke":
                made.grants = msgspec.structs.replace(made.grants, revoked={"ann": 2.0})
            else:
                await made.store.write(lambda db: spoil(db, id, what))
            await made.work._job(job, again=True)
        task = await made.until(id, "succeeded", "failed")
        assert (task.state, made.purged) == ("failed", [])
        assert error in task.error
        assert await made.inbox.state(id) in (JobState.RUNNING, JobState.FAILED)


def spoil(db: Any, id: str, what: str) -> None:
    n, body = db.execute("SELECT n, body FROM task_steps WHERE task = ? ORDER BY n DESC LIMIT 1", [id]).fetchone()
    step = msgspec.json.decode(body, type=Step)
    assert step.call is not None
    if what == "swap":  # somebody who can write the file, but not sign, points the approval at another call
        step = msgspec.structs.replace(step, call=msgspec.structs.replace(step.call, args={"line": 3}))
    else:
        text, _, signature = step.text.partition(".")
        text = to_text(from_text(text).replace(b"9", b"8").replace(b"4600", b"9600"))
        step = msgspec.structs.replace(step, text=f"{text}.{signature}")
    db.execute("UPDATE task_steps SET body = ? WHERE task = ? AND n = ?", [msgspec.json.encode(step), id, n])


async def test_the_hub_approves_by_a_job_and_a_workflow_waits_as_a_task_does(tmp_path: Path) -> None:
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows/w.yaml").write_text(FLOW)
    async with device(tmp_path) as made:
        id = (await made.work.call("run_workflow", {"name": "w"}, OTTO))["id"]
        task = await made.until(id, "waiting")
        body = {"tool": "approve_call", "args": {"id": id, "call": task.steps[-1].text}}
        await made.inbox.accept(Job("j1", JobKind.TOOL, body, "ann", ["admin"], 1.0, 9e9))
        done = await made.until(id, "succeeded", "failed")
        assert (done.state, done.result, made.purged) == ("succeeded", {"p": "gone"}, [2])
        assert done.answer == "p succeeded"


@pytest.mark.parametrize("answer", ["deny", "wait"])
async def test_a_step_that_nobody_approved_goes_to_its_on_error_and_is_not_asked_for_again(
    tmp_path: Path, answer: str
) -> None:
    (tmp_path / "workflows").mkdir()
    handled = FLOW.replace("{line: 2}}", "{line: 2}, on_error: calm, retry: {times: 3}}")
    handled += "  - {id: calm, tool: look}\nresult: steps.p.error\n"
    (tmp_path / "workflows/w.yaml").write_text(handled)
    async with device(tmp_path) as made:
        id = (await made.work.call("run_workflow", {"name": "w"}, OTTO))["id"]
        await made.until(id, "waiting")
        if answer == "deny":
            await made.approve(id, approve=False)
        else:
            made.now += 3601
        done = await made.until(id, "succeeded", "failed")
        why = "ann denied purge(line=2)" if answer == "deny" else "nobody approved purge(line=2) in time"
        assert (done.state, done.answer, done.result) == ("succeeded", "p failed, calm succeeded", why)
        assert (made.purged, [step.role for step in done.steps].count("ask")) == ([], 1)


async def test_a_trigger_starts_no_second_run_while_one_of_before_a_restart_waits(tmp_path: Path) -> None:
    (tmp_path / "workflows").mkdir()
    head = FLOW.replace("steps", "run_as: [operator]\ntriggers: [{event: link.down}, {event: link.up}]\nsteps")
    (tmp_path / "workflows" / "w.yaml").write_text(head)
    down, up = {"id": "1", "depth": 1}, {"id": "2", "depth": 1}
    async with device(tmp_path) as made:
        await asyncio.gather(
            made.work.triggers.event("link.down", "", down), made.work.triggers.event("link.up", "", up)
        )
        await made.until("w-event-0-1", "waiting")
    async with device(tmp_path) as made:
        await made.until("w-event-0-1", "waiting")
        await made.work.triggers.event("link.up", "", up)
        assert [job.id for job in await made.inbox.under_way()] == ["w-event-0-1"], "two would ask for the same act"
        await made.approve("w-event-0-1")
        await made.until("w-event-0-1", "succeeded")
        await until(lambda: not made.work.current)
        await made.work.triggers.event("link.up", "", up)
        await made.until("w-event-1-2", "waiting")
        assert made.purged == [2]


async def test_a_run_of_somebody_who_was_revoked_before_it_began_ends_when_the_device_hears_of_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "workflows").mkdir()
    (tmp_path / "workflows" / "w.yaml").write_text(FLOW)
    async with device(tmp_path) as made:
        id = (await made.work.call("run_workflow", {"name": "w"}, OTTO))["id"]
        await made.until(id, "waiting")
        made.grants = msgspec.structs.replace(made.grants, revoked={"otto": made.now - 1})
        await made.approve(id)
        assert "otto may not use purge" in (await made.until(id, "succeeded", "failed")).error
        assert made.purged == []


async def test_a_dangerous_tool_is_not_called_past_a_task(tmp_path: Path) -> None:
    async with device(tmp_path) as made:
        with pytest.raises(Refused, match="needs an approval"):
            await made.work.call("purge", {"line": 2}, ANN)
        assert made.purged == []


async def test_what_a_task_did_is_taken_back_by_who_may_do_that_from_the_last_on_and_once(tmp_path: Path) -> None:
    says = ("set_speed(percent=40)", "set_speed(percent=70)", "none()")
    async with device(tmp_path, *says) as made:
        id = await made.work.submit("to 40, then 70", OTTO)
        await made.until(id, "succeeded")
        assert made.speed == 70
        with pytest.raises(Forbidden):
            await made.work.call("undo_task", {"id": id}, Subject("vic", ["viewer"], 1.0))
        seen = await made.work.call("undo_task", {"id": id, "look": True}, OTTO)
        assert [each["call"] for each in seen["undone"]] == ["set_speed(percent=70)", "set_speed(percent=40)"]
        assert made.speed == 70, "a look takes nothing back"
        done = await made.work.call("undo_task", {"id": id}, OTTO)
        assert [each["by"] for each in done["undone"]] == ["set_speed(percent=40)", "set_speed(percent=10)"]
        assert made.speed == 10
        with pytest.raises(Refused, match="nothing of that"):
            await made.work.call("undo_task", {"id": id}, OTTO)
        with pytest.raises(Refused, match="no task"):
            await made.work.call("undo_task", {"id": "other"}, OTTO)


async def test_what_somebody_did_whose_rights_are_gone_is_taken_back_by_who_has_them(tmp_path: Path) -> None:
    async with device(tmp_path, "set_speed(percent=40)", "none()") as made:
        id = await made.work.submit("to 40", OTTO)
        await made.until(id, "succeeded")
        made.grants = msgspec.structs.replace(made.grants, revoked={"otto": 9e9})
        with pytest.raises(Forbidden, match="otto may not use set_speed"):
            await made.work.call("undo_task", {"id": id}, OTTO)
        done = await made.work.call("undo_task", {"id": id}, ANN)
        assert ([each["ok"] for each in done["undone"]], made.speed) == ([True], 10)
        blocks = await made.store.read(lambda db: db.execute("SELECT lines FROM outbox ORDER BY first").fetchall())
        told = [msgspec.json.decode(line)["body"] for (block,) in blocks for line in block.splitlines()]
        assert [each["subject"] for each in told if each.get("event") == "call"] == ["otto", "ann"]


async def test_a_job_takes_back_what_a_task_did_and_two_who_ask_at_once_do_it_once(tmp_path: Path) -> None:
    async with device(tmp_path, "set_speed(percent=40)", "none()", "set_speed(percent=70)", "none()") as made:
        id = await made.work.submit("to 40, then 70", OTTO)
        await made.until(id, "succeeded")
        body = {"tool": "undo_task", "args": {"id": id}}
        await made.inbox.accept(Job("undo", JobKind.TOOL, body, "otto", ["operator"], 1.0, 9e9))
        await until(lambda: made.speed == 10)
        id = await made.work.submit("to 70", OTTO)
        await made.until(id, "succeeded")
        both = (made.work.call("undo_task", {"id": id}, OTTO) for _ in range(2))
        ends = await asyncio.gather(*both, return_exceptions=True)
        assert sorted(type(end) for end in ends if isinstance(end, Exception)) == [Refused]
        assert made.speed == 10


async def test_of_a_yes_and_a_no_at_once_one_counts(tmp_path: Path) -> None:
    async with device(tmp_path, "purge(line=2)", "none()") as made:
        id = await ask(made)
        ends = await asyncio.gather(made.approve(id), made.approve(id, approve=False), return_exceptions=True)
        assert [type(end) for end in ends if end is not None] == [Refused]
        await made.until(id, "succeeded", "failed")
        assert made.purged == [2]


async def test_an_approval_whose_caller_leaves_while_it_is_written_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with device(tmp_path, "purge(line=2)", "none()") as made:
        id, append = await ask(made), made.transcripts.append

        async def leaving(*given: Any) -> None:
            monkeypatch.undo()
            approving.cancel()
            await append(*given)

        monkeypatch.setattr(made.transcripts, "append", leaving)
        approving = asyncio.create_task(made.approve(id))
        with pytest.raises(asyncio.CancelledError):
            await approving
        assert (await made.until(id, "succeeded", "failed")).state == "succeeded"
        assert made.purged == [2]


async def test_a_caller_cancelled_during_a_commit_leaves_the_transcript_whole(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db", migrations)
    transcripts = Transcripts(store)
    task = await transcripts.add(Task("t", "x", OTTO, 1.0))
    await transcripts.append(task, Step("model", "look()"), later=True)
    for n in range(40):
        writing = asyncio.create_task(transcripts.append(task, Step("tool", str(n)), later=n % 3 == 0))
        await asyncio.sleep(0.0005 * (n % 4))
        writing.cancel()
        await asyncio.wait([writing])
    task.state = "failed"
    await transcripts.save(task)
    kept = await transcripts.get("t")
    assert kept is not None
    assert kept.state == "failed"
    assert [step.text for step in kept.steps] == [step.text for step in task.steps]
    store.close()
