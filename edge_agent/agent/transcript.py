"""Tasks and their steps, kept in SQLite so that a crash at any moment loses no decision and repeats no effect.

Invariants: steps are only appended, in durable transactions of the device's store, and are on disk before what follows
them changes anything: what was only decided or read waits for the next step that matters, or the task's end, as after a
crash it is decided or read again. Finished tasks beyond KEEP are removed, the oldest first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import msgspec
from sqlite_utils import Database, Migrations

from edge_agent.agent.calls import Call
from edge_agent.store import Connection, Store
from edge_agent.wire.grants import Subject

KEEP = 2000
State = Literal["running", "waiting", "succeeded", "failed"]
migrations = Migrations("agent")


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """`model`: what it said; `check`: what it said without untrusted text, which counts instead; `intent`: the call to
    be made; `tool`: what came back; `ask` and `approval`: of a dangerous call, see approval.py; times in ms.

    `model`, `digest` and `adapter` (name and version) say which model it was; `confidence` that it is right, from its
    mean `logprob` and `votes`; `tried` which others were asked, or in vain; `tokens`, `ms` and `cost` are of all.
    A run of a workflow begins with its `plan`, and `at` is the step (and item) of it; a task has one where of several
    calls one is dangerous, and `at` is the place of their decision and the call's number. `why`: it needs an approval.
    """

    role: Literal["model", "check", "intent", "tool", "plan", "ask", "approval"]
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
    digest: str = ""
    adapter: str = ""
    at: str = ""
    expires: float = 0.0
    model: str = ""
    logprob: float = 0.0
    confidence: float | None = None
    votes: str = ""
    tried: list[str] = []
    cost: float = 0.0
    why: str = ""


class Exchange(msgspec.Struct, frozen=True):
    """A request of a conversation and its answer, by its task; with no request, what was before, summed up."""

    id: str
    text: str
    answer: str


class Task(msgspec.Struct):
    """A request with its transcript. `answer` is for people, `result` the last tool result, `error` why it failed.

    `priority` is the class of its requests to models (0 goes first), `joules` what the device drew, `withheld` the
    output rules for which its answer is not shown. `before` is what it knows of its `conversation`. `sources` are the
    documents that its results came from, each with its parts.
    """

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
    priority: int = 1
    joules: float = 0.0
    sources: list[str] = []
    withheld: list[str] = []
    conversation: str = ""
    before: list[Exchange] = []
    steps: list[Step] = []


@migrations()
def m001_transcripts(db: Database) -> None:
    """Tasks and their steps."""
    for statement in (
        """CREATE TABLE tasks (
            id TEXT PRIMARY KEY, created REAL NOT NULL, state TEXT NOT NULL, head BLOB NOT NULL) STRICT""",
        "CREATE INDEX tasks_state ON tasks (state, created)",
        """CREATE TABLE task_steps (
            task TEXT NOT NULL, n INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (task, n)) STRICT""",
    ):
        db.execute(statement)


@migrations()
def m002_rates(db: Database) -> None:
    """When tools that have a rate were called."""
    db.execute("CREATE TABLE rated_calls (tool TEXT NOT NULL, ts REAL NOT NULL) STRICT")
    db.execute("CREATE INDEX rated_calls_tool ON rated_calls (tool, ts)")


@migrations()
def m003_conversations(db: Database) -> None:
    """What was said before."""
    db.execute(
        """CREATE TABLE conversations (
            subject TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL, ts REAL NOT NULL,
            PRIMARY KEY (subject, name)) STRICT"""
    )


@migrations()
def m004_examples(db: Database) -> None:
    """What was asked and done well."""
    db.execute(
        """CREATE TABLE examples (
            subject TEXT NOT NULL, request TEXT NOT NULL, calls TEXT NOT NULL, PRIMARY KEY (subject, request)) STRICT"""
    )


class Transcripts:
    """Tasks in a store that was opened with these `migrations`. Every method raises Retry when the disk is full."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._turn = asyncio.Lock()
        self._unsaved: dict[str, list[Step]] = {}
        self._doing: set[asyncio.Task[None]] = set()
        self.beside: Callable[[Connection, Task, Step], None] | None = None  # in the transaction of a step
        self.on_step: Callable[[Task, Step], Awaitable[None]] | None = None  # after it

    @property
    def store(self) -> Store:
        """Where they are."""
        return self._store

    @property
    def folder(self) -> Path:
        """Where the device keeps its state."""
        return self._store.path.parent

    async def add(self, task: Task) -> Task:
        """Save a new task, or return the one that has its id."""
        return await self._store.write(lambda db: _add(db, task))

    async def get(self, id: str) -> Task | None:
        """A task with its steps."""
        task = await self._store.read(lambda db: _get(db, id))
        if task is not None:
            task.steps += self._unsaved.get(id, [])
        return task

    async def latest(self, limit: int = 50) -> list[Task]:
        """The newest tasks, with no steps."""
        rows = "SELECT head FROM tasks ORDER BY created DESC LIMIT ?"
        decode = msgspec.json.Decoder(Task).decode
        return await self._store.read(lambda db: [decode(head) for (head,) in db.execute(rows, (limit,))])

    async def append(self, task: Task, step: Step, later: bool = False) -> None:
        """Add a step; it is on disk when this returns, or `later`: with the next one that is, or with `save`."""
        await self._whole(self._append(task, step, later))
        if self.on_step:
            await self.on_step(task, step)

    async def save(self, task: Task) -> None:
        """Save everything of a task, with the steps that were put off."""
        await self._whole(self._save(task))

    async def _whole(self, work: Coroutine[Any, Any, None]) -> None:
        """A caller that is cancelled meanwhile leaves no transaction half told."""
        doing = asyncio.create_task(work)
        self._doing.add(doing)
        doing.add_done_callback(self._doing.discard)
        await asyncio.shield(doing)

    async def _append(self, task: Task, step: Step, later: bool) -> None:
        async with self._turn:  # parallel steps of a task have an order
            waiting = [*self._unsaved.get(task.id, []), step]
            if later:
                self._unsaved[task.id] = waiting
            else:

                def work(db: Connection) -> None:
                    _put(db, task, waiting, len(task.steps) + 1)
                    if self.beside:
                        self.beside(db, task, step)

                await self._store.write(work)
                self._unsaved.pop(task.id, None)
            task.steps.append(step)

    async def _save(self, task: Task) -> None:
        sql, row = "UPDATE tasks SET state = ?, head = ? WHERE id = ?", (task.state, _head(task), task.id)
        async with self._turn:
            waiting = self._unsaved.get(task.id, [])

            def work(db: Connection) -> None:
                _put(db, task, waiting, len(task.steps))
                db.execute(sql, row)

            await self._store.write(work)
            self._unsaved.pop(task.id, None)

    async def take(self, tool: str, count: int, seconds: float, now: float) -> float:
        """Count a call of a tool at `now`; if it was called `count` times within `seconds`, when it may be again."""

        def work(db: Connection) -> float:
            db.execute("DELETE FROM rated_calls WHERE tool = ? AND ts <= ?", (tool, now - seconds))
            db.execute("UPDATE rated_calls SET ts = ? WHERE tool = ? AND ts > ?", (now, tool, now))  # a clock set back
            times = "SELECT ts FROM rated_calls WHERE tool = ? ORDER BY ts DESC LIMIT 1 OFFSET ?"
            if (oldest := db.execute(times, (tool, count - 1)).fetchone()) is not None:
                return float(oldest[0]) + seconds
            db.execute("INSERT INTO rated_calls VALUES (?, ?)", (tool, now))
            return now

        return await self._store.write(work)


