"""What is old goes, in small steps, and what anything else depends on stays."""

import asyncio
import hashlib
import os
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa

from edge_agent.wire.messages import JobKind, Record
from hub import audit_cli, retention
from hub.audit import Audit, check_export
from hub.blobs import Uploads
from hub.committer import replay
from hub.db import Database, dead_letters, fanouts, jobs, settings, telemetry
from hub.errors import Fatal
from hub.jobs import new
from hub.retention import DAY_S, Retention
from tests.hub.rig import enrolled, running, until
from tests.hub.rig import telemetry as make
from tests.hub.test_committer import Sender

NOW = time.time()
NONE = Uploads(Path("/nowhere"))


@pytest.fixture
def sender(database: Database, monkeypatch: pytest.MonkeyPatch) -> Sender:
    monkeypatch.setattr(retention, "BATCH", 10)
    monkeypatch.setattr(retention, "PAUSE_S", 0.0)
    monkeypatch.setattr(retention, "STRIDE_S", 1e9)
    return Sender(database)


def at(sender: Sender, days_ago: float, *messages: Any, **more: Any) -> None:
    """Committed so long ago."""
    with pytest.MonkeyPatch.context() as clock:
        clock.setattr("hub.committer.time.time", lambda: NOW - days_ago * DAY_S)
        sender.commit(*messages, **more)


def seqs(sender: Sender) -> list[int]:
    return [seq for _, seq, _ in sender.committed()]


def chained(sender: Sender, count: int) -> list[Record]:
    """Entries of a chain, each followed by a record of telemetry."""
    prev, records = "", list[Record]()
    for n in range(1, count + 1):
        body = {"event": "call", "call": f"stop_line({n})", "n": n, "prev": prev}
        prev = hashlib.sha256(msgspec.json.encode(body)).hexdigest()
        records += [Record(2 * n - 1, 1.0, "audit", 2, body), Record(2 * n, 1.0, "telemetry", 5, {"n": n})]
    return records


async def pruned(
    database: Database, *, records: float = 90, jobs: float = 90, audit_too: bool = True
) -> dict[str, Any]:
    await Audit(database).anchor()
    return await Retention(database, NONE, records, jobs, audit_too=audit_too).prune()


async def test_old_records_go_in_bounded_steps_between_which_others_write(sender: Sender) -> None:
    at(sender, 100, sender.batch(make(range(1, 36))))
    at(sender, 10, sender.batch(make(range(36, 41))))
    steps, write = list[int](), sender.database.write

    async def counted(change: Any) -> Any:
        before = len(seqs(sender))
        made = await write(change)
        steps.append(before - len(seqs(sender)))
        return made

    await Audit(sender.database).anchor()
    keeping = Retention(sender.database, NONE, 90, 90)
    sender.database.write = counted  # type: ignore[method-assign]
    state = await keeping.prune()
    assert seqs(sender) == list(range(36, 41))
    assert [step for step in steps if step] == [10, 10, 10, 5]
    assert (state["records"]["last"], state["records"]["total"]) == (35, 35)
    assert (await keeping.prune())["records"] | {"before": 0} == {"before": 0, "days": 90, "last": 0, "total": 35}
    assert await keeping.report() == await Retention(sender.database, NONE, 90, 90).report(), "it is on disk"


async def test_what_was_pruned_and_comes_again_is_not_taken_again(sender: Sender) -> None:
    old = sender.batch(make(range(1, 11)))
    at(sender, 100, old)
    at(sender, 1, sender.batch(make(range(11, 13))))
    await pruned(sender.database)
    assert sender.commit(old).records == 0
    assert sender.commit(sender.batch(make(range(5, 14)))).records == 1
    assert (seqs(sender), sender.device()[:2]) == ([11, 12, 13], (1, 13))


async def test_the_newest_record_of_all_stays_so_that_no_id_is_given_again(sender: Sender) -> None:
    at(sender, 100, sender.batch(make(range(1, 31))))
    ids = sa.select(sa.func.max(telemetry.c.id))
    top = sender.rows(ids)[0][0]
    await pruned(sender.database)
    assert seqs(sender) == [30]
    sender.commit(sender.batch(make([31])))
    assert sender.rows(ids)[0][0] > top


