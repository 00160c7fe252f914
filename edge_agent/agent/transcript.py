"""Tasks and their steps, kept in SQLite so that a crash at any moment loses no decision and repeats no effect.

Invariants: steps are only appended, each in its own commit with synchronous=FULL, so a step that was saved is on disk
before what follows it; one thread owns the connection and SQLite never runs on the event loop; finished tasks beyond
KEEP are removed, the oldest first.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import msgspec

from edge_agent.agent.calls import Call
from edge_agent.wire.grants import Subject

KEEP = 2000
State = Literal["running", "succeeded", "failed"]
T = TypeVar("T")


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """`model`: what it said; `intent`: the call about to be made; `tool`: what came back; times in ms."""

    role: Literal["model", "intent", "tool"]
    text: str = ""
    call: Call | None = None
    result: Any = None
    ok: bool = True
    ts: float = 0.0
    ms: float = 0.0
    first_token_ms: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0


class Task(msgspec.Struct):
    """A request with its transcript. `answer` is for people, `result` the last tool result, `error` why it failed."""

    id: str
    text: str
    subject: Subject
    created: float
    state: State = "running"
    answer: str = ""
    result: Any = None
    error: str = ""
    finished: float = 0.0
    runs: int = 0
    steps: list[Step] = []


def migrate(db: sqlite3.Connection) -> None:
    """Create the tables, once."""
    with db:
        db.execute(
            "create table if not exists tasks (id text primary key, created real not null, state text not null,"
            " runs integer not null, head blob not null) without rowid"
        )
        db.execute("create index if not exists tasks_by_state on tasks (state, created)")
        db.execute(
            "create table if not exists task_steps (task text not null, n integer not null, body blob not null,"
            " primary key (task, n)) without rowid"
        )


class Transcripts:
    """The store. It takes the connection over: open it with `check_same_thread=False` and use it nowhere else."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="transcripts")
        db.execute("pragma synchronous=full")
        migrate(db)

    async def add(self, task: Task) -> Task:
        """Save a new task, or return the one that has its id."""
        return await self._do(lambda: self._add(task))

    async def get(self, id: str) -> Task | None:
        """A task with its steps."""
        return await self._do(lambda: self._get(id))

    async def latest(self, limit: int = 50) -> list[Task]:
        """The newest tasks, with no steps."""
        return await self._do(lambda: self._list("select head from tasks order by created desc limit ?", limit))

    async def unfinished(self) -> list[Task]:
        """Tasks that a crash or a stop left running, oldest first, with no steps."""
        return await self._do(lambda: self._list("select head from tasks where state = ? order by created", "running"))

    async def append(self, task: Task, step: Step) -> None:
        """Add a step; it is on disk when this returns."""
        row = (task.id, len(task.steps), msgspec.json.encode(step))
        await self._do(lambda: self._write("insert into task_steps values (?, ?, ?)", *row))
        task.steps.append(step)

    async def save(self, task: Task) -> None:
        """Save everything of a task but its steps."""
        row = (task.state, task.runs, _head(task), task.id)
        await self._do(lambda: self._write("update tasks set state = ?, runs = ?, head = ? where id = ?", *row))

    async def close(self) -> None:
        """Finish what is queued and close the connection."""
        await self._do(self._db.close)
        self._thread.shutdown()

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _write(self, sql: str, *row: Any) -> None:
        with self._db:
            self._db.execute(sql, row)

    def _add(self, task: Task) -> Task:
        with self._db:
            row = (task.id, task.created, task.state, task.runs, _head(task))
            self._db.execute("insert into tasks values (?, ?, ?, ?, ?) on conflict (id) do nothing", row)
            self._prune()
        stored = self._get(task.id)
        assert stored is not None
        return stored

    def _prune(self) -> None:
        old = "select id from tasks where state != 'running' order by created desc limit -1 offset ?"
        self._db.execute(f"delete from task_steps where task in ({old})", (KEEP,))
        self._db.execute(f"delete from tasks where id in ({old})", (KEEP,))

    def _get(self, id: str) -> Task | None:
        row = self._db.execute("select head from tasks where id = ?", (id,)).fetchone()
        if row is None:
            return None
        task = msgspec.json.decode(row[0], type=Task)
        rows = self._db.execute("select body from task_steps where task = ? order by n", (id,))
        task.steps = [msgspec.json.decode(body, type=Step) for (body,) in rows]
        return task

    def _list(self, sql: str, value: Any) -> list[Task]:
        return [msgspec.json.decode(head, type=Task) for (head,) in self._db.execute(sql, (value,))]


def _head(task: Task) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(task, steps=[]))
