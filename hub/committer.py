"""What devices send becomes records: verified, in order, once. The rules and the SQL; `ingest` is the loop.

Invariants: the signature is checked before anything is parsed; records and watermark are committed in one
transaction, and only then is the message acknowledged to the broker and the batch to the device, so a crash at any
point leads to redelivery and never to loss or a double; a gap commits nothing and is answered with the watermark,
from which the device sends again. A bad signature is audited and moves nothing; what is signed but cannot be read or
stored is dead-lettered (the newest MAX_DEAD_LETTERS are kept) and acknowledged. A seq that a batch covers and has no
record for is counted as missing (a `loss` record tells why, if the device knows). Several batches share a commit.
"""

import time
from collections.abc import Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.sync.broker import Message
from edge_agent.wire.batch import Header, decode_records, verify_batch
from edge_agent.wire.errors import Undecodable, WireError
from edge_agent.wire.messages import Record
from edge_agent.wire.signing import VerifyKey
from edge_agent.wire.topics import Topic
from hub import audit
from hub.db import dead_letters, devices, gaps, telemetry
from hub.jobs import apply_report
from hub.twin import apply_reported

MAX_DEAD_LETTERS = 256
MAX_GAPS = 100  # kept of a device
MAX_KIND = 64
_COLUMNS = ("device", "epoch", "seq", "ts", "received", "kind", "priority", "body")
MAX_SPAN = 1_000_000  # seqs a batch may leave out and still have its gap's ends found exactly
_WIDTH = len(_COLUMNS)
_AT_ONCE = 250  # rows a statement: at each the interpreter goes to another thread, and back when that lets it go
_encoder = msgspec.json.Encoder()
_I32 = 2**31 - 1
_I64 = 2**63 - 1


class Verdict(Enum):
    """What the watermark rule says of a batch."""

    TAKE = auto()
    SEEN = auto()
    GAP = auto()
    OLD_EPOCH = auto()


def judge(epoch: int, watermark: int, header: Header) -> tuple[Verdict, int]:
    """The verdict, and the watermark to compare the batch's seqs with."""
    if header.epoch < epoch:
        return Verdict.OLD_EPOCH, watermark
    reached = watermark if header.epoch == epoch else 0
    if header.first > reached + 1:
        return Verdict.GAP, reached
    return (Verdict.SEEN if header.last <= reached else Verdict.TAKE), reached


class Ackable(msgspec.Struct):
    """What a device is told: everything up to `seq` of `epoch` is committed."""

    epoch: int
    seq: int


class _State(msgspec.Struct):
    key: VerifyKey
    epoch: int
    watermark: int
    lost: int = 0
    missing: int = 0
    moved: bool = False


class Committed(msgspec.Struct):
    """The outcome of one transaction."""

    acks: dict[str, Ackable] = {}
    records: int = 0
    doubled: int = 0  # seqs that came again and were skipped


