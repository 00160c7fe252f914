"""The outbox promises: what append returned survives, order holds, and every loss is told."""

import asyncio
import contextlib
import datetime
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from edge_agent import store as store_module
from edge_agent.errors import Refused
from edge_agent.store import Connection, Store
from edge_agent.sync.outbox import Limits, Outbox
from edge_agent.wire.batch import MAX_BATCH
from edge_agent.wire.messages import Loss, Record
from tests.sync.reading import everything


async def test_appended_records_come_out_in_order_with_seqs_from_1(outbox: Outbox) -> None:
    seqs = await asyncio.gather(*(outbox.append("telemetry", {"n": n}, priority=n % 10) for n in range(500)))
    assert list(seqs) == list(range(1, 501))
    records = await everything(outbox)
    assert [(r.seq, r.body["n"], r.priority) for r in records] == [(n + 1, n, n % 10) for n in range(500)]
    assert outbox.depth == 500


async def test_concurrent_appends_share_a_commit(outbox: Outbox, store: Store) -> None:
    before = await store.read(lambda db: db.total_changes)
    await asyncio.gather(*(outbox.append("telemetry", {"n": n}) for n in range(300)))
    after = await store.read(lambda db: db.total_changes)
    assert after - before <= 3  # a block a commit


async def test_batches_read_at_once_are_those_read_one_by_one(outbox: Outbox) -> None:
    await outbox.append_many("telemetry", [{"x": "y" * 20_000} for _ in range(100)])
    singly, after = [], 0
    while part := await outbox.batch(after):
        singly.append(part)
        after = part.last
    assert len(singly) > 4
    assert await outbox.batches(0, 4) == singly[:4]
    assert await outbox.batches(0, 99) == singly
    assert await outbox.batches(after, 4) == []


async def test_only_acks_wait_for_the_disk_with_the_next_commit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    outbox, seen = await Outbox.open(store), list[tuple[str, int]]()
    for name in ("_insert", "_ack"):
        work = getattr(outbox, name)

        def noted(db: Any, *args: Any, name: str = name, work: Any = work) -> Any:
            seen.append((name, db.execute("PRAGMA synchronous").fetchone()[0]))
            return work(db, *args)

        monkeypatch.setattr(outbox, name, noted)
    for n in (1, 2):
        await outbox.append("telemetry", {})
        await outbox.ack(n)
    full, normal = 2, 1
    assert seen == [("_insert", full), ("_ack", normal)] * 2


async def test_each_write_is_as_durable_as_it_asks_also_after_one_that_failed_and_the_disk_is_told_of_changes_alone(
    store: Store,
) -> None:
    said, seen = list[str](), list[int]()
    await store.read(lambda db: db.set_trace_callback(said.append))

    def work(db: sqlite3.Connection, fails: bool) -> None:
        seen.append(db.execute("PRAGMA synchronous").fetchone()[0])
        if fails:
            db.execute("INSERT INTO nowhere VALUES (1)")

    asked = [(durable, fails) for durable in (True, False) for fails in (False, True, True)] * 2 + [(True, False)]
    for durable, fails in asked:
        with pytest.raises(sqlite3.OperationalError) if fails else contextlib.nullcontext():
            await store.write(lambda db, fails=fails: work(db, fails), durable)  # type: ignore[misc]
    full, normal = 2, 1
    assert seen == [full if durable else normal for durable, _ in asked]
    assert [each for each in said if "synchronous=" in each] == [
        f"PRAGMA synchronous={each}" for each in ("FULL", "NORMAL", "FULL", "NORMAL", "FULL")
    ]


async def test_an_ack_empties_the_outbox_up_to_its_seq_and_no_further(outbox: Outbox) -> None:
    await outbox.append_many("telemetry", [{"n": n} for n in range(10)])
    await outbox.ack(4)
    await outbox.ack(3)  # late
    assert (outbox.acked, outbox.depth) == (4, 6)
    assert [r.seq for r in await everything(outbox)] == [5, 6, 7, 8, 9, 10]


