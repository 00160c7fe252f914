"""Cancelling a job, whenever it comes: hub and device agree in the end, and nothing begins that was taken back."""

import asyncio
import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edge_agent.errors import Refused
from edge_agent.store import Store
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.messages import JOB_TRANSITIONS, TERMINAL, Job, JobKind, JobReport, JobState, Progress, Record
from hub.db import Database, devices
from hub.errors import Refused as HubRefused
from hub.jobs import Jobs, apply_report

STEPS = ("deliver", "begin", "end", "cancel", "report", "restart", "again", "progress", "lose", "overtake")


class Race:
    """A hub's and a device's real tables; what is between them arrives when a step says so, doubled by `again`."""

    def __init__(self, folder: Path, hub: Database) -> None:
        self.folder, self.hub = folder, hub
        self.down: list[Job] = []
        self.up = 0
        self.begun = self.told = self.withdrawn = False

    async def run(self, steps: list[str]) -> None:
        self.jobs = Jobs(self.hub, self._send)
        await self._start()
        self.id = (await self.jobs.create("d", JobKind.TOOL, {"tool": "x"}, subject="ann", roles=[]))["id"]
        for step in steps:
            await getattr(self, f"_{step}")()
        for _ in range(3):  # everything arrives in the end, and what runs ends
            await self._again()
            while self.down:
                await self._deliver()
            await self._begin()
            await self._end()
            await self._report()
        hub, device = JobState((await self.jobs.get(self.id))["state"]), await self.inbox.state(self.id)
        assert hub is device
        assert hub in TERMINAL
        self.store.close()

    async def _send(self, _device: str, job: Job) -> None:
        self.down.append(job)

    async def _start(self) -> None:
        self.store = Store(self.folder / "device.db")
        self.outbox = await Outbox.open(self.store)
        self.inbox = Inbox(self.store, self.outbox)
        self.told = False

        def on_cancel(_id: str, _why: str) -> None:
            self.told = True

        self.inbox.on_cancel = on_cancel

    async def _deliver(self) -> None:
        if self.down:
            job = self.down.pop(0)
            unbegun = await self.inbox.state(self.id) in (None, JobState.DELIVERED)
            await self.inbox.accept(job)
            self.withdrawn |= job.kind is JobKind.CANCEL and unbegun

    async def _begin(self) -> None:
        if await self.inbox.state(self.id) is JobState.DELIVERED:
            assert (await self.inbox.next()).id == self.id
            assert not self.withdrawn, "it began though it was cancelled before"
            assert not self.begun, "it began twice"
            self.begun = True

    async def _end(self) -> None:
        if await self.inbox.state(self.id) is JobState.RUNNING:
            await asyncio.sleep(0)
            asked = await self.inbox.cancelled(self.id)
            assert asked or not self.told
            await self.inbox.report(self.id, JobState.CANCELLED if asked else JobState.SUCCEEDED)

    async def _cancel(self) -> None:
        with contextlib.suppress(HubRefused):  # it has ended
            await self.jobs.cancel(self.id, "bob")

    async def _progress(self) -> None:
        await self.inbox.progress(self.id, Progress(1, 2, "half"))

    async def _report(self) -> None:
        part = await self.outbox.batch(self.up)
        for record in await _records(part):
            self.up = record.seq
            if record.kind == "job":
                await self.hub.write(lambda c, body=record.body: apply_report(c, "d", body))

    async def _restart(self) -> None:
        self.store.close()
        await self._start()
        assert [job.id for job in await self.inbox.interrupted()] in ([], [self.id])

    async def _lose(self) -> None:
        self.down = self.down[1:]

    async def _overtake(self) -> None:
        self.down = self.down[::-1]

    async def _again(self) -> None:
        await self.jobs.send_queued("d")


async def _records(part: Any) -> list[Record]:
    if part is None:
        return []
    lines = part.lines if hasattr(part, "lines") else b"\n".join(part.blocks).split(b"\n")
    return [msgspec.json.decode(line, type=Record) for line in lines if line]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path_factory.mktemp('hub') / 'hub.db'}")
    with made.engine.begin() as connection:
        connection.execute(devices.insert().values(name="d", public_key="k", enrolled=0.0, desired={}, reported={}))
    yield made
    made.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=14))
@example(["deliver", "begin", "end", "cancel", "report"])  # done before the cancellation was asked for, told after
@example(["cancel", "overtake", "deliver", "deliver"])
@example(["cancel", "lose", "deliver", "restart", "report"])
@example(["deliver", "begin", "report", "cancel", "deliver", "restart", "progress"])
def test_hub_and_device_agree_however_a_cancellation_races(hub: Database, steps: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(Race(Path(folder), hub).run(steps))


async def test_a_cancellation_that_overtakes_its_job_keeps_it_from_ever_running(store: Store, outbox: Outbox) -> None:
    inbox = Inbox(store, outbox, lambda: 0.0)
    cancel = Job("cancel-a", JobKind.CANCEL, {"job": "a"}, "bob", [], 0.0, 99.0)
    assert await inbox.accept(cancel) is None
    assert await inbox.accept(Job("a", JobKind.TASK, {"text": "x"}, "ann", [], 0.0, 99.0)) is None
    assert await inbox.state("a") is JobState.CANCELLED
    assert await inbox.accept(cancel) is None  # again changes nothing
    assert outbox.last_seq == 1


async def test_progress_is_told_only_while_a_job_runs(store: Store, outbox: Outbox) -> None:
    inbox = Inbox(store, outbox, lambda: 0.0)
    await inbox.accept(Job("a", JobKind.TASK, {"text": "x"}, "ann", [], 0.0, 99.0))
    await inbox.progress("a", Progress(1))
    before = outbox.last_seq
    await inbox.next()
    await inbox.progress("a", Progress(1, 3, "read_sensor()"))
    await inbox.report("a", JobState.SUCCEEDED)
    await inbox.progress("a", Progress(2))
    assert outbox.last_seq == before + 3


def test_a_report_of_progress_never_changes_a_state() -> None:
    assert JobState.RUNNING not in JOB_TRANSITIONS[JobState.RUNNING]
    told = msgspec.json.encode(JobReport("a", JobState.RUNNING, 1.0))
    assert b"progress" not in told, "a report without progress is written as it was before there was any"


async def test_what_ended_cannot_be_reported_otherwise(store: Store, outbox: Outbox) -> None:
    inbox = Inbox(store, outbox, lambda: 0.0)
    await inbox.accept(Job("a", JobKind.TASK, {"text": "x"}, "ann", [], 0.0, 99.0))
    await inbox.accept(Job("c", JobKind.CANCEL, {"job": "a"}, "bob", [], 0.0, 99.0))
    with pytest.raises(Refused, match="cannot become"):
        await inbox.report("a", JobState.SUCCEEDED)
