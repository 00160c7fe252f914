"""The device's state: one SQLite file, one thread that touches it, one owner process.

Invariants: WAL with synchronous=FULL, so a transaction that `write` has returned from survives power loss (one that is
not `durable` waits for the next that is); SQLite never runs on the event loop; every `write` is one transaction,
all of it or nothing; a full disk is a `Retry` that changed nothing. The schema grows by append-only migrations: a
released one is never edited.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import sqlite3
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from edge_agent.errors import Fatal, OutriderError, Refused, Retry

T = TypeVar("T")
Change = Callable[[Any], None]
BUSY_TIMEOUT_S = 5.0
SWITCH_S = 0.0005  # SQLite's thread gives the interpreter away at each statement: to wait 5 ms for it would cost more


class Migrations:
    """Changes of a schema: `@migrations` adds one, `apply` makes each once."""

    def __init__(self, name: str) -> None:
        self.name, self._changes = name, list[Change]()

    def __call__(self, change: Change) -> Change:
        self._changes.append(change)
        return change

    def apply(self, db: sqlite3.Connection) -> None:
        """Make what is missing, by sqlite-utils, which is loaded only then: it costs a daemon 3 MiB."""
        (noted,) = db.execute("SELECT count(*) FROM sqlite_master WHERE name = '_sqlite_migrations'").fetchone()
        query = "SELECT name FROM _sqlite_migrations WHERE migration_set = ?"
        made = {name for (name,) in db.execute(query, [self.name])} if noted else set[str]()
        if made.issuperset(change.__name__ for change in self._changes):
            return
        import sqlite_utils

        known = sqlite_utils.Migrations(self.name)
        for change in self._changes:
            known()(change)
        known.apply(sqlite_utils.Database(db))


migrations = Migrations("edge")


@migrations
def m001_sync(db: sqlite3.Connection) -> None:
    """The outbox, jobs that came, and the documents shared with the hub."""
    for statement in (
        """CREATE TABLE outbox (
            seq INTEGER PRIMARY KEY, priority INTEGER NOT NULL, expires REAL, line BLOB NOT NULL) STRICT""",
        "CREATE INDEX outbox_expires ON outbox (expires) WHERE expires IS NOT NULL",
        """CREATE TABLE outbox_state (
            id INTEGER PRIMARY KEY CHECK (id = 1), epoch INTEGER NOT NULL, last_seq INTEGER NOT NULL,
            acked INTEGER NOT NULL) STRICT""",
        """CREATE TABLE jobs (
            n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, idempotency_key TEXT NOT NULL, state TEXT NOT NULL,
            expires REAL NOT NULL, updated REAL NOT NULL, job BLOB NOT NULL, report BLOB) STRICT""",
        "CREATE INDEX jobs_state ON jobs (state)",
        "CREATE INDEX jobs_key ON jobs (idempotency_key) WHERE idempotency_key != ''",
        "CREATE TABLE documents (name TEXT PRIMARY KEY, version INTEGER NOT NULL, body BLOB NOT NULL) STRICT",
    ):
        db.execute(statement)
    db.execute("INSERT INTO outbox_state VALUES (1, ?, 0, 0)", [int(time.time() * 1000)])


@migrations
def m002_found(db: sqlite3.Connection) -> None:
    """The last seq that was there when a life began that the hub has not answered yet."""
    db.execute("ALTER TABLE outbox_state ADD COLUMN found INTEGER")


@migrations
def m003_blocks(db: sqlite3.Connection) -> None:
    """The lines of consecutive records lie together."""
    db.execute("ALTER TABLE outbox RENAME TO records")
    db.execute("DROP INDEX outbox_expires")
    db.execute(
        """CREATE TABLE outbox (first INTEGER PRIMARY KEY, last INTEGER NOT NULL, priority INTEGER NOT NULL,
            expires REAL, lines BLOB NOT NULL) STRICT"""
    )
    db.execute("INSERT INTO outbox SELECT seq, seq, priority, expires, line FROM records")
    db.execute("DROP TABLE records")
    db.execute("CREATE INDEX outbox_expires ON outbox (expires) WHERE expires IS NOT NULL")


class Connection(sqlite3.Connection):
    """What the work of a transaction gets: SQLite, and what to run when it has ended."""

    committed: list[Callable[[], object]]
    undone: list[Callable[[], None]]

    def on_commit(self, call: Callable[[], object]) -> None:
        """Runs on the event loop after the commit."""
        self.committed.append(call)

    def on_rollback(self, call: Callable[[], None]) -> None:
        """Runs in the store's thread, last registered first, when nothing of the transaction stays."""
        self.undone.append(call)


