"""The audit log: every entry holds the hash of the one before it, so a changed or missing entry shows.

Invariants: entries are only appended, in the transaction of the deed they tell of; `hash` is SHA-256 over the previous
hash and the entry's canonical JSON. Devices chain their own entries, which come as records; every head that came is
anchored in the hub's chain, so neither side can rewrite what both have; where the oldest were pruned, that chain has
the hash that the rest follows from. What the outside world can cause at will (bad signatures, unknown devices) is told
at most once a minute per cause, with a count, so nobody can fill the disk with it.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import msgspec
import sqlalchemy as sa

from hub.db import AUDITED, Database, audit, settings, telemetry

GENESIS = "0" * 64
where: ContextVar[str] = ContextVar("where", default="")
"""The address of the client whose request is being served; it goes into every entry that comes of it."""
QUIET_S = 60.0
LAST_TS = 253402300799.0  # the end of the year 9999
MAX_CAUSES = 1024


def entry_hash(prev: str, ts: float, actor: str, action: str, detail: str) -> str:
    return hashlib.sha256(prev.encode() + b"\0" + msgspec.json.encode([ts, actor, action, detail])).hexdigest()


def append(connection: sa.Connection, actor: str, action: str, detail: dict[str, Any]) -> None:
    """Add an entry inside the caller's transaction."""
    last = sa.select(audit.c.hash).order_by(audit.c.id.desc()).limit(1).with_for_update()
    prev = connection.execute(last).scalar() or GENESIS
    detail = detail | {"where": where.get()} if where.get() else detail
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


class DeviceEntry(msgspec.Struct):
    """A line of an export: what a device chained, `body` being the very text it hashed."""

    device: str
    epoch: int
    seq: int
    ts: float
    body: str


class Chains:
    """Follows the chains of devices through their entries, in the order of (device, epoch, seq)."""

    def __init__(self) -> None:
        self._found: dict[str, dict[str, Any]] = {}
        self._heads: dict[tuple[str, int], set[str]] = {}
        self._breaks: list[tuple[str, int, str]] = []
        self._anchors: list[Any] = []
        self._pruned: dict[str, Any] = {}  # the newest, by device
        self._followed: set[tuple[str, str]] = set()  # heads of what was pruned

    def take(self, device: str, text: str) -> bool:
        """Whether it is in the chain: what an older device only tells is not."""
        body = msgspec.json.decode(text)
        if not isinstance(body, dict) or not isinstance(body.get("n"), int):
            return False
        chain = self._chain(device)
        again = body["n"] == 1  # a new state directory begins a new chain
        if not again and body.get("prev") != chain["head"]:
            self._breaks.append((device, body["n"], str(body.get("prev"))))
        chain["entries"] += 1
        chain["head"] = _digest(text)
        self._heads.setdefault((device, body["n"]), set()).add(chain["head"])
        return True

    def know(self, action: str, detail: Any) -> None:
        """Take what the hub's own chain tells, in its order: a head that was anchored, up to where was pruned."""
        if action == "anchor:device":
            self._anchors.append(detail)
        elif action == "prune:device":
            self._pruned[detail["device"]] = detail
            self._followed.add((detail["device"], detail["head"]))

    def verdict(self, anchored: bool = True) -> dict[str, dict[str, Any]]:
        """Each device's chain: entries, head, what is wrong with it, and up to where older ones were pruned."""
        for name, gone in self._pruned.items():
            up_to = {"epoch": gone["epoch"], "seq": gone["seq"]}
            self._chain(name).update(wrong=gone["wrong"], pruned=up_to)
        for name, n, prev in self._breaks:
            if (name, prev) not in self._followed and not self._found[name]["wrong"]:
                self._found[name]["wrong"] = f"entry {n} does not follow from the one before it"
        for anchor in self._anchors if anchored else ():
            name, n = anchor["device"], anchor["n"]
            heads, gone = self._heads.get((name, n), ()), self._pruned.get(name)
            if gone and (anchor.get("epoch", 0), anchor.get("seq", 0)) <= (gone["epoch"], gone["seq"]):
                continue  # one of before anchors told their place holds nothing once its device was pruned
            if anchor["head"] not in heads:
                self._chain(name)["wrong"] = f"entry {n} " + (
                    "is not the one that was anchored" if heads else "was anchored and is gone"
                )
        return self._found

    def _chain(self, device: str) -> dict[str, Any]:
        return self._found.setdefault(device, {"entries": 0, "head": "", "wrong": ""})


