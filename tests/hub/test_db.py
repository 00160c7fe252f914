"""The database: migrations from empty, durability settings, one writer."""

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from edge_agent.wire.messages import JobKind
from hub import audit, db, jobs
from hub.audit import Audit
from hub.db import Database, metadata, settings
from hub.errors import Fatal
from hub.fanout import Fanouts
from hub.jobs import Jobs
from hub.rollout_runner import Rollouts
from hub.telemetry import Telemetry


def test_migrations_from_empty_give_exactly_the_declared_tables(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_opening_again_keeps_what_is_there(database: Database, database_url: str) -> None:
    with database.engine.begin() as connection:
        connection.execute(settings.insert().values(key="a", value="b"))
    again = Database(database_url)
    with again.engine.connect() as connection:
        assert connection.execute(sa.select(settings.c.value)).scalar() == "b"
    again.close()


def test_sqlite_commits_survive_power_loss_by_its_settings(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'hub.db'}")
    with database.engine.connect() as connection:
        pragmas = {p: connection.exec_driver_sql(f"PRAGMA {p}").scalar() for p in ("journal_mode", "synchronous")}
        assert pragmas == {"journal_mode": "wal", "synchronous": 2}
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    database.close()


def test_a_database_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="cannot be opened") as caught:
        Database(f"sqlite:///{tmp_path / 'missing' / 'hub.db'}")
    assert "--data" in caught.value.hint


async def test_concurrent_read_then_writes_are_not_interleaved(database: Database) -> None:
    def increment(connection: sa.Connection) -> None:
        known = connection.execute(sa.select(settings.c.value)).scalar()
        connection.execute(settings.delete())
        connection.execute(settings.insert().values(key="n", value=str(int(known or 0) + 1)))

    await asyncio.gather(*(database.write(increment) for _ in range(50)))
    assert await database.read(lambda c: c.execute(sa.select(settings.c.value)).scalar()) == "50"


async def test_a_failed_write_leaves_nothing(database: Database) -> None:
    def fail(connection: sa.Connection) -> None:
        connection.execute(settings.insert().values(key="n", value="1"))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.write(fail)
    assert await database.read(lambda c: c.execute(sa.select(settings)).all()) == []


async def test_a_changed_or_missing_audit_entry_shows(database: Database) -> None:
    log = Audit(database)
    for n in range(5):
        await log.add("tester", "do:thing", {"n": n})
    assert await log.first_broken() is None
    assert [entry["detail"]["n"] for entry in await log.entries(limit=3)] == [0, 1, 2]
    ids = [entry["id"] for entry in await log.entries()]
    await database.write(lambda c: c.execute(audit.audit.update().where(audit.audit.c.id == ids[2]).values(actor="x")))
    assert await log.first_broken() == ids[2]
    await database.write(lambda c: c.execute(audit.audit.delete().where(audit.audit.c.id == ids[2])))
    assert await log.first_broken() == ids[3]


def test_repeated_outside_events_are_told_at_a_bounded_rate() -> None:
    limiter = audit.Limiter()
    assert [limiter.count("d", "refuse:batch", now) for now in (0.0, 1.0, 2.0)] == [1, 0, 0]
    assert limiter.count("d", "refuse:batch", 61.0) == 3
    for n in range(3000):
        limiter.count(f"d{n}", "refuse:batch", 62.0)
    assert len(limiter._causes) <= audit.MAX_CAUSES


async def test_a_scope_of_more_devices_than_sqlite_takes_parameters_is_read(database: Database) -> None:
    """SQLite takes 32,766 in a statement where nobody built it otherwise, PostgreSQL 65,535."""

    def as_built_by_default(connection: Any, *_: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.setlimit(sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER, 32_766)

    sa.event.listen(database.engine, "checkout", as_built_by_default)
    many = {f"press-{n}" for n in range(70_000)}
    row = {"public_key": "k", "enrolled": 0.0, "desired": {}, "reported": {}}
    record = {"epoch": 1, "seq": 1, "ts": 0.0, "received": 0.0, "kind": "telemetry", "priority": 5, "body": "{}"}
    letter = {"epoch": 1, "first": 1, "last": 1, "received": 0.0, "reason": "", "payload": b""}
    work, plan = jobs.new("", JobKind.TASK, {"text": "t"}, "ann", [], "", 60.0), {"bundle": "reader", "version": "2"}
    run = {"status": "paused", "live": True, "created_by": "ann", "created": 0.0, "updated": 0.0}

    def fill(connection: sa.Connection) -> None:
        connection.execute(db.fanouts.insert().values(id="f", group="g", subject="a", created=0, ttl_s=1, at_once=0))
        for name in ("press-7", "other"):
            connection.execute(db.devices.insert().values(name=name, **row))
            connection.execute(db.telemetry.insert().values(device=name, **record))
            connection.execute(db.dead_letters.insert().values(device=name, **letter))
            connection.execute(db.jobs.insert().values(work | {"id": name, "device": name, "fanout": "f"}))
            told = {"id": name, "status": "paused", "plan": plan}
            connection.execute(db.rollouts.insert().values(**plan, **run, id=name, run=told))
            place = {"device": name, "wave": 0, "step": "pending"}
            connection.execute(db.rollout_devices.insert().values(rollout=name, **place, place=place))

    await database.write(fill)
    nobody: Any = None
    sent, work_of = Telemetry(database), Jobs(database, nobody)
    rollouts = Rollouts(database, nobody, nobody, nobody, nobody)
    assert [each["device"] for each in await sent.query(only=many)] == ["press-7"]
    assert [each["device"] for each in await sent.dead(only=many)] == ["press-7"]
    assert [each["device"] for each in await work_of.list(only=many)] == ["press-7"]
    assert (await Fanouts(database, work_of, nobody).get("f", only=many))["states"] == {"queued": 1}
    assert [each["id"] for each in await rollouts.list(only=many)] == ["press-7"]
    assert [each["device"] for each in await rollouts.devices("press-7", only=many)] == ["press-7"]
    assert await sent.query(only=set()) == []


async def test_records_of_a_kind_are_found_without_reading_all_that_came(tmp_path: Path) -> None:
    database, asked = Database(f"sqlite:///{tmp_path / 'hub.db'}"), list[tuple[str, Any]]()
    sa.event.listen(
        database.engine, "before_cursor_execute", lambda _c, _cursor, text, given, *_: asked.append((text, given))
    )
    for more in ({}, {"after": 7}, {"only": {"press-1"}}, {"newest_first": True}):
        await Telemetry(database).query(kind="reported", **more)
    await Telemetry(database).query("press-1", "reported")
    queries = [each for each in asked if "FROM telemetry" in each[0]]
    with database.engine.connect() as connection:
        plans = [str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", given).all()) for text, given in queries]
    for plan in plans[:-1]:
        assert "SEARCH telemetry USING INDEX telemetry_by_kind (kind=? AND id>?)" in plan, plan
    assert "SEARCH telemetry USING INDEX sqlite_autoindex_telemetry_1 (device=?)" in plans[-1], plans[-1]
    database.close()