async def test_an_ack_reads_what_it_lets_go_and_not_what_waits(store: Store) -> None:
    """A device that was away for weeks drains in as many acks as batches: each must not cost a look at all the rest."""

    async def steps(waiting: int) -> int:
        def fill(db: Connection) -> None:
            (last,) = db.execute("SELECT last_seq FROM outbox_state").fetchone()
            rows = ((seq, seq, 5, None, b"{}") for seq in range(last + 1, last + waiting + 1))
            db.executemany("INSERT INTO outbox VALUES (?, ?, ?, ?, ?)", rows)
            db.execute("UPDATE outbox_state SET last_seq = ?", [last + waiting])

        await store.write(fill)
        outbox, counted = await Outbox.open(store), 0

        def count() -> int:
            nonlocal counted
            counted += 1
            return 0

        await store.read(lambda db: db.set_progress_handler(count, 10))
        await outbox.ack(outbox.acked + 10)
        await store.read(lambda db: db.set_progress_handler(None, 0))
        return counted

    few = await steps(100)
    assert await steps(20_000) <= few + 10


@given(
    before=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    acked=st.integers(0, 30),
    since=st.lists(st.integers(0, 60), max_size=30),
    cut=st.integers(0, 30),
)
@settings(max_examples=40, deadline=None)
def test_a_new_epoch_keeps_what_was_made_since_and_counts_it_from_1(
    before: list[int], acked: int, since: list[int], cut: int
) -> None:
    async def live(path: Path) -> None:
        lives = [("y", before), ("z", since[:cut]), ("z", since[cut:])]
        for letter, sizes in lives:  # only the first one hears of the hub
            store = Store(path)
            outbox = await Outbox.open(store)
            assert letter == "z" or await outbox.settle(outbox.epoch, 0) == ""
            await outbox.append_many("telemetry", [{"x": letter * n} for n in sizes], 3)
            if letter == "y":
                await outbox.ack(min(acked, len(before)))
            epoch = outbox.epoch
            store.close()
        store = Store(path)
        outbox = await Outbox.open(store)
        assert await outbox.settle(epoch, len(before) + 1)
        assert outbox.epoch > epoch
        records = await everything(outbox)
        assert [(r.seq, len(r.body["x"])) for r in records] == list(enumerate(since, 1))
        assert (outbox.last_seq, outbox.acked, outbox.depth) == (len(since), 0, len(since))
        state = (outbox.epoch, outbox.last_seq, outbox.size)
        store.close()
        store = Store(path)
        again = await Outbox.open(store)
        assert (again.epoch, again.last_seq, again.size) == state
        assert await again.append("telemetry", {}) == len(since) + 1
        store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(Path(folder) / "s.db"))


@given(
    records=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200), st.booleans()), max_size=80),
    handed_out=st.integers(0, 40),
    limits=st.builds(Limits, rows=st.integers(10, 30), bytes=st.integers(1500, 6000)),
)
@settings(max_examples=60, deadline=None)
def test_no_record_goes_while_a_lower_or_an_older_equal_one_stays(
    records: list[tuple[int, int, bool]], handed_out: int, limits: Limits
) -> None:
    """But for what was handed out, which goes last of all."""

    async def live(path: Path) -> None:
        store = Store(path)
        outbox = await Outbox.open(store, limits, clock=lambda: 1000.0)
        priorities: dict[int, int] = {}
        sent: set[int] = set()
        for n, (priority, size, many) in enumerate(records):
            if n == handed_out and (part := await outbox.batch(0)):
                sent = set(range(1, part.last + 1))
            bodies = [{"x": "y" * size}] * (3 if many else 1)
            before = await _waiting(store)
            made = dict.fromkeys(await outbox.append_many("telemetry", bodies, priority), priority)
            priorities |= made
            after = await _waiting(store)
            gone = {seq for seq in before | made.keys() if seq not in after}
            stayed = {seq for seq in after if seq in priorities} - sent
            for seq in gone - sent:
                rank = (priorities[seq], -seq)
                assert all((priorities[other], -other) < rank for other in stayed), (seq, rank, stayed)
            assert not gone & sent or not stayed
        store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(live(Path(folder) / "s.db"))


async def _waiting(store: Store) -> set[int]:
    spans = "SELECT first, last FROM outbox WHERE priority >= 0"
    found = await store.read(lambda db: db.execute(spans).fetchall())
    return {seq for first, last in found for seq in range(first, last + 1)}


async def test_an_ack_of_what_was_never_sent_is_refused(outbox: Outbox) -> None:
    with pytest.raises(Refused, match="restored or copied"):
        await outbox.ack(1)


