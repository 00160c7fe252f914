"""What is to be done later: requests and workflows, kept on disk until they are due.

Invariants: an entry carries who asked for it, and starts as that subject, by the grants of that time; each time it is
due it starts under one id, so after a crash it starts once; one that started or was taken out stays known by its id
(the last MAX_GONE), so the call that made it, made again after a crash, makes no second one; a time that passed while
the device was off is made up for within LATE_S, once, and otherwise told and left out; times follow from the first one,
whole days by the clock on the wall, and a clock that was far ahead for a while puts none off. The tool runner writes
entries (tools/schedule.py), the daemon starts them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.errors import OutriderError, Refused
from edge_agent.rhythm import tick
from edge_agent.wire.grants import Subject

MAX_ENTRIES, MAX_GONE = 100, 1000
LATE_S, TICK_S, AGAIN_S, DAY_S = 3600.0, 1.0, 10.0, 86400.0
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS entries (id TEXT PRIMARY KEY, due REAL NOT NULL, body BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS gone (id TEXT PRIMARY KEY, by TEXT NOT NULL, body BLOB NOT NULL) STRICT",
)
_log = logging.getLogger("outrider.schedule")


class Entry(msgspec.Struct, frozen=True):
    """A request (`text`) or a `workflow` with its inputs; in seconds `every_s` (0: once), `due`, `first` (0: `due`)."""

    id: str
    subject: Subject
    due: float
    every_s: float = 0.0
    text: str = ""
    workflow: str = ""
    inputs: dict[str, Any] = {}
    first: float = 0.0

    def times(self, now: float) -> tuple[float, float]:
        """The last time that has come at `now`, which is not before `due`, and the next one, infinite for none."""
        if not self.every_s:
            return self.due, float("inf")
        first = datetime.fromtimestamp(self.first or self.due, None if self.every_s % DAY_S == 0 else UTC)
        n = max(1, int((now - first.timestamp()) / self.every_s))
        near = [(first + timedelta(seconds=self.every_s * k)).timestamp() for k in range(n - 1, n + 3)]
        return max([self.due, *(each for each in near if each <= now)]), min(each for each in near if each > now)


class Schedule:
    """The entries in a file, safe between processes."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def add(self, entry: Entry) -> Entry:
        """The entry, or the one that has or had its id. Raises Refused when there are too many."""
        with self._open() as db:
            db.execute("BEGIN IMMEDIATE")
            known = "SELECT body FROM entries WHERE id = ?1 UNION ALL SELECT body FROM gone WHERE id = ?1"
            if found := db.execute(known, (entry.id,)).fetchone():
                return msgspec.json.decode(found[0], type=Entry)
            if db.execute("SELECT count(*) FROM entries").fetchone()[0] >= MAX_ENTRIES:
                raise Refused(f"{MAX_ENTRIES} things are scheduled already", "take one out first")
            self._put(db, entry)
        return entry

    def stamp(self) -> tuple[int, int]:
        """Another one after each change."""
        with contextlib.suppress(FileNotFoundError):
            about = self._path.stat()
            return about.st_mtime_ns, about.st_size
        return 0, 0

    def all(self) -> list[Entry]:
        """In the order in which they are due."""
        if not self._path.exists():
            return []
        with self._open() as db:
            rows = db.execute("SELECT body FROM entries ORDER BY due").fetchall()
        return [msgspec.json.decode(body, type=Entry) for (body,) in rows]

    def remove(self, id: str, by: str = "") -> None:
        """Because it started, or because `by` took it out. Safe to do again."""
        with self._open() as db:
            db.execute("INSERT OR IGNORE INTO gone SELECT id, ?, body FROM entries WHERE id = ?", (by, id))
            db.execute("DELETE FROM entries WHERE id = ?", (id,))
            db.execute("DELETE FROM gone WHERE rowid <= (SELECT max(rowid) FROM gone) - ?", (MAX_GONE,))

    def removed(self, id: str, by: str) -> bool:
        """Whether `by` took it out."""
        with self._open() as db:
            return db.execute("SELECT 1 FROM gone WHERE id = ? AND by = ?", (id, by)).fetchone() is not None

    def started(self, entry: Entry, now: float) -> None:
        """Gone, or due again at its next time after `now`, if nobody took it out meanwhile."""
        if not entry.every_s:
            return self.remove(entry.id)
        again = msgspec.structs.replace(entry, due=entry.times(now)[1], first=entry.first or entry.due)
        with self._open() as db:
            row = (again.due, msgspec.json.encode(again), entry.id)
            db.execute("UPDATE entries SET due = ?, body = ? WHERE id = ?", row)
        return None

    @contextlib.contextmanager
    def _open(self) -> Any:
        with contextlib.closing(sqlite3.connect(self._path, timeout=5.0)) as db, db:
            for table in _SCHEMA:
                db.execute(table)
            yield db

    def _put(self, db: sqlite3.Connection, entry: Entry) -> None:
        db.execute("INSERT INTO entries VALUES (?, ?, ?)", (entry.id, entry.due, msgspec.json.encode(entry)))


class Scheduled:
    """Starts what is due: `start(id, entry)` queues it once for each id, or raises."""

    def __init__(
        self, path: Path, start: Callable[[str, Entry], Awaitable[None]], clock: Callable[[], float] = time.time
    ) -> None:
        self._schedule, self._start, self._clock = Schedule(path), start, clock
        self._seen, self._soonest, self._looked = (0, 0), 0.0, 0.0

    async def run(self) -> None:
        """Look until cancelled; what cannot be read or started is told, and tried again later."""
        while True:
            pause = TICK_S
            try:
                await self.look()
            except (OutriderError, sqlite3.Error) as error:
                _log.error("the schedule waits: %s", error)
                pause = AGAIN_S
            await tick(pause)

    async def look(self) -> None:
        """One round, if the file changed, something is due or the clock was set back. Raises Retry, sqlite3.Error."""
        now, stamp, before = self._clock(), self._schedule.stamp(), self._looked
        self._looked = now
        if stamp == self._seen and before <= now < self._soonest:
            return
        due = await asyncio.to_thread(self._schedule.all)
        self._seen, self._soonest = stamp, min((entry.due for entry in due), default=float("inf"))
        for entry in due:
            if entry.due > now:
                if entry.first and entry.due - now > entry.every_s + 2 * LATE_S:  # a clock that was ahead put it off
                    await asyncio.to_thread(self._schedule.started, entry, now)
                continue
            if now - entry.times(now)[0] > LATE_S:
                _log.warning("%s was due at %.0f, while the device was off: left out", entry.id, entry.due)
            else:
                try:
                    await self._start(f"{entry.id}-{entry.due:.0f}", entry)
                except Refused as error:
                    _log.error("%s is not started: %s", entry.id, error)
            await asyncio.to_thread(self._schedule.started, entry, now)
