"""The audit log: every entry holds the hash of the one before it, so a changed or missing entry shows.

Invariants: entries are only appended, in the transaction of the deed they tell of; `hash` is SHA-256 over the previous
hash and the entry's canonical JSON. What the outside world can cause at will (bad signatures, unknown devices) is
told at most once a minute per cause, with a count, so nobody can fill the disk with it.
"""

import hashlib
import time
from collections import OrderedDict
from typing import Any

import msgspec
import sqlalchemy as sa

from hub.db import Database, audit

GENESIS = "0" * 64
QUIET_S = 60.0
MAX_CAUSES = 1024


def entry_hash(prev: str, ts: float, actor: str, action: str, detail: str) -> str:
    return hashlib.sha256(prev.encode() + b"\0" + msgspec.json.encode([ts, actor, action, detail])).hexdigest()


def append(connection: sa.Connection, actor: str, action: str, detail: dict[str, Any]) -> None:
    """Add an entry inside the caller's transaction."""
    last = sa.select(audit.c.hash).order_by(audit.c.id.desc()).limit(1).with_for_update()
    prev = connection.execute(last).scalar() or GENESIS
    ts, text = time.time(), msgspec.json.encode(detail).decode()
    digest = entry_hash(prev, ts, actor, action, text)
    row = {"ts": ts, "actor": actor, "action": action, "detail": text, "prev": prev, "hash": digest}
    connection.execute(audit.insert().values(**row))


class Limiter:
    """Decides which repeated events are told: the first of a cause, then one a minute with the count of all since."""

    def __init__(self) -> None:
        self._causes: OrderedDict[tuple[str, str], tuple[float, int]] = OrderedDict()

    def count(self, actor: str, action: str, now: float) -> int:
        """How many events an entry written now stands for; 0 when none should be written."""
        told, pending = self._causes.pop((actor, action), (float("-inf"), 0))
        due = now - told >= QUIET_S
        self._causes[(actor, action)] = (now, 0) if due else (told, pending + 1)
        if len(self._causes) > MAX_CAUSES:
            self._causes.popitem(last=False)
        return pending + 1 if due else 0


class Audit:
    """Reading the log."""

    def __init__(self, db: Database) -> None:
        self._db = db

    async def add(self, actor: str, action: str, detail: dict[str, Any]) -> None:
        await self._db.write(lambda c: append(c, actor, action, detail))

    async def entries(self, after: int = 0, limit: int = 100) -> list[dict[str, Any]]:
        """Entries with an id above `after`, oldest first."""
        query = sa.select(audit).where(audit.c.id > after).order_by(audit.c.id).limit(limit)
        rows = await self._db.read(lambda c: c.execute(query).mappings().all())
        return [dict(row) | {"detail": msgspec.json.decode(row["detail"])} for row in rows]

    async def newest(self, limit: int = 100) -> list[dict[str, Any]]:
        """The last entries, newest first."""
        query = sa.select(audit).order_by(audit.c.id.desc()).limit(limit)
        rows = await self._db.read(lambda c: c.execute(query).mappings().all())
        return [dict(row) | {"detail": msgspec.json.decode(row["detail"])} for row in rows]

    async def first_broken(self) -> int | None:
        """The id of the first entry that does not follow from the one before it, or None."""

        def walk(connection: sa.Connection) -> int | None:
            prev = GENESIS
            everything = sa.select(audit).order_by(audit.c.id)
            with connection.execution_options(yield_per=1000).execute(everything) as rows:
                for row in rows:
                    if row.prev != prev or row.hash != entry_hash(prev, row.ts, row.actor, row.action, row.detail):
                        return int(row.id)
                    prev = row.hash
            return None

        return await self._db.read(walk)
