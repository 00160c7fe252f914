"""Tasks and their steps, kept in SQLite so that a crash at any moment loses no decision and repeats no effect.

Invariants: steps are only appended, in durable transactions of the device's store, and are on disk before what follows
them changes anything. What was only decided waits for what comes of it; what was read is written while the next thing
is decided, one transaction of a task at a time: after a crash it is decided or read again. A caller that is cancelled
leaves each transaction whole. Of the KEEP newest tasks those that have ended are kept, older ones only until they end.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_agent.agent.calls import Call
from edge_agent.store import Connection, Migrations, Store
from edge_agent.wire.grants import Subject

KEEP, LATEST = 2000, 50
State = Literal["running", "waiting", "succeeded", "failed"]
migrations = Migrations("agent")
_UPDATE = "UPDATE tasks SET state = ?, head = ? WHERE id = ?"
_log = logging.getLogger("outrider.transcript")


class Step(msgspec.Struct, frozen=True, omit_defaults=True):
    """`model`: what it said; `check`: what it said without untrusted text, which counts instead; `intent`: the call to
    be made; `tool`: what came back; `ask` and `approval`: of a dangerous call, see approval.py; times in ms.

    `model`, `digest` and `adapter` (name and version) say which model it was; `confidence` that it is right, from its
    mean `logprob` and `votes`; `tried` which others were asked, or in vain; `tokens`, `ms` and `cost` are of all.
    A run of a workflow begins with its `plan`, and `at` is the step (and item) of it; a task has one where of several
    calls one is dangerous, and `at` is the place of their decision and the call's number. `why`: it needs an approval.
    `wrote`: the model's own words, where something in them had no reason (meant.py). `whole`: it read the whole request
    at once, not part by part (parts.py).
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
    wrote: str = ""
    whole: bool = False


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


@migrations
def m001_transcripts(db: sqlite3.Connection) -> None:
    """Tasks and their steps."""
    for statement in (
        """CREATE TABLE tasks (
            id TEXT PRIMARY KEY, created REAL NOT NULL, state TEXT NOT NULL, head BLOB NOT NULL) STRICT""",
        "CREATE INDEX tasks_state ON tasks (state, created)",
        """CREATE TABLE task_steps (
            task TEXT NOT NULL, n INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (task, n)) STRICT""",
    ):
        db.execute(statement)


@migrations
def m002_rates(db: sqlite3.Connection) -> None:
    """When tools that have a rate were called."""
    db.execute("CREATE TABLE rated_calls (tool TEXT NOT NULL, ts REAL NOT NULL) STRICT")
    db.execute("CREATE INDEX rated_calls_tool ON rated_calls (tool, ts)")


@migrations
def m003_conversations(db: sqlite3.Connection) -> None:
    """What was said before."""
    db.execute(
        """CREATE TABLE conversations (
            subject TEXT NOT NULL, name TEXT NOT NULL, body BLOB NOT NULL, ts REAL NOT NULL,
            PRIMARY KEY (subject, name)) STRICT"""
    )


@migrations
def m004_examples(db: sqlite3.Connection) -> None:
    """What was asked and done well."""
    db.execute(
        """CREATE TABLE examples (
            subject TEXT NOT NULL, request TEXT NOT NULL, calls TEXT NOT NULL, PRIMARY KEY (subject, request)) STRICT"""
    )


class _Tail:
    """The last steps of a task, which are not on disk; the first of them is its `first`."""

    def __init__(self, first: int) -> None:
        self.first, self.steps, self.turn = first, list[Step](), asyncio.Lock()


