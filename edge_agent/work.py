"""Jobs from the hub and tasks from the local API: one queue, one at a time, each to a reported end.

Invariants: work is journaled in the inbox before it is run, a local task too, and its end is reported until the store
takes it, so kill -9 at any moment loses nothing: after a restart a task goes on from its transcript, an idempotent tool
call is made again, any other is reported failed with its effect unknown, and a run of a workflow goes on from its
journal. What a job may do is decided here, on the device, by the cached grants.

A workflow is run as the tool `run_workflow(name, inputs)`: by a job, at the local API, or by its own triggers. Of one
workflow no trigger starts a run while one that a trigger started waits or runs. What waits for an approval holds up
nothing else: its job stays running and goes on when the tool `approve_call(id, call, approve)` was called for it, by
a job or at the local API, or when it waited too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import msgspec

from edge_agent.agent import policy, shown
from edge_agent.agent.act import Tools, perform, undoable, within_rate
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Call, CallError, render, validate
from edge_agent.agent.loop import AgentLoop, request
from edge_agent.agent.schedule import Entry, Scheduled
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.agent.transcript import Task, Transcripts
from edge_agent.agent.workflow_run import Runner
from edge_agent.agent.workflow_triggers import Library, Triggers
from edge_agent.api.access import Denied
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.rhythm import tick
from edge_agent.store import Connection
from edge_agent.trouble import Trouble
from edge_agent.watch import Watch
from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import TERMINAL, Job, JobKind, JobState, Progress

LOCAL_TTL_S = 86400.0
RUN_WORKFLOW, APPROVE, UNDO, SUPPORT = "run_workflow", "approve_call", "undo_task", "support_bundle"
LOOK_S = 0.2
MAX_RESULT = 8 * 1024
MAX_ERROR = 2000  # characters
_log = logging.getLogger("outrider.work")
_storing = Trouble(_log, "jobs wait for the store, which is tried again and again")


class Inbox(Protocol):
    """sync.inbox.Inbox."""

    on_cancel: Callable[[str, str], None]

    async def accept(self, job: Job) -> JobState | None: ...
    async def state(self, id: str) -> JobState | None: ...
    async def next(self) -> Job: ...
    async def interrupted(self) -> list[Job]: ...
    async def cancelled(self, id: str) -> bool: ...
    async def progress(self, id: str, progress: Progress) -> None: ...
    async def report(self, id: str, state: JobState, result: dict[str, Any] | None = None, error: str = "") -> None: ...


class Audit(Protocol):
    async def append(self, event: str, subject: str, **detail: Any) -> None: ...
    def put(self, db: Connection, event: str, subject: str, **detail: Any) -> None: ...


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
        self.library = Library(transcripts.folder / "workflows")
        self._runner = Runner(tools, transcripts, allowed, clock=clock, approvals=approvals)
        kept = transcripts.folder / "triggers.json"
        self.triggers = Triggers(self.library, tools, allowed, self._trigger, clock, kept)
        self._scheduled = Scheduled(transcripts.folder / "tools" / "schedule.db", self.scheduled, clock)
        self._triggered: dict[str, str] = {}  # the workflow of each run that a trigger started
        self._approvals, self._one, self._asked = approvals, asyncio.Lock(), asyncio.Event()
        self._answering = asyncio.Lock()
        self._waiting: dict[str, tuple[Job, float]] = {}  # by id: what waits for an approval, and until when
        self._approved: set[str] = set()
        self.on_end: Callable[[Task], None] | None = None
        self.asks: dict[str, dict[str, Any]] = {}  # by task: what the hub shows of a call that waits
        self._watch = Watch(inbox, transcripts, audit)
        inbox.on_cancel = self._watch.cancel
        transcripts.beside, transcripts.on_step = self._watch.tell, self._watch.stepped
        self.support: Callable[[], Awaitable[Any]] | None = None  # makes a file for who helps, and uploads it
        self.current = ""

    async def run(self) -> None:
        """Finish what the last process left, then take what comes until cancelled, and watch for triggers."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._queue(), name="jobs")
            group.create_task(self.triggers.run(), name="triggers")
            group.create_task(self._resume(), name="approved")
            group.create_task(self._scheduled.run(), name="schedule")

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
                if until <= self._clock() or job.id in self._approved or job.id in self._watch.ending:
                    async with self._answering:
                        del self._waiting[job.id]
                        self._approved.discard(job.id)
                    await self._job(job, again=True)

    async def approve(self, args: dict[str, Any], subject: Subject) -> None:
        """Approve or deny the call a task waits with: `{id, call: DIGEST, approve: bool}`. Raises Denied, Refused."""
        id, told, given = args.get("id"), args.get("call"), args.get("approve", True)
        if not isinstance(id, str) or not isinstance(told, str) or not isinstance(given, bool):
            raise Refused("an approval names a task and its call", '{"id": "local-…", "call": "<digest>"}')
        async with self._answering:  # one answer counts
            if self._approvals is None or (task := await self._transcripts.get(id)) is None:
                raise Refused(f"there is no task {id}", "GET /v1/tasks shows which wait")
            try:
                step = self._approvals.give(task, told, given, subject, self._clock())
            except policy.Forbidden as error:
                raise Denied(error.message, error.hint) from error
            await self._audit.append("approve" if given else "deny", subject.name, task=id, call=told)
            await self._transcripts.append(task, step)
            self._approved.add(id)
        await self._approval("given" if given else "denied", task, told, by=subject.name)

    async def undo(self, args: dict[str, Any], subject: Subject) -> dict[str, Any]:
        """Take an ended task's effects back, the last first, until one cannot be: `{id, step, look}`.

        With `step` of that alone; with `look` nothing is done. Raises Denied, Refused, Retry.
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
            self._may_call(specs[undo.tool], subject)
            if specs[undo.tool].risk == "danger":
                raise Refused(f"{undo.tool} is dangerous", "ask for it in a task: its call waits there for an approval")
        if not args.get("look"):
            await self._audit.append("undo", subject.name, task=id, steps=chosen)
            for n, shown in zip(chosen, done, strict=True):
                step = await self._agent.undo(task, n)
                shown |= {"by": render(step.call) if step.call else "", "ok": step.ok, "result": step.text}
                if not step.ok:
                    break
        return {"id": id, "undone": done}

    async def submit(self, text: str, subject: Subject, conversation: str = "") -> str:
        """Accept a local task; on disk when its id is returned. Raises Refused (bad text), Retry (too many wait)."""
        id = f"local-{uuid.uuid4().hex[:16]}"
        return await self._submit(id, text, subject, self._clock(), conversation=conversation)

    async def _submit(
        self, id: str, text: str, subject: Subject, created: float, priority: int = 0, conversation: str = ""
    ) -> str:
        text, until = request(text), self._clock() + LOCAL_TTL_S
        await self._audit.append("submit", subject.name, task=id, text=text[:2000])
        body = {"text": text, "conversation": conversation}
        job = Job(id, JobKind.TASK, body, subject.name, subject.roles, created, until)
        if await self._inbox.accept(job) is not JobState.DELIVERED:
            raise Retry("too many tasks wait on this device", "try again when some are done")
        await self._agent.accept(id, text, subject, priority, conversation)
        return id

    async def scheduled(self, id: str, entry: Entry) -> None:
        """Queue what is due, once for an id. Raises Denied, Refused, Retry."""
        who = entry.subject
        if await self._inbox.state(id) is not None:
            return
        if entry.workflow:
            await self._start(id, who, {"name": entry.workflow, "inputs": entry.inputs}, who.issued_at)
        else:
            await self._submit(id, entry.text, who, who.issued_at, priority=1)  # nobody waits for it

    async def task(self, id: str) -> Task | None:
        """A task with its transcript; one whose job ended without running is shown as failed."""
        task, state = await self._transcripts.get(id), await self._inbox.state(id)
        if task is not None and task.state == "running" and state in TERMINAL:
            task.state, task.error = "failed", f"the job was {state} before it ran"
        if task is not None:
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

    async def _start(self, id: str, subject: Subject, args: dict[str, Any], created: float) -> None:
        """Queue a run. Raises Denied, Refused, Retry."""
        self._installed(args, subject)
        body, now = {"tool": RUN_WORKFLOW, "args": args}, self._clock()
        await self._audit.append("workflow", subject.name, id=id, workflow=args["name"])
        job = Job(id, JobKind.TOOL, body, subject.name, subject.roles, created, now + LOCAL_TTL_S)
        if await self._inbox.accept(job) not in (JobState.DELIVERED, None):
            raise Retry("too many tasks wait on this device", "try again when some are done")

    async def _trigger(self, name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        for began in [each for each, of in self._triggered.items() if of == name]:
            if (state := await self._inbox.state(began)) is None or state in TERMINAL:
                self._triggered.pop(began, None)  # it was taken back, or ran out of time, while it waited
        if name in self._triggered.values() or await self._inbox.state(id) is not None:
            return
        await self._start(id, subject, {"name": name, "inputs": inputs, "event": event}, subject.issued_at)
        self._triggered[id] = name

    def _installed(self, args: Any, subject: Subject) -> str:
        """The text of the workflow to run. Raises Denied, Refused."""
        name, inputs = (args.get("name"), args.get("inputs", {})) if isinstance(args, dict) else (None, {})
        known = self.library.all()
        if not isinstance(name, str) or name not in known or not isinstance(inputs, dict):
            here = ", ".join(known) or "none"
            raise Refused(f"there is no workflow {name!r:.60} to run with a dict of inputs", f"installed: {here}")
        self._may_run(subject)
        return known[name].text

    def _may_run(self, subject: Subject) -> None:
        if not self._allowed(subject, "run:task", ""):
            raise Denied(f"{subject.name} may not run:task on this device", "its grants do not say so")

    def _may_call(self, spec: ToolSpec, subject: Subject) -> None:
        """Raises Denied."""
        try:
            policy.check(spec, subject, self._allowed)
        except policy.Forbidden as error:
            raise Denied(error.message, error.hint) from error

    async def call(self, name: str, args: dict[str, Any], subject: Subject, key: str = "") -> Any:
        """Call one tool for a subject, or start a workflow. Raises Denied, Refused, Retry; a ToolError is Refused."""
        if name == APPROVE:
            return await self.approve(args, subject)
        if name == UNDO:
            async with contextlib.nullcontext() if key else self._one:  # a job, which brings a key, has its turn
                return await self.undo(args, subject)
        if name == SUPPORT and self.support:
            if not self._allowed(subject, "upload:blob", ""):
                raise Denied(f"{subject.name} may not upload:blob on this device", "its grants do not say so")
            return await self.support()
        if name == RUN_WORKFLOW:
            id = f"local-{uuid.uuid4().hex[:16]}"
            await self._start(id, subject, args, self._clock())
            return {"id": id}
        spec, call = await self._checked(name, args, subject)
        if spec.risk != "read":
            await self._audit.append("call", subject.name, call=render(call))
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
        self._may_call(spec, subject)
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
        try:
            await self._watch.begin(job, again, self._clock())
            state, result, error = await self._do(job, again)
        except OutriderError as problem:
            state, result, error = JobState.FAILED, {}, str(problem)
        except Exception as problem:  # noqa: BLE001 - no job may stop the daemon, and again after each restart
            _log.exception("job %s failed in the agent", job.id)
            state, result, error = JobState.FAILED, {}, f"{type(problem).__name__} in the agent: {problem}"
        finally:
            self.current = ""
        if job.id in self._watch.ending and state is not JobState.SUCCEEDED:
            state, error = JobState.CANCELLED, f"{self._watch.ending[job.id]}: {error}"
            self.asks.pop(job.id, None)
            await _until_stored(lambda: self._watch.settle(job.id, error[:MAX_ERROR], self._clock()))
        if state is JobState.RUNNING:
            self._waiting[job.id] = job, result["until"]
            self._asked.set()
            return
        error = error[:MAX_ERROR]
        _log.info("job %s: %s %s", job.id, state, error)
        await _until_stored(lambda: self._inbox.report(job.id, state, result, error))
        told = {"job": job.id, "kind": job.kind, "state": state} | ({"error": error[:300]} if error else {})
        await _until_stored(lambda: self._audit.append("end", job.subject, **told))
        self._watch.over(job.id)
        self._triggered.pop(job.id, None)
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
                self._may_run(subject)
                conversation = str(job.body.get("conversation", ""))[:64]
                await self._agent.accept(job.id, str(job.body.get("text", "")), subject, conversation=conversation)
                return await self._ended(await self._agent.run(job.id))
            case JobKind.TOOL:
                name, args = str(job.body.get("tool", "")), job.body.get("args")
                args = {} if args is None else args
                if name == RUN_WORKFLOW:
                    return await self._workflow(job.id, args, subject, again)
                if (
                    again
                    and name not in (APPROVE, UNDO)
                    and not (await self._checked(name, args, subject))[0].repeatable
                ):
                    raise Refused(f"interrupted: effect unknown of {name}", "look at the device before you ask again")
                made = await self._watch.calling(job.id, self.call(name, args, subject, job.id))
                return JobState.SUCCEEDED, {"result": bounded(made)}, ""
            case _:
                raise Refused("this agent does not know that kind of job", "update the agent")

    async def _workflow(
        self, id: str, args: Any, subject: Subject, again: bool
    ) -> tuple[JobState, dict[str, Any], str]:
        before = await self._transcripts.get(id) if again else None
        if before is None or not before.steps:
            text = self._installed(args, subject)
            await self._runner.accept(id, text, args.get("inputs", {}), subject, args.get("event"))
        return await self._ended(await self._runner.run(id))

    async def _ended(self, task: Task) -> tuple[JobState, dict[str, Any], str]:
        if task.withheld:
            await self._audit.append("withheld", task.subject.name, task=task.id, rules=task.withheld)
        if task.state != "waiting":
            task.sources = shown.cited(task.steps)
            if self.on_end is not None:
                self.on_end(task)
            return JobState(task.state), summary(task), task.error
        ask = task.steps[-1]
        _log.warning("%s %s until %.0f: outrider task approve %s", task.id, task.error, ask.expires, task.id)
        await self._audit.append("ask", task.subject.name, task=task.id, call=task.error, digest=ask.text)
        self.asks[task.id] = shown.ask(task, ask)
        await self._approval("asked", task, ask.text)
        return JobState.RUNNING, {"until": ask.expires}, ""

    async def _approval(self, what: str, task: Task, digest: str, **more: str) -> None:
        about = {"id": f"{task.id}-{digest[:12]}", "task": task.id, "text": task.text, "depth": 1, **more}
        await self.triggers.event(f"approval.{what}", "", about)


def summary(task: Task) -> dict[str, Any]:
    """What the hub is told of a task: the answer, each call with its outcome, each decision with its times in ms, and
    the transcript, cut short."""
    calls = [
        {"call": render(step.call), "ok": step.ok, "result": step.text[:500], "ms": round(step.ms, 1)}
        for step in task.steps
        if step.role == "tool" and step.call is not None
    ]
    decisions = [
        {
            "text": step.text[:200],
            "ms": round(step.ms, 1),
            "first_token_ms": round(step.first_token_ms, 1),
            "prompt_tokens": step.prompt_tokens,
            "cached_tokens": step.cached_tokens,
            "tokens": step.tokens,
            "model": step.digest,
            "adapter": step.adapter,
        }
        for step in task.steps
        if step.role == "model"
    ]
    return {
        "answer": task.answer[:2000],
        "sources": task.sources,
        "result": bounded(task.result),
        "calls": calls[-20:],
        "decisions": decisions[-20:],
        "steps": shown.told_all(task.steps),
        "runs": task.runs,
        "seconds": round(task.finished - task.created, 3),
    }


def bounded(value: Any) -> Any:
    """The value, or its beginning as text when it is too large for a record."""
    encoded = msgspec.json.encode(value)
    return value if len(encoded) <= MAX_RESULT else encoded[:MAX_RESULT].decode(errors="ignore") + "…"


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
