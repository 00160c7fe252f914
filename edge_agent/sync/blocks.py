"""The lines of the outbox in blocks: how they are made of records, without a disk.

Invariants: a block holds the lines of consecutive seqs of one commit, of one priority and of TTLs that end within a
second (it goes with the last of them); the seqs of all blocks are those of the records, in their order; what cannot be
a record is refused for what it is, whatever its seq and company.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from edge_agent.errors import Refused
from edge_agent.wire.batch import MAX_BATCH
from edge_agent.wire.messages import Record

MAX_RECORD = 64 * 1024  # bytes, encoded
BLOCK = MAX_BATCH // 4  # bytes of a block and its newline at most, but for one record that is larger
_SECOND = 1.0  # how far apart TTLs may end within a block
_encoder = msgspec.json.Encoder()


class Run(NamedTuple):
    """Records of one kind that were made at once; `kept` is the priority that they lie under, where not their own."""

    kind: str
    bodies: Sequence[dict[str, Any]]
    priority: int
    at: float
    expires: float | None
    kept: int | None = None


class Block(NamedTuple):
    """As it lies on disk; `expires` is the latest."""

    first: int
    last: int
    priority: int
    expires: float | None
    lines: bytes


def blocks(first: int, runs: Iterable[Run]) -> Iterator[Block]:
    """Of the seqs from `first` on. Raises Refused: no record."""
    records = list[Record]()
    priority, begun, expires = 0, None, None
    for run in runs:
        stored = run.priority if run.kept is None else run.kept
        if records and (stored != priority or _apart(begun, run.expires)):
            yield from _encoded(records, priority, expires)
            first, records = first + len(records), []
        if not records:
            priority, begun, expires = stored, run.expires, run.expires
        elif expires is not None and run.expires is not None:
            expires = max(expires, run.expires)
        numbered = enumerate(run.bodies, first + len(records))
        records += [Record(seq, run.at, run.kind, run.priority, body) for seq, body in numbered]
    if records:
        yield from _encoded(records, priority, expires)


def refusal(run: Run) -> Refused | None:
    """Why it cannot be on disk, if it cannot."""
    try:
        for _ in blocks(1, [run]):
            pass
    except Refused as error:
        return error
    return None


def _encoded(records: Sequence[Record], priority: int, expires: float | None) -> Iterator[Block]:
    first, at, kind = records[0].seq, 0, records[0].kind
    try:
        text = _encoder.encode_lines(records)
    except Exception as error:  # noqa: BLE001 - the objects in a body may raise whatever they like
        raise Refused(f"the body of a {kind} record is not JSON: {error}", "use text, numbers, lists") from None
    while at < len(text):
        end = text.rfind(b"\n", at, at + BLOCK)
        if end < 0:
            end = text.index(b"\n", at)
            size = end - at - len(str(first)) + 1  # whatever its seq, which is not known when it is tried alone
            if size > MAX_RECORD:
                raise Refused(f"a {kind} record of {size} bytes", f"at most {MAX_RECORD}: send a blob, or split it")
        lines = text[at:end]
        last = first + lines.count(b"\n")
        yield Block(first, last, priority, expires, lines)
        first, at = last + 1, end + 1


def _apart(a: float | None, b: float | None) -> bool:
    return a != b and (a is None or b is None or abs(a - b) > _SECOND)


def enough(lines: bytes, rows: int, size: int) -> int:
    """How many of the first lines are at least so many rows and bytes."""
    count = 0
    for line in lines.split(b"\n"):
        if rows <= 0 and size <= 0:
            break
        count, rows, size = count + 1, rows - 1, size - len(line)
    return count
