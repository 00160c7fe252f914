"""What came long ago goes: records, uploads and finished jobs past a configured age, a bounded number of rows at once.

What is not pruned, and why:
- A device's epoch, watermark and twin. They are in `devices`; by them, not by old records, a record that comes again is
  skipped, a device learns where it stands and a rollout judges. Rollouts read reports of the last minutes only.
- The hub's audit log: each entry holds the hash of the one before it; and those of devices, unless it is asked for.
- The newest record of all: SQLite would give its id again, and who reads past an id would miss the next record.
- What is not anchored yet; and from the first seq of a dead letter on, as replaying that takes what is not here.
  Letters past the age go first.
- A job that has not ended, or whose time is not over: it is still sent or taken back. A fan-out goes whole, when all of
  its jobs may. An idempotency key holds as long as its job is kept.

Invariants: a device's records go in the order of (epoch, seq), so its chain loses at most its beginning, and
`prune:device` in the hub's own chain says up to where, with the hash that the rest follows from and what was wrong with
what went. How old a record is its id says: older than the first one that came within the age, whatever the hub's clock
said when it came. The horizon moves by STRIDE_S a run at most: a clock that is years ahead for an hour costs a day of
the oldest.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.wire.messages import TERMINAL, JobState
from hub import audit
from hub.blobs import Uploads
from hub.db import PRUNED, Database, dead_letters, devices, fanouts, jobs, settings, telemetry
from hub.db import audit as entries
from hub.errors import Fatal

log = logging.getLogger(__name__)
DAY_S = 86400.0
FIRST_S, RUN_S, STRIDE_S = 300.0, 3600.0, DAY_S
BATCH, PAUSE_S = 500, 0.02  # rows in a transaction, seconds in which others have the writer


class Retention:
    """Prunes once an hour; an age of 0 days keeps for ever. Raises Fatal for one that is less than a day."""

    def __init__(
        self, db: Database, uploads: Uploads, records_days: float, jobs_days: float, *, audit_too: bool = False
    ) -> None:
        for days in (records_days, jobs_days):
            if days and not days >= 1:
                raise Fatal(f"{days:g} days is no age to keep something to", "at least 1, or 0 for ever")
        self._db, self._uploads, self._audit_too = db, uploads, audit_too
        self._days = {"records": records_days, "jobs": jobs_days, "uploads": records_days}  # a record names an upload

    async def run(self) -> None:
        await asyncio.sleep(FIRST_S)
        while True:
            await self.prune()
            await asyncio.sleep(RUN_S)

    async def report(self) -> dict[str, Any]:
        """Of records, jobs, uploads: the age in days, since when they are here, how many the last run and all took."""
        return await self._db.read(self._state)

    async def prune(self) -> dict[str, Any]:
        """One run; the report then."""
        now, state = time.time(), await self.report()
        for what, prune in (("records", self._records), ("jobs", self._jobs), ("uploads", self._files)):
            kept = state[what]
            before = min(now - kept["days"] * DAY_S, kept["before"] + STRIDE_S)
            kept["last"] = 0
            if kept["days"] and before > kept["before"]:  # else for ever, or the clock stands before the last run
                kept["before"], kept["last"] = before, await prune(before, now)
                kept["total"] += kept["last"]
        state["at"] = now
        row = {"key": "retention", "value": msgspec.json.encode(state).decode()}

        def save(connection: sa.Connection) -> None:
            connection.execute(settings.delete().where(settings.c.key == "retention"))
            connection.execute(settings.insert().values(row))

        await self._db.write(save)
        log.info("pruned %d records, %d jobs, %d uploads", *(state[what]["last"] for what in self._days))
        return state

    def _state(self, connection: sa.Connection) -> dict[str, Any]:
        known = connection.execute(sa.select(settings.c.value).where(settings.c.key == "retention")).scalar()
        state: dict[str, Any] = msgspec.json.decode(known) if known else {"at": None}
        oldest = {
            "records": sa.select(telemetry.c.received).order_by(telemetry.c.id).limit(1),
            "jobs": sa.select(sa.func.min(jobs.c.created)),
        }
        oldest["uploads"] = oldest["records"]
        for what, query in oldest.items():
            if what not in state:
                first = connection.execute(query).scalar() or time.time() - self._days[what] * DAY_S
                state[what] = {"before": first, "last": 0, "total": 0}
            state[what]["days"] = self._days[what]
        return state

    async def _records(self, before: float, now: float) -> int:
        old = dead_letters.delete().where(~dead_letters.c.received.between(before, now))
        await self._db.write(lambda c: c.execute(old))
        top = await self._db.read(lambda c: _top(c, before, now))
        first = sa.select(telemetry.c.id).where(telemetry.c.device == devices.c.name, _of(self._audit_too))
        first = first.order_by(telemetry.c.epoch, telemetry.c.seq).limit(1)
        due = sa.select(devices.c.name).where(first.scalar_subquery() <= top).order_by(devices.c.name)
        names = await self._db.read(lambda c: c.execute(due).scalars().all())
        prune = partial(prune_records, top=top, audit_too=self._audit_too)
        return sum([await self._batches(partial(prune, device=name)) for name in names])

    async def _jobs(self, before: float, _now: float) -> int:
        return await self._batches(lambda c: prune_jobs(c, before))

    async def _files(self, before: float, _now: float) -> int:
        return await self._uploads.prune(before)

    async def _batches(self, prune: Callable[[sa.Connection], int]) -> int:
        gone = 0
        while taken := await self._db.write(prune):
            gone += taken
            await asyncio.sleep(PAUSE_S)
        return gone


def _top(connection: sa.Connection, before: float, now: float) -> int:
    """The highest id of what may go."""
    young = sa.select(telemetry.c.id).where(telemetry.c.received.between(before, now)).order_by(telemetry.c.id).limit(1)
    anchored = sa.select(settings.c.value).where(settings.c.key == "anchored")
    newest = sa.select(sa.func.max(telemetry.c.id))
    first, known, last = (connection.execute(query).scalar() for query in (young, anchored, newest))
    return min(int(known or 0), int(last or 0) - 1, int(first or last or 0) - 1)


def _of(audit_too: bool) -> sa.ColumnElement[bool]:
    return sa.true() if audit_too else telemetry.c.kind != "audit"


def prune_records(connection: sa.Connection, device: str, top: int, audit_too: bool) -> int:
    """Take away some of a device's oldest records, up to the id `top`. How many."""
    letters = sa.select(dead_letters.c.epoch, dead_letters.c.first).where(dead_letters.c.device == device)
    letter = connection.execute(letters.order_by(dead_letters.c.epoch, dead_letters.c.first).limit(1)).first()
    barrier = tuple(letter) if letter else (math.inf, 0)
    query = sa.select(telemetry).where(telemetry.c.device == device, _of(audit_too))
    rows = connection.execute(query.order_by(telemetry.c.epoch, telemetry.c.seq).limit(BATCH)).all()
    gone = list(takewhile(lambda row: row.id <= top and (row.epoch, row.seq) < barrier, rows))
    chains, last = audit.Chains(), None
    told = sa.select(entries.c.detail).where(PRUNED, entries.c.actor == device)
    if known := connection.execute(told.order_by(entries.c.id.desc()).limit(1)).scalar():
        chains.know("prune:device", msgspec.json.decode(known))
    for row in gone:
        if row.kind == "audit" and chains.take(device, row.body):
            last = row
    if last is not None:
        chain = chains.verdict()[device]
        detail = {
            "device": device,
            "epoch": last.epoch,
            "seq": last.seq,
            "head": chain["head"],
            "wrong": chain["wrong"],
        }
        audit.append(connection, device, "prune:device", detail)
    connection.execute(telemetry.delete().where(telemetry.c.id.in_([row.id for row in gone])))
    return len(gone)


def prune_jobs(connection: sa.Connection, before: float) -> int:
    """Take away some of the jobs that ended before that. How many."""
    aged = sa.and_(jobs.c.created < before, jobs.c.updated < before, jobs.c.expires < before)
    old = sa.and_(aged, jobs.c.state.not_in(sorted(set(JobState) - TERMINAL)))  # `in` would have it read all that ended
    young = sa.exists().where(jobs.c.fanout == fanouts.c.id, sa.not_(old))
    whole = connection.execute(sa.select(fanouts.c.id).where(fanouts.c.created < before, ~young).limit(BATCH))
    connection.execute(fanouts.delete().where(fanouts.c.id.in_(whole.scalars().all())))
    alone = sa.or_(jobs.c.fanout.is_(None), jobs.c.fanout.not_in(sa.select(fanouts.c.id)))
    ids = connection.execute(sa.select(jobs.c.id).where(old, alone).order_by(jobs.c.created).limit(BATCH))
    gone = ids.scalars().all()
    connection.execute(jobs.delete().where(jobs.c.id.in_(gone)))
    return len(gone)
