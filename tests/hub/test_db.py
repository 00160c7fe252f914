"""The database: migrations from empty, durability settings, one writer."""

import asyncio
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from hub import audit
from hub.audit import Audit
from hub.db import Database, metadata, settings
from hub.errors import Fatal


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
