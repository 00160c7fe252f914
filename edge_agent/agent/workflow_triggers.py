"""What starts workflows by itself: the clock, a reading past its threshold, an event, a message of the site's broker.

Invariants: a start has an id made of its cause, so the same minute of a clock that was set back starts nothing twice; a
stream, and an alarm of the pack `history`, fires once until it was quiet again, across restarts too; a file that is no
workflow, a sample that fails and a start that is refused are told and stop nothing; one that cannot be taken now (full
disk, full queue) is tried again by the next sample, look or delivery. A minute that passed while the device was off, or
that a clock set forward leaves more than LATE_S behind, is not made up for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
from cronsim import CronSim, CronSimError

from edge_agent.agent import policy
from edge_agent.agent.act import Tools, shaped
from edge_agent.agent.calls import Call, CallError, Decision, parse, render, validate
from edge_agent.agent.tool import ToolError
from edge_agent.agent.workflow import Broken, Trigger, Workflow, evaluate, read, topic_pattern
from edge_agent.agent.workflow_check import ALARMS, check, runs_as
from edge_agent.errors import OutriderError, Retry
from edge_agent.rhythm import tick
from edge_agent.trouble import Trouble
from edge_agent.wire import durable, windows
from edge_agent.wire.grants import Subject

TICK_S, ALARMS_S, LATE_S = 0.5, 10.0, 3600.0
MAX_DEPTH = 4  # runs that start each other by their ends
_log = logging.getLogger("outrider.workflows")

Start = Callable[[str, Subject, str, dict[str, Any], Any], Awaitable[None]]
"""(workflow, whom it runs as, id of the cause, inputs, event) starts a run."""


class Installed(msgspec.Struct, frozen=True):
    """A definition of this device and when it came here, seconds since the Unix epoch."""

    flow: Workflow
    text: str
    since: float


class Library:
    """The definitions in a folder and in `bundles`, `*.yaml`, by their names; files are read again when they change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.bundles: dict[str, Path] = {}  # the folder of each, which goes before the device's own
        self._files: dict[Path, tuple[tuple[int, int], Installed | None]] = {}

    def all(self) -> dict[str, Installed]:
        """What is installed now."""
        files = {}
        folders = [self._folder, *self.bundles.values()]
        for path in (path for folder in folders for path in sorted(folder.glob("*.yaml"))):
            try:
                stat = path.stat()
                stamp = (stat.st_mtime_ns, stat.st_size)
                known = self._files.get(path)
                files[path] = known if known and known[0] == stamp else (stamp, _load(path, stat.st_mtime))
            except OSError as error:
                _log.warning("%s: %s", path.name, error)
        self._files = files
        return {each.flow.workflow: each for _, each in files.values() if each is not None}

    def others(self, bundle: str) -> set[str]:
        """The workflows of the bundles but this one."""
        self.all()
        folders = {folder for name, folder in self.bundles.items() if name != bundle}
        return {each.flow.workflow for path, (_, each) in self._files.items() if each and path.parent in folders}


def _load(path: Path, since: float) -> Installed | None:
    try:
        text = path.read_text()
        return Installed(read(text)[0], text, since)
    except (Broken, UnicodeDecodeError) as error:
        first = error.problems[0] if isinstance(error, Broken) else error
        _log.error("%s is no workflow: %s", path.name, first)
        return None


class Threshold:
    """Hysteresis and debounce over a reading."""

    def __init__(self, trigger: Trigger, fired: bool = False) -> None:
        self._sign = 1 if trigger.above is not None else -1
        limit = trigger.above if trigger.above is not None else trigger.below
        self._limit = self._sign * (limit or 0.0)
        self._clear = self._limit if trigger.clear is None else self._sign * trigger.clear
        self._for_s = trigger.for_s
        self._since: float | None = None
        self.fired = fired

    def feed(self, value: float, now: float) -> bool:
        """Whether this reading, at `now` in seconds, starts something; if that fails, `fired` is to be taken back.

        Raises ValueError for what is no number.
        """
        if math.isnan(value):
            raise ValueError("the reading is no number")
        value *= self._sign
        if self.fired:
            self.fired, self._since = value > self._clear, None
            return False
        if value <= self._limit:
            self._since = None
            return False
        self._since = now if self._since is None else min(self._since, now)  # a clock set back prolongs nothing
        self.fired = now - self._since >= self._for_s
        return self.fired


