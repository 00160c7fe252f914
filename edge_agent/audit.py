"""What was decided on this device, by whom: hash-chained records on their way to the hub.

Invariants: an entry names the hash of the one before it, so one taken out or changed shows; the head of the chain and
the record are one transaction; entries are of the highest priority but losses and jobs, and have no TTL.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import msgspec

from edge_agent.store import Connection, Store
from edge_agent.sync.outbox import Outbox

PRIORITY = 2
QUIET_S = 10.0
_HEAD = "audit"
where: ContextVar[str] = ContextVar("where", default="")
"""The address of the client whose request is being served."""


class Audit:
    """Append-only."""

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self._store, self._outbox = store, outbox
        self._quiet: dict[str, tuple[float, int]] = {}  # by event: until when, and how many were kept quiet

    async def refused(self, event: str, subject: str, **detail: Any) -> bool:
        """What a stranger can cause at will: one entry in QUIET_S of each event, with the count of all since.

        Whether this was it.
        """
        now = time.monotonic()
        until, count = self._quiet.get(event, (0.0, 0))
        if now < until:
            self._quiet[event] = until, count + 1
            return False
        self._quiet[event] = now + QUIET_S, 0
        await self.append(event, subject, **detail, count=count + 1)
        return True

    async def append(self, event: str, subject: str, **detail: Any) -> None:
        """Enqueue one entry: `{event, subject, n, prev, …}`, `prev` the SHA-256 of the entry before. Raises Retry."""
        await self._store.write(self.entry(event, subject, **detail))

    def entry(self, event: str, subject: str, **detail: Any) -> Callable[[Connection], None]:
        """What puts one into the caller's transaction, with the client that is served here."""
        if place := where.get():
            detail["where"] = place
        return lambda db: self.put(db, event, subject, **detail)

    def put(self, db: Connection, event: str, subject: str, **detail: Any) -> None:
        """Enqueue one inside the caller's transaction."""
        row = db.execute("SELECT version, body FROM documents WHERE name = ?", [_HEAD]).fetchone()
        n, prev = row or (0, b"")
        body = {"event": event, "subject": subject, "n": n + 1, "prev": prev.decode(), **detail}
        head = hashlib.sha256(msgspec.json.encode(body)).hexdigest().encode()
        keep = "INSERT INTO documents VALUES (?, ?, ?) ON CONFLICT (name) DO UPDATE SET version = ?2, body = ?3"
        db.execute(keep, [_HEAD, n + 1, head])
        self._outbox.put(db, "audit", body, PRIORITY)
