"""Which waiting requests run next, and which of them together.

Invariants: pure, time is given. Better classes go first (0 before 3), and a request gains a class for every `AGING_S`
it waits, so none starves; those that waited behind a barrier (an adapter that changes) never run before it. A batch
has one key (model, names, types and shapes behind the first dimension), and at most its pace's rows. What waits for a
model is bounded in number and bytes; what is past its deadline is given back, not run. How many runs go at the same
time and how many rows each has follows the measured time a byte of input takes, as no constant is right for all.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import msgspec

from edge_agent.errors import Retry

AGING_S = 1.0
WAITING, WAITING_BYTES = 64, 256 * 1024 * 1024
LOWEST = 3
_WEIGHT = 0.1  # of the newest value in an average, once there are as many
_SPELL, _LEAST = 12, 4  # rows and runs of a way that is tried
_REST = 40.0  # how many times as long the best one is kept then
_BETTER = 0.97  # the share of the best way's time that another must take less than: noise is no reason to change
T = TypeVar("T")


class Serving(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a model is served; a bundle may say so in `meta.serving`.

    Rows that run together at most; how long the first of them may wait for others; the latency of a run that the rows
    adapt to (0: no target); how much memory answers to equal inputs may take (0: none are kept); runs at the same time
    at most (0: as the engine allows); requests that wait at most, and their MiB; MiB that it needs when loaded (0: two
    and a half times its files); whether inputs with NaN or infinite values are refused.
    """

    max_batch: int = 8
    max_delay_ms: float = 0.0
    target_ms: float = 0.0
    cache_mb: float = 0.0
    concurrency: int = 0
    queue: int = WAITING
    queue_mb: float = WAITING_BYTES / 2**20
    memory_mb: float = 0.0
    finite: bool = True

    def __post_init__(self) -> None:
        others = self.max_delay_ms, self.target_ms, self.cache_mb, self.concurrency, self.queue_mb, self.memory_mb
        if min(self.max_batch, self.queue) < 1 or min(others) < 0:
            raise ValueError("max_batch and queue are at least 1, the other settings are not negative")


NORMAL = Serving()


@dataclass
class Lanes:
    """The runs that go on, and a clock of their shares: of two at the same time, each takes half of the time."""

    active: int = 0
    _limit: int = 1
    _shares: float = 0.0
    _at: float = 0.0

    @property
    def full(self) -> bool:
        """Whether nothing at all may begin."""
        return self.active >= self._limit

    def free(self, lanes: int) -> bool:
        """Whether a run that goes beside at most `lanes - 1` others may begin."""
        return self.active < min(lanes, self._limit) or not self.active

    def begin(self, now: float, lanes: int) -> tuple[float, float]:
        """What `end` wants to know."""
        began = now, self._tick(now)
        self._limit = lanes
        self.active += 1
        return began

    def end(self, now: float, began: tuple[float, float]) -> tuple[float, float]:
        """Seconds that the run took, and its share of them."""
        shares = self._tick(now)
        self.active -= 1
        return now - began[0], shares - began[1]

    def _tick(self, now: float) -> float:
        if self.active:
            self._shares += (now - self._at) / self.active
        self._at = now
        return self._shares


Way = tuple[int, int]
"""Runs at the same time, rows of each."""


@dataclass
class _Mean:
    """An average of what came lately."""

    value: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += max(_WEIGHT, 1 / self.count) * (value - self.value)


