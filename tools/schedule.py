"""Work for later as tools: a request or a workflow at a time, after some minutes, or again and again.

Invariants: an entry is on disk before its tool answers, under an id made of its call's key, so a call made twice makes
one entry; it runs as who asked for it (edge_agent/agent/schedule.py); people see and take out their own entries, those
with the role admin everybody's. Times are the device's local time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec

from edge_agent.agent.schedule import Entry, Schedule
from edge_agent.agent.tool import Context, ForLater, Range, Tool, ToolError, declare
from edge_agent.errors import Refused
from edge_agent.wire.grants import Subject
from tools import settings

Minutes = Annotated[int, Range(0, 60 * 24 * 366, "min")]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file, which need not be there."""

    least_every_minutes: int = 1


class Planned(TypedDict):
    """An entry; `at` is its next time, `every_minutes` 0 when it is the only one."""

    id: str
    at: str
    every_minutes: int
    what: str


class Plans(TypedDict):
    """The next first."""

    scheduled: list[Planned]


class Later:
    """The tools."""

    def __init__(self, schedule: Schedule, settings: Settings) -> None:
        self._schedule, self._settings = schedule, settings

    def schedule_request(
        self,
        text: Annotated[str, ForLater()],
        key: str,
        subject: dict[str, Any],
        ctx: Context,
        in_minutes: Minutes = 0,
        at: str = "",
        every_minutes: Minutes = 0,
    ) -> Planned:
        """Do a request later: in some minutes, at a time (07:30 or 2027-01-31 07:30), or every so many minutes."""
        return self._add(key, subject, ctx, in_minutes, at, every_minutes, text=text)

    def schedule_workflow(
        self,
        name: str,
        key: str,
        subject: dict[str, Any],
        ctx: Context,
        inputs: Annotated[dict[str, Any], ForLater()] = {},  # noqa: B006 - shown as the default, never changed
        in_minutes: Minutes = 0,
        at: str = "",
        every_minutes: Minutes = 0,
    ) -> Planned:
        """Run a workflow later: in some minutes, at a time (07:30 or 2027-01-31 07:30), or every so many minutes."""
        return self._add(key, subject, ctx, in_minutes, at, every_minutes, workflow=name, inputs=inputs)

    def list_schedule(self, subject: dict[str, Any]) -> Plans:
        """List what is scheduled for later."""
        return {"scheduled": [_shown(entry) for entry in self._mine(subject)]}

    def cancel_schedule(self, id: str, subject: dict[str, Any]) -> str:
        """Take something out of the schedule by its id."""
        ids, by = [entry.id for entry in self._mine(subject)], msgspec.convert(subject, Subject).name
        if id not in ids and not self._schedule.removed(id, by):
            raise ToolError(f"there is no {id!r:.60} in your schedule; there is {', '.join(ids) or 'nothing'}")
        self._schedule.remove(id, by)
        return f"{id} is taken out"

    def _mine(self, asks: dict[str, Any]) -> list[Entry]:
        who = msgspec.convert(asks, Subject)
        return [e for e in self._schedule.all() if "admin" in who.roles or e.subject.name == who.name]

    def _add(
        self, key: str, asks: dict[str, Any], ctx: Context, minutes: int, at: str, every: int, **what: Any
    ) -> Planned:
        if every and every < self._settings.least_every_minutes:
            raise ToolError(f"every {every} minutes is too often: {self._settings.least_every_minutes} at least")
        if (bool(minutes) and bool(at)) or not (minutes or at or every):
            raise ToolError("say when: in_minutes or at, or every_minutes alone")
        now = ctx.now()
        due = _time(at, now) if at else now + 60 * (minutes or every)
        id = f"later-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        try:
            return _shown(self._schedule.add(Entry(id, msgspec.convert(asks, Subject), due, 60.0 * every, **what)))
        except Refused as refused:
            raise ToolError(str(refused)) from refused


def _time(text: str, now: float) -> float:
    """The next such time, seconds since the Unix epoch. Raises ToolError."""
    here = datetime.fromtimestamp(now)  # without an offset, which a night in which the clock is set would change
    try:
        if len(text) <= 5:
            clock = datetime.strptime(text, "%H:%M")
            due = here.replace(hour=clock.hour, minute=clock.minute, second=0, microsecond=0)
            return (due if due > here else due + timedelta(days=1)).timestamp()
        due = datetime.fromisoformat(text)
    except ValueError as error:
        raise ToolError(f"{text!r:.40} is no time: 07:30, or 2027-01-31 07:30") from error
    if due.timestamp() <= now:
        raise ToolError(f"{text} has passed: it is {here:%Y-%m-%d %H:%M}")
    return due.timestamp()


def _shown(entry: Entry) -> Planned:
    at = f"{datetime.fromtimestamp(entry.due).astimezone():%Y-%m-%d %H:%M}"
    what = entry.text or f"workflow {entry.workflow}"
    return {"id": entry.id, "at": at, "every_minutes": int(entry.every_s // 60), "what": what}


def pack(state: Path, options: dict[str, str]) -> Sequence[Tool]:
    """The four tools. Raises ValueError."""
    given = settings.read("schedule", state, options, Settings, needed=False)
    tools = Later(Schedule(state / "schedule.db"), given)
    return [
        declare(tools.schedule_request, risk="act", permission="run:task"),
        declare(tools.schedule_workflow, risk="act", permission="run:task"),
        declare(tools.list_schedule),
        declare(tools.cancel_schedule, risk="act"),
    ]
