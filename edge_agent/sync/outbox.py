"""What the device has to say, until the hub has committed it.

Invariants: a seq that `append` returned is on disk and names one content for ever; seqs count from 1 within an epoch,
with no holes but for records let go by quota or TTL, and a `loss` record tells of those; a record leaves only when the
hub's ack covers it, when its TTL has passed, by the time of `ages.py`, or when the quota makes it the victim (lowest
priority first, then oldest).
A batch that was handed out is let go only when nothing else is left to go. Before anything is sent, `settle` is told
what the hub knows; more than was there when the first process since the last answer began (`found`), and another life
of the device wrote it (this one was restored, or its disk lied): a new epoch begins, with what was made since.
Memory is bounded by the callers that wait; disk by `Limits` and the few `loss` records.
On disk lie the blocks of `blocks.py`, so that the work of SQLite is paid a block and not a record.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec

from edge_agent.errors import Refused, Retry
from edge_agent.rhythm import steady
from edge_agent.store import Connection, Store
from edge_agent.sync.ages import Ages, Note
from edge_agent.sync.blocks import Run, blocks, enough, refusal
from edge_agent.trouble import Trouble
from edge_agent.wire.batch import MAX_BATCH
from edge_agent.wire.messages import Loss, LossReason, Record

log = logging.getLogger(__name__)
LOWEST = 9
_KEPT = -1  # stored priority of a loss record: never let go
_ROWS = 16  # blocks an INSERT
DELAY_S = 10.0  # what the hub tells comes so late: less between two times that it tells is no time off
_COUNT = "coalesce(sum(last - first + 1), 0), coalesce(sum(length(lines)), 0)"


class Limits(msgspec.Struct, frozen=True):
    """Past either one, records are let go."""

    rows: int = 1_000_000
    bytes: int = 256 << 20


class Slice(NamedTuple):
    """Encoded records that cover the seqs `first` to `last`; fewer than that when some were let go.

    `blocks` are NDJSON without the last newline, of so many `records` in all.
    """

    first: int
    last: int
    blocks: list[bytes]
    records: int

    @property
    def lines(self) -> list[bytes]:
        """A record each."""
        return b"\n".join(self.blocks).split(b"\n")


class _State(msgspec.Struct):
    last_seq: int
    acked: int
    rows: int
    bytes: int
    losses: dict[LossReason, tuple[int, Loss]] = {}


_Span = tuple[int, int, int]  # first, last, priority


class Outbox:
    """Made by `await Outbox.open(store)`; one an open store."""

    def __init__(
        self, store: Store, epoch: int, state: _State, limits: Limits, clock: Callable[[], float], ages: Ages
    ) -> None:
        self._store, self._state, self._limits, self._clock, self._ages = store, state, limits, clock, ages
        self.epoch = epoch
        self.found: float = state.last_seq
        self.changed = asyncio.Event()  # set after each commit of new records; its consumer clears it
        self._waiting: list[tuple[Run, asyncio.Future[int]]] = []
        self._flusher: asyncio.Task[None] | None = None
        self._handed_out = state.acked  # the newest seq that may be on its way
        self._next_expiry = 0.0  # nothing outlives its TTL before
        self._before = 0  # the last seq that was there when the first process began that the hub has not answered yet
        self._expiring = Trouble(log, "what outlived its TTL is sent all the same")

    @classmethod
    async def open(
        cls,
        store: Store,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = steady,
    ) -> Outbox:
        """Read where the last process stopped."""

        def load(db: Connection) -> tuple[int, int, _State, Ages]:
            db.execute("UPDATE outbox_state SET last_seq = max(last_seq, (SELECT coalesce(max(last), 0) FROM outbox))")
            db.execute("UPDATE outbox_state SET found = coalesce(found, last_seq)")
            epoch, last, acked, found = db.execute("SELECT epoch, last_seq, acked, found FROM outbox_state").fetchone()
            rows, size = db.execute(f"SELECT {_COUNT} FROM outbox").fetchone()
            return epoch, found, _State(last, acked, rows, size), Ages(db, clock, steady)

        epoch, found, state, ages = await store.write(load)
        outbox = cls(store, epoch, state, limits or Limits(), clock, ages)
        outbox.found = outbox._before = found
        return outbox

    @property
    def last_seq(self) -> int:
        return self._state.last_seq

    @property
    def acked(self) -> int:
        """The newest seq the hub has committed."""
        return self._state.acked

    @property
    def depth(self) -> int:
        """Records that wait for the hub's commit."""
        return self._state.rows

    @property
    def size(self) -> int:
        """Bytes of the records that wait."""
        return self._state.bytes

    def limit(self, limits: Limits) -> None:
        """Another quota: what is past it goes with the next append."""
        self._limits = limits

    async def append(self, kind: str, body: dict[str, Any], priority: int = 5, ttl: float | None = None) -> int:
        """The record's seq, once it is on disk; the body is not to change until then. `ttl` is in seconds.

        Concurrent callers share one commit. Raises Refused when it cannot be a record, or Retry.
        """
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append((self._run(kind, [body], priority, ttl), future))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush(), name="outbox-flush")
        return await future

    async def append_many(
        self, kind: str, bodies: Sequence[dict[str, Any]], priority: int = 5, ttl: float | None = None
    ) -> range:
        """The seqs of records that are made at once, in one commit: all of them or none. As `append` else."""
        run = self._run(kind, bodies, priority, ttl)
        return await self._store.write(lambda db: self._insert(db, [run]))

    def put(self, db: Connection, kind: str, body: dict[str, Any], priority: int = 5, ttl: float | None = None) -> int:
        """Append inside the caller's transaction."""
        return self._insert(db, [self._run(kind, [body], priority, ttl)])[0]

    async def batches(self, after: int, most: int) -> list[Slice]:
        """The next records after a seq, in slices of at most MAX_BATCH bytes: so many slices, or all there are."""
        if after >= self._state.last_seq:
            return []
        try:
            await self.expire()
        except Retry as error:  # a full disk must not stop what would free it
            self._expiring.tell(error)
        else:
            self._expiring.over()
        return await self._store.read(lambda db: self._batches(db, after, most))

    async def batch(self, after: int) -> Slice | None:
        """The first of these; None when there are none."""
        return next(iter(await self.batches(after, 1)), None)

    async def ack(self, seq: int) -> None:
        """The hub has committed everything up to `seq`. Raises Refused when that was never appended."""
        if seq > self._state.last_seq:
            hint = "the state directory is older than what was sent: it was restored or copied; enrol the device anew"
            raise Refused(f"the hub has seq {seq} of epoch {self.epoch}, this device made {self.last_seq}", hint)
        if seq > self._state.acked:
            await self._store.write(lambda db: self._ack(db, seq), durable=False)  # forgotten, it would only come again

    async def settle(self, epoch: int, seq: int) -> str:
        """The hub has `seq` of `epoch`: what was done about it, if that is not of this life. Raises Refused or Retry.

        To be told what the hub says until it returns, before anything is sent.
        """
        if epoch > self.epoch and self.acked:
            hint = "the state directory was restored or copied from an older one: enrol the device anew"
            raise Refused(f"the hub knows epoch {epoch}, this device writes {self.epoch}", hint)
        if epoch < self.epoch or (epoch == self.epoch and seq <= self.found):
            if self.found != math.inf:
                await self._store.write(lambda db: db.execute("UPDATE outbox_state SET found = NULL"))
                self.found = math.inf
            return ""
        base = int(self.found) if epoch == self.epoch else 0  # else flashed anew, and its clock stood behind
        await self._store.write(lambda db: self._renew(db, epoch + 1, base))
        return f"a new epoch after {base} records of the one before, as the hub has {seq} of epoch {epoch}"

    async def expire(self) -> None:
        """Let go of what outlived its TTL. Raises Retry."""
        if self._ages.now() >= self._next_expiry:
            await self._store.write(self._expire)

    async def hear(self, ts: float) -> None:
        """What the hub's clock says at this moment, signed: what waited while the device was off is older by that."""
        missed, note = self._ages.hear(ts)
        with contextlib.suppress(Retry):  # a full disk must not stop the ack that would free it; the next one tells too
            if missed > DELAY_S or self._ages.note.hub is None:
                await self._store.write(lambda db: self._age(db, missed, note))
            self._ages.note = note

    def _run(self, kind: str, bodies: Sequence[dict[str, Any]], priority: int, ttl: float | None) -> Run:
        if not 0 <= priority <= LOWEST:
            raise Refused(f"priority {priority} of a {kind} record", f"0 is the highest, {LOWEST} the lowest")
        return Run(kind, bodies, priority, self._clock(), None if ttl is None else self._ages.now() + ttl)

    async def _flush(self) -> None:
        try:
            while self._waiting:
                group, self._waiting = self._waiting, []
                await self._commit(group)
        finally:
            self._flusher = None
            for _, future in self._waiting:
                future.cancel()

    async def _commit(self, group: Sequence[tuple[Run, asyncio.Future[int]]]) -> None:
        """One that cannot be a record keeps no other back."""
        try:
            seqs = await self._store.write(lambda db: self._insert(db, [run for run, _ in group]))
        except Exception as error:  # noqa: BLE001 - every caller gets it, or its own
            wrong = [refusal(run) for run, _ in group] if isinstance(error, Refused) else []
            if any(wrong) and not all(wrong):
                await self._commit([each for each, own in zip(group, wrong, strict=True) if own is None])
            for (_, future), own in itertools.zip_longest(group, wrong):
                if not future.done():
                    future.set_exception(own or error)
        else:
            for seq, (_, future) in zip(seqs, group, strict=True):
                if not future.done():
                    future.set_result(seq)

    # What follows runs in the store's thread, inside a transaction.

    def _begin(self, db: Connection) -> _State:
        before = self._state

        def restore() -> None:
            self._state = before

        db.on_rollback(restore)
        self._state = msgspec.structs.replace(before)
        return self._state

    def _insert(self, db: Connection, runs: Sequence[Run]) -> range:
        """`last_seq` is not written: what is there tells it, and what removes blocks keeps it."""
        state = self._begin(db)
        self._ages.keep(db)
        first = state.last_seq + 1
        made = list(blocks(first, runs))
        for at in range(0, len(made), _ROWS):
            some = made[at : at + _ROWS]
            rows = ", ".join(["(?, ?, ?, ?, ?)"] * len(some))
            db.execute(f"INSERT INTO outbox VALUES {rows}", list(itertools.chain.from_iterable(some)))
        for block in made:
            state.last_seq = block.last
            state.bytes += len(block.lines)
            if block.expires is not None:
                self._next_expiry = min(self._next_expiry, block.expires)
        state.rows += state.last_seq - first + 1
        full = state.rows > self._limits.rows or state.bytes > self._limits.bytes
        if full and all(run.kept is None for run in runs):
            self._make_room(db)
        db.on_commit(self.changed.set)
        return range(first, first + sum(len(run.bodies) for run in runs))

    def _batches(self, db: Connection, after: int, most: int) -> list[Slice]:
        found = list[Slice]()
        while len(found) < most and (part := self._batch(db, found[-1].last if found else after)):
            found.append(part)
        return found

    def _batch(self, db: Connection, after: int) -> Slice | None:
        parts: list[bytes] = []
        last, size, count = after, 0, 0
        at = "first >= coalesce((SELECT max(first) FROM outbox WHERE first <= :after), 0) AND last > :after"
        for first, until, lines in db.execute(
            f"SELECT first, last, lines FROM outbox WHERE {at} ORDER BY first", {"after": after}
        ):
            if first <= after:  # the hub stands within a block
                lines = lines.split(b"\n", after - first + 1)[-1]
                first = after + 1
            size += len(lines) + 1
            if size > MAX_BATCH:
                break
            parts.append(lines)
            last, count = until, count + until - first + 1
        if not parts:
            return None
        self._handed_out = max(self._handed_out, last)
        return Slice(after + 1, last, parts, count)

    def _cut(self, db: Connection, seq: int) -> None:
        """No block holds both `seq` and what follows it."""
        newest = "SELECT first, last, lines FROM outbox WHERE first <= ? ORDER BY first DESC LIMIT 1"
        first, last, lines = db.execute(newest, [seq]).fetchone() or (0, 0, b"")
        if last <= seq:
            return
        *parts, rest = lines.split(b"\n", seq - first + 1)
        after = "INSERT INTO outbox SELECT ?, last, priority, expires, ? FROM outbox WHERE first = ?"
        db.execute(after, [seq + 1, rest, first])
        db.execute("UPDATE outbox SET last = ?, lines = ? WHERE first = ?", [seq, b"\n".join(parts), first])
        self._state.bytes -= 1

    def _ack(self, db: Connection, seq: int) -> None:
        state = self._begin(db)
        state.acked = max(state.acked, seq)
        self._cut(db, seq)
        self._delete(db, "first <= ?", [seq])  # the key: an ack is not to read all that still waits
        self._handed_out = max(self._handed_out, seq)

    def _renew(self, db: Connection, epoch: int, base: int) -> None:
        state, epoch = self._begin(db), max(epoch, int(self._clock() * 1000))
        self._cut(db, base)
        self._delete(db, "first <= ?", [base])
        firsts = [first for (first,) in db.execute("SELECT first FROM outbox ORDER BY first")]
        for first in firsts:
            (lines,) = db.execute("SELECT lines FROM outbox WHERE first = ?", [first]).fetchone()
            tails = (line[line.index(b",") :] for line in lines.split(b"\n"))
            new = b"\n".join(b'{"seq":%d%b' % (seq, tail) for seq, tail in enumerate(tails, first - base))
            renumber = "UPDATE outbox SET first = first - ?, last = last - ?, lines = ? WHERE first = ?"
            db.execute(renumber, [base, base, new, first])
        _, state.bytes = db.execute(f"SELECT {_COUNT} FROM outbox").fetchone()
        state.last_seq, state.acked, state.losses = state.last_seq - base, 0, {}
        db.execute("UPDATE outbox_state SET epoch = ?, last_seq = ?, acked = 0, found = NULL", [epoch, state.last_seq])

        def done() -> None:
            self.epoch, self.found, self._handed_out, self._before = epoch, math.inf, 0, self._before - base

        db.on_commit(done)

    def _delete(self, db: Connection, where: str, values: Sequence[float]) -> None:
        rows, size = db.execute(f"SELECT {_COUNT} FROM outbox WHERE {where}", values).fetchone()
        db.execute(f"DELETE FROM outbox WHERE {where}", values)
        db.execute("UPDATE outbox_state SET last_seq = ?, acked = ?", [self._state.last_seq, self._state.acked])
        self._state.rows -= rows
        self._state.bytes -= size

    def _expire(self, db: Connection) -> None:
        values = [self._ages.now(), self._handed_out]
        where = "expires IS NOT NULL AND expires <= ? AND first > ?"
        gone = db.execute(f"SELECT first, last, priority FROM outbox WHERE {where} ORDER BY first", values).fetchall()
        if gone:
            self._begin(db)
            db.on_rollback(partial(setattr, self, "_next_expiry", self._next_expiry))
            self._delete(db, where, values)
            self._tell_loss(db, LossReason.TTL, gone)
        (soonest,) = db.execute("SELECT min(expires) FROM outbox WHERE expires > ?", values[:1]).fetchone()
        self._next_expiry = math.inf if soonest is None else soonest

    def _age(self, db: Connection, missed: float, note: Note) -> None:
        """What was made after that did not wait while the device was off."""
        db.execute("UPDATE outbox SET expires = expires - ? WHERE first <= ?", [missed, self._before])
        self._ages.write(db, note)
        self._next_expiry = 0.0

    def _make_room(self, db: Connection) -> None:
        """Down to 95 % of the limits, so that the scan for victims is paid once for many appends."""
        self._expire(db)
        state = self._begin(db)
        rows, size = int(self._limits.rows * 0.95), int(self._limits.bytes * 0.95)
        gone: list[_Span] = []
        for floor in (self._handed_out, state.acked):
            for priority in range(LOWEST, -1, -1):
                if state.rows <= rows and state.bytes <= size:
                    break
                victims = self._victims(db, priority, floor, state.rows - rows, state.bytes - size)
                if victims:
                    where = "priority = ? AND first > ? AND last <= ?"
                    self._delete(db, where, [priority, floor, victims[-1][1]])
                    gone += victims
        if gone:
            self._tell_loss(db, LossReason.QUOTA, gone)

    def _victims(self, db: Connection, priority: int, floor: int, rows: int, size: int) -> list[_Span]:
        """The oldest of a priority, until so many rows and bytes are found; the last block is cut if a part will do."""
        oldest = "SELECT first, last, length(lines) FROM outbox WHERE priority = ? AND first > ? ORDER BY first"
        victims, need = list[_Span](), (rows, size)
        for first, last, length in db.execute(oldest, [priority, floor]):
            if rows <= 0 and size <= 0:
                break
            victims.append((first, last, priority))
            need = rows, size
            rows, size = rows - (last - first + 1), size - length
        if victims and victims[-1][0] < victims[-1][1]:
            first, last, _ = victims.pop()
            (lines,) = db.execute("SELECT lines FROM outbox WHERE first = ?", [first]).fetchone()
            last = min(last, first + enough(lines, *need) - 1)
            self._cut(db, last)
            victims.append((first, last, priority))
        return victims

    def _tell_loss(self, db: Connection, reason: LossReason, gone: list[_Span]) -> None:
        """One `loss` record a reason, amended until it is handed out."""
        counts: dict[str, int] = {}
        for first, last, priority in gone:
            counts[str(priority)] = counts.get(str(priority), 0) + last - first + 1
        ends = min(first for first, _, _ in gone), max(last for _, last, _ in gone)
        loss = Loss(reason, *ends, sum(counts.values()), counts)
        seq, known = self._state.losses.get(reason, (0, loss))
        if seq > self._handed_out:
            loss = _merge(known, loss)
            line = msgspec.json.encode(Record(seq, self._clock(), "loss", 0, msgspec.to_builtins(loss)))
            (before,) = db.execute("SELECT length(lines) FROM outbox WHERE first = ?", [seq]).fetchone()
            db.execute("UPDATE outbox SET lines = ? WHERE first = ?", [line, seq])
            self._state.bytes += len(line) - before
        else:
            run = Run("loss", [msgspec.to_builtins(loss)], 0, self._clock(), None, kept=_KEPT)
            (seq,) = self._insert(db, [run])
        self._state.losses = {**self._state.losses, reason: (seq, loss)}


def _merge(a: Loss, b: Loss) -> Loss:
    by_priority = {k: a.by_priority.get(k, 0) + b.by_priority.get(k, 0) for k in a.by_priority | b.by_priority}
    first, last = min(a.first_seq, b.first_seq), max(a.last_seq, b.last_seq)
    return Loss(a.reason, first, last, a.count + b.count, by_priority)
