"""The device's own telemetry as tools: what a sensor showed over a time, and when it was past its limits.

Invariants: the daemon writes (edge_agent/history.py), this only reads; a window is read from minutes while they are
kept and from hours beyond; an alarm is a stretch of buckets whose least or most is past a limit of the pack's file.
"""

from __future__ import annotations

import contextlib
import difflib
import sqlite3
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from edge_agent.agent.tool import Context, Range, Tool, ToolError, declare
from edge_agent.history import HOURS_S, MINUTES_S
from tools import settings

MAX_ALARMS = 50


class Limit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a series (a name, or a pattern with `*`) should not pass."""

    series: str
    above: float | None = None
    below: float | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file, which need not be there."""

    limits: list[Limit] = []


class Window(TypedDict):
    """What a series was over some minutes; `age_s` is how old the last value is."""

    series: str
    count: int
    min: float
    mean: float
    max: float
    last: float
    age_s: float
    unit: str


class Alarm(TypedDict):
    """A stretch past a limit; `worst` is the furthest value, `active`: nothing that was measured since is within it."""

    series: str
    minutes_ago: int
    minutes: int
    worst: float
    limit: float
    active: bool


class Alarms(TypedDict):
    """Those that are active, then the others, the newest first."""

    alarms: list[Alarm]


class History:
    """The tools, over the daemon's file."""

    def __init__(self, path: Path, limits: Sequence[Limit]) -> None:
        self._path, self._limits = path, limits

    def list_history(self) -> dict[str, Any]:
        """List what the device has measured: the names of its series."""
        return {"series": [name for (name,) in self._rows("SELECT name FROM series ORDER BY name")]}

    def read_history(self, series: str, ctx: Context, minutes: Annotated[int, Range(1, HOURS_S // 60)] = 60) -> Window:
        """Look back: least, mean, most and last value of a series over the last minutes."""
        now, unit = ctx.now(), self._unit(series)
        found = self._buckets(series, now - 60 * minutes, now)
        if not found:
            raise ToolError(f"{series} was not measured in the last {minutes} minutes")
        count, last = sum(b[1] for b in found), found[-1]
        return {
            "series": series,
            "count": count,
            "min": min(b[3] for b in found),
            "mean": sum(b[2] for b in found) / count,
            "max": max(b[4] for b in found),
            "last": last[5],
            "age_s": round(max(0.0, now - last[6]), 1),
            "unit": unit,
        }

    def past_alarms(self, ctx: Context, hours: Annotated[int, Range(1, HOURS_S // 3600)] = 24) -> Alarms:
        """List when the device's values were past their limits in the last hours."""
        now, alarms = ctx.now(), list[Alarm]()
        span = _span(3600 * hours)
        for name in self.list_history()["series"]:
            for limit in (limit for limit in self._limits if fnmatchcase(name, limit.series)):
                alarms += _alarms(name, limit, self._buckets(name, now - 3600 * hours, now), span, now)
        alarms.sort(key=lambda alarm: (not alarm["active"], alarm["minutes_ago"]))
        return {"alarms": alarms[:MAX_ALARMS]}

    def _unit(self, series: str) -> str:
        known = dict(self._rows("SELECT name, unit FROM series"))
        if series not in known:
            near = difflib.get_close_matches(series, known, 3, 0.3) or list(known)[:10]
            raise ToolError(f"there is no series {series!r:.80}; there is {', '.join(near) or 'none yet'}")
        return str(known[series])

    def _buckets(self, series: str, since: float, now: float) -> list[Any]:
        """(start, n, total, least, most, last, at) in order."""
        span = _span(now - since)
        rows = """SELECT start, n, total, least, most, last, at FROM buckets JOIN series ON id = series
            WHERE name = ? AND span = ? AND start > ? AND start <= ? ORDER BY start"""
        return self._rows(rows, (series, span, since - span, now))

    def _rows(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        try:
            with contextlib.closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=2.0)) as db:
                return db.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise ToolError(f"there is no history yet: {error}") from error


def _span(seconds: float) -> int:
    return 60 if seconds <= MINUTES_S else 3600


def _alarms(name: str, limit: Limit, buckets: Sequence[Any], span: int, now: float) -> list[Alarm]:
    found = list[Alarm]()
    for bound, column, most in ((limit.above, 4, max), (limit.below, 3, min)):
        runs = list[list[Any]]()
        for bucket in buckets:
            if bound is None or most(bucket[column], bound) != bucket[column]:
                continue
            if runs and bucket[0] - runs[-1][-1][0] <= span:
                runs[-1].append(bucket)
            else:
                runs.append([bucket])
        for run in runs:
            since, until = run[0][0], run[-1][0] + span
            about = {"series": name, "limit": float(bound or 0), "worst": most(bucket[column] for bucket in run)}
            ago, long = int((now - since) // 60), int((until - since) // 60)
            found.append(Alarm(**about, minutes_ago=ago, minutes=long, active=run[-1] is buckets[-1]))  # type: ignore[typeddict-item]
    return found


def pack(state: Path, options: dict[str, str]) -> Sequence[Tool]:
    """`list_history`, `read_history` and `past_alarms`. Raises ValueError."""
    given = settings.read("history", state, options, Settings, needed=False)
    tools = History(state.parent / "history.db", given.limits)
    return [
        declare(tools.list_history, concurrent=True),
        declare(tools.read_history, concurrent=True),
        declare(tools.past_alarms, concurrent=True),
    ]
