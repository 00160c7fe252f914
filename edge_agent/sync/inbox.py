"""Jobs that came down, journaled before anything is done about them.

Invariants: a job is accepted once, by id and by idempotency key; it changes state only along `JOB_TRANSITIONS`, and the
record that reports the change is enqueued in the same transaction; an expired job is reported expired, never run,
judged by the time that the hub signed and what passed since, however this machine's clock is set (until it has signed
one since the start, a job that this clock would drop, or that it calls not yet made, waits); one that is longer than
a hub makes them (BOUNDS) is rejected as it comes, so that whatever is told of a job fits a record;
`next` journals `running` before it hands a job out, so a job found running at start was interrupted and is never run
again by itself. A cancellation drops a job that waits, for ever one that is not known yet, and tells `on_cancel` of one
that runs; that it was asked for is on disk.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from edge_agent.errors import Refused
from edge_agent.rhythm import steady, wait_up_to
from edge_agent.store import Connection, Store
from edge_agent.sync.outbox import Outbox
from edge_agent.trouble import Trouble
from edge_agent.wire.messages import JOB_TRANSITIONS, TERMINAL, Job, JobKind, JobReport, JobState, Progress

MAX_WAITING = 1000  # jobs delivered and not begun
KEPT = 10_000  # of so many newest jobs the ended ones are remembered, so that a repeated one is known
REPORT_PRIORITY, PROGRESS_PRIORITY = 1, 6
LOOK_S = 30.0  # a job that waits for the time is looked at again
BOUNDS = {"id": 256, "subject": 512, "idempotency_key": 1024, "roles": 16 << 10, "body": 64 << 10}
"""Bytes of JSON of a job from the hub: of its body as many as the hub takes, of names more."""
_COLUMNS = "id, idempotency_key, state, expires, updated, job"


class Inbox:
    """The journal of jobs. `next()` is how work leaves it."""

    def __init__(
        self,
        store: Store,
        outbox: Outbox,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = steady,
    ) -> None:
        self._store, self._outbox, self._clock, self._steady = store, outbox, clock, steady
        self._ahead: float | None = None  # of the hub's clock before `steady`
        self._own: dict[str, float] = {}  # until when (steady) work of this device itself may wait
        self._held, self._unsure = False, Trouble(logging.getLogger(__name__), "jobs wait for the hub to tell the time")
        self.limit = MAX_WAITING
        self.on_cancel: Callable[[str, str], None] = lambda _id, _why: None
        self.unbegun: Callable[[Connection, str, str, float], None] = lambda *_: None  # in the transaction of its end
        self._arrived = asyncio.Event()
        self._arrived.set()

    def now(self) -> float:
        """The hub's time, seconds since the Unix epoch; this machine's while the hub has told none since the start."""
        return self._clock() if self._ahead is None else self._steady() + self._ahead

    def hear(self, ts: float) -> None:
        """What the hub's clock says at this moment, signed."""
        if self._ahead is None:
            self._arrived.set()  # what waited for it
        self._ahead = ts - self._steady()

    async def accept(self, job: Job) -> JobState | None:
        """Journal it: its state, or None when it is known by id already. Durable when this returns."""
        return await self._store.write(lambda db: self.put(db, job))

    async def next(self) -> Job:
        """The oldest job not begun, journaled as running; waits for one."""
        while True:
            self._arrived.clear()
            job = await self._store.write(self._begin)
            if self._held:
                self._unsure.tell("this machine's clock cannot be right")
            if job is not None:
                return job
            await wait_up_to(LOOK_S if self._held else None, self._arrived)

    async def interrupted(self) -> list[Job]:
        """Jobs that were running when the last process ended: resume them or report them failed."""
        return await self.under_way("running")

    async def under_way(self, *states: str) -> list[Job]:
        """Jobs of these states; without any, those that wait or run."""
        states = states or ("delivered", "running")
        rows = f"SELECT job FROM jobs WHERE state IN ({', '.join('?' * len(states))}) ORDER BY n"
        return await self._store.read(lambda db: [_job(line) for (line,) in db.execute(rows, states)])

    async def report(
        self,
        id: str,
        state: JobState,
        result: dict[str, Any] | None = None,
        error: str = "",
        beside: Callable[[Connection], None] = lambda _: None,
    ) -> None:
        """Change the state and tell the hub, both or neither. Raises Refused, `beside` done alone, when it may not."""
        report = JobReport(id, state, self._clock(), result or {}, error)

        def work(db: Connection) -> None:
            self._report(db, report)
            beside(db)

        try:
            await self._store.write(work)
        except Refused:
            await self._store.write(beside)
            raise

    async def cancelled(self, id: str) -> bool:
        """Whether a job that runs was to be ended."""
        asked = "SELECT 1 FROM jobs WHERE id = ? AND expires = 0"
        return await self._store.read(lambda db: db.execute(asked, [id]).fetchone() is not None)

    async def progress(self, id: str, progress: Progress) -> None:
        """Tell how far a job is that runs."""
        body = msgspec.to_builtins(JobReport(id, JobState.RUNNING, self._clock(), progress=progress))

        def tell(db: Connection) -> None:
            if db.execute("SELECT 1 FROM jobs WHERE id = ? AND state = 'running'", [id]).fetchone():
                self._outbox.put(db, "job", body, PROGRESS_PRIORITY)

        await self._store.write(tell)

    async def state(self, id: str) -> JobState | None:
        """What became of a job; None when it is not known."""
        row = await self._store.read(lambda db: db.execute("SELECT state FROM jobs WHERE id = ?", [id]).fetchone())
        return JobState(row[0]) if row else None

    def _cancel(self, db: Connection, id: str, job: Job) -> None:
        row, now = db.execute("SELECT state FROM jobs WHERE id = ?", [id]).fetchone(), self._clock()
        why = f"cancelled by {job.subject}"
        if row is None:
            values = [id, "", JobState.QUEUED, job.expires, now, msgspec.json.encode(job)]
            db.execute(f"INSERT INTO jobs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", values)
        if row is None or row[0] == JobState.DELIVERED:
            self._report(db, JobReport(id, JobState.CANCELLED, now, {}, why))
        elif row[0] == JobState.RUNNING:
            db.execute("UPDATE jobs SET expires = 0 WHERE id = ?", [id])
            db.on_commit(lambda: self.on_cancel(id, why))

    def put(self, db: Connection, job: Job, own: bool = False) -> JobState | None:
        """The same inside the caller's transaction; `own` work, not the hub's, expires by `now` and may be longer."""
        if too_long := "" if own else _too_long(job):
            job = msgspec.structs.replace(job, body={}, subject="", roles=[], idempotency_key="")
        if job.kind is JobKind.CANCEL:
            self._cancel(db, str(job.body.get("job", ""))[:64], job)
            return None
        if db.execute("SELECT 1 FROM jobs WHERE id = ?", [job.id]).fetchone():
            return None
        now = self._clock()
        key = job.idempotency_key
        twin = db.execute("SELECT id FROM jobs WHERE idempotency_key = ? AND idempotency_key != ''", [key]).fetchone()
        waiting = db.execute("SELECT count(*) FROM jobs WHERE state = 'delivered'").fetchone()[0]
        values = [job.id, key, JobState.QUEUED, job.expires, now, msgspec.json.encode(job)]
        db.execute(f"INSERT INTO jobs ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)", values)
        if too_long:
            state, error = JobState.REJECTED, too_long
        elif twin:
            state, error = JobState.REJECTED, f"the same as job {twin[0]}: both carry idempotency key {key!r}"
        elif self._ahead is not None and job.expires <= self.now():
            state, error = JobState.EXPIRED, f"it expired {self.now() - job.expires:.0f} s before it came"
        elif waiting >= self.limit:
            state, error = JobState.REJECTED, f"{waiting} jobs wait on this device already: send it again later"
        else:
            state, error = JobState.DELIVERED, ""
            db.on_commit(self._arrived.set)
            if own:
                db.on_commit(partial(self._own.__setitem__, job.id, self._steady() + job.expires - self.now()))
        self._report(db, JobReport(job.id, state, now, {}, error))
        return state

    def _begin(self, db: Connection) -> Job | None:
        oldest = "SELECT n, job FROM jobs WHERE state = 'delivered' AND n > ? ORDER BY n LIMIT 1"
        n, self._held = 0, False
        while row := db.execute(oldest, [n]).fetchone():
            n, job, now = row[0], _job(row[1]), self._clock()
            match self._over(job):
                case True:
                    error = "it expired while it waited on the device"
                    self._report(db, JobReport(job.id, JobState.EXPIRED, now, {}, error))
                case False:
                    self._report(db, JobReport(job.id, JobState.RUNNING, now))
                    return job
                case None:
                    self._held = True
        return None

    def _over(self, job: Job) -> bool | None:
        """Whether its time is over; None while nobody can say."""
        if (until := self._own.get(job.id)) is not None:
            return self._steady() >= until
        if self._ahead is None and not job.created <= self._clock() < job.expires:
            return None
        return job.expires <= self.now()

    def _report(self, db: Connection, report: JobReport) -> None:
        row = db.execute("SELECT state FROM jobs WHERE id = ?", [report.id]).fetchone()
        if row is None:
            raise Refused(f"no job {report.id!r} is known here", "it was never accepted, or ended long ago")
        before = JobState(row[0])
        if report.state not in JOB_TRANSITIONS[before]:
            raise Refused(f"job {report.id} is {before}: it cannot become {report.state}", "report a job's end once")
        body = msgspec.to_builtins(report)
        db.execute(
            "UPDATE jobs SET state = ?, updated = ?, report = ? WHERE id = ?",
            [report.state, report.ts, msgspec.json.encode(report), report.id],
        )
        self._outbox.put(db, "job", body, REPORT_PRIORITY)
        if before is JobState.DELIVERED:
            db.on_commit(partial(self._own.pop, report.id, None))
        if report.state in TERMINAL:
            if before is not JobState.RUNNING:
                self.unbegun(db, report.id, report.error, report.ts)
            ended = ", ".join(f"'{each}'" for each in sorted(TERMINAL))
            db.execute(f"DELETE FROM jobs WHERE n <= (SELECT max(n) FROM jobs) - {KEPT} AND state IN ({ended})")


def _too_long(job: Job) -> str:
    """What is too long about it, if something is. Raises Refused when nobody could be told that by a report."""
    for part, most in BOUNDS.items():
        if (size := len(msgspec.json.encode(getattr(job, part)))) > most:
            if part == "id" or job.kind is JobKind.CANCEL:
                raise Refused(f"the {part} of a job has {size} bytes", f"at most {most}")
            return f"its {part} has {size} bytes: a device takes at most {most}"
    return ""


def _job(line: bytes) -> Job:
    return msgspec.json.decode(line, type=Job)