async def test_a_store_of_an_earlier_version_is_brought_up_once_and_what_waited_stays(tmp_path: Path) -> None:
    with contextlib.closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as db:
        db.execute("CREATE TABLE _sqlite_migrations (migration_set TEXT, name TEXT, applied_at TEXT, "
                   "PRIMARY KEY (migration_set, name))")  # fmt: skip
        for change in (store_module.m001_sync, store_module.m002_found):
            change(db)
            db.execute("INSERT INTO _sqlite_migrations VALUES ('edge', ?, '')", [change.__name__])
        db.execute(
            "INSERT INTO outbox VALUES (1, 5, NULL, ?)", [b'{"seq":1,"ts":1.0,"kind":"a","priority":5,"body":{}}']
        )
        db.execute("UPDATE outbox_state SET last_seq = 1")
    for _ in range(2):
        store = Store(tmp_path / "s.db")
        outbox = await Outbox.open(store)
        assert [r.seq for r in await everything(outbox)] == [1]
        made = await store.read(lambda db: db.execute("SELECT name FROM _sqlite_migrations").fetchall())
        assert sorted(made) == [("m001_sync",), ("m002_found",), ("m003_blocks",)]
        store.close()


def test_a_change_of_the_schema_that_fails_leaves_nothing_and_is_tried_again() -> None:
    changes, fails = store_module.Migrations("x"), [True]

    @changes
    def m001_table(db: sqlite3.Connection) -> None:
        db.execute("CREATE TABLE made (n)")
        if fails.pop():
            raise ValueError("no")
        fails.append(False)

    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        with pytest.raises(ValueError, match="no"):
            changes.apply(db)
        assert not db.execute("SELECT * FROM sqlite_schema WHERE name = 'made'").fetchall()
        fails.append(False)
        changes.apply(db)
        changes.apply(db)
        assert db.execute("SELECT migration_set, name FROM _sqlite_migrations").fetchall() == [("x", "m001_table")]


