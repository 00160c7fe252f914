"""Examples for a request out of what is like it: the tools' own, and what this person asked before and got.

Invariants: only models behind an endpoint are shown any (a trained adapter needs none, the base model was worse with
them). Of a task nothing is kept but the person's own words and the calls that were decided before any result was read,
so no text of a tool is ever in an example; only tasks that succeeded with nothing refused, checked, or asked of a
person are kept, KEEP of them, each for who asked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from edge_agent.agent.calls import Call, CallError, render
from edge_agent.agent.plan import read
from edge_agent.agent.prompt import Turn
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Task
from edge_agent.store import Connection, Store

KEEP, SHOWN, LEAST = 300, 3, 0.25
_CALM = ("model", "intent", "tool")


class Recall:
    """The examples of a device, over a store that was opened with the transcripts' migrations."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def keep(self, task: Task) -> None:
        """Take in a task that is over, if it may be an example. Raises Retry when the disk is full."""
        calm = all(step.ok and step.role in _CALM for step in task.steps)
        if calm and task.state == "succeeded" and not task.before and task.steps[1:2] and task.steps[1].call:
            row = (task.subject.name, task.text, task.steps[0].text)

            def work(db: Connection) -> None:
                db.execute("INSERT OR REPLACE INTO examples VALUES (?, ?, ?)", row)
                old = "SELECT rowid FROM examples ORDER BY rowid DESC LIMIT -1 OFFSET ?"
                db.execute(f"DELETE FROM examples WHERE rowid IN ({old})", (KEEP,))

            await self._store.write(work)

    async def like(self, task: Task, specs: Sequence[ToolSpec]) -> list[Turn]:
        """At most SHOWN examples that these tools can do, the most like last."""
        sql = "SELECT request, calls FROM examples WHERE subject = ?"
        own = await self._store.read(lambda db: db.execute(sql, (task.subject.name,)).fetchall())
        curated = [(text, render(Call(spec.name, args))) for spec in specs for text, args in spec.examples]
        ranked = sorted(((alike(text, task.text), text, calls) for text, calls in [*curated, *own]), reverse=True)
        shown: list[list[Turn]] = []
        for score, text, calls in ranked:
            try:
                made = [decision for decision in read(calls, specs, 8) if isinstance(decision, Call)]
            except CallError:
                continue
            if score >= LEAST and made and len(shown) < SHOWN:
                shown.append([Turn("user", text), Turn("assistant", calls), *[Turn("tool", "ok")] * len(made)])
        return [turn for example in reversed(shown) for turn in example]


def alike(one: str, other: str) -> float:
    """The cosine of two texts' sets of words and numbers."""
    a, b = (set(re.findall(r"\w+", text.lower())) for text in (one, other))
    return len(a & b) / (len(a) * len(b)) ** 0.5 if a and b else 0.0