class Transcripts:
    """Tasks in a store that was opened with these `migrations`. Every method raises Retry when the disk is full."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._tails: dict[str, _Tail] = {}
        self._doing: set[asyncio.Task[None]] = set()
        self.beside: Callable[[Connection, Task, Step], None] = lambda *_: None  # in the transaction of a step
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
        return await self._store.write(lambda db: self.put(db, task))

    def put(self, db: Connection, task: Task) -> Task:
        """The same inside the caller's transaction."""
        row = (task.id, task.created, task.state, _head(task))
        if not db.execute("INSERT INTO tasks VALUES (?, ?, ?, ?) ON CONFLICT (id) DO NOTHING", row).rowcount:
            return _get(db, task.id) or task
        old = "rowid < (SELECT max(rowid) FROM tasks) - ? AND state NOT IN ('running', 'waiting')"
        db.execute(f"DELETE FROM task_steps WHERE task IN (SELECT id FROM tasks WHERE {old})", (KEEP,))
        db.execute(f"DELETE FROM tasks WHERE {old}", (KEEP,))
        return task

    async def get(self, id: str) -> Task | None:
        """A task with its steps."""
        return self._whole(await self._store.read(lambda db: _get(db, id)))

    async def begin(self, id: str, prepare: Callable[[Connection, Task], None], new: Task | None = None) -> Task | None:
        """A task (a `new` one if there is none), which runs from here on if it is not over; `prepare` may refuse that,
        or add to it, just before."""

        def work(db: Connection) -> Task | None:
            task = self.put(db, new) if new else _get(db, id)
            if task is not None and task.state in ("running", "waiting"):
                prepare(db, task)
                task.runs += task.state == "running"
                task.state = "running"
                db.execute(_UPDATE, (task.state, _head(task), task.id))
            return task

        return self._whole(await self._store.write(work))

    def unbegun(self, db: Connection, id: str, error: str, now: float) -> None:
        """A task that will not begin has failed, inside the caller's transaction; one that has ended stays as it is."""
        if (task := _get(db, id)) and task.state == "running":
            task.state, task.error, task.finished = "failed", error, now
            db.execute(_UPDATE, (task.state, _head(task), id))

    async def latest(self) -> list[Task]:
        """The newest tasks, with no steps."""
        rows = "SELECT head FROM tasks ORDER BY created DESC LIMIT ?"
        decode = msgspec.json.Decoder(Task).decode
        return await self._store.read(lambda db: [decode(head) for (head,) in db.execute(rows, (LATEST,))])

    async def append(self, task: Task, step: Step, later: bool = False) -> None:
        """Add a step; it is on disk when this returns, or `later`: with the next one that is, or with `save`.

        A result that may come later is begun to be written at once.
        """
        tail = self._tails.setdefault(task.id, _Tail(len(task.steps)))
        tail.steps.append(step)
        task.steps.append(step)
        if not later:
            await asyncio.shield(self._begun(self._write(task, tail, step)))
        elif step.role == "tool":
            self._begun(self._write(task, tail)).add_done_callback(_put_off)
        if self.on_step:
            await self.on_step(task, step)

    async def save(self, task: Task) -> None:
        """Save everything of a task, with the steps that were put off."""
        tail = self._tails.setdefault(task.id, _Tail(len(task.steps)))
        await asyncio.shield(self._begun(self._write(task, tail, head=_head(task))))

    async def settled(self) -> None:
        """All that was begun is written, or cannot be."""
        while self._doing:
            await asyncio.wait(self._doing)

    def _whole(self, task: Task | None) -> Task | None:
        if task is not None and (tail := self._tails.get(task.id)):
            task.steps[tail.first :] = tail.steps
        return task

    def _begun(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        doing = asyncio.create_task(work)
        self._doing.add(doing)
        doing.add_done_callback(self._doing.discard)
        return doing

    async def _write(self, task: Task, tail: _Tail, last: Step | None = None, head: bytes = b"") -> None:
        """Write what is not on disk yet; a `last` step that cannot be is taken back, but for what came of a call."""
        async with tail.turn:
            steps, first, state = list(tail.steps), tail.first, task.state

            def work(db: Connection) -> None:
                rows = [(task.id, n, msgspec.json.encode(step)) for n, step in enumerate(steps, first)]
                db.executemany("INSERT INTO task_steps VALUES (?, ?, ?)", rows)
                for step in steps:
                    self.beside(db, task, step)
                if head:
                    db.execute(_UPDATE, (state, head, task.id))

            try:
                if steps or head:
                    await self._store.write(work)
            except BaseException:
                for kept in (tail.steps, task.steps) if last and last.role != "tool" else ():
                    del kept[next(n for n, step in enumerate(kept) if step is last)]
                raise
            tail.first += len(steps)
            del tail.steps[: len(steps)]
            if not tail.steps and self._tails.get(task.id) is tail:
                del self._tails[task.id]

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


def _put_off(written: asyncio.Task[None]) -> None:
    if not written.cancelled() and (error := written.exception()):
        _log.warning("a result goes to disk with what comes next: %s", error)
