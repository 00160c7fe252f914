"""What the device measures, at an interval: its own health and what its reading tools say.

Invariants: a sample that fails is one line in the log and never stops the next; only tools of risk `read` are sampled;
samples have a low priority and a TTL, so that they are the first to go when the outbox is full. A round is one commit.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edge_agent import machine
from edge_agent.agent.calls import Call, CallError, parse, render, validate
from edge_agent.agent.ports import RunnerTools
from edge_agent.agent.tool import Param, ToolError, ToolSpec
from edge_agent.errors import OutriderError, Refused
from edge_agent.history import History
from edge_agent.rhythm import rest, wait_up_to
from edge_agent.sync.outbox import Outbox
from edge_agent.trouble import Trouble

PRIORITY = 6
MAX_CALLS = 32
_SAMPLED = "read_sensor"
_log = logging.getLogger("outrider.telemetry")


class Telemetry:
    """The sampler. `sample` is calls in the compact form; empty means every value of `read_sensor`, if there is one.

    `lost`: how many events started nothing for want of room, since the daemon started.
    """

    def __init__(
        self,
        tools: RunnerTools,
        outbox: Outbox,
        state: Path,
        interval_s: float,
        ttl_s: float,
        sample: Sequence[str] = (),
        history: History | None = None,
        lost: Callable[[], int] = lambda: 0,
    ) -> None:
        self._tools, self._outbox, self._state, self._history, self._lost = tools, outbox, state, history, lost
        self._changed = asyncio.Event()
        self.configure(interval_s, ttl_s, sample)
        self._cpu = machine.cpu_times()
        self._trouble = Trouble(_log, "no sample this time")
        self._failing: dict[str, Trouble] = {}

    def configure(self, interval_s: float, ttl_s: float, sample: Sequence[str]) -> None:
        """What and how often from now on. Raises Refused, and keeps what was before."""
        wanted = [_call(text) for text in sample]
        self._interval_s, self._ttl_s, self._wanted = interval_s, ttl_s, wanted
        self._changed.set()

    async def run(self) -> None:
        """Sample until cancelled; a round that takes longer than the interval delays the next, none pile up."""
        while True:
            self._changed.clear()
            bodies = [{"health": self._health()}]
            try:
                try:
                    await self._sample(bodies)
                finally:
                    await self._append(bodies)
                    if self._history:
                        await self._history.keep(bodies)
            except OutriderError as error:
                self._trouble.tell(error)
            else:
                self._trouble.over()
            await wait_up_to(rest(self._interval_s), self._changed)

    async def _append(self, bodies: list[dict[str, Any]]) -> None:
        """What cannot be a record keeps no other back."""
        try:
            await self._outbox.append_many("telemetry", bodies, PRIORITY, self._ttl_s)
        except Refused:
            each = (self._outbox.append("telemetry", body, PRIORITY, self._ttl_s) for body in bodies)
            for body, end in zip(bodies, await asyncio.gather(*each, return_exceptions=True), strict=True):
                if isinstance(end, Refused) and "tool" in body:
                    self._fails(Call(body["tool"], body["args"]), end)
                elif isinstance(end, BaseException):
                    raise end from None

    async def _sample(self, bodies: list[dict[str, Any]]) -> None:
        specs = await self._tools.specs()
        calls = self._wanted or [c for spec in specs if spec.name == _SAMPLED for c in every_call(spec)]
        reading = {spec.name: spec for spec in specs if spec.risk == "read"}
        good: list[tuple[Call, Call]] = []
        for wanted in calls[:MAX_CALLS]:
            if wanted.name not in reading:
                raise Refused(f"{wanted.name} is not a reading tool of this pack", f"these are: {', '.join(reading)}")
            try:
                good.append((wanted, validate(wanted, specs)))
            except CallError as error:
                self._fails(wanted, error)
        if not good:
            return
        patience = max(reading[call.name].timeout_s for _, call in good)
        values = await self._tools.read([(call.name, call.args) for _, call in good], patience)
        for (wanted, call), value in zip(good, values, strict=True):
            if isinstance(value, ToolError):
                self._fails(wanted, value)
                continue
            if self._failing and (trouble := self._failing.get(render(wanted))):
                trouble.over()
            bodies.append({"tool": call.name, "args": call.args, "result": value})

    def _fails(self, wanted: Call, error: Exception) -> None:
        text = render(wanted)
        self._failing.setdefault(text, Trouble(_log, f"sample {text}")).tell(error)

    def _health(self) -> dict[str, Any]:
        before, self._cpu = self._cpu, machine.cpu_times()
        busy, total = (now - then for now, then in zip(self._cpu, before, strict=True))
        free = machine.memory()
        disk = shutil.disk_usage(self._state)
        return {
            "cpu_percent": round(100 * busy / total, 1) if total else 0.0,
            "load": round(os.getloadavg()[0], 2),
            "memory_free_mb": free.get("MemAvailable", 0) // 1024,
            "memory_mb": free.get("MemTotal", 0) // 1024,
            "disk_free_mb": disk.free >> 20,
            "disk_mb": disk.total >> 20,
            "events_lost": self._lost(),
        }


def every_call(spec: ToolSpec) -> list[Call]:
    """Every call of a tool whose required parameters have few values; none when one is open."""
    names = [param.name for param in spec.params if param.required]
    values = [_values(param) for param in spec.params if param.required]
    return [Call(spec.name, dict(zip(names, each, strict=True))) for each in itertools.product(*values)][:MAX_CALLS]


def _values(param: Param) -> list[Any]:
    if param.kind == "choice":
        return list(param.choices)
    if param.kind == "int" and param.low is not None and param.high is not None:
        return list(range(int(param.low), min(int(param.high), int(param.low) + MAX_CALLS) + 1))
    return [False, True] if param.kind == "bool" else []


def _call(text: str) -> Call:
    try:
        call = parse(text)
    except CallError as error:
        raise Refused(f"sample {text!r}: {error}", 'such as read_sensor(sensor="speed", line=1)') from error
    if not isinstance(call, Call):
        raise Refused(f"sample {text!r} is not a call", 'such as read_sensor(sensor="speed", line=1)')
    return call
