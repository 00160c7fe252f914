"""The messages of the contract, JSON by msgspec.

Invariants: a tolerant reader (unknown fields are accepted, unknown enum values read as `unknown`), a strict writer;
`v` is the major version of the protocol, and another one is refused by its name, never guessed at.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any, TypeVar

import msgspec

from edge_agent.wire.errors import Undecodable, VersionRefused
from edge_agent.wire.topics import VERSION

MAX_MESSAGE = 256 * 1024
TWIN_LIMIT = 32 * 1024
MAX_DEPTH = 32  # levels of lists and objects in a document anybody may write


class _Tolerant(StrEnum):
    @classmethod
    def _missing_(cls, value: object) -> _Tolerant:
        return cls("unknown")


class PresenceState(_Tolerant):
    ONLINE = "online"
    OFFLINE = "offline"
    UNKNOWN = "unknown"


class JobState(_Tolerant):
    QUEUED = "queued"
    DELIVERED = "delivered"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    REJECTED = "rejected"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    UNKNOWN = "unknown"


class JobKind(_Tolerant):
    TASK = "task"
    TOOL = "tool"
    CANCEL = "cancel"  # of the job that its body names
    UNKNOWN = "unknown"


class LossReason(_Tolerant):
    QUOTA = "quota"
    TTL = "ttl"
    UNKNOWN = "unknown"


_S = JobState
TERMINAL = frozenset({_S.SUCCEEDED, _S.FAILED, _S.REJECTED, _S.EXPIRED, _S.CANCELLED})
JOB_TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    _S.QUEUED: frozenset({_S.DELIVERED, _S.RUNNING} | TERMINAL),
    _S.DELIVERED: frozenset({_S.RUNNING} | TERMINAL),
    _S.RUNNING: frozenset({_S.SUCCEEDED, _S.FAILED, _S.CANCELLED}),
    **{state: frozenset() for state in TERMINAL},
}


class Record(msgspec.Struct, frozen=True, gc=False):
    """One line of a batch: `seq` counts from 1 within an epoch, `ts` is seconds since the Unix epoch.

    JSON has no NaN and no infinity: in a body both are written as null.
    """

    seq: int
    ts: float
    kind: str
    priority: int
    body: dict[str, Any]


class Presence(msgspec.Struct, frozen=True):
    """A device says that it is there; the will says that it is not. `nonce` answers the hub's last ack."""

    state: PresenceState
    ts: float
    epoch: int
    seq: int
    nonce: str = ""
    agent: str = ""
    v: int = VERSION
    reason: str | msgspec.UnsetType = msgspec.UNSET  # of offline: `lost` by the will, `shutdown`


class Ack(msgspec.Struct, frozen=True):
    """The hub has committed everything up to `seq` of `epoch`; `ts` is the hub's clock in seconds."""

    epoch: int
    seq: int
    ts: float
    nonce: str = ""
    v: int = VERSION


class Desired(msgspec.Struct, frozen=True):
    """The whole document the hub wants on a device, at most 32 KiB, with a version that only grows."""

    version: int
    ts: float
    doc: dict[str, Any]
    v: int = VERSION


class Job(msgspec.Struct, frozen=True):
    """Work for a device on behalf of a subject. Times are seconds since the Unix epoch."""

    id: str
    kind: JobKind
    body: dict[str, Any]
    subject: str
    roles: list[str]
    created: float
    expires: float
    idempotency_key: str = ""
    v: int = VERSION


class Progress(msgspec.Struct, frozen=True):
    """How far a job is: steps done, of how many (0: not known), and the last one in words."""

    done: int
    total: int = 0
    text: str = ""


class JobReport(msgspec.Struct, frozen=True):
    """What became of a job: the body of a record of kind `job`. One that runs tells its progress, at a bounded rate."""

    id: str
    state: JobState
    ts: float
    result: dict[str, Any] = {}
    error: str = ""
    progress: Progress | msgspec.UnsetType = msgspec.UNSET


class Loss(msgspec.Struct, frozen=True):
    """What the outbox let go, and why: the body of a record of kind `loss`."""

    reason: LossReason
    first_seq: int
    last_seq: int
    count: int
    by_priority: dict[str, int] = {}


class _Version(msgspec.Struct):
    v: int = VERSION


T = TypeVar("T")


def check_depth(value: object) -> None:
    """Raises Undecodable for lists and objects nested past MAX_DEPTH: readers downstream recurse."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        below = [one for each in level for one in (each.values() if isinstance(each, dict) else each)]
        level = [one for one in below if isinstance(one, dict | list)]
        if not level:
            return
    raise Undecodable(f"nested deeper than {MAX_DEPTH} levels")


def merge_patch(document: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """RFC 7396: null removes, objects merge, anything else replaces."""
    merged = dict(document)
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        elif isinstance(value, dict):
            inner = merged.get(name)
            merged[name] = merge_patch(inner if isinstance(inner, dict) else {}, value)
        else:
            merged[name] = value
    return merged


def encode(message: msgspec.Struct) -> bytes:
    """JSON, fields in the order of their declaration."""
    return msgspec.json.encode(message)


def decode(kind: type[T], data: bytes) -> T:
    """Raises VersionRefused when another major version speaks, else Undecodable with the field at fault."""
    if len(data) > MAX_MESSAGE:
        raise Undecodable(f"a {kind.__name__} of {len(data)} bytes; at most {MAX_MESSAGE}")
    try:
        spoken = msgspec.json.decode(data, type=_Version).v
        if spoken != VERSION:
            raise VersionRefused(f"protocol version {spoken} spoke; this side speaks version {VERSION}")
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Undecodable(f"not a {kind.__name__}: {error}") from None
