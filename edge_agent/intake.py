"""How work comes in at this device itself: tasks of the local API, what is scheduled, workflows that a trigger starts.

Invariants: what is taken in is in the inbox, the audit and (a task) the transcripts by one transaction, or in none of
them. Of one workflow no trigger starts a run while one that a trigger started waits or runs, over restarts too.
Work is of who asked as of the time of their token: what is revoked later ends it.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from edge_agent.agent import policy
from edge_agent.agent.act import Tools
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.schedule import Entry, Scheduled
from edge_agent.agent.transcript import Task, Transcripts
from edge_agent.agent.workflow_triggers import Library, Triggers
from edge_agent.audit import Audit
from edge_agent.errors import Refused, Retry
from edge_agent.store import Connection
from edge_agent.sync.inbox import Inbox
from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import Job, JobKind, JobState

LOCAL_TTL_S = 86400.0
RUN_WORKFLOW = "run_workflow"


class Parts(NamedTuple):
    """What work is done with."""

    inbox: Inbox
    agent: AgentLoop
    transcripts: Transcripts
    tools: Tools
    audit: Audit
    allowed: policy.Allowed
    clock: Callable[[], float]


class Intake:
    """`library` has the installed workflows, `triggers` and `schedule` are to be run."""

    def __init__(self, parts: Parts) -> None:
        self._inbox, self._agent, self._transcripts, tools, self._audit, self._allowed, self._clock = parts
        folder = self._transcripts.folder
        self.library = Library(folder / "workflows")
        self.triggers = Triggers(
            self.library, tools, self._allowed, self._trigger, self._clock, folder / "triggers.json"
        )
        self.schedule = Scheduled(folder / "tools" / "schedule.db", self.scheduled, self._clock)
        self._trying = asyncio.Lock()

    async def submit(self, text: str, subject: Subject, conversation: str = "") -> str:
        """Accept a local task; on disk when its id is returned. Raises Refused (bad text), Retry (too many wait)."""
        return await self._task(_local(), text, subject, 0, conversation)

    async def _task(self, id: str, text: str, by: Subject, priority: int, conversation: str) -> str:
        task = self._agent.task(id, text, by, priority, conversation)
        body = {"text": task.text, "conversation": conversation}
        job = Job(id, JobKind.TASK, body, by.name, by.roles, by.issued_at, self._inbox.now() + LOCAL_TTL_S)
        return await self._queue(job, self._audit.entry("submit", by.name, task=id, text=task.text), task)

    async def scheduled(self, id: str, entry: Entry) -> None:
        """Queue what is due, once for an id. Raises Forbidden, Refused, Retry."""
        who = entry.subject
        if await self._inbox.state(id) is not None:
            return
        if entry.workflow:
            await self._run(id, who, {"name": entry.workflow, "inputs": entry.inputs})
        else:
            await self._task(id, entry.text, who, 1, "")  # nobody waits for it

    async def workflow(self, args: dict[str, Any], subject: Subject) -> str:
        """The id of the run that is queued. Raises Forbidden, Refused, Retry."""
        return await self._run(_local(), subject, args)

    async def _run(self, id: str, subject: Subject, args: dict[str, Any]) -> str:
        self.installed(args, subject)
        body, until = {"tool": RUN_WORKFLOW, "args": args}, self._inbox.now() + LOCAL_TTL_S
        job = Job(id, JobKind.TOOL, body, subject.name, subject.roles, subject.issued_at, until)
        return await self._queue(job, self._audit.entry("workflow", subject.name, id=id, workflow=args["name"]))

    async def _queue(self, job: Job, entry: Callable[[Connection], None], task: Task | None = None) -> str:
        def work(db: Connection) -> str:
            if self._inbox.put(db, job, own=True) not in (JobState.DELIVERED, None):
                raise Retry("too many tasks wait on this device", "try again when some are done")
            entry(db)
            if task is not None:
                self._transcripts.put(db, task)
            return job.id

        return await self._transcripts.store.write(work)

    async def _trigger(self, name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        async with self._trying:  # of two causes at once
            under_way = [job.subject for job in await self._inbox.under_way()]
            if subject.name not in under_way and await self._inbox.state(id) is None:
                await self._run(id, subject, {"name": name, "inputs": inputs, "event": event})

    def installed(self, args: Any, subject: Subject) -> str:
        """The text of the workflow to run. Raises Forbidden, Refused."""
        name, inputs = (args.get("name"), args.get("inputs", {})) if isinstance(args, dict) else (None, {})
        known = self.library.all()
        if not isinstance(name, str) or name not in known or not isinstance(inputs, dict):
            here = ", ".join(known) or "none"
            raise Refused(f"there is no workflow {name!r:.60} to run with a dict of inputs", f"installed: {here}")
        policy.must(subject, "run:task", self._allowed)
        return known[name].text


def _local() -> str:
    return f"local-{uuid.uuid4().hex[:16]}"