class Store:
    """Opens, checks and migrates the file at once.

    Raises:
        Retry: another process has it, or the disk is full. Refused: it is not writable. Fatal: it is damaged.
    """

    def __init__(self, path: Path, *more: Migrations) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(path.with_name(path.name + ".lock"))
        sys.setswitchinterval(min(SWITCH_S, sys.getswitchinterval()))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._full: bool | None = None  # what the connection is set to; nothing was said yet
        try:
            self._db = self._thread.submit(self._open, more).result()
        except BaseException:
            self._thread.shutdown()
            os.close(self._lock)
            raise

    async def write(self, work: Callable[[Connection], T], durable: bool = True) -> T:
        """Run `work` as one transaction, durable when this returns, or else with the next one that is.

        Raises Retry when the disk is full.
        """
        return await self._run(self._transact, work, durable)

    async def read(self, work: Callable[[Connection], T]) -> T:
        """Run `work`, which only reads."""
        return await self._run(self._read, work)

    def close(self) -> None:
        """Ends after what was begun; safe to call twice."""
        if self._lock >= 0:
            self._thread.submit(self._db.close).result()
            self._thread.shutdown()
            os.close(self._lock)
            self._lock = -1

    async def _run(self, how: Callable[..., T], *args: Any) -> T:
        """As `run_in_executor`, but the event loop is woken once, for the result and what is to follow a commit."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(answer: Callable[[Any], None], value: Any, committed: list[Callable[[], object]]) -> None:
            for call in committed:
                loop.call_soon(call)
            if not future.done():
                answer(value)

        def run() -> None:
            if future.cancelled():
                return
            answer: Callable[[Any], None] = future.set_result
            try:
                value: Any = how(*args)
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                answer, value = future.set_exception, error
            committed, self._db.committed = self._db.committed, []
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(settle, answer, value, committed)

        self._thread.submit(run)
        return await future

    def _open(self, more: tuple[Migrations, ...]) -> Connection:
        db: Connection | None = None
        try:
            db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, factory=Connection)
            db.committed, db.undone = [], []
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA journal_size_limit=16777216")
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            for each in (migrations, *more):
                each.apply(db)
        except sqlite3.Error as error:
            if db is not None:
                db.close()
            raise self._explain(error) from error
        return db

    def _transact(self, work: Callable[[Connection], T], durable: bool) -> T:
        db = self._db
        try:
            if durable is not self._full:
                db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._full = durable
            db.execute("BEGIN IMMEDIATE")
            result = work(db)
            db.execute("COMMIT")
        except BaseException as error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            for call in reversed(db.undone):
                call()
            db.committed.clear()
            if isinstance(error, sqlite3.Error):
                raise self._explain(error) from error
            raise
        finally:
            db.undone.clear()
        return result

    def _read(self, work: Callable[[Connection], T]) -> T:
        try:
            return work(self._db)
        except sqlite3.Error as error:
            raise self._explain(error) from error

    def _explain(self, error: sqlite3.Error) -> OutriderError | sqlite3.Error:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            return Retry(f"cannot write {self.path}: {error}", "the disk is full or failing: free some space there")
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Retry(f"{self.path} is busy", "another program reads or writes it: let it finish")
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            hint = "move the file aside and start again: what was not sent stays in it, a new epoch begins"
            return Fatal(f"{self.path} is damaged: {error}", hint)
        if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            return Refused(f"cannot open {self.path} for writing: {error}", "check who owns the state directory")
        return error


def _lock(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        hint = "who owns the state directory, and is its file system writable and not full?"
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise (Retry if full else Refused)(f"cannot write in {path.parent}: {error}", hint) from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        hint = "stop the other agent, or give this one its own --state"
        raise Retry(f"{path.parent} is in use by another process", hint) from None
    return descriptor
