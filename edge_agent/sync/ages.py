"""How long what waits has waited, however any clock is set.

Invariants: time is counted by a clock that nobody can set, and after a restart from where it was on disk; what passed
while nobody counted (the device was off) is told by `hear`, as far as the hub's clock and this machine's both moved on
since the hub last told the time. So neither makes anything older by being set, and while they do not agree what waits
is kept too long rather than too short.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

from edge_agent.store import Connection

KEEP_S = 60.0  # so much of what was counted a crash may cost
_NAME = "ages"


class Note(msgspec.Struct, frozen=True):
    """`at` is the time counted; `hub` and `own` by how much those clocks were before it when the hub last told."""

    at: float
    hub: float | None = None
    own: float = 0.0


class Ages:
    """`now()` is a time for differences alone; on a new disk it begins with this machine's."""

    def __init__(self, db: Connection, clock: Callable[[], float], steady: Callable[[], float]) -> None:
        self._clock, self._steady = clock, steady
        row = db.execute("SELECT body FROM documents WHERE name = ?", [_NAME]).fetchone()
        self.note = msgspec.json.decode(row[0], type=Note) if row else Note(clock())
        self._ahead = self.note.at - steady()
        self._written = self.note.at if row else -math.inf

    def now(self) -> float:
        """Seconds."""
        return self._steady() + self._ahead

    def hear(self, ts: float) -> tuple[float, Note]:
        """The seconds not counted since the hub last told the time, and what to note now that it tells `ts`."""
        now = self.now()
        note = Note(now, ts - now, self._clock() - now)
        missed = 0.0 if self.note.hub is None else min(ts - now - self.note.hub, note.own - self.note.own)
        return missed, note

    def keep(self, db: Connection) -> None:
        """Write the time down inside the caller's transaction, when it was not for long."""
        if (now := self.now()) - self._written >= KEEP_S:
            self.write(db, msgspec.structs.replace(self.note, at=now))

    def write(self, db: Connection, note: Note) -> None:
        """The same at once."""
        db.execute("INSERT OR REPLACE INTO documents VALUES (?, 0, ?)", [_NAME, msgspec.json.encode(note)])
        self._written = note.at
