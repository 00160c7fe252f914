"""What the pages show, read once for all open tabs.

Invariants: the database is asked at most once in `MAX_AGE_S` per question, however many tabs ask, and one read of a
kind runs at a time; memory is bounded in questions and in history.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any, TypeVar

import msgspec

from edge_agent.wire.messages import JobState
from hub.services import Services

T = TypeVar("T")
MAX_AGE_S = 1.0
MAX_KEYS = 256
HISTORY = 90  # samples of the committed count
RECENT_JOBS = 200


class Fleet(msgspec.Struct, frozen=True):
    """The overview at one moment; `rates` are committed records per second, oldest first."""

    devices: list[dict[str, Any]]
    jobs: list[dict[str, Any]]
    committed: int
    doubled: int
    rates: list[float]

    @property
    def running(self) -> dict[str, dict[str, Any]]:
        """The job each device is at work on."""
        return {job["device"]: job for job in reversed(self.jobs) if job["state"] == JobState.RUNNING}


class Snapshots:
    """Shared reads, keyed by question; `services` gives the hub's, once it has started."""

    def __init__(self, services: Callable[[], Services]) -> None:
        self._services = services
        self._kept: OrderedDict[str, tuple[float, Any]] = OrderedDict()
        self._locks: dict[str, asyncio.Lock] = {}
        self._counted = (0, 0)  # records committed, and the last id among them
        self._history: deque[tuple[float, int]] = deque(maxlen=HISTORY + 1)

    async def get(self, key: str, load: Callable[[], Awaitable[T]], max_age_s: float = MAX_AGE_S) -> T:
        """What `load` gave for this key within `max_age_s`, else what it gives now."""
        async with self._locks.setdefault(key, asyncio.Lock()):
            at, value = self._kept.pop(key, (float("-inf"), None))
            if time.monotonic() - at >= max_age_s:
                at, value = time.monotonic(), await load()
            self._kept[key] = (at, value)
        while len(self._kept) > MAX_KEYS:
            self._locks.pop(self._kept.popitem(last=False)[0], None)
        kept: T = value
        return kept

    async def fleet(self) -> Fleet:
        return await self.get("fleet", self._fleet)

    async def device(self, name: str) -> dict[str, Any]:
        return await self.get(f"device {name}", lambda: self._services().devices.get(name))

    async def jobs(self, name: str, limit: int) -> list[dict[str, Any]]:
        """A device's newest jobs: fresher than the rest, so that work is seen as it happens."""
        return await self.get(f"jobs {name}", lambda: self._services().jobs.list(name, limit=limit), 0.4)

    async def records(self, name: str, limit: int) -> list[dict[str, Any]]:
        """A device's newest telemetry, oldest first."""

        async def load() -> list[dict[str, Any]]:
            newest = self._services().telemetry.query(name, "telemetry", newest_first=True, limit=limit)
            return list(reversed(await newest))

        return await self.get(f"records {name}", load, 2 * MAX_AGE_S)

    async def bundles(self) -> list[dict[str, Any]]:
        return await self.get("bundles", lambda: self._services().registry.list())

    async def events(self, limit: int) -> list[dict[str, Any]]:
        """The newest entries of the audit log, newest first."""
        return await self.get("events", lambda: self._services().audit.newest(limit))

    async def _fleet(self) -> Fleet:
        services = self._services()
        devices, jobs = await services.devices.list(), await services.jobs.list(limit=RECENT_JOBS)
        more, last = await services.telemetry.count_after(self._counted[1])
        self._counted = (self._counted[0] + more, last)
        self._history.append((time.monotonic(), self._counted[0]))
        points = list(self._history)
        rates = [(b - a) / max(0.5, until - since) for (since, a), (until, b) in pairwise(points)]
        return Fleet(devices, jobs, self._counted[0], services.devices.doubled, rates)
