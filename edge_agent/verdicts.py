"""What people decide about tasks: approve or deny a call, take effects back, end one before its time.

Invariants: each word is in the audit before it has an effect; of two answers to one call the first counts.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import msgspec

from edge_agent.agent import policy
from edge_agent.agent.act import undoable
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import render
from edge_agent.agent.transcript import Task
from edge_agent.errors import Refused
from edge_agent.intake import Parts
from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import TERMINAL, Job, JobKind

APPROVE, UNDO, CANCEL = "approve_call", "undo_task", "cancel_task"


class Verdicts:
    """`approved` are the tasks that may go on; `answering` is held while one is taken up or answered."""

    def __init__(self, parts: Parts, approvals: Approvals | None) -> None:
        self._inbox, self._agent, self._transcripts, self._tools, self._audit, self._allowed, self._clock = parts
        self._approvals = approvals
        self.answering, self.approved = asyncio.Lock(), set[str]()

    async def approve(self, args: dict[str, Any], subject: Subject) -> tuple[Task, bool]:
        """Approve or deny the call a task waits with: `{id, call: DIGEST, approve: bool}`; the task, and whether.

        Raises Forbidden, Refused.
        """
        id, told, given = args.get("id"), args.get("call"), args.get("approve", True)
        if not isinstance(id, str) or not isinstance(told, str) or not isinstance(given, bool):
            raise Refused("an approval names a task and its call", '{"id": "local-…", "call": "<digest>"}')
        async with self.answering:
            if self._approvals is None or (task := await self._transcripts.get(id)) is None:
                raise Refused(f"there is no task {id}", "GET /v1/tasks shows which wait")
            step = self._approvals.give(task, told, given, subject, self._clock())
            await self._audit.append("approve" if given else "deny", subject.name, task=id, call=told)
            try:
                await self._transcripts.append(task, step)
            finally:  # who asked may have left: the answer is written all the same
                self.approved.add(id)
        return task, given

    async def undo(self, args: dict[str, Any], subject: Subject) -> dict[str, Any]:
        """Take an ended task's effects back, the last first, until one cannot be: `{id, step, look}`.

        With `step` of that alone; with `look` nothing is done. Raises Forbidden, Refused, Retry.
        """
        if not isinstance(id := args.get("id"), str) or (task := await self._transcripts.get(id)) is None:
            raise Refused(f"there is no task {args.get('id')}", "GET /v1/tasks shows them")
        if task.state not in ("succeeded", "failed"):
            raise Refused(f"{id} is {task.state}", "what has ended can be undone")
        specs = {spec.name: spec for spec in await self._tools.specs()}
        left = undoable(task, list(specs.values()))
        chosen = [n for n in left if args.get("step") in (None, n)]
        if not chosen:
            raise Refused(f"nothing of that in {id} can be taken back", f"steps that can: {left or 'none'}")
        done = [{"step": n, "call": render(call)} for n in chosen if (call := task.steps[n].call)]
        for undo in [spec.undo for n in chosen if (made := task.steps[n].call) and (spec := specs[made.name]).undo]:
            policy.check(specs[undo.tool], subject, self._allowed)
            if specs[undo.tool].risk == "danger":
                raise Refused(f"{undo.tool} is dangerous", "ask for it in a task: its call waits there for an approval")
        if not args.get("look"):
            await self._audit.append("undo", subject.name, task=id, steps=chosen)
            task = msgspec.structs.replace(task, subject=subject)  # by whom, and by whose grants, from here on
            for n, shown in zip(chosen, done, strict=True):
                step = await self._agent.undo(task, n)
                shown |= {"by": render(step.call) if step.call else "", "ok": step.ok, "result": step.text}
                if not step.ok:
                    break
        return {"id": id, "undone": done}

    async def cancel(self, args: dict[str, Any], subject: Subject) -> dict[str, Any]:
        """End a task or run that waits or runs, as the hub's cancelling of its job does: `{id}`; its state then.

        Raises Forbidden, Refused, Retry.
        """
        policy.must(subject, "run:task", self._allowed)
        if not isinstance(id := args.get("id"), str) or (state := await self._inbox.state(id)) is None:
            raise Refused(f"there is no task {args.get('id')!r:.60}", "GET /v1/tasks shows them")
        if state in TERMINAL:
            raise Refused(f"{id} has {state} already", "outrider task undo takes back what it did")
        await self._audit.append("cancel", subject.name, task=id)
        word = Job(
            f"cancel-{uuid.uuid4().hex[:16]}", JobKind.CANCEL, {"job": id}, subject.name, subject.roles, 0.0, 0.0
        )
        await self._inbox.accept(word)
        return {"id": id, "state": await self._inbox.state(id)}
