"""Which waiting requests run next, and which of them together.

Invariants: pure, time is given. Better classes go first (0 before 3), and a request gains a class for every `AGING_S`
it waits, so none starves; those that waited behind a barrier (an adapter that changes) never run before it. A batch
has one key (model, names, types and shapes behind the first dimension), and at most its pace's rows. What waits is
bounded in number and bytes; what is past its deadline is given back, not run.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from edge_agent.errors import Retry

AGING_S = 1.0
WAITING, WAITING_BYTES = 64, 256 * 1024 * 1024
LOWEST = 3
_WEIGHT = 0.2  # of the newest latency in its average
T = TypeVar("T")


class Serving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is served; a bundle may say so in `meta.serving`.

    Rows that run together at most; how long the first of them may wait for others; the latency of a run that the rows
    adapt to (0: no target); how much memory answers to equal inputs may take (0: none are kept).
    """

    max_batch: int = 8
    max_delay_ms: float = 0.0
    target_ms: float = 0.0
    cache_mb: float = 0.0

    def __post_init__(self) -> None:
        if self.max_batch < 1 or min(self.max_delay_ms, self.target_ms, self.cache_mb) < 0:
            raise ValueError("max_batch is at least 1, the other settings are not negative")


NORMAL = Serving()


@dataclass
class Pace:
    """How many rows of a model run together: one more while its latency is within the target, half when it is not."""

    serving: Serving = NORMAL
    ewma_ms: float = 0.0
    rows: int = 0

    def __post_init__(self) -> None:
        self.rows = 1 if self.serving.target_ms else self.serving.max_batch

    def ran(self, ms: float) -> None:
        """Take the latency of a run into account."""
        self.ewma_ms = ms if not self.ewma_ms else self.ewma_ms + _WEIGHT * (ms - self.ewma_ms)
        if self.serving.target_ms:
            late = self.ewma_ms > self.serving.target_ms
            self.rows = max(1, self.rows // 2) if late else min(self.serving.max_batch, self.rows + 1)


@dataclass(eq=False)
class Entry(Generic[T]):
    """A request that waits. Entries of one `key` may run together, with `None` it runs alone.

    `digest` is of its inputs, where answers to equal ones are kept.
    """

    request: T
    id: int
    since: float
    priority: int = LOWEST - 1
    until: float = math.inf
    key: Hashable = None
    rows: int = 1
    size: int = 0
    barrier: bool = False
    digest: bytes = b""
    era: int = 0


@dataclass
class Schedule(Generic[T]):
    """What waits for one execution thread."""

    waiting: list[Entry[T]] = field(default_factory=list)
    size: int = 0
    _era: int = 0

    def add(self, entry: Entry[T]) -> None:
        """Raises Retry when too much is waiting; a barrier always has room."""
        if not entry.barrier:
            if len(self.waiting) >= WAITING:
                raise Retry(f"{WAITING} requests are waiting", "try again later")
            if self.size + entry.size > WAITING_BYTES and self.waiting:
                raise Retry(f"{self.size >> 20} MiB of requests are waiting", "try again later")
        self._era += entry.barrier
        entry.era = self._era
        self._era += entry.barrier
        self.waiting.append(entry)
        self.size += entry.size

    def take(self, now: float, pace: Pace) -> tuple[list[Entry[T]], float | None]:
        """What runs now, or how long to wait for more (None: until something comes); `pace` is that of the `head`."""
        head = self.head(now)
        if head is None:
            return [], None
        if head.key is None:
            return self._out([head]), None
        batch, rows = [head], head.rows
        for entry in sorted(self.waiting, key=lambda e: _rank(e, now)):
            if entry is not head and entry.key == head.key and entry.era == head.era and rows + entry.rows <= pace.rows:
                batch.append(entry)
                rows += entry.rows
        left = pace.serving.max_delay_ms / 1000 - (now - head.since)
        if rows < pace.rows and left > 0:
            return [], left
        return self._out(batch), None

    def head(self, now: float) -> Entry[T] | None:
        """The request whose turn it is."""
        return min(self.waiting, key=lambda e: _rank(e, now), default=None)

    def expired(self, now: float) -> list[Entry[T]]:
        """Take out what is past its deadline."""
        return self._out([entry for entry in self.waiting if entry.until < now])

    def remove(self, id: int) -> Entry[T] | None:
        """Take out a request that was given up; None when it does not wait here."""
        found = [entry for entry in self.waiting if entry.id == id and not entry.barrier]
        return self._out(found)[0] if found else None

    def _out(self, entries: list[Entry[T]]) -> list[Entry[T]]:
        for entry in entries:
            self.waiting.remove(entry)
            self.size -= entry.size
        return entries


def _rank(entry: Entry[T], now: float) -> tuple[int, float, float]:
    return entry.era, entry.priority - math.floor((now - entry.since) / AGING_S), entry.since
