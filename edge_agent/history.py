"""What the device has measured lately, on the device: a bounded table that its own tools read.

Invariants: every number of a telemetry record is in a series; of each series the buckets of a minute are kept for
MINUTES_S and those of an hour for HOURS_S, with count, sum, least, most and last; past MAX_SERIES new series are
dropped, which is told. It is a file of its own: to lose it loses no record, and a disk that is full delays none.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_agent.trouble import Trouble

MINUTES_S, HOURS_S = 2 * 86400, 90 * 86400
MAX_SERIES = 200
_SCHEMA = """
CREATE TABLE IF NOT EXISTS series (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, unit TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS buckets (
    series INTEGER NOT NULL, span INTEGER NOT NULL, start INTEGER NOT NULL, n INTEGER NOT NULL, total REAL NOT NULL,
    least REAL NOT NULL, most REAL NOT NULL, last REAL NOT NULL, at REAL NOT NULL, PRIMARY KEY (series, span, start)
) STRICT, WITHOUT ROWID;
"""
_ADD = """INSERT INTO buckets VALUES (?1, ?2, ?3, 1, ?4, ?4, ?4, ?4, ?5) ON CONFLICT DO UPDATE SET
    n = n + 1, total = total + ?4, least = min(least, ?4), most = max(most, ?4), last = ?4, at = ?5"""
_log = logging.getLogger("outrider.history")


class History:
    """Keeps the numbers of telemetry records."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path, self._clock = path, clock
        self._trouble, self._full = Trouble(_log, "history is not kept"), False
        self._lock, self._pruned = asyncio.Lock(), 0.0
        self._db: sqlite3.Connection | None = None

    async def keep(self, bodies: Sequence[Mapping[str, Any]]) -> None:
        """Of one moment, in one commit; one that fails is told and delays nothing."""
        seen = {name: value for body in bodies for name, value in values(body).items()}
        async with self._lock:
            try:
                await asyncio.to_thread(self._keep, seen, self._clock())
                self._trouble.over()
            except sqlite3.Error as error:
                self.close()
                self._trouble.tell(error)

    def close(self) -> None:
        """Safe to call twice."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            self._db = sqlite3.connect(self._path, timeout=2.0, check_same_thread=False)
            self._db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {_SCHEMA}")
        return self._db

    def _keep(self, seen: Mapping[str, tuple[float, str]], now: float) -> None:
        with self._open() as db:
            known = {name: id for id, name in db.execute("SELECT id, name FROM series")}
            for name, (value, unit) in seen.items():
                if name not in known:
                    if len(known) >= MAX_SERIES:
                        if not self._full:
                            _log.warning("history keeps %d series, not %s", MAX_SERIES, name)
                        self._full = True
                        continue
                    row = "INSERT INTO series (name, unit) VALUES (?, ?)"
                    known[name] = int(db.execute(row, (name, unit)).lastrowid or 0)
                for span in (60, 3600):
                    db.execute(_ADD, (known[name], span, int(now // span * span), value, now))
            if not 0 <= now - self._pruned < 3600:
                self._pruned = now
                old = "DELETE FROM buckets WHERE span = ? AND start < ?"
                db.executemany(old, [(60, now - MINUTES_S), (3600, now - HOURS_S)])
                db.execute("DELETE FROM series WHERE id NOT IN (SELECT series FROM buckets)")


def values(body: Mapping[str, Any]) -> dict[str, tuple[float, str]]:
    """The numbers of a telemetry record, with units, by name: `health/load`, `read_sensor/speed/1`."""
    if "tool" not in body:
        return {f"health/{key}": (float(value), "") for key, value in body.get("health", {}).items()}
    args, result = body.get("args", {}), body.get("result")
    where = "/".join([body["tool"], *(str(value) for value in args.values())])
    found = result if isinstance(result, dict) else {"value": result}
    unit = str(found.get("unit", ""))
    return {
        where if key == "value" else f"{where}/{key}": (float(value), unit if key == "value" else "")
        for key, value in found.items()
        if isinstance(value, int | float) and key not in args
    }
