"""When a device may update: the rules in force, and an application's hold.

Invariant: a hold is on disk before anyone is told of it, so that it outlives a restart.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.update import moments
from edge_agent.update.moments import Facts, Hold
from edge_agent.wire import durable
from edge_agent.wire.updates import Rules


class Timing:
    """`own` are the settings' rules; the hub's go before them (see update/moments.py)."""

    def __init__(
        self, path: Path, own: Mapping[str, Any], facts: Callable[[], Facts], clock: Callable[[], float]
    ) -> None:
        self._path, self._own, self._facts, self._clock = path, own, facts, clock
        self.rules, self.holding = moments.rules(own), _read(path)
        self._changing = asyncio.Lock()

    def configure(self, asked: Mapping[str, Any]) -> None:
        """Raises Refused, and keeps what was before."""
        self.rules = moments.rules(self._own, asked)

    async def hold(self, minutes: float, reason: str) -> Hold:
        """Raises Refused."""
        async with self._changing:
            kept = moments.held(self._held(), self._clock(), minutes, reason, self.rules.max_hold_minutes)
            await self._keep(kept)
        return kept

    async def release(self) -> None:
        async with self._changing:
            if self.holding is not None and self._clock() < self.holding.until:
                await self._keep(msgspec.structs.replace(self.holding, until=self._clock()))

    async def check(self, step: moments.Step) -> None:
        """Before a step begins. Raises NotNow."""
        moments.check(step, self.rules, await asyncio.to_thread(self._facts), self._held(), self._clock())

    def check_window(self, step: moments.Step) -> None:
        """While it goes on: windows and holds, not the machine. Raises NotNow."""
        moments.check(step, self.rules, Facts(), self._held(), self._clock())

    def check_hold(self) -> None:
        """When it is done: a hold alone, as a window may have closed meanwhile. Raises NotNow."""
        moments.check("activate", Rules(), Facts(), self._held(), self._clock())

    def left(self, until: float) -> float:
        """Seconds until it may be asked again; not too many, as a clock may be set."""
        return min(max(0.05, until - self._clock()), moments.ASK_AGAIN_S)

    def _held(self) -> Hold | None:
        """The last hold; one that ends beyond the limit is of a clock that was put back since, and is forgotten."""
        most = self._clock() + self.rules.max_hold_minutes * 60 + moments.REST_S
        if self.holding is not None and self.holding.until > most:
            self.holding = None
        return self.holding

    async def _keep(self, hold: Hold) -> None:
        await asyncio.to_thread(self._path.parent.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(durable.write, self._path, msgspec.json.encode(hold))
        self.holding = hold


def _read(path: Path) -> Hold | None:
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(path.read_bytes(), type=Hold)
    return None
