"""No job can stop the daemon: what is wrong with one is its own report, also after a restart in its middle."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from edge_agent.agent import prompt
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.ports import RunnerTools
from edge_agent.agent.tool import tool
from edge_agent.agent.transcript import Step, Task, Transcripts, migrations
from edge_agent.audit import Audit
from edge_agent.errors import Refused, Retry
from edge_agent.store import Connection, Store
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.telemetry import Telemetry
from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import TERMINAL, Job, JobKind, JobReport, JobState
from edge_agent.work import Work
from tests.fakes import LocalTools, ScriptedModel
from tests.sync.brokers import until


@tool()
def double(number: int) -> int:
    """Twice a number."""
    return 2 * number


@tool(risk="act")
def keep_all(values: list[int]) -> int:
    """Keep some values."""
    return len(values)


class Rig:
    """A device's work with its real journal."""

    def __init__(self, store: Store, outbox: Outbox, tools: LocalTools, *says: str) -> None:
        self.store, self.inbox, self.transcripts = store, Inbox(store, outbox), Transcripts(store)
        self.tools = tools
        loop = AgentLoop(ScriptedModel(*says), tools, self.transcripts, lambda *_: True)
        self.work = Work(self.inbox, loop, self.transcripts, tools, Audit(store, outbox), lambda *_: True)

    async def end_of(self, id: str) -> JobReport:
        """The last report of a job, once it is terminal; fails with what ended the work before."""
        running = asyncio.create_task(self.work.run())
        try:
            async with asyncio.timeout(10):
                while await self.inbox.state(id) not in TERMINAL:
                    assert not running.done(), running.result()
                    await asyncio.sleep(0.01)
        finally:
            running.cancel()
            await asyncio.wait([running])
        line = await self.store.read(lambda db: db.execute("SELECT report FROM jobs WHERE id = ?", [id]).fetchone())
        return msgspec.json.decode(line[0], type=JobReport)


@asynccontextmanager
async def rig(path: Path, **fail: Exception) -> AsyncIterator[Rig]:
    store = Store(path, migrations)
    try:
        yield Rig(store, await Outbox.open(store), LocalTools(double, keep_all, fail=dict(fail)))
    finally:
        store.close()


def job(id: str, body: dict[str, Any], kind: JobKind = JobKind.TOOL) -> Job:
    return Job(id, kind, body, "ann", ["operator"], 1.0, 9e9)


@pytest.mark.parametrize("args", [["x"], "x", 3, True, [], "", 0], ids=repr)
@pytest.mark.parametrize("restarted", [False, True])
async def test_a_job_whose_args_are_no_dict_is_refused_and_the_next_one_runs(
    tmp_path: Path, args: Any, restarted: bool
) -> None:
    path = tmp_path / "s.db"
    async with rig(path) as before:
        await before.inbox.accept(job("bad", {"tool": "double", "args": args}))
        await before.inbox.accept(job("good", {"tool": "double", "args": {"number": 4}}))
        if restarted:
            assert (await before.inbox.next()).id == "bad"
    async with rig(path) as after:
        good = await after.end_of("good")
        assert (good.state, good.result) == (JobState.SUCCEEDED, {"result": 8})
        assert await after.inbox.state("bad") is JobState.FAILED
        assert "each argument by its name" in (await after.end_of("bad")).error


@pytest.mark.parametrize("long", ["subject", "idempotency_key", "roles", "body"])
async def test_a_job_that_is_longer_than_a_hub_makes_them_is_rejected_with_the_bound_and_the_next_one_runs(
    tmp_path: Path, long: str
) -> None:
    """Its end, in a record of 64 KiB at most, could not have been told after its call was made."""
    plain = job("bad", {"tool": "keep_all", "args": {"values": [1]}})
    parts: dict[str, Any] = {"roles": ["r" * 100_000], "body": plain.body | {"note": "x" * 100_000}}
    async with rig(tmp_path / "s.db") as made:
        state = await made.inbox.accept(msgspec.structs.replace(plain, **{long: parts.get(long, "x" * 100_000)}))
        assert state is JobState.REJECTED
        await made.inbox.accept(job("good", {"tool": "double", "args": {"number": 4}}))
        assert (await made.end_of("good")).result == {"result": 8}
        assert f"its {long} has 100" in (report := await made.end_of("bad")).error
        assert "at most" in report.error
        assert made.tools.calls == [("double", {"number": 4})]
        assert made.store.path.stat().st_size < 200_000