async def test_what_is_not_anchored_yet_stays(sender: Sender) -> None:
    at(sender, 100, sender.batch(make(range(1, 6))))
    await Retention(sender.database, NONE, 90, 90).prune()
    assert seqs(sender) == [1, 2, 3, 4, 5]


async def test_a_dead_letter_that_is_replayed_takes_nothing_a_second_time(sender: Sender) -> None:
    at(sender, 100, sender.batch(make(range(1, 6))))
    dead = sender.batch([*make([6]), Record(7, 1.0, "loss", 1, {"count": 3}), *make([8])], first=4)
    at(sender, 50, dead, condemn="a full disk")
    at(sender, 100, sender.batch(make(range(9, 12))))
    await pruned(sender.database)
    assert seqs(sender) == [4, 5, 9, 10, 11], "what it covers, and what follows, waits for it"
    id = sender.rows(sa.select(dead_letters.c.id))[0][0]
    with sender.database.engine.begin() as connection:
        assert replay(connection, id) == 3
    with sender.database.engine.begin() as connection:
        assert replay(connection, id) == 0
    assert sender.device()[2] == 3
    await pruned(sender.database, records=20)
    assert (sorted(seqs(sender)), sender.dead()) == ([6, 7, 8, 9, 10, 11], []), "a letter goes before what it covers"


async def test_a_record_that_came_while_the_clock_was_wrong_is_as_old_as_its_neighbours(sender: Sender) -> None:
    another, third = Sender(sender.database), Sender(sender.database)
    for n, days_ago in enumerate([100, -7000, 99, 10, 7000, -7000, 9]):
        at(sender, days_ago, sender.batch(make([n + 1])))
        if days_ago == 7000:
            at(another, days_ago, another.batch(make([1])))
            at(third, -days_ago, third.batch(make([1])))
    await pruned(sender.database)
    assert seqs(sender) == [4, 5, 6, 7]
    assert seqs(another) == seqs(third) == [1]


async def test_a_clock_years_off_costs_a_day_and_one_that_is_put_back_nothing(
    sender: Sender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "STRIDE_S", DAY_S)
    for n in range(10):
        at(sender, 89.5 - n, sender.batch(make([n + 1])))
    await pruned(sender.database)
    for years, left in ((20, 9), (-20, 9), (0, 9)):
        monkeypatch.setattr("hub.retention.time.time", lambda off=years: NOW + off * 366 * DAY_S)
        await Retention(sender.database, NONE, 90, 90).prune()
        assert len(seqs(sender)) == left, years


async def test_a_pruned_chain_still_verifies_and_says_up_to_where_it_was_pruned(sender: Sender) -> None:
    calls, log = chained(sender, 12), Audit(sender.database)
    at(sender, 100, sender.batch(calls[:9]))
    await log.anchor()
    at(sender, 95, sender.batch(calls[9:15]))
    at(sender, 5, sender.batch(calls[15:]))
    assert (await pruned(sender.database))["records"]["last"] == 15
    whole = {"entries": 4, "wrong": "", "pruned": {"epoch": 1, "seq": 15}}
    found = (await log.devices())[sender.name]
    assert {name: found[name] for name in whole} == whole

    async def export() -> list[bytes]:
        return [msgspec.json.encode(each) for each in (*await log.device_entries(), *await log.entries())]

    lines = await export()
    assert check_export(lines)["first_broken"] is None
    assert check_export(lines)["devices"][sender.name] == found
    for n, follows in ((9, 10), (10, 11)):
        without = [line for line in lines if f"stop_line({n})".encode() not in line]
        assert f"entry {follows} does not follow" in check_export(without)["devices"][sender.name]["wrong"]
    changed = [line.replace(b"stop_line(12)", b"stop_line(0)") for line in lines]
    assert "is not the one that was anchored" in check_export(changed)["devices"][sender.name]["wrong"]
    untold = [line for line in lines if b"prune:device" not in line]
    assert "was anchored and is gone" in check_export(untold)["devices"][sender.name]["wrong"]
    assert await log.first_broken() is None


