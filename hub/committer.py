"""What devices send becomes records: verified, in order, once. The rules and the SQL; `ingest` is the loop.

Invariants: the signature is checked before anything is parsed; records and watermark are committed in one
transaction, and only then is the message acknowledged to the broker and the batch to the device, so a crash at any
point leads to redelivery and never to loss or a double; a gap commits nothing and is answered with the watermark,
from which the device sends again. A bad signature is audited and moves nothing; what is signed but cannot be read or
stored is dead-lettered (the newest MAX_DEAD_LETTERS are kept) and acknowledged. Several batches share a commit.
"""

import time
from collections.abc import Sequence
from enum import Enum, auto
from functools import lru_cache
from typing import Any, Protocol

import msgspec
import sqlalchemy as sa

from edge_agent.wire.batch import Header, decode_records, verify_batch
from edge_agent.wire.errors import Undecodable, WireError
from edge_agent.wire.messages import Record
from edge_agent.wire.signing import VerifyKey
from edge_agent.wire.topics import Topic
from hub import audit
from hub.db import dead_letters, devices, telemetry
from hub.jobs import apply_report
from hub.twin import apply_reported

MAX_DEAD_LETTERS = 256
MAX_KIND = 64
_I32 = 2**31 - 1
_I64 = 2**63 - 1


class Message(Protocol):
    """What the transport hands over."""

    @property
    def topic(self) -> str: ...
    @property
    def payload(self) -> bytes: ...
    @property
    def properties(self) -> dict[str, str]: ...


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
        done, rows = Committed(acks={}), []
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
            taken = self._take(connection, device, state, header, message, condemn)
            rows += taken
            done.records += len(taken)
            acked = Ackable(state.epoch, state.watermark) if header.epoch <= state.epoch else Ackable(header.epoch, 0)
            done.acks[device] = acked
        if rows:
            connection.execute(telemetry.insert(), rows)
        for device, state in states.items():
            if state.moved:
                values = {"epoch": state.epoch, "watermark": state.watermark, "lost": devices.c.lost + state.lost}
                connection.execute(devices.update().where(devices.c.name == device).values(**values))
        return done

    def _states(self, connection: sa.Connection, messages: Sequence[Message]) -> dict[str, _State]:
        names = {device_of(message.topic, self._fleet) for message in messages}
        columns = (devices.c.name, devices.c.public_key, devices.c.epoch, devices.c.watermark)
        query = sa.select(*columns).where(devices.c.name.in_(sorted(names))).order_by(devices.c.name).with_for_update()
        return {r.name: _State(_verify_key(r.public_key), r.epoch, r.watermark) for r in connection.execute(query)}

    def _take(
        self, connection: sa.Connection, device: str, state: _State, header: Header, message: Message, condemn: str
    ) -> list[dict[str, Any]]:
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
            records = [r for r in decode_records(header, message.payload) if r.seq > reached]
            rows = [_row(device, header.epoch, received, record) for record in records]
        except Undecodable as error:
            _dead_letter(connection, device, header, received, str(error), message.payload)
            self._tell(connection, device, "dead:batch", {"first": header.first, "last": header.last})
            return []
        for record in records:
            if record.kind != "telemetry":
                self._apply(connection, device, state, record)
        return rows

    def _apply(self, connection: sa.Connection, device: str, state: _State, record: Record) -> None:
        match record.kind:
            case "job":
                apply_report(connection, device, record.body)
            case "reported":
                apply_reported(connection, device, record.body)
            case "loss":
                count = record.body.get("count")
                state.lost += count if isinstance(count, int) and 0 < count <= _I32 else 0

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


def _row(device: str, epoch: int, received: float, record: Record) -> dict[str, Any]:
    if len(record.kind) > MAX_KIND or "\0" in record.kind or abs(record.priority) > _I32 or record.seq > _I64:
        raise Undecodable(f"record {record.seq}: kind, priority or seq is out of range")
    return {
        "device": device,
        "epoch": epoch,
        "seq": record.seq,
        "ts": record.ts,
        "received": received,
        "kind": record.kind,
        "priority": record.priority,
        "body": msgspec.json.encode(record.body).decode(),
    }


def _dead_letter(
    connection: sa.Connection, device: str, header: Header, received: float, reason: str, payload: bytes
) -> None:
    row = {
        "device": device,
        "epoch": header.epoch,
        "first": header.first,
        "last": header.last,
        "received": received,
        "reason": reason.replace("\0", "")[:1000],
        "payload": payload,
    }
    new = connection.execute(dead_letters.insert().values(**row)).inserted_primary_key
    if new is not None:
        connection.execute(dead_letters.delete().where(dead_letters.c.id <= new[0] - MAX_DEAD_LETTERS))
