"""The audit log: every entry holds the hash of the one before it, so a changed or missing entry shows.

Invariants: entries are only appended, in the transaction of the deed they tell of; `hash` is SHA-256 over the previous
hash and the entry's canonical JSON. Devices chain their own entries, which come as records; every head that came is
anchored in the hub's chain, so neither side can rewrite what both have. What the outside world can cause at will (bad
signatures, unknown devices) is told at most once a minute per cause, with a count, so nobody can fill the disk with it.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import msgspec
import sqlalchemy as sa

from hub.db import Database, audit, settings, telemetry

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


def first_broken(entries: Iterable[Any]) -> int | None:
    """The id of the first entry, `detail` as its JSON text, that does not follow from the one before it."""
    prev = GENESIS
    for entry in entries:
        if entry.prev != prev or entry.hash != entry_hash(prev, entry.ts, entry.actor, entry.action, entry.detail):
            return int(entry.id)
        prev = entry.hash
    return None


class Exported(msgspec.Struct):
    """A line of an export."""

    id: int
    ts: float
    actor: str
    action: str
    detail: msgspec.Raw
    prev: str
    hash: str


def broken_line(lines: Iterable[bytes]) -> int | None:
    """`first_broken` of an export as JSON Lines: checked with no hub. Raises msgspec.DecodeError."""
    decoded = (msgspec.json.decode(line, type=Exported) for line in lines)
    texts = (msgspec.structs.replace(each, detail=bytes(each.detail).decode()) for each in decoded)
    return first_broken(texts)


def cef(entry: dict[str, Any]) -> str:
    """The entry in ArcSight's Common Event Format, version 0, as SIEMs read it."""

    def field(text: object) -> str:
        return str(text).replace("\\", "\\\\").replace("=", "\\=").replace("\n", "\\n").replace("\r", "\\r")

    action = str(entry["action"]).replace("\\", "\\\\").replace("|", "\\|")
    severity = 6 if action.startswith(("refuse:", "lock:", "reuse:", "dead:")) else 3
    more = {"rt": int(entry["ts"] * 1000), "suser": entry["actor"], "externalId": entry["id"]}
    more |= {"cs1Label": "detail", "cs1": msgspec.json.encode(entry["detail"]).decode()}
    more |= {"cs2Label": "hash", "cs2": entry["hash"]}
    said = " ".join(f"{name}={field(value)}" for name, value in more.items())
    return f"CEF:0|Outrider|hub|1|{action}|{action}|{severity}|{said}"


def anchor(connection: sa.Connection) -> None:
    """Take the newest head of each device that sent audit records since the last call into the hub's own chain."""
    known = int(connection.execute(sa.select(settings.c.value).where(settings.c.key == "anchored")).scalar() or 0)
    newest = connection.execute(sa.select(sa.func.max(telemetry.c.id))).scalar() or 0
    new = sa.and_(telemetry.c.id > known, telemetry.c.id <= newest, telemetry.c.kind == "audit")
    heads = {}
    for row in connection.execute(sa.select(telemetry).where(new).order_by(telemetry.c.id)):
        if isinstance(n := msgspec.json.decode(row.body).get("n"), int):
            heads[row.device] = {"device": row.device, "n": n, "head": _digest(row.body)}
    for name, head in sorted(heads.items()):
        append(connection, name, "anchor:device", head)
    connection.execute(settings.delete().where(settings.c.key == "anchored"))
    connection.execute(settings.insert().values(key="anchored", value=str(newest)))


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()


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

    async def anchor(self) -> None:
        await self._db.write(anchor)

    async def first_broken(self) -> int | None:
        """The id of the first entry that does not follow from the one before it, or None."""
        everything = sa.select(audit).order_by(audit.c.id)

        def walk(connection: sa.Connection) -> int | None:
            with connection.execution_options(yield_per=1000).execute(everything) as rows:
                return first_broken(rows)

        return await self._db.read(walk)

    async def devices(self) -> dict[str, dict[str, Any]]:
        """Each device's chain as the hub holds it: entries, and what is wrong with it, or an empty text."""
        records = sa.select(telemetry.c.device, telemetry.c.body).where(telemetry.c.kind == "audit")
        records = records.order_by(telemetry.c.device, telemetry.c.epoch, telemetry.c.seq)
        anchors = sa.select(audit.c.detail).where(audit.c.action == "anchor:device")

        def walk(connection: sa.Connection) -> dict[str, dict[str, Any]]:
            chains: dict[str, dict[str, Any]] = {}
            heads: dict[tuple[str, int], str] = {}
            with connection.execution_options(yield_per=1000).execute(records) as rows:
                for row in rows:
                    body = msgspec.json.decode(row.body)
                    if not isinstance(body.get("n"), int):
                        continue  # what the device only tells, such as a refused message, is not in its chain
                    chain = chains.setdefault(row.device, {"entries": 0, "head": "", "wrong": ""})
                    again = body["n"] == 1  # a new state directory begins a new chain
                    if not again and not chain["wrong"] and body.get("prev") != chain["head"]:
                        chain["wrong"] = f"entry {body['n']} does not follow from the one before it"
                    chain["entries"] += 1
                    heads[row.device, body["n"]] = chain["head"] = _digest(row.body)
            for detail in connection.execute(anchors).scalars():
                held = msgspec.json.decode(detail)
                if heads.get((held["device"], held["n"])) != held["head"] and held["device"] in chains:
                    chains[held["device"]]["wrong"] = f"entry {held['n']} is not the one that was anchored"
            return chains

        return await self._db.read(walk)