class Committer:
    """Applies messages inside a transaction. Called from the writer thread only."""

    def __init__(self, fleet: str) -> None:
        self._fleet = fleet
        self._limiter = audit.Limiter()

    def commit(self, connection: sa.Connection, messages: Sequence[Message], condemn: str = "") -> Committed:
        """Take messages in their order; with `condemn`, dead-letter what would be taken, for that reason."""
        states = self._states(connection, messages)
        done, values = Committed(acks={}), list[Any]()
        for message in messages:
            device = device_of(message.topic, self._fleet)
            state = states.get(device)
            if state is None:
                self._tell(connection, device or "unknown", "refuse:device", {"topic": message.topic[:200]})
                continue
            try:
                header = verify_batch(message.topic, message.payload, message.properties, state.key)
            except WireError as error:
                self._tell(connection, device, "refuse:batch", {"reason": str(error)[:400]})
                continue
            if header.epoch == state.epoch:
                done.doubled += max(0, min(header.last, state.watermark) - header.first + 1)
            values += self._take(connection, device, state, header, message, condemn)
            acked = Ackable(state.epoch, state.watermark) if header.epoch <= state.epoch else Ackable(header.epoch, 0)
            done.acks[device] = acked
        _insert(connection, values)
        done.records = len(values) // _WIDTH
        for device, state in states.items():
            if state.moved:
                moved = {"epoch": state.epoch, "watermark": state.watermark, "lost": devices.c.lost + state.lost}
                moved["missing"] = devices.c.missing + state.missing
                connection.execute(devices.update().where(devices.c.name == device).values(**moved))
        return done

    def _states(self, connection: sa.Connection, messages: Sequence[Message]) -> dict[str, _State]:
        names = {device_of(message.topic, self._fleet) for message in messages}
        columns = (devices.c.name, devices.c.public_key, devices.c.epoch, devices.c.watermark)
        query = sa.select(*columns).where(devices.c.name.in_(sorted(names))).order_by(devices.c.name).with_for_update()
        return {r.name: _State(_verify_key(r.public_key), r.epoch, r.watermark) for r in connection.execute(query)}

    def _take(
        self, connection: sa.Connection, device: str, state: _State, header: Header, message: Message, condemn: str
    ) -> list[Any]:
        verdict, reached = judge(state.epoch, state.watermark, header)
        if verdict is Verdict.OLD_EPOCH:
            self._tell(connection, device, "refuse:epoch", {"epoch": header.epoch, "known": state.epoch})
        if verdict is not Verdict.TAKE:
            return []
        state.epoch, state.watermark, state.moved = header.epoch, header.last, True
        received = time.time()
        try:
            if condemn:
                raise Undecodable(condemn)
            content_type = message.properties.get("ct", "")
            records = [r for r in decode_records(header, message.payload, content_type) if r.seq > reached]
            values = _values(device, header.epoch, received, records)
        except Undecodable as error:
            _dead_letter(connection, device, header, received, str(error), message)
            self._tell(connection, device, "dead:batch", {"first": header.first, "last": header.last})
            return []
        first = max(reached + 1, header.first)
        if missing := header.last - first + 1 - len(records):
            state.missing += missing
            _gap(connection, device, header, first, missing, [record.seq for record in records], received)
        for record in records:
            if record.kind != "telemetry":
                state.lost += _apply(connection, device, record)
        return values

    def tell(self, connection: sa.Connection, actor: str, action: str, reason: str) -> None:
        """Audit something the outside world can cause at will, at a bounded rate."""
        self._tell(connection, actor, action, {"reason": reason[:400]})

    def _tell(self, connection: sa.Connection, actor: str, action: str, detail: dict[str, Any]) -> None:
        if count := self._limiter.count(actor, action, time.monotonic()):
            audit.append(connection, actor, action, detail | {"count": count})


def device_of(topic: str, fleet: str) -> str:
    """The device a topic of this fleet names, or the empty string."""
    try:
        parsed = Topic.parse(topic)
    except WireError:
        return ""
    return (parsed.device or "") if parsed.fleet == fleet else ""


@lru_cache(maxsize=4096)
def _verify_key(text: str) -> VerifyKey:
    return VerifyKey.from_text(text)


def replay(connection: sa.Connection, id: int) -> int | None:
    """Take what a dead letter holds and is not here yet: how many records, None when there is no such letter.

    State that a device reported is not taken, as a newer one has come since. Raises Undecodable when it still is.
    """
    letter = connection.execute(sa.select(dead_letters).where(dead_letters.c.id == id).with_for_update()).first()
    if letter is None:
        return None
    header, received = Header(letter.epoch, letter.first, letter.last), time.time()
    where = (telemetry.c.device == letter.device, telemetry.c.epoch == header.epoch)
    query = sa.select(telemetry.c.seq).where(*where, telemetry.c.seq.between(header.first, header.last))
    known = set(connection.execute(query).scalars())
    records = [record for record in decode_records(header, letter.payload) if record.seq not in known]
    _insert(connection, _values(letter.device, header.epoch, received, records))
    special = (record for record in records if record.kind not in ("telemetry", "reported"))
    values = {"lost": devices.c.lost + sum(_apply(connection, letter.device, record) for record in special)}
    connection.execute(devices.update().where(devices.c.name == letter.device).values(**values))
    connection.execute(dead_letters.update().where(dead_letters.c.id == id).values(replayed=received))
    return len(records)