@dataclass
class Pace:
    """In which way a model runs while requests wait: a way beside the best one is tried for some runs, then again after
    a rest, and what takes clearly less time a byte is kept; a way that is later than the target is none."""

    serving: Serving = NORMAL
    lanes: int = 1  # runs at the same time that the engine allows
    way: Way = (1, 1)
    _best: Way = (1, 1)
    _all: _Mean = field(default_factory=_Mean)  # milliseconds of a run
    _seen: dict[Way, tuple[_Mean, _Mean]] = field(default_factory=dict)  # seconds a byte, milliseconds of a run
    _tried: list[Way] = field(default_factory=lambda: [(1, 1)])  # the last one at the end
    _runs: int = 0
    _rows: int = 0
    _spent: float = 0.0
    _rest: float = 0.0

    @property
    def ewma_ms(self) -> float:
        return self._all.value

    def ran(
        self, rows: int, size: int, took_s: float, share_s: float, waiting: bool = True, company: bool = False
    ) -> None:
        """Take a run into account; `waiting`: others did while it ran; `company`: others could go at the same time."""
        self._all.add(took_s * 1000)
        seen = round(took_s / share_s) if share_s else 1, rows
        if seen[0] == (self.lanes if company else 1):
            cost, ms = self._seen.setdefault(seen, (_Mean(), _Mean()))
            cost.add(share_s / max(1, size))
            ms.add(took_s * 1000)
        if not (waiting or seen > (1, 1)):
            return
        self._runs, self._rows, self._spent = self._runs + 1, self._rows + rows, self._spent + share_s
        if self._rows < _SPELL or self._runs < _LEAST or (self.way == self._best and self._spent < self._rest):
            return
        if self.way == self._best:
            beside = self._beside()
            untried = [way for way in beside if way not in self._tried]
            self.way = next(iter(untried or [way for way in self._tried if way in beside]), self._best)
            self._tried = [*(way for way in self._tried if way != self.way), self.way]
        else:
            best, other = self._cost(self._best), self._cost(self.way)
            if min(best, other) == math.inf:
                self._best = (1, 1)
            elif other < _BETTER * best:
                self._best = self.way
            self.way = self._best
            self._rest = _REST * self._spent if set(self._beside()) <= set(self._tried) else 0.0
        self._runs, self._rows, self._spent = 0, 0, 0.0

    def _cost(self, way: Way) -> float:
        """Seconds a byte; infinite for a way that is too late, or was never seen."""
        cost, ms = self._seen.get(way, (_Mean(math.inf), _Mean()))
        return math.inf if ms.value > (self.serving.target_ms or math.inf) else cost.value

    def _beside(self) -> list[Way]:
        lanes, rows = self._best
        ways = (1 if lanes > 1 else self.lanes, rows), (lanes, rows * 2), (lanes, rows // 2)
        return [way for way in ways if way != self._best and 1 <= way[1] <= self.serving.max_batch]


@dataclass(eq=False)
class Entry(Generic[T]):
    """A request that waits. Entries of one `key` may run together, with `None` it runs alone.

    `model` is whose queue it waits in, `digest` of its inputs, where answers to equal ones are kept.
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
    model: str = ""


@dataclass
class Schedule(Generic[T]):
    """What waits for the execution threads: a bounded queue a model, so that a busy one costs the others no Retry."""

    waiting: list[Entry[T]] = field(default_factory=list)
    _held: Counter[str] = field(default_factory=Counter)  # requests by model
    _sizes: Counter[str] = field(default_factory=Counter)
    _era: int = 0

    def add(self, entry: Entry[T], serving: Serving = NORMAL) -> None:
        """Raises Retry when too much is waiting for the model; a barrier always has room."""
        if not entry.barrier:
            held, size = self._held[entry.model], self._sizes[entry.model]
            who = f" for {entry.model}" if entry.model else ""
            if held >= serving.queue:
                raise Retry(f"{held} requests are waiting{who}", "try again later")
            if held and size + entry.size > serving.queue_mb * 2**20:
                raise Retry(f"{size >> 20} MiB of requests are waiting{who}", "try again later")
            self._held[entry.model] += 1
            self._sizes[entry.model] += entry.size
        self._era += entry.barrier
        entry.era = self._era
        self._era += entry.barrier
        self.waiting.append(entry)

    def take(self, now: float, pace: Pace) -> tuple[list[Entry[T]], float | None]:
        """What runs now, or how long to wait for more (None: until something comes); `pace` is that of the `head`."""
        head = self.head(now)
        if head is None:
            return [], None
        if head.key is None:
            return self._out([head]), None
        batch, rows, most = [head], head.rows, pace.way[1]
        for entry in sorted(self.waiting, key=lambda e: _rank(e, now)):
            if entry is not head and entry.key == head.key and entry.era == head.era and rows + entry.rows <= most:
                batch.append(entry)
                rows += entry.rows
        left = pace.serving.max_delay_ms / 1000 - (now - head.since)
        if rows < most and left > 0:
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
            if not entry.barrier:
                self._held[entry.model] -= 1
                self._sizes[entry.model] -= entry.size
            if not self._held[entry.model]:
                del self._held[entry.model], self._sizes[entry.model]  # names come from callers: keep none
        return entries


def _rank(entry: Entry[T], now: float) -> tuple[int, float, float]:
    return entry.era, entry.priority - math.floor((now - entry.since) / AGING_S), entry.since
