"""The hub's tables (SQLAlchemy Core) and the two ways to them: `read` and `write`, never on the event loop.

Invariants: types and SQL hold for SQLite and PostgreSQL alike; the schema changes by migrations only (hub/migrations,
a test compares both); all writes of a process go through one thread, so a read-then-write in one `write` is not
interleaved; SQLite runs WAL with synchronous=FULL, so what was committed survives power loss. Times are seconds since
the Unix epoch.
"""

import asyncio
import sys
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from hub.errors import Fatal

T = TypeVar("T")
READERS = 4
metadata = sa.MetaData()
BigId = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

AUDITED = sa.text("kind = 'audit'")  # not as a parameter, or SQLite does not use the index
PRUNED = sa.text("action = 'prune:device'")
SPECIAL = sa.text("kind <> 'telemetry'")

settings = sa.Table(
    "settings",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

users = sa.Table(
    "users",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("password_hash", sa.String(255), nullable=False),
    sa.Column("roles", sa.JSON, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("revoked", sa.Float),
)

roles = sa.Table(
    "roles",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("permissions", sa.JSON, nullable=False),
)

refresh_tokens = sa.Table(
    "refresh_tokens",
    metadata,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("family", sa.String(32), nullable=False),
    sa.Column("user", sa.String(63), nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("used", sa.Float),
)

certificates = sa.Table(
    "certificates",
    metadata,
    sa.Column("serial", sa.String(40), primary_key=True),
    sa.Column("device", sa.String(63), nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("revoked", sa.Float),
    sa.Index("certificates_by_device", "device"),
)

enrolments = sa.Table(
    "enrolments",
    metadata,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("name", sa.String(63)),
    sa.Column("created_by", sa.String(63), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("used", sa.Float),
    sa.Column("used_by", sa.String(63)),
)

devices = sa.Table(
    "devices",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("public_key", sa.String(64), nullable=False),
    sa.Column("enrolled", sa.Float, nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("watermark", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("lost", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("missing", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("last_seen", sa.Float),
    sa.Column("clock_offset_s", sa.Float),
    sa.Column("agent", sa.String(64), nullable=False, server_default=""),
    sa.Column("desired_version", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("desired", sa.JSON, nullable=False),
    sa.Column("reported", sa.JSON, nullable=False),
    sa.Column("reported_version", sa.BigInteger, nullable=False, server_default="0"),
    sa.Column("revoked", sa.Float),
    sa.Column("labels", sa.JSON, nullable=False, server_default="{}"),
)

telemetry = sa.Table(
    "telemetry",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("device", sa.String(63), sa.ForeignKey("devices.name"), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("seq", sa.BigInteger, nullable=False),
    sa.Column("ts", sa.Float, nullable=False),
    sa.Column("received", sa.Float, nullable=False),
    sa.Column("kind", sa.String(64), nullable=False),
    sa.Column("priority", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.UniqueConstraint("device", "epoch", "seq", name="telemetry_once"),
    sa.Index("telemetry_audit", "device", "epoch", "seq", sqlite_where=AUDITED, postgresql_where=AUDITED),
    sa.Index("telemetry_by_kind", "kind", "id", sqlite_where=SPECIAL, postgresql_where=SPECIAL),
)

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("device", sa.String(63), sa.ForeignKey("devices.name"), nullable=False),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("body", sa.JSON, nullable=False),
    sa.Column("subject", sa.String(63), nullable=False),
    sa.Column("roles", sa.JSON, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float, nullable=False),
    sa.Column("updated", sa.Float, nullable=False),
    sa.Column("idempotency_key", sa.String(128)),
    sa.Column("result", sa.JSON, nullable=False),
    sa.Column("error", sa.Text, nullable=False, server_default=""),
    sa.Column("cancelled_by", sa.String(63)),
    sa.Column("progress", sa.JSON),
    sa.Column("fanout", sa.String(32)),
    sa.Column("held", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.UniqueConstraint("device", "idempotency_key", name="jobs_once"),
    sa.Index("jobs_by_state", "state", "device"),
    sa.Index("jobs_by_created", "created"),
    sa.Index("jobs_by_fanout", "fanout", "state"),
)

fanouts = sa.Table(
    "fanouts",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("group", sa.String(64), nullable=False),
    sa.Column("subject", sa.String(63), nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("ttl_s", sa.Float, nullable=False),
    sa.Column("at_once", sa.Integer, nullable=False),
    sa.Column("idempotency_key", sa.String(128)),
    sa.UniqueConstraint("group", "idempotency_key", name="fanouts_once"),
)

dead_letters = sa.Table(
    "dead_letters",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("device", sa.String(63), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("first", sa.BigInteger, nullable=False),
    sa.Column("last", sa.BigInteger, nullable=False),
    sa.Column("received", sa.Float, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("payload", sa.LargeBinary, nullable=False),
    sa.Column("properties", sa.JSON, nullable=False, server_default="{}"),
    sa.Column("replayed", sa.Float),
)

gaps = sa.Table(
    "gaps",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("device", sa.String(63), nullable=False),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    sa.Column("first", sa.BigInteger, nullable=False),
    sa.Column("last", sa.BigInteger, nullable=False),
    sa.Column("count", sa.BigInteger, nullable=False),
    sa.Column("found", sa.Float, nullable=False),
    sa.Index("gaps_by_device", "device", "id"),
)

bundles = sa.Table(
    "bundles",
    metadata,
    sa.Column("name", sa.String(63), primary_key=True),
    sa.Column("version", sa.String(64), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("manifest", sa.Text, nullable=False),
    sa.Column("manifest_sha256", sa.String(64), nullable=False),
    sa.Column("index_sha256", sa.String(64), nullable=False, server_default=""),
    sa.Column("role", sa.String(63), nullable=False, server_default=""),
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("content_digest", sa.String(64), nullable=False),
    sa.Column("published", sa.Float, nullable=False),
    sa.Column("published_by", sa.String(63), nullable=False),
)

rollouts = sa.Table(
    "rollouts",
    metadata,
    sa.Column("id", sa.String(32), primary_key=True),
    sa.Column("bundle", sa.String(63), nullable=False),
    sa.Column("version", sa.String(64), nullable=False),
    sa.Column("status", sa.String(16), nullable=False),
    sa.Column("live", sa.Boolean, nullable=False),
    sa.Column("run", sa.JSON, nullable=False),
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("created_by", sa.String(63), nullable=False),
    sa.Column("updated", sa.Float, nullable=False),
)

rollout_devices = sa.Table(
    "rollout_devices",
    metadata,
    sa.Column("rollout", sa.String(32), sa.ForeignKey("rollouts.id"), primary_key=True),
    sa.Column("device", sa.String(63), sa.ForeignKey("devices.name"), primary_key=True),
    sa.Column("wave", sa.Integer, nullable=False),
    sa.Column("step", sa.String(16), nullable=False),
    sa.Column("place", sa.JSON, nullable=False),
    sa.Index("rollout_devices_by_step", "rollout", "wave", "step"),
)

audit = sa.Table(
    "audit",
    metadata,
    sa.Column("id", BigId, primary_key=True, autoincrement=True),
    sa.Column("ts", sa.Float, nullable=False),
    sa.Column("actor", sa.String(63), nullable=False),
    sa.Column("action", sa.String(64), nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("prev", sa.String(64), nullable=False),
    sa.Column("hash", sa.String(64), nullable=False),
    sa.Index("audit_pruned", "actor", "id", sqlite_where=PRUNED, postgresql_where=PRUNED),
)


class Database:
    """One database: `await db.read(f)` and `await db.write(f)` call `f(connection)` in a thread, in one transaction.

    Raises:
        Fatal: when it cannot be opened or brought to the newest schema.
    """

    def __init__(self, url: str) -> None:
        sys.setswitchinterval(min(0.0005, sys.getswitchinterval()))  # or the writer waits 5 ms at each statement
        try:
            self.engine = sa.create_engine(url, json_serializer=_dumps, json_deserializer=msgspec.json.decode)
            if self.engine.dialect.name == "sqlite":
                sa.event.listen(self.engine, "connect", _sqlite_connect)
                sa.event.listen(self.engine, "begin", _sqlite_begin)
            with self.engine.begin() as connection:
                config = Config()
                config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        except (sa.exc.SQLAlchemyError, ImportError) as error:
            raise Fatal(
                f"the database cannot be opened: {error}", "check --data and --database, free space and permissions"
            ) from error
        self._reading = self.engine.execution_options(read_only=True)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="db-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="db-write")
        self.failing = ""  # why the last write could not be made: a full disk, a lost server

    async def read(self, query: Callable[[sa.Connection], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._call, self._reading, query)

    async def write(self, change: Callable[[sa.Connection], T]) -> T:
        """Commits when `change` returns, rolls back when it raises."""
        work = partial(copy_context().run, self._call, self.engine, change)  # who asked, and where, goes along
        try:
            made = await asyncio.get_running_loop().run_in_executor(self._writer, work)
        except sa.exc.OperationalError as error:
            self.failing = str(error.orig)
            raise
        self.failing = ""
        return made

    def close(self) -> None:
        self._readers.shutdown()
        self._writer.shutdown()
        self.engine.dispose()

    @staticmethod
    def _call(engine: sa.Engine, work: Callable[[sa.Connection], T]) -> T:
        with engine.begin() as connection:
            return work(connection)


def among(column: sa.ColumnElement[str], names: Collection[str]) -> sa.ColumnElement[bool]:
    """`column IN names` in one parameter: SQLite takes no more than 32,766 of them."""
    listed = sa.func.json_each(sa.literal(dict.fromkeys(names), sa.JSON)).table_valued(sa.column("key", sa.String))
    return column.in_(sa.select(listed.c.key))


def row_dict(row: sa.Row[Any]) -> dict[str, Any]:
    """A row as a plain dict by column name."""
    return dict(row._mapping)


def _dumps(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _sqlite_connect(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # SQLAlchemy says BEGIN, not the driver
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=10000"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: sa.Connection) -> None:
    read_only = connection.get_execution_options().get("read_only", False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")