def _add(db: Connection, task: Task) -> Task:
    row = (task.id, task.created, task.state, _head(task))
    db.execute("INSERT INTO tasks VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING", row)
    old = "SELECT id FROM tasks WHERE state NOT IN ('running', 'waiting') ORDER BY created DESC LIMIT -1 OFFSET ?"
    db.execute(f"DELETE FROM task_steps WHERE task IN ({old})", (KEEP,))
    db.execute(f"DELETE FROM tasks WHERE id IN ({old})", (KEEP,))
    return _get(db, task.id) or task


def _put(db: Connection, task: Task, steps: list[Step], count: int) -> None:
    """The last steps of `count`."""
    rows = [(task.id, n, msgspec.json.encode(step)) for n, step in enumerate(steps, count - len(steps))]
    db.executemany("INSERT INTO task_steps VALUES (?, ?, ?)", rows)


def _get(db: Connection, id: str) -> Task | None:
    row = db.execute("SELECT head FROM tasks WHERE id = ?", (id,)).fetchone()
    if row is None:
        return None
    task = msgspec.json.decode(row[0], type=Task)
    rows = db.execute("SELECT body FROM task_steps WHERE task = ? ORDER BY n", (id,))
    task.steps = [msgspec.json.decode(body, type=Step) for (body,) in rows]
    return task


def _head(task: Task) -> bytes:
    return msgspec.json.encode(msgspec.structs.replace(task, steps=[]))