async def test_epoch_seq_and_watermark_survive_a_restart(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    outbox = await Outbox.open(store)
    epoch = outbox.epoch
    for n in range(5):
        await outbox.append("telemetry", {"n": n})
    await outbox.ack(5)
    store.close()
    store = Store(tmp_path / "s.db")
    outbox = await Outbox.open(store)
    assert (outbox.epoch, outbox.last_seq, outbox.acked, outbox.depth) == (epoch, 5, 5, 0)
    assert await outbox.append("telemetry", {}) == 6
    store.close()


@pytest.mark.parametrize(("limits", "ttl"), [(Limits(), 10), (Limits(rows=19), None)], ids=["ttl", "quota"])
async def test_a_seq_is_never_used_again_after_a_restart_whatever_removed_the_newest(
    tmp_path: Path, limits: Limits, ttl: float | None
) -> None:
    now = 1000.0
    store = Store(tmp_path / "s.db")
    outbox = await Outbox.open(store, limits, lambda: now, lambda: now)
    await outbox.append_many("telemetry", [{}] * 19, 0)
    for seq in (20, 22):  # 21 tells of the loss of both
        assert await outbox.append("telemetry", {}, 9, ttl) == seq
        now += 11
        await outbox.expire()
    assert [r.seq for r in await everything(outbox)][-2:] == [19, 21]
    store.close()
    store = Store(tmp_path / "s.db")
    assert await (await Outbox.open(store)).append("telemetry", {}) == 23
    store.close()


async def test_large_records_are_cut_into_batches_and_a_too_large_one_is_refused(outbox: Outbox) -> None:
    for _ in range(9):
        await outbox.append("telemetry", {"x": "y" * 60_000})
    assert len(await everything(outbox)) == 9
    with pytest.raises(Refused, match="at most"):
        await outbox.append("telemetry", {"x": "y" * 70_000})
    with pytest.raises(Refused, match="not JSON"):
        await outbox.append("telemetry", {"x": object()})
    with pytest.raises(Refused, match="priority"):
        await outbox.append("telemetry", {}, priority=10)
    assert await outbox.append("telemetry", {}) == 10


class Nowhere(datetime.tzinfo):
    def utcoffset(self, _: datetime.datetime | None) -> None:
        raise KeyError("zone")

    dst = tzname = utcoffset


async def test_one_that_cannot_be_a_record_keeps_no_other_back(outbox: Outbox) -> None:
    raises = datetime.datetime(2026, 1, 1, tzinfo=Nowhere())
    bodies: list[dict[str, Any]] = [{"n": 1}, {"x": "y" * 70_000}, {"x": object()}, {"x": raises}, {"n": 2}]
    appends = (outbox.append("telemetry", body) for body in bodies)
    ends = await asyncio.wait_for(asyncio.gather(*appends, return_exceptions=True), 10)
    assert [end if isinstance(end, int) else str(end).split()[-1] for end in ends] == [1, "it)", "lists)", "lists)", 2]
    with pytest.raises(Refused, match="not JSON"):
        await outbox.append_many("telemetry", bodies[2:])
    assert [r.body for r in await everything(outbox)] == [{"n": 1}, {"n": 2}]


async def test_a_record_of_64_kib_is_taken_and_of_a_byte_more_refused_whatever_its_seq_and_company(
    store: Store,
) -> None:
    outbox = await Outbox.open(store, clock=lambda: 1000.0)
    least = len(msgspec.json.encode(Record(1, 1000.0, "telemetry", 5, {"x": ""})))
    fits, over = ({"x": "y" * (64 * 1024 - least + more)} for more in (0, 1))
    for seq in (1, 100):
        appends = (outbox.append("telemetry", body) for body in ({}, fits, over, {}))
        ends = await asyncio.gather(*appends, return_exceptions=True)
        assert ends[:2] + ends[3:] == [seq, seq + 1, seq + 2]
        assert isinstance(ends[2], Refused)
        assert "65537 bytes" in str(ends[2])
        assert list(await outbox.append_many("telemetry", [{}, fits, {}])) == [seq + 3, seq + 4, seq + 5]
        await outbox.append_many("telemetry", [{}] * 93)
    records = await everything(outbox)
    assert [r.seq for r in records] == list(range(1, 199))
    assert [r.seq for r in records if r.body == fits] == [2, 5, 101, 104]


async def test_a_batch_is_nearly_full_however_the_records_fall_into_blocks(store: Store) -> None:
    outbox = await Outbox.open(store, clock=lambda: 1000.0)
    least = len(msgspec.json.encode(Record(100, 1000.0, "telemetry", 5, {"x": ""})))
    await outbox.append_many("telemetry", [{}] * 99)
    await outbox.append_many("telemetry", [{"x": "y" * (1023 - least + (n % 64 == 63))} for n in range(512)])
    part = await outbox.batch(99)
    assert part is not None
    assert sum(map(len, part.blocks)) > MAX_BATCH - 4 * 1100


async def test_past_the_quota_the_lowest_priority_and_oldest_go_first(store: Store) -> None:
    outbox = await Outbox.open(store, Limits(rows=100))
    for n in range(60):
        await outbox.append("telemetry", {"n": n}, priority=0)
    for n in range(60):
        await outbox.append("telemetry", {"n": n}, priority=9)
    records = await everything(outbox)
    losses = [msgspec.convert(r.body, Loss) for r in records if r.kind == "loss"]
    assert [r.body["n"] for r in records if r.priority == 0 and r.kind != "loss"] == list(range(60))
    kept = [r.body["n"] for r in records if r.priority == 9]
    assert kept == list(range(60 - len(kept), 60))
    assert len(losses) == 1
    assert (losses[0].count, losses[0].by_priority) == (60 - len(kept), {"9": 60 - len(kept)})


async def test_what_outlived_its_ttl_goes_and_is_told(store: Store) -> None:
    now = 1000.0
    outbox = await Outbox.open(store, steady=lambda: now)
    await outbox.append("telemetry", {"n": 1}, ttl=10)
    await outbox.append("telemetry", {"n": 2})
    now = 1011.0
    records = await everything(outbox)
    assert [r.kind for r in records] == ["telemetry", "loss"]
    assert msgspec.convert(records[1].body, Loss) == Loss("ttl", 1, 1, 1, {"5": 1})  # type: ignore[arg-type]


async def test_what_outlived_its_ttl_goes_after_a_transaction_that_let_go_of_it_and_failed(store: Store) -> None:
    now = 1000.0
    outbox = await Outbox.open(store, limits=Limits(rows=2), steady=lambda: now)
    await outbox.append("telemetry", {"n": 1}, ttl=10)
    now = 1011.0

    def work(db: Any) -> None:
        for n in range(2, 5):
            outbox.put(db, "job", {"n": n})
        assert outbox.last_seq > 4  # there was no room: what outlived its TTL is told as lost
        raise Refused("no")

    with pytest.raises(Refused, match="no"):
        await store.write(work)
    assert outbox.last_seq == 1
    assert [r.kind for r in await everything(outbox)] == ["loss"]


async def test_a_transaction_that_fails_takes_its_record_and_its_seq_back(outbox: Outbox, store: Store) -> None:
    def work(db: Any) -> None:
        assert outbox.put(db, "job", {"n": 1}) == 1
        raise Refused("no")

    with pytest.raises(Refused):
        await store.write(work)
    assert (outbox.last_seq, outbox.depth, outbox.size) == (0, 0, 0)
    assert await outbox.append("job", {"n": 2}) == 1