class Triggers:
    """The service."""

    def __init__(
        self,
        library: Library,
        tools: Tools,
        allowed: policy.Allowed,
        start: Start,
        clock: Callable[[], float] = time.time,
        kept: Path | None = None,
    ) -> None:
        self._library, self._tools, self._allowed, self._start, self._clock = library, tools, allowed, start, clock
        self._last, self._kept, self._quiet_from = clock(), kept, dict[tuple[str, int, float], float]()
        self._fired, self.lost = _fired(kept), 0
        self.zone: Callable[[], str] = lambda: "UTC"  # the site's, for workflows that name none
        self._streams: dict[tuple[str, int, float], tuple[Threshold, float]] = {}
        self._trouble: dict[str, Trouble] = {}
        self._on, self._alarms_at = {key for key in self._fired if key.startswith("alarm ")}, 0.0

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            await self.look()
            await tick(TICK_S if self._streams else 1.0)

    async def look(self) -> None:
        """One round over all triggers."""
        now, last, taken = self._clock(), self._last, True
        streams = {}
        for flow, n, trigger in self._all():
            if trigger.cron and (due := self._due(flow.flow, n, trigger.cron, max(last, now - LATE_S), now)):
                taken &= await self._fire(flow, f"cron-{n}-{due}", trigger, {"time": due})
            elif trigger.stream:
                key = (flow.flow.workflow, n, flow.since)
                known = self._streams.get(key) or (Threshold(trigger, _key(key) in self._fired), 0.0)
                streams[key] = await self._sample(flow, n, trigger, *known)
        self._last = now if taken else min(last, now)
        self._streams, self._on = streams, await self._alarms(now)
        fired = {_key(key) for key, (threshold, _) in streams.items() if threshold.fired} | self._on
        if fired != self._fired and self._kept is not None:
            try:
                await asyncio.to_thread(durable.write, self._kept, msgspec.json.encode(sorted(fired)))
                self._fired = fired
            except OSError as error:
                self._trouble.setdefault("", Trouble(_log, "which streams have fired is not saved")).tell(error)

    def topics(self) -> set[str]:
        """The topic filters that workflows listen to."""
        wanted = set[str]()
        for flow, n, trigger in self._all():
            with self._telling(f"{flow.flow.workflow}, topic {n}"):
                wanted |= {trigger.mqtt} if trigger.mqtt and topic_pattern(trigger.mqtt) else set()
        return wanted

    async def message(self, topic: str, payload: Any) -> None:
        """A message of the site's broker. Raises ValueError when a condition cannot be asked of it, Retry when a run
        that it starts is not journaled."""
        problem, lost = None, ""
        for flow, n, trigger in self._all():
            key, now = (flow.flow.workflow, n, flow.since), self._clock()
            try:
                if not trigger.mqtt or not topic_pattern(trigger.mqtt).fullmatch(topic):
                    continue
                wanted = evaluate(trigger.when or "true", {"payload": payload, "topic": topic})
                if not isinstance(wanted, bool):
                    raise ValueError(f"{trigger.when} is neither true nor false")
            except ValueError as error:
                problem = error
                continue
            if wanted and not self._quiet_from.get(key, now) - trigger.debounce_s < now < self._quiet_from.get(
                key, now
            ):
                event = {"topic": topic, "payload": payload}
                if not await self._fire(flow, f"mqtt-{n}-{int(now * 1e3)}", trigger, event):
                    lost = flow.flow.workflow
                    continue
                self._quiet_from = {k: until for k, until in self._quiet_from.items() if until > now}
                self._quiet_from[key] = now + trigger.debounce_s
        if lost:
            raise Retry(f"{lost} is not started")
        if problem is not None:
            raise problem

    async def event(self, kind: str, name: str, data: dict[str, Any]) -> None:
        """Something happened: `task.failed`, `workflow.succeeded` of a name, `alarm.raised` of one, `link.down`.

        A run that it starts and that cannot be taken now makes it lost, which is counted.
        """
        self.lost += not await self._event(kind, name, data)

    async def _event(self, kind: str, name: str, data: dict[str, Any]) -> bool:
        """False when a run that it starts could not be taken now."""
        taken = True
        if data["depth"] > MAX_DEPTH:
            _log.error("%s of %s starts nothing: %d runs have started each other", kind, name, data["depth"])
            return taken
        for flow, n, trigger in self._all():
            own = kind.startswith("workflow.") and flow.flow.workflow == name
            if (trigger.event == kind or fnmatchcase(f"{kind}:{name}", trigger.event)) and not own:
                taken &= await self._fire(flow, f"event-{n}-{data['id']}", trigger, data | {"kind": kind, "name": name})
        return taken

    async def _alarms(self, now: float) -> set[str]:
        """The alarms that are on, looked at while a workflow waits for some; tells of those that began or ended."""
        if not any(trigger.event.startswith("alarm.") for _, _, trigger in self._all()):
            return set()
        if 0 <= now - self._alarms_at < ALARMS_S:
            return self._on
        self._alarms_at, told, alarms = now, set(self._on), None
        with self._telling("alarms"):
            alarms = (await self._read(ALARMS))["alarms"]  # the newest first
        if alarms is None:
            return told
        latest = {f"alarm {each['limit']:g} {each['series']}": each for each in reversed(alarms)}
        for key in sorted({key for key, alarm in latest.items() if alarm["active"]} ^ told):
            alarm, name, kind = latest.get(key, {}), key.split(" ", 2)[2], "cleared" if key in told else "raised"
            ago = alarm.get("minutes_ago", 0) - (alarm.get("minutes", 0) if key in told else 0)
            id = f"{sha256(key.encode()).hexdigest()[:12]}-{int(now // 60) - ago}"
            if await self._event(f"alarm.{kind}", name, {"series": name, **alarm, "id": id, "depth": 1}):
                told ^= {key}
        return told

    def _due(self, flow: Workflow, n: int, cron: str, after: float, until: float) -> int:
        found = 0
        with self._telling(f"{flow.workflow}, cron {n}"):
            found = _latest(cron, after, until, flow.zone or self.zone())
        return found

    @contextlib.contextmanager
    def _telling(self, where: str) -> Iterator[None]:
        """What goes wrong inside is told, and stops nothing."""
        trouble = self._trouble.setdefault(where, Trouble(_log, where))
        try:
            yield
            trouble.over()
        except (OutriderError, ToolError, CallError, CronSimError, ValueError, TypeError) as error:
            trouble.tell(error)

    async def _read(self, call: Decision, subject: Subject | None = None) -> Any:
        """Its result, as a subject or the device itself. Raises CallError, ToolError, Refused, Retry."""
        if not isinstance(call, Call):
            raise CallError(f"{render(call)} is no call")
        specs = await self._tools.specs()
        call = validate(call, specs)
        spec = next(spec for spec in specs if spec.name == call.name)
        if subject is not None:
            policy.check(spec, subject, self._allowed)
        return shaped(call.name, spec.returns, await self._tools.call(call.name, call.args, spec.timeout_s))

    def _all(self) -> Iterator[tuple[Installed, int, Trigger]]:
        for each in self._library.all().values():
            for n, trigger in enumerate(each.flow.triggers):
                yield each, n, trigger

    async def _sample(
        self, flow: Installed, n: int, trigger: Trigger, threshold: Threshold, next_at: float
    ) -> tuple[Threshold, float]:
        now = self._clock()
        if next_at - trigger.every_s <= now < next_at:
            return threshold, next_at
        with self._telling(f"{flow.flow.workflow}, stream {n}"):
            result = await self._read(parse(trigger.stream), runs_as(flow.flow, flow.since))
            value = evaluate(trigger.value or "result", {"result": result})
            if threshold.feed(float(value), now):
                event = {"value": value, "result": result}
                threshold.fired = await self._fire(flow, f"stream-{n}-{int(now * 1e3)}", trigger, event)
        due = next_at if 0 <= now - next_at < trigger.every_s else now
        return threshold, due + trigger.every_s

    async def _fire(self, installed: Installed, cause: str, trigger: Trigger, event: dict[str, Any]) -> bool:
        """False when the start cannot be taken now; what is refused is told, and done with."""
        flow = installed.flow
        trouble = self._trouble.setdefault(f"{flow.workflow} starts", Trouble(_log, f"{flow.workflow} is not started"))
        try:
            marks = read(installed.text)[1]
            if found := check(flow, marks, await self._tools.specs(), self._allowed):
                _log.error("%s is not started: line %d: %s", flow.workflow, found[0].line, found[0].message)
                return True
            subject = runs_as(flow, installed.since)
            await self._start(flow.workflow, subject, f"{flow.workflow}-{cause}", trigger.inputs, event)
            trouble.over()
        except Retry as error:
            trouble.tell(error)
            return False
        except OutriderError as error:
            _log.error("%s is not started: %s", flow.workflow, error)
        return True


def _latest(cron: str, after: float, until: float, zone: str) -> int:
    """The last time of a cron line in (after, until], seconds since the Unix epoch; 0 when there is none."""
    found = 0
    for due in CronSim(cron, datetime.fromtimestamp(after, windows.zone(zone))):
        if due.timestamp() > until:
            break
        found = int(due.timestamp()) if due.timestamp() > after else found
    return found


def _key(stream: tuple[str, int, float]) -> str:
    return "{} {} {}".format(*stream)


def _fired(kept: Path | None) -> set[str]:
    """The streams that had fired and were not quiet since, when the last process ended."""
    try:
        return set(msgspec.json.decode(kept.read_bytes(), type=list[str])) if kept else set()
    except FileNotFoundError:
        return set()
    except (OSError, msgspec.MsgspecError) as error:
        _log.error("which streams have fired is not known: %s", error)
        return set()