async def test_audit_entries_stay_when_the_records_around_them_go_unless_it_is_asked_for(sender: Sender) -> None:
    at(sender, 100, sender.batch(chained(sender, 9)))
    at(sender, 5, sender.batch(make([19])))
    assert (await pruned(sender.database, audit_too=False))["records"]["last"] == 9
    assert seqs(sender) == [*range(1, 18, 2), 19]
    assert (await pruned(sender.database, audit_too=False))["records"]["last"] == 0
    found = (await Audit(sender.database).devices())[sender.name]
    assert (found["entries"], found["wrong"], sender.told("prune:device")) == (9, "", 0)


async def test_an_export_during_which_entries_were_pruned_verifies(sender: Sender) -> None:
    calls, log = chained(sender, 9), Audit(sender.database)
    at(sender, 100, sender.batch(calls[:12]))
    at(sender, 5, sender.batch(calls[12:]))
    await log.anchor()
    own, first = await log.entries(), await log.device_entries(limit=2)
    await pruned(sender.database)
    rest = await log.device_entries((sender.name, 1, first[-1].seq))
    lines = [msgspec.json.encode(each) for each in (*own, *first, *rest, *await log.entries(own[-1]["id"]))]
    found = check_export(lines)
    assert (found["first_broken"], found["devices"][sender.name]["wrong"]) == (None, "")
    assert found["devices"][sender.name]["entries"] == 2 + 3


async def test_a_chain_that_was_broken_before_it_was_pruned_stays_broken(sender: Sender) -> None:
    calls = chained(sender, 9)
    at(sender, 100, sender.batch([*calls[:4], *calls[6:9]], last=9))
    at(sender, 5, sender.batch(calls[9:]))
    await pruned(sender.database)
    at(sender, 95, sender.batch(make([19])))
    assert sender.told("prune:device") == 1
    await pruned(sender.database, records=2)
    assert sender.told("prune:device") >= 2
    assert (await Audit(sender.database).devices())[sender.name]["wrong"].startswith("entry 4 does not follow")


def test_what_may_go_is_found_without_reading_all_that_is_kept(tmp_path: Path) -> None:
    database, asked = Database(f"sqlite:///{tmp_path / 'hub.db'}"), list[tuple[str, Any]]()
    sender = Sender(database)
    sa.event.listen(
        database.engine, "before_cursor_execute", lambda _c, _cursor, text, given, *_: asked.append((text, given))
    )
    with database.engine.begin() as connection:
        retention.prune_records(connection, sender.name, 0, True)
        retention.prune_jobs(connection, NOW)
        for table, index in (("audit", "audit_pruned"), ("jobs", "jobs_by_created (created<?)")):
            text, given = next(each for each in asked if each[0].startswith(f"SELECT {table}."))
            plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", given).all())
            assert f"USING INDEX {index}" in plan, plan
    database.close()


async def test_jobs_that_ended_long_ago_go_and_what_still_counts_stays(sender: Sender) -> None:
    def job(id: str, days_ago: float, state: str = "succeeded", **more: Any) -> dict[str, Any]:
        then = NOW - days_ago * DAY_S
        made = new(sender.name, JobKind.TASK, {"text": "t"}, "ann", [], "", 60.0)
        return made | {"id": id, "created": then, "updated": then, "expires": then + 60, "state": state} | more

    given = [job(f"old-{n}", 100 + n, state) for n, state in enumerate(["succeeded", "failed", "expired"] * 8)]
    given += [job("young", 80), job("runs", 100, "running"), job("delivered", 100, "delivered")]
    given += [job("ended-lately", 100, updated=NOW - DAY_S), job("withdrawn", 100, "cancelled", expires=NOW + DAY_S)]
    given += [job(f"whole-{n}", 100, fanout="whole") for n in range(15)]
    given += [job(f"part-{n}", 100, fanout="part") for n in range(15)] + [job("last", 2, fanout="part")]
    with sender.database.engine.begin() as connection:
        connection.execute(jobs.insert(), given)
        alike = {"group": "g", "subject": "ann", "created": NOW - 100 * DAY_S, "ttl_s": 60.0, "at_once": 0}
        connection.execute(fanouts.insert(), [alike | {"id": "whole"}, alike | {"id": "part"}])
    assert (await pruned(sender.database))["jobs"]["last"] == 24 + 15
    kept = {id for (id,) in sender.rows(sa.select(jobs.c.id))}
    wanted = {"young", "runs", "delivered", "ended-lately", "withdrawn", "last", *(f"part-{n}" for n in range(15))}
    assert kept == wanted
    assert sender.rows(sa.select(fanouts.c.id)) == [("part",)]
    await pruned(sender.database, jobs=0)
    assert len(sender.rows(sa.select(jobs.c.id))) == len(wanted)


