"""Jobs once, states by the table, reports with the state or not at all; documents that never go back."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.store import Store
from edge_agent.sync import inbox as inbox_module
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.sync.twin import GrantsCache, Twin
from edge_agent.wire.errors import Undecodable
from edge_agent.wire.grants import Grants, sign_grants
from edge_agent.wire.messages import Desired, Job, JobKind, JobState, Record, merge_patch
from edge_agent.wire.signing import SigningKey


def job(id: str, expires: float = 2000.0, key: str = "") -> Job:
    return Job(id, JobKind.TASK, {"text": "x"}, "ann", ["operator"], 0.0, expires, key)


async def reports(outbox: Outbox) -> list[tuple[str, str, str]]:
    part = await outbox.batch(0)
    records = [msgspec.json.decode(line, type=Record) for line in part.lines] if part else []
    return [(r.body["id"], r.body["state"], r.body["error"]) for r in records if r.kind == "job"]


async def test_an_expired_job_is_reported_and_not_run(store: Store, outbox: Outbox) -> None:
    now = 1000.0
    inbox = Inbox(store, outbox, steady=lambda: now)
    inbox.hear(1000.0)
    assert await inbox.accept(job("old", expires=999)) is JobState.EXPIRED
    assert await inbox.accept(job("waits", expires=1010)) is JobState.DELIVERED
    assert await inbox.accept(job("good")) is JobState.DELIVERED
    now = 1011.0
    assert (await inbox.next()).id == "good"
    told = [(id, state) for id, state, _ in await reports(outbox)]
    assert told[-2:] == [("waits", "expired"), ("good", "running")]
    assert told[0] == ("old", "expired")


async def test_a_wrong_clock_neither_runs_nor_drops_a_job_whose_time_the_hub_has_not_told(
    store: Store, outbox: Outbox
) -> None:
    clock, steady = 9e9, 50.0  # a clock that stands far ahead at the start
    inbox = Inbox(store, outbox, lambda: clock, lambda: steady)
    assert await inbox.accept(job("late", expires=1030)) is JobState.DELIVERED
    assert await inbox.accept(job("good", expires=1100)) is JobState.DELIVERED
    waiting = asyncio.create_task(inbox.next())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    inbox.hear(1040.0)
    assert (await asyncio.wait_for(waiting, 5)).id == "good"
    assert [(id, state) for id, state, _ in await reports(outbox)][2:] == [("late", "expired"), ("good", "running")]


async def test_a_clock_that_is_set_while_jobs_wait_changes_nothing(store: Store, outbox: Outbox) -> None:
    clock, steady = 1000.0, 50.0
    inbox = Inbox(store, outbox, lambda: clock, lambda: steady)
    await store.write(lambda db: inbox.put(db, job("own", expires=inbox.now() + 60), own=True))
    inbox.hear(5000.0)
    await inbox.accept(job("hub", expires=5060))
    await inbox.accept(job("over", expires=5030))
    await store.write(lambda db: inbox.put(db, job("own-over", expires=inbox.now() + 30), own=True))
    clock, steady = 9e9, steady + 40
    inbox.hear(5040.0)
    assert [(await inbox.next()).id for _ in range(2)] == ["own", "hub"]
    waiting = asyncio.create_task(inbox.next())
    await asyncio.sleep(0.05)
    waiting.cancel()
    assert [(id, state) for id, state, _ in await reports(outbox)][-2:] == [
        ("over", "expired"),
        ("own-over", "expired"),
    ]


async def test_after_a_restart_a_clock_that_stands_before_a_job_was_made_runs_none(
    store: Store, outbox: Outbox
) -> None:
    made = msgspec.structs.replace(job("valve", expires=1100), created=1000.0)
    await Inbox(store, outbox, lambda: 1001.0).accept(made)
    inbox = Inbox(store, outbox, lambda: 3.0, lambda: 0.0)
    waiting = asyncio.create_task(inbox.next())
    await asyncio.sleep(0.05)
    assert not waiting.done(), "it may have expired long ago"
    inbox.hear(1200.0)
    await asyncio.sleep(0.05)
    waiting.cancel()
    assert await inbox.state("valve") is JobState.EXPIRED


async def test_the_same_idempotency_key_runs_once(store: Store, outbox: Outbox) -> None:
    inbox = Inbox(store, outbox, lambda: 0.0)
    assert await inbox.accept(job("a", key="k")) is JobState.DELIVERED
    assert await inbox.accept(job("a", key="k")) is None
    assert await inbox.accept(job("b", key="k")) is JobState.REJECTED
    assert "the same as job a" in (await reports(outbox))[-1][2]


async def test_too_many_waiting_jobs_are_rejected_not_kept(
    store: Store, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "MAX_WAITING", 2)
    inbox = Inbox(store, outbox, lambda: 0.0)
    states = [await inbox.accept(job(str(n))) for n in range(3)]
    assert states == [JobState.DELIVERED, JobState.DELIVERED, JobState.REJECTED]


async def test_ended_jobs_are_forgotten_but_the_newest_however_they_ended(
    store: Store, outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox_module, "KEPT", 3)
    now = 0.0
    inbox = Inbox(store, outbox, lambda: now)

    async def known() -> list[str]:
        return await store.read(lambda db: [id for (id,) in db.execute("SELECT id FROM jobs ORDER BY n")])

    await inbox.accept(job("runs"))
    await inbox.next()
    for n in range(8):
        await inbox.accept(job(f"done-{n}"))
        await inbox.next()
        await inbox.report(f"done-{n}", JobState.SUCCEEDED)
    assert await known() == ["runs", "done-5", "done-6", "done-7"]
    inbox.hear(0.0)
    for n in range(8):
        await inbox.accept(job(f"late-{n}", expires=-1.0))
    assert await known() == ["runs", "late-5", "late-6", "late-7"]
    await inbox.report("runs", JobState.SUCCEEDED)
    assert await known() == ["late-5", "late-6", "late-7"]


async def test_a_change_the_table_forbids_is_refused_and_not_reported(store: Store, outbox: Outbox) -> None:
    inbox = Inbox(store, outbox, lambda: 0.0)
    await inbox.accept(job("a"))
    await inbox.next()
    await inbox.report("a", JobState.SUCCEEDED, {"answer": 1})
    before = outbox.last_seq
    for state in (JobState.FAILED, JobState.RUNNING, JobState.SUCCEEDED):
        with pytest.raises(Refused, match="once"):
            await inbox.report("a", state)
    with pytest.raises(Refused, match="no job"):
        await inbox.report("never", JobState.FAILED)
    assert outbox.last_seq == before


async def test_a_job_that_was_running_is_interrupted_after_a_restart_and_not_run_again(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    inbox = Inbox(store, await Outbox.open(store), lambda: 0.0)
    await inbox.accept(job("began"))
    await inbox.accept(job("waits"))
    await inbox.next()
    store.close()
    store = Store(tmp_path / "s.db")
    inbox = Inbox(store, await Outbox.open(store), lambda: 0.0)
    assert [each.id for each in await inbox.interrupted()] == ["began"]
    assert (await inbox.next()).id == "waits"
    store.close()


async def test_next_waits_for_a_job(store: Store, outbox: Outbox) -> None:
    inbox = Inbox(store, outbox, lambda: 0.0)
    waiting = asyncio.create_task(inbox.next())
    await asyncio.sleep(0)
    await inbox.accept(job("a"))
    assert (await asyncio.wait_for(waiting, 5)).id == "a"


async def test_reported_grows_by_merge_and_is_told_only_when_it_changed(store: Store, outbox: Outbox) -> None:
    twin = await Twin.open(store, outbox)
    assert await twin.report({"a": {"x": 1}, "b": 2}) == 1
    assert await twin.report({"a": {"x": 1}}) is None
    assert await asyncio.gather(twin.report({"a": {"y": 3}}), twin.report({"b": None})) == [2, 3]
    assert (await Twin.open(store, outbox)).reported == {"a": {"x": 1, "y": 3}}
    assert outbox.last_seq == 3
    with pytest.raises(Refused, match="at most"):
        await twin.report({"big": "x" * 40_000})


async def test_a_desired_document_past_its_limit_is_refused(store: Store, outbox: Outbox) -> None:
    twin = await Twin.open(store, outbox)
    with pytest.raises(Undecodable):
        await twin.accept(Desired(1, 0.0, {"x": "y" * 40_000}))
    assert await twin.accept(Desired(1, 0.0, {"x": 1}))
    assert not await twin.accept(Desired(1, 0.0, {"x": 2}))
    assert (await Twin.open(store, outbox)).desired.doc == {"x": 1}


async def test_an_older_document_that_comes_while_a_newer_one_is_being_stored_changes_nothing(
    store: Store, outbox: Outbox
) -> None:
    """As when one that the full disk delayed is stored while the link brings an old one again."""
    twin, key = await Twin.open(store, outbox), SigningKey.generate()
    assert await asyncio.gather(*(twin.accept(Desired(n, 0.0, {"n": n})) for n in (6, 5))) == [True, False]
    assert twin.desired.version == (await Twin.open(store, outbox)).desired.version == 6
    cache = await GrantsCache.open(store, key.public)
    signed = [sign_grants(key, Grants(epoch, 0.0, 9e9, {}, [])) for epoch in (6, 5)]
    _, older = await asyncio.gather(*map(cache.accept, signed), return_exceptions=True)
    assert isinstance(older, Undecodable)
    assert cache.grants == (await GrantsCache.open(store, key.public)).grants
    assert cache.grants is not None
    assert cache.grants.epoch == 6


def test_merge_patch_follows_rfc_7396() -> None:
    assert merge_patch({"a": "b", "c": {"d": "e", "f": "g"}}, {"a": "z", "c": {"f": None}}) == {
        "a": "z",
        "c": {"d": "e"},
    }
    assert merge_patch({"a": [1]}, {"a": {"b": None, "c": 1}}) == {"a": {"c": 1}}


async def test_a_second_process_and_a_damaged_file_are_told_apart(store: Store, tmp_path: Path) -> None:
    with pytest.raises(Retry, match="in use"):
        Store(store.path)
    damaged = tmp_path / "damaged.db"
    damaged.write_bytes(b"not a database at all" * 100)
    with pytest.raises(Fatal, match="move the file aside"):
        Store(damaged)