def _apply(connection: sa.Connection, device: str, record: Record) -> int:
    """What a record changes beside the telemetry; how many records it tells the loss of."""
    match record.kind:
        case "job":
            apply_report(connection, device, record.body)
        case "reported":
            apply_reported(connection, device, record.body)
        case "loss":
            count = record.body.get("count")
            return count if isinstance(count, int) and 0 < count <= _I32 else 0
    return 0


def _values(device: str, epoch: int, received: float, records: Sequence[Record]) -> list[Any]:
    """The rows' values one after the other: a tuple for each row is what the collector would look through."""
    for kind in {record.kind for record in records}:
        if len(kind) > MAX_KIND or "\0" in kind:
            raise Undecodable(f"a record's kind is longer than {MAX_KIND}, or has a zero in it: {kind[:MAX_KIND]!r}")
    if any(abs(priority) > _I32 for priority in {record.priority for record in records}):
        raise Undecodable("a record's priority is out of range")
    bodies = _encoder.encode_lines([record.body for record in records]).decode().split("\n")
    return [
        value
        for r, body in zip(records, bodies, strict=False)
        for value in (device, epoch, r.seq, r.ts, received, r.kind, r.priority, body)
    ]


def _insert(connection: sa.Connection, values: list[Any]) -> None:
    """By the driver: to compile and bind each row takes SQLAlchemy longer than the insert itself."""
    mark = "?" if connection.dialect.paramstyle == "qmark" else "%s"
    marks = f"({', '.join([mark] * _WIDTH)})"
    insert, size = f"INSERT INTO telemetry ({', '.join(_COLUMNS)}) VALUES ", _AT_ONCE * _WIDTH
    several, whole = insert + ", ".join([marks] * _AT_ONCE), len(values) - len(values) % size
    for at in range(0, whole, size):
        connection.exec_driver_sql(several, tuple(values[at : at + size]))
    rest = iter(values[whole:])
    if rows := list(zip(*[rest] * _WIDTH, strict=True)):
        connection.exec_driver_sql(insert + marks, rows)


def _gap(
    connection: sa.Connection, device: str, header: Header, first: int, count: int, seqs: list[int], found: float
) -> None:
    """Keep from which seq to which some are missing."""
    absent = sorted(set(range(first, header.last + 1)).difference(seqs)) if count < MAX_SPAN else [first, header.last]
    row = {"epoch": header.epoch, "first": absent[0], "last": absent[-1], "count": count, "found": found}
    connection.execute(gaps.insert().values(device=device, **row))
    newest = sa.select(gaps.c.id).where(gaps.c.device == device).order_by(gaps.c.id.desc()).limit(MAX_GAPS)
    connection.execute(gaps.delete().where(gaps.c.device == device, gaps.c.id.not_in(newest)))


def _dead_letter(
    connection: sa.Connection, device: str, header: Header, received: float, reason: str, message: Message
) -> None:
    row = {
        "device": device,
        "epoch": header.epoch,
        "first": header.first,
        "last": header.last,
        "received": received,
        "reason": reason.replace("\0", "")[:1000],
        "payload": message.payload,
        "properties": dict(message.properties),
    }
    new = connection.execute(dead_letters.insert().values(**row)).inserted_primary_key
    if new is not None:
        connection.execute(dead_letters.delete().where(dead_letters.c.id <= new[0] - MAX_DEAD_LETTERS))