async def test_uploads_go_at_the_age_of_records_also_at_a_hub_that_never_pruned_them(
    sender: Sender, tmp_path: Path
) -> None:
    at(sender, 100, sender.batch(make(range(1, 6))))
    folder = tmp_path / "uploads" / sender.name
    folder.mkdir(parents=True)
    for name, days_ago in (("old", 100), ("young", 10)):
        (folder / name).write_bytes(b"1")
        os.utime(folder / name, (NOW, NOW - days_ago * DAY_S))
    kept = {"before": 1.0, "last": 0, "total": 0}
    before = {"key": "retention", "value": msgspec.json.encode({"at": 1.0, "records": kept, "jobs": kept}).decode()}
    for days, left in ((0, {"old", "young"}), (90, {"young"})):
        with sender.database.engine.begin() as connection:
            connection.execute(settings.delete().where(settings.c.key == "retention"))
            connection.execute(settings.insert().values(before))
        state = await Retention(sender.database, Uploads(tmp_path), days, 0).prune()
        assert {path.name for path in folder.iterdir()} == left
        assert state["uploads"]["last"] == 2 - len(left)


async def test_nothing_goes_where_everything_is_kept_and_an_age_of_hours_is_refused(sender: Sender) -> None:
    at(sender, 4000, sender.batch(make(range(1, 6))))
    state = await pruned(sender.database, records=0, jobs=0)
    assert (seqs(sender), state["records"]["days"]) == ([1, 2, 3, 4, 5], 0)
    for days in (0.5, -1, float("nan")):
        with pytest.raises(Fatal, match="is no age"):
            Retention(sender.database, NONE, days, 90)


async def test_sqlite_uses_the_space_of_what_was_pruned_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "STRIDE_S", 1e9)
    monkeypatch.setattr(retention, "PAUSE_S", 0.0)
    database = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    sender, sizes = Sender(database), list[int]()
    for turn in range(4):
        at(sender, 100 if turn < 3 else 0, sender.batch(make(range(turn * 3000 + 1, turn * 3000 + 3001))))
        with database.engine.connect() as connection:
            sizes.append(connection.exec_driver_sql("PRAGMA page_count").scalar() or 0)
        await pruned(database)
    assert max(sizes) < sizes[0] * 1.1, sizes
    database.close()


async def test_a_running_hub_prunes_by_itself_and_says_what(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"FIRST_S": 0.2, "RUN_S": 0.2, "STRIDE_S": 1e9}.items():
        monkeypatch.setattr(retention, name, value)
    monkeypatch.setattr("hub.app.ANCHOR_S", 0.1)
    async with running(tmp_path / "hub", keep_days=30.0, keep_jobs_days=0.0) as hub:
        device, admin = await enrolled(hub, "press-1"), await hub.login()
        async with device.online():
            await device.send(make(range(1, 21)))
            await until(lambda: device.acked()[1] == 20)
            old = telemetry.update().where(telemetry.c.seq < 15).values(received=NOW - 31 * DAY_S)
            await hub.services.db.write(lambda c: c.execute(old))
            end = time.monotonic() + 15
            while (found := (await admin.get("/v1/retention")).json())["records"]["total"] < 14:
                assert time.monotonic() < end, found
                await asyncio.sleep(0.05)
        assert (found["records"]["days"], found["jobs"]["days"]) == (30, 0)
        page = (await admin.get("/v1/telemetry", params={"device": "press-1"})).json()["records"]
        assert [record["seq"] for record in page] == list(range(15, 21))
        said = audit_cli._retention(found)
        assert "records: kept 30 days, here since " in said
        assert "in all 14" in said
        assert "uploads: kept 30 days" in said
        assert "jobs: kept for ever" in said
        verified = (await admin.get("/v1/audit/verify")).json()
        assert verified["first_broken"] is None
        await admin.aclose()