async def test_a_job_whose_id_no_report_can_name_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    async with rig(tmp_path / "s.db") as made:
        for wrong in (job("i" * 100_000, {}), job("c", {"job": "a"}, JobKind.CANCEL)):
            wrong = msgspec.structs.replace(wrong, subject="s" * 100_000)
            with pytest.raises(Refused, match="of a job has 100002 bytes"):
                await made.inbox.accept(wrong)
            assert await made.inbox.state(wrong.id) is None


async def test_a_call_too_long_for_its_audit_is_refused_before_it_is_made(tmp_path: Path) -> None:
    async with rig(tmp_path / "s.db") as made:
        await made.inbox.accept(job("fits", {"tool": "keep_all", "args": {"values": [1] * 16_000}}))
        await made.inbox.accept(job("long", {"tool": "keep_all", "args": {"values": [1] * 30_000}}))
        assert "so that it can be audited" in (await made.end_of("long")).error
        assert (await made.end_of("fits")).result == {"result": 16_000}
        assert len(made.tools.calls) == 1


@pytest.mark.parametrize("restarted", [False, True])
async def test_an_unexpected_error_in_a_job_is_its_report_with_a_traceback_in_the_log(
    tmp_path: Path, restarted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.db"
    async with rig(path) as before:
        await before.inbox.accept(job("bad", {"tool": "double", "args": {"number": 4}}))
        if restarted:
            await before.inbox.next()
    with caplog.at_level(logging.ERROR, "outrider.work"):
        async with rig(path, double=TypeError("y" * 100_000)) as after:
            report = await after.end_of("bad")
    assert report.state is JobState.FAILED
    assert report.error.startswith("TypeError in the agent: yyy")
    assert "Traceback" in caplog.text


@pytest.mark.parametrize(
    "number", [10**400, float("inf"), float("nan"), [], {"a": 1}, None, "4"], ids=lambda v: type(v)
)
async def test_a_value_of_any_kind_is_refused_with_what_is_wanted(tmp_path: Path, number: Any) -> None:
    async with rig(tmp_path / "s.db") as made:
        with pytest.raises(Refused, match="number of double is a whole number"):
            await made.work.call("double", {"number": number}, Subject("ann", ["operator"], 1.0))


@pytest.mark.parametrize("text", ["", " \n", "x" * (prompt.MAX_REQUEST + 1)], ids=["empty", "blank", "long"])
async def test_a_bad_request_is_refused_before_anything_is_journaled(tmp_path: Path, text: str) -> None:
    async with rig(tmp_path / "s.db") as made:
        with pytest.raises(Refused, match="empty or too long"):
            await made.work.submit(text, Subject("ann", ["operator"], 1.0))
        count = await made.store.read(lambda db: db.execute("SELECT count(*) FROM jobs").fetchone()[0])
        assert count == 0


async def test_a_task_that_finds_the_queue_full_leaves_nothing_behind(tmp_path: Path) -> None:
    async with rig(tmp_path / "s.db") as made:
        made.inbox.limit = 0
        with pytest.raises(Retry, match="too many tasks wait"):
            await made.work.submit("twice 2", Subject("ann", ["operator"], 1.0))
        tables = ("jobs", "tasks", "outbox", "documents")
        counts = "SELECT " + ", ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        assert await made.store.read(lambda db: db.execute(counts).fetchone()) == (0, 0, 0, 0)
        made.inbox.limit = 1
        id = await made.work.submit("twice 2", Subject("ann", ["operator"], 1.0))
        assert await made.store.read(lambda db: db.execute(counts).fetchone()) == (1, 1, 2, 1)
        assert (await made.work.task(id)) is not None


async def test_a_task_that_the_full_disk_ends_has_its_end_and_its_effect_in_the_transcript(tmp_path: Path) -> None:
    class Full(Store):
        full = False

        async def write(self, work: Callable[[Connection], Any], durable: bool = True) -> Any:
            if self.full:
                raise Retry("the disk is full")
            return await super().write(work, durable)

    store = Full(tmp_path / "s.db", migrations)

    @tool(risk="act", idempotent=False)
    def press() -> str:
        """Press a button, and have a full disk."""
        store.full = True
        asyncio.get_running_loop().call_later(0.2, lambda: setattr(store, "full", False))
        return "pressed"

    try:
        outbox = await Outbox.open(store)
        made = Rig(store, outbox, LocalTools(press), "press()")
        id = await made.work.submit("press it", Subject("ann", ["operator"], 1.0))
        report = await made.end_of(id)
        kept = await Transcripts(store).get(id)
        assert kept is not None
        assert (report.state, kept.state, kept.error) == (JobState.FAILED, "failed", report.error)
        assert "the disk is full" in kept.error
        assert [(step.role, step.text) for step in kept.steps][-1] == ("tool", "pressed")
        lines = b"\n".join(line for part in await outbox.batches(0, 9) for line in part.lines)
        assert lines.count(b'"call":"press()"') == 1, "in the audit, once"
    finally:
        store.close()


async def test_the_end_of_a_job_whose_row_is_gone_is_in_the_audit_all_the_same(tmp_path: Path) -> None:
    rows = list[sqlite3.Connection]()

    @tool()
    def forget() -> str:
        """Take the own row out of the journal."""
        with rows[0]:
            rows[0].execute("DELETE FROM jobs WHERE id = 'gone'")
        return "done"

    store = Store(tmp_path / "s.db", migrations)
    rows.append(sqlite3.connect(tmp_path / "s.db", check_same_thread=False))
    try:
        outbox = await Outbox.open(store)
        made = Rig(store, outbox, LocalTools(double, forget))
        await made.inbox.accept(job("gone", {"tool": "forget"}))
        await made.inbox.accept(job("good", {"tool": "double", "args": {"number": 4}}))
        assert (await made.end_of("good")).state is JobState.SUCCEEDED
        records = [msgspec.json.decode(line) for part in await outbox.batches(0, 9) for line in part.lines]
        ends = [each["body"] for each in records if each["body"].get("event") == "end"]
        assert [(end["job"], end["state"]) for end in ends] == [("gone", "succeeded"), ("good", "succeeded")]
    finally:
        rows[0].close()
        store.close()


async def test_what_came_back_while_the_daemon_ends_is_on_disk_when_it_has_ended(tmp_path: Path) -> None:
    async with rig(tmp_path / "s.db") as made:
        task = await made.transcripts.add(Task("t", "x", Subject("ann", ["operator"], 1.0), 1.0))
        writing, go = threading.Event(), threading.Event()

        def slowly(*_: object) -> None:
            writing.set()
            go.wait(5)

        made.transcripts.beside = slowly
        running = asyncio.create_task(made.work.run())
        first = asyncio.create_task(made.transcripts.append(task, Step("tool", "first")))
        await asyncio.to_thread(writing.wait, 5)
        second = asyncio.create_task(made.transcripts.append(task, Step("tool", "second")))
        await asyncio.sleep(0.01)
        threading.Timer(0.1, go.set).start()
        for each in (first, second, running):
            each.cancel()
        await asyncio.wait([first, second, running])
    async with rig(tmp_path / "s.db") as after:
        kept = await after.transcripts.get("t")
        assert kept is not None
        assert [step.text for step in kept.steps] == ["first", "second"]


async def test_events_that_start_nothing_for_want_of_room_are_counted_in_the_telemetry(tmp_path: Path) -> None:
    (tmp_path / "workflows").mkdir()
    head = 'workflow: w\nversion: "1"\nrun_as: [operator]\ntriggers: [{event: link.down}, {event: task.succeeded}]\n'
    (tmp_path / "workflows" / "w.yaml").write_text(f"{head}steps: [{{id: a, tool: double, args: {{number: 2}}}}]\n")
    async with rig(tmp_path / "s.db") as made:
        made.inbox.limit = 0
        for kind in ("link.down", "link.up", "task.succeeded"):  # nothing waits for the second
            await made.work.triggers.event(kind, "", {"id": kind, "depth": 1})
        made.inbox.limit = 9
        await made.work.triggers.event("link.down", "", {"id": "again", "depth": 1})
        outbox = made.inbox._outbox
        before = outbox.last_seq
        tools = cast(RunnerTools, made.tools)
        telemetry = Telemetry(tools, outbox, tmp_path, 60, 60, lost=lambda: made.work.triggers.lost)
        sampling = asyncio.create_task(telemetry.run())
        await until(lambda: outbox.last_seq > before)
        sampling.cancel()
        part = await outbox.batch(before)
    assert part is not None
    assert msgspec.json.decode(part.lines[0])["body"]["health"]["events_lost"] == 2


async def test_tasks_that_were_cancelled_or_expired_before_they_began_are_listed_with_their_end(tmp_path: Path) -> None:
    ann = Subject("ann", ["operator"], 1.0)
    async with rig(tmp_path / "s.db") as made:
        ours, hubs, late = [await made.work.submit(text, ann) for text in ("ours", "the hub's", "late")]
        await made.work.call("cancel_task", {"id": ours}, ann)
        await made.inbox.accept(Job("cancel", JobKind.CANCEL, {"job": hubs}, "bob", [], 1.0, 9e9))
        steady = made.inbox._steady
        made.inbox._steady = lambda: steady() + 90_000  # over a day
        await made.inbox.accept(job("good", {"tool": "double", "args": {"number": 4}}))
        await made.end_of("good")
        listed = {task.id: task for task in await made.work.tasks()}
        assert {id: (task.state, task.error) for id, task in listed.items()} == {
            ours: ("failed", "cancelled by ann"),
            hubs: ("failed", "cancelled by bob"),
            late: ("failed", "it expired while it waited on the device"),
        }
        assert all(task.finished for task in listed.values())


async def test_a_late_word_about_a_task_whose_job_is_forgotten_changes_nothing_of_its_end(tmp_path: Path) -> None:
    ended = Task("old", "x", Subject("ann", ["operator"], 1.0), 1.0, "succeeded", "done", finished=2.0)
    async with rig(tmp_path / "s.db") as made:
        await made.transcripts.add(ended)
        await made.inbox.accept(Job("cancel", JobKind.CANCEL, {"job": "old"}, "bob", [], 1.0, 9e9))
        assert await made.work.task("old") == ended


async def test_a_conversation_goes_on_through_the_api_and_through_jobs(tmp_path: Path) -> None:
    ann = Subject("ann", ["operator"], 1.0)
    async with rig(tmp_path / "s.db") as device:
        ids = [await device.work.submit(text, ann, "talk") for text in ("first", "second")]
        for id in ids:
            await device.end_of(id)
        await device.inbox.accept(job("j", {"text": "third", "conversation": "talk"}, JobKind.TASK))
        await device.end_of("j")
        await device.end_of(await device.work.submit("alone", ann))
        known = {task.text: [each.text for each in task.before] for task in await device.transcripts.latest()}
    assert known == {"first": [], "second": ["first"], "third": ["first", "second"], "alone": []}


@pytest.mark.parametrize("depth", ["x", None, [], {}])
async def test_an_event_that_no_trigger_wrote_ends_its_job_and_not_the_daemon(tmp_path: Path, depth: Any) -> None:
    async with rig(tmp_path / "s.db") as made:
        event = {"name": "nope", "event": {"depth": depth}}
        await made.inbox.accept(job("flow", {"tool": "run_workflow", "args": event}))
        await made.inbox.accept(job("task", {"text": "x", "args": {"event": {"depth": depth}}}, JobKind.TASK))
        await made.inbox.accept(job("good", {"tool": "double", "args": {"number": 4}}))
        assert (await made.end_of("good")).state is JobState.SUCCEEDED
        assert await made.inbox.state("flow") is JobState.FAILED
