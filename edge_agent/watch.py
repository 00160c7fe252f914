"""The jobs under way as their hub sees them: how far they are, and how one is ended before its time.

Invariants: a job that waits in the inbox is dropped there; one that runs is ended here: a tool call is broken off like
one that took too long (its effect is unknown and said to be), a task or workflow stops after the step it is at, and one
that waits for an approval goes no further. What succeeded before it was told stays a success. Progress is told at most
once in `PROGRESS_S` of a job, and a lost one changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Coroutine
from functools import lru_cache
from typing import Any, TypeVar

from edge_agent.agent.act import Ended
from edge_agent.agent.calls import render
from edge_agent.agent.transcript import Step, Task, Transcripts
from edge_agent.agent.workflow import read
from edge_agent.audit import Audit
from edge_agent.errors import OutriderError, Refused
from edge_agent.store import Connection
from edge_agent.sync.inbox import Inbox
from edge_agent.wire.messages import Job, Progress

T = TypeVar("T")
PROGRESS_S = 1.0


class Watch:
    """`cancel` is the inbox's `on_cancel`; `tell` and `stepped` are the transcripts' `beside` and `on_step`."""

    def __init__(self, inbox: Inbox, transcripts: Transcripts, audit: Audit) -> None:
        self._inbox, self._transcripts, self._audit = inbox, transcripts, audit
        self.ending: dict[str, str] = {}  # by id: why
        self._calls: dict[str, asyncio.Task[Any]] = {}
        self._told: dict[str, float] = {}

    def cancel(self, id: str, why: str) -> None:
        self.ending[id] = why
        if call := self._calls.get(id):
            call.cancel()

    async def begin(self, job: Job, again: bool, now: float) -> None:
        """Raises Refused when it is to be ended before it begins or goes on."""
        if again and job.id not in self.ending and await self._inbox.cancelled(job.id):
            self.ending[job.id] = "cancelled before a restart"
        if job.id in self.ending:
            await self.settle(job.id, self.ending[job.id], now)
            raise Refused("it went no further")

    async def settle(self, id: str, error: str, now: float) -> None:
        """The task of a job that ends before its time has failed, if it has not ended. Raises Retry."""
        task = await self._transcripts.get(id)
        if task is not None and task.state in ("running", "waiting"):
            task.state, task.error, task.finished = "failed", error, now
            await self._transcripts.save(task)

    async def calling(self, id: str, call: Coroutine[Any, Any, T]) -> T:
        """The result of a tool call. Raises Refused when it was broken off."""
        made = self._calls[id] = asyncio.create_task(call)
        try:
            result: T = await made
            return result
        except asyncio.CancelledError:
            if id not in self.ending or not made.cancelled():
                made.cancel()
                raise
            raise Refused("broken off: its effect is unknown", "look at the device before you ask again") from None
        finally:
            del self._calls[id]

    def tell(self, db: Connection, task: Task, step: Step) -> None:
        """A call and its outcome, into the audit in the transaction that keeps them."""
        if step.role != "tool":
            return
        call = render(step.call)[:500] if step.call else ""
        told: dict[str, Any] = {"task": task.id, "call": call, "ok": step.ok}
        told |= {"at": step.at} if step.at else {}
        told |= {} if step.ok else {"error": step.text[:300]}
        self._audit.put(db, "call" if step.call else "refuse:call", task.subject.name, **told)

    async def stepped(self, task: Task, step: Step) -> None:
        """After each step is on disk. Raises Ended when the task is to stop here."""
        if step.role not in ("model", "check", "tool"):
            return
        if why := self.ending.get(task.id):
            raise Ended("failed", error=f"{why}: stopped after a step")
        now = time.monotonic()
        if step.role == "tool" and not task.id.startswith("local-") and now - self._told.get(task.id, 0) >= PROGRESS_S:
            self._told[task.id] = now
            with contextlib.suppress(OutriderError):
                await self._inbox.progress(task.id, progress(task, step))

    def over(self, id: str) -> str:
        """Forget a job that has ended: why it was to be ended, or an empty text."""
        self._told.pop(id, None)
        return self.ending.pop(id, "")


def progress(task: Task, step: Step) -> Progress:
    """Steps done, and of how many when it is a workflow."""
    made = [each for each in task.steps if each.role == "tool"]
    said = render(step.call) if step.call else step.text
    if not task.steps or task.steps[0].role != "plan":
        return Progress(len(made), 0, said[:200])
    done = {each.at.partition("[")[0] for each in made}
    return Progress(len(done), _steps(task.steps[0].text), f"{step.at}: {said}"[:200])


@lru_cache(4)
def _steps(text: str) -> int:
    return len(read(text)[0].steps)