def check_export(lines: Iterable[bytes], devices: bool = True) -> dict[str, Any]:
    """`{first_broken, devices}` of an export as JSON Lines, checked with no hub. Raises msgspec.DecodeError.

    One that was made without `devices` has none of what the anchors name.
    """
    chains = Chains()

    def own() -> Iterator[Any]:
        for line in lines:
            match msgspec.json.decode(line, type=dict[str, Any]):
                case {"device": str(device), "body": str(body)}:
                    chains.take(device, body)
                case {"chain": _}:
                    pass  # the verdict of the hub that made the export
                case _:
                    entry = msgspec.json.decode(line, type=Exported)
                    if devices:
                        chains.know(entry.action, msgspec.json.decode(entry.detail))
                    yield msgspec.structs.replace(entry, detail=bytes(entry.detail).decode())

    broken = first_broken(own())
    return {"first_broken": broken, "devices": chains.verdict(anchored=broken is None)}


def cef_device(entry: dict[str, Any]) -> str:
    """A device's entry in the same form."""
    body = msgspec.json.decode(entry["body"])
    told = {name: value for name, value in body.items() if name not in ("event", "action", "subject", "prev")}
    shown = {
        "id": f"{entry['device']}/{entry['epoch']}/{entry['seq']}",
        "ts": entry["ts"],
        "hash": _digest(entry["body"]),
    }
    who, what = body.get("subject", ""), body.get("event") or body.get("action", "")
    return cef(shown | {"actor": who, "action": what, "detail": told | {"device": entry["device"]}}, "agent")


def cef(entry: dict[str, Any], product: str = "hub") -> str:
    """The entry in ArcSight's Common Event Format, version 0, as SIEMs read it."""

    def field(text: object) -> str:
        return str(text).replace("\\", "\\\\").replace("=", "\\=").replace("\n", "\\n").replace("\r", "\\r")

    action = " ".join(str(entry["action"]).split()).replace("\\", "\\\\").replace("|", "\\|")
    severity = 6 if action.startswith(("refuse:", "lock:", "reuse:", "dead:")) else 3
    more = {"rt": millis(entry["ts"]), "suser": entry["actor"], "externalId": entry["id"]}
    more |= {"cs1Label": "detail", "cs1": msgspec.json.encode(entry["detail"]).decode()}
    more |= {"cs2Label": "hash", "cs2": entry["hash"]}
    said = " ".join(f"{name}={field(value)}" for name, value in more.items())
    return f"CEF:0|Outrider|{product}|1|{action}|{action}|{severity}|{said}"


def millis(ts: float) -> int:
    """Milliseconds since the Unix epoch, held to the years 1970 to 9999, whatever a device's clock says."""
    return round(min(max(ts, 0.0), LAST_TS) * 1000)


def anchor(connection: sa.Connection) -> None:
    """Take the newest head of each device that sent audit records since the last call into the hub's own chain."""
    known = int(connection.execute(sa.select(settings.c.value).where(settings.c.key == "anchored")).scalar() or 0)
    newest = connection.execute(sa.select(sa.func.max(telemetry.c.id))).scalar() or 0
    new = sa.and_(telemetry.c.id > known, telemetry.c.id <= newest, telemetry.c.kind == "audit")
    heads = {}
    for row in connection.execute(sa.select(telemetry).where(new).order_by(telemetry.c.id)):
        if isinstance(n := msgspec.json.decode(row.body).get("n"), int):
            place = {"epoch": row.epoch, "seq": row.seq}
            heads[row.device] = {"device": row.device, "n": n, "head": _digest(row.body)} | place
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

    async def device_entries(self, after: tuple[str, int, int] = ("", 0, 0), limit: int = 1000) -> list[DeviceEntry]:
        """What devices chained, in the order of (device, epoch, seq), past that."""
        place = sa.tuple_(telemetry.c.device, telemetry.c.epoch, telemetry.c.seq)
        columns = [telemetry.c[name] for name in DeviceEntry.__struct_fields__]
        query = sa.select(*columns).where(AUDITED, place > after)
        query = query.order_by(telemetry.c.device, telemetry.c.epoch, telemetry.c.seq).limit(limit)
        return [DeviceEntry(*row) for row in await self._db.read(lambda c: c.execute(query).all())]

    async def devices(self) -> dict[str, dict[str, Any]]:
        """Each device's chain as the hub holds it, see `Chains.verdict`."""
        records = sa.select(telemetry.c.device, telemetry.c.body).where(AUDITED)
        records = records.order_by(telemetry.c.device, telemetry.c.epoch, telemetry.c.seq)
        told = sa.select(audit.c.action, audit.c.detail).where(audit.c.action.in_(["anchor:device", "prune:device"]))

        def walk(connection: sa.Connection) -> dict[str, dict[str, Any]]:
            chains = Chains()
            with connection.execution_options(yield_per=1000).execute(records) as rows:
                for row in rows:
                    chains.take(row.device, row.body)
            for row in connection.execute(told.order_by(audit.c.id)):
                chains.know(row.action, msgspec.json.decode(row.detail))
            return chains.verdict()

        return await self._db.read(walk)
