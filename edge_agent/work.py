"""Jobs from the hub and work of this device's own: one queue, one at a time, each to a reported end.

Invariants: work is journaled in the inbox before it is run, a local task too, and its end is reported until the store
takes it, so kill -9 at any moment loses nothing: after a restart a task goes on from its transcript, an idempotent tool
call is made again, any other is reported failed with its effect unknown, and a run of a workflow goes on from its
journal. What a job may do is decided here, on the device, by the cached grants.

A workflow is run as the tool `run_workflow(name, inputs)`: by a job, at the local API, or by its own triggers. What
waits for an approval holds up nothing else: its job stays running and goes on when the tool `approve_call(id, call,
approve)` was called for it, by a job or at the local API, or when it waited too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from edge_agent.agent import policy, shown
from edge_agent.agent.act import Tools, perform, within_rate
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Call, CallError, render, validate
from edge_agent.agent.loop import AgentLoop
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.agent.transcript import Task, Transcripts
from edge_agent.agent.workflow_run import Runner
from edge_agent.audit import Audit
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.intake import RUN_WORKFLOW, Intake, Parts
from edge_agent.rhythm import tick
from edge_agent.sync.inbox import Inbox
from edge_agent.trouble import Trouble
from edge_agent.verdicts import APPROVE, CANCEL, UNDO, Verdicts
from edge_agent.watch import Watch
from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import Job, JobKind, JobState

SUPPORT = "support_bundle"
LOOK_S = 0.2
MAX_ERROR = 2000  # characters
MAX_CALL = 48 << 10  # bytes of a call that does more than read: the record that audits it has 64 KiB
_log = logging.getLogger("outrider.work")
_storing = Trouble(_log, "jobs wait for the store, which is tried again and again")


class Work:
    """Runs what is to be done."""

    def __init__(
        self,
        inbox: Inbox,
        agent: AgentLoop,
        transcripts: Transcripts,
        tools: Tools,
        audit: Audit,
        allowed: policy.Allowed,
        clock: Callable[[], float] = time.time,
        approvals: Approvals | None = None,
    ) -> None:
        self._inbox, self._agent, self._transcripts, self._tools = inbox, agent, transcripts, tools
        self._audit, self._allowed, self._clock = audit, allowed, clock
        self._runner = Runner(tools, transcripts, allowed, clock=clock, approvals=approvals)
        parts = Parts(inbox, agent, transcripts, tools, audit, allowed, clock)
        self._intake = Intake(parts)
        self.library, self.triggers, self.submit = self._intake.library, self._intake.triggers, self._intake.submit
        self._one, self._asked = asyncio.Lock(), asyncio.Event()
        self._waiting: dict[str, tuple[Job, float]] = {}  # by id: what waits for an approval, and until when
        self.on_end: Callable[[Task], None] | None = None
        self.asks: dict[str, dict[str, Any]] = {}  # by task: what the hub shows of a call that waits
        self._watch = Watch(inbox, transcripts, audit)
        self._verdicts = Verdicts(parts, approvals)
        inbox.on_cancel, inbox.unbegun = self._watch.cancel, transcripts.unbegun
        transcripts.beside, transcripts.on_step = self._watch.tell, self._watch.stepped
        self.support: Callable[[], Awaitable[Any]] | None = None  # makes a file for who helps, and uploads it
        self.current = ""

    async def run(self) -> None:
        """Finish what the last process left, then take what comes until cancelled, and watch for triggers."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._queue(), name="jobs")
                group.create_task(self.triggers.run(), name="triggers")
                group.create_task(self._resume(), name="approved")
                group.create_task(self._intake.schedule.run(), name="schedule")
        finally:
            await self._transcripts.settled()  # before the store is closed

    async def _queue(self) -> None:
        for job in await _until_stored(self._inbox.interrupted):
            await self._job(job, again=True)
        while True:
            await self._job(await _until_stored(self._inbox.next), again=False)

    async def _resume(self) -> None:
        while True:
            if not self._waiting:
                self._asked.clear()
                await self._asked.wait()
            await tick(LOOK_S)
            for job, until in list(self._waiting.values()):
                if until <= self._clock() or job.id in self._verdicts.approved or job.id in self._watch.ending:
                    async with self._verdicts.answering:
                        del self._waiting[job.id]
                        self._verdicts.approved.discard(job.id)
                    await self._job(job, again=True)

    async def task(self, id: str) -> Task | None:
        """A task with its transcript."""
        if (task := await self._transcripts.get(id)) is not None:
            task.sources = shown.cited(task.steps)
        return task

    @property
    def counts(self) -> Mapping[str, int]:
        """What the agent did since the daemon started, for the metrics."""
        return self._agent.counts

    async def tasks(self) -> list[Task]:
        """The newest tasks, with no steps."""
        return await self._transcripts.latest()

    async def tools(self, subject: Subject) -> list[ToolSpec]:
        """Those that the subject may use. Raises Retry."""
        return policy.usable(await self._tools.specs(), subject, self._allowed)

    async def call(self, name: str, args: dict[str, Any], subject: Subject, key: str = "") -> Any:
        """Call a tool for a subject, or the device itself. Raises Forbidden, Refused, Retry; a ToolError is Refused."""
        if name == APPROVE:
            task, given = await self._verdicts.approve(args, subject)
            return await self._approval("given" if given else "denied", task, args["call"], by=subject.name)
        if name == UNDO:
            async with contextlib.nullcontext() if key else self._one:  # a job, which brings a key, has its turn
                return await self._verdicts.undo(args, subject)
        if name == CANCEL:
            return await self._verdicts.cancel(args, subject)
        if name == SUPPORT and self.support:
            policy.must(subject, "upload:blob", self._allowed)
            return await self.support()
        if name == RUN_WORKFLOW:
            return {"id": await self._intake.workflow(args, subject)}
        spec, call = await self._checked(name, args, subject)
        if spec.risk != "read":
            told = render(call)
            if (size := len(msgspec.json.encode(told))) > MAX_CALL:
                raise Refused(f"the call of {name} has {size} bytes", f"at most {MAX_CALL}, so that it can be audited")
            await self._audit.append("call", subject.name, call=told)
        await within_rate(self._transcripts, spec, self._clock())
        try:
            return await perform(self._tools, spec, call, key or uuid.uuid4().hex, subject, spec.timeout_s)
        except ToolError as error:
            raise Refused(f"{name}: {error}", "the tool itself refused") from error

    async def _checked(self, name: str, args: Any, subject: Subject) -> tuple[ToolSpec, Call]:
        if not isinstance(args, dict):
            raise Refused(f"args is a {type(args).__name__}", 'args has each argument by its name: {"line": 2}')
        specs = await self._tools.specs()
        try:
            call = validate(Call(name, args), specs)
        except CallError as error:
            raise Refused(str(error), "see GET /v1/status for the tools") from error
        spec = next(spec for spec in specs if spec.name == name)
        policy.check(spec, subject, self._allowed)
        if spec.risk == "danger":
            hint = "ask for it in a task or a workflow: its call waits there until it is approved"
            raise Refused(f"{name} is dangerous and needs an approval", hint)
        return spec, call

    async def _job(self, job: Job, again: bool) -> None:
        async with self._one:
            await self._run(job, again)

    async def _run(self, job: Job, again: bool) -> None:
        self.current = job.id
        self.asks.pop(job.id, None)
        broke = True
        try:
            await self._watch.begin(job, again, self._clock())
            state, result, error = await self._do(job, again)
            broke = False
        except OutriderError as problem:
            state, result, error = JobState.FAILED, {}, str(problem)
        except Exception as problem:  # noqa: BLE001 - no job may stop the daemon, and again after each restart
            _log.exception("job %s failed in the agent", job.id)
            state, result, error = JobState.FAILED, {}, f"{type(problem).__name__} in the agent: {problem}"
        finally:
            self.current = ""
        if job.id in self._watch.ending and state is not JobState.SUCCEEDED:
            state, why = JobState.CANCELLED, self._watch.ending[job.id]
            error = error if error.startswith(why) else f"{why}: {error}"
            self.asks.pop(job.id, None)
            broke = True
        if broke:  # its transcript ends as it does, with all that came
            await _until_stored(lambda: self._watch.settle(job.id, error[:MAX_ERROR], self._clock()))
        if state is JobState.RUNNING:
            self._waiting[job.id] = job, result["until"]
            self._asked.set()
            return
        error = error[:MAX_ERROR]
        _log.info("job %s: %s %s", job.id, state, error)
        told = {"job": job.id, "kind": job.kind, "state": state} | ({"error": error[:300]} if error else {})
        entry = self._audit.entry("end", job.subject, **told)
        await _until_stored(lambda: self._inbox.report(job.id, state, result, error, entry))
        self._watch.over(job.id)
        kind, name, args = "task", "", job.body.get("args")
        args = args if isinstance(args, dict) else {}
        if job.body.get("tool") == RUN_WORKFLOW:
            kind, name = "workflow", str(args.get("name"))
        if kind == "workflow" or job.kind is JobKind.TASK:
            depth = event.get("depth") if isinstance(event := args.get("event"), dict) else 0
            depth = depth if isinstance(depth, int) else 0
            await self.triggers.event(f"{kind}.{state}", name, {"id": job.id, "error": error, "depth": depth + 1})

    async def _do(self, job: Job, again: bool) -> tuple[JobState, dict[str, Any], str]:
        subject = Subject(job.subject, job.roles, job.created)
        match job.kind:
            case JobKind.TASK:
                policy.must(subject, "run:task", self._allowed)
                text, named = str(job.body.get("text", "")), str(job.body.get("conversation", ""))[:64]
                task = self._agent.task(job.id, text, subject, conversation=named)
                return await self._ended(await self._agent.run(job.id, task))
            case JobKind.TOOL:
                name, args = str(job.body.get("tool", "")), job.body.get("args")
                args = {} if args is None else args
                if name == RUN_WORKFLOW:
                    return await self._workflow(job.id, args, subject, again)
                known = name in (APPROVE, UNDO, CANCEL)
                if again and not known and not (await self._checked(name, args, subject))[0].repeatable:
                    raise Refused(f"interrupted: effect unknown of {name}", "look at the device before you ask again")
                made = await self._watch.calling(job.id, self.call(name, args, subject, job.id))
                return JobState.SUCCEEDED, {"result": shown.bounded(made)}, ""
            case _:
                raise Refused("this agent does not know that kind of job", "update the agent")

    async def _workflow(
        self, id: str, args: Any, subject: Subject, again: bool
    ) -> tuple[JobState, dict[str, Any], str]:
        before = await self._transcripts.get(id) if again else None
        if before is None or not before.steps:
            text = self._intake.installed(args, subject)
            await self._runner.accept(id, text, args.get("inputs", {}), subject, args.get("event"))
        return await self._ended(await self._runner.run(id))

    async def _ended(self, task: Task) -> tuple[JobState, dict[str, Any], str]:
        if task.withheld:
            await self._audit.append("withheld", task.subject.name, task=task.id, rules=task.withheld)
        if task.state != "waiting":
            task.sources = shown.cited(task.steps)
            if self.on_end is not None:
                self.on_end(task)
            return JobState(task.state), shown.summary(task), task.error
        ask = task.steps[-1]
        _log.warning("%s %s until %.0f: outrider task approve %s", task.id, task.error, ask.expires, task.id)
        await self._audit.append("ask", task.subject.name, task=task.id, call=task.error, digest=ask.text)
        self.asks[task.id] = shown.ask(task, ask)
        await self._approval("asked", task, ask.text)
        return JobState.RUNNING, {"until": ask.expires}, ""

    async def _approval(self, what: str, task: Task, digest: str, **more: str) -> None:
        about = {"id": f"{task.id}-{digest[:12]}", "task": task.id, "text": task.text, "depth": 1, **more}
        await self.triggers.event(f"approval.{what}", "", about)


async def _until_stored(work: Callable[[], Any]) -> Any:
    """Do it again until the store takes it: a full disk delays an end, it never loses one."""
    pause = 0.5
    while True:
        try:
            done = await work()
            _storing.over()
            return done
        except Refused as error:
            _log.error("the end of a piece of work is not reported: %s", error)
            return None
        except Retry as error:
            _storing.tell(error)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 30.0)
