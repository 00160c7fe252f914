"""Runs a workflow, step by step, from wherever its journal stands.

Invariants: the definition and the inputs are the first entry of a run, so a file that changes meanwhile changes no run;
calls are made as act.py says, with the run, the step and the item as their key, so after a crash what is over stays
over. Steps begin in an order that the definition alone decides. Those that only read run beside each other, acts alone;
`parallel` lets acts run beside others too, but never a dangerous call, so that an ask is the last entry of a run that
waits. After a failure nothing begins, and what is under way comes to its end. A step whose `when` is false is skipped,
which does not hold up what depends on it.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextvars import ContextVar
from typing import Any

import msgspec

from edge_agent.agent import policy
from edge_agent.agent.act import Acts, Ended, Tools
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.loop import MAX_RUNS
from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.agent.transcript import Step as Entry
from edge_agent.agent.transcript import Task, Transcripts
from edge_agent.agent.workflow import Broken, Step, Workflow, evaluate, fill, read
from edge_agent.agent.workflow_check import check
from edge_agent.errors import OutriderError, Refused
from edge_agent.store import Connection
from edge_agent.wire.grants import Subject

MAX_ITEMS = 1000
READS = 4
AT = ContextVar("at", default="")
"""The step (and item) that the code runs for."""


class Runner:
    """Executes runs; `sleep` waits between attempts."""

    def __init__(
        self,
        tools: Tools,
        transcripts: Transcripts,
        allowed: policy.Allowed,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        approvals: Approvals | None = None,
    ) -> None:
        self._tools, self._transcripts, self._allowed = tools, transcripts, allowed
        self._clock, self.sleep = clock, sleep
        self.acts = Acts(tools, transcripts, allowed, clock, approvals)

    async def accept(self, id: str, text: str, inputs: dict[str, Any], subject: Subject, event: Any = None) -> Task:
        """Save a new run of a definition; the one there is, if it has that id. Raises Refused when it cannot run."""
        if (task := await self._transcripts.get(id)) and task.steps:
            return task
        try:
            flow, marks = read(text)
            found = check(flow, marks, await self._tools.specs(), self._allowed, subject)
        except Broken as broken:
            found = broken.problems
        if found:
            raise Refused(f"line {found[0].line}: {found[0].message}", found[0].hint or "outrider workflow check FILE")
        try:
            inputs = validate(Call(flow.workflow, inputs), [flow.signature()]).args
        except CallError as error:
            raise Refused(str(error), "the inputs stand at the head of the workflow") from error
        inputs = {param.name: param.default for param in flow.inputs if not param.required} | inputs
        task = await self._transcripts.add(Task(id, f"workflow {flow.workflow}", subject, self._clock()))
        if not task.steps:
            begun = Entry("plan", text, result={"inputs": inputs, "event": event}, ts=self._clock())
            await self._transcripts.append(task, begun)
        return task

    async def run(self, id: str) -> Task:
        """Run an accepted run until it is over or waits. Raises Refused for an unknown id."""
        task = await self._transcripts.begin(id, _planned)
        if task is None:
            raise Refused(f"there is no run {id}", "accept it first")
        if task.state == "running":
            run = _Run(self, task)
            try:
                if task.runs > MAX_RUNS:
                    raise Ended("failed", error=f"given up: it was cut off {MAX_RUNS} times")
                async with asyncio.timeout(run.flow.timeout_s):
                    await run.run(await self._tools.specs())
                task.state, task.error = "succeeded", ""
            except Ended as end:
                task.state, task.error = end.state, end.error
            except TimeoutError:
                task.state, task.error = "failed", f"out of time: {run.flow.timeout_s:g} s"
            except OutriderError as error:
                task.state, task.error = "failed", str(error)
            task.finished, task.answer = self._clock(), run.account()
            await self._transcripts.save(task)
        return task

    async def append(self, task: Task, entry: Entry) -> None:
        await self._transcripts.append(task, msgspec.structs.replace(entry, ts=self._clock()))


class _Run:
    """One run under way: what each step gave, by its id."""

    def __init__(self, runner: Runner, task: Task) -> None:
        self._runner, self._task = runner, task
        self.flow, _ = read(task.steps[0].text)
        begun = task.steps[0].result
        self._context: dict[str, Any] = {"inputs": begun["inputs"], "event": begun["event"], "item": None, "steps": {}}

    async def run(self, specs: Sequence[ToolSpec]) -> None:
        """Raises Ended when it fails."""
        self._specs = {spec.name: spec for spec in specs}
        self._steps, self._slots = {step.id: step for step in self.flow.steps}, asyncio.Semaphore(slots(self.flow))
        self._turns = defaultdict[str, asyncio.Lock](asyncio.Lock)
        left, running, problems = self.flow.order(), dict[asyncio.Task[None], Step](), list[BaseException]()
        over = set[str]()
        try:
            while running or (left and not problems):
                now = [] if problems else begins(self.flow, self._specs, left, list(running.values()), over)
                for step in now:
                    left.remove(step)
                    running[asyncio.create_task(self._whole(step), name=step.id)] = step
                ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                problems += [problem for each in ended if (problem := each.exception())]
                over |= {running.pop(each).id for each in ended}
        finally:
            for each in running:
                each.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if problems:
            raise problems[0]
        self._task.result = {id: each["result"] for id, each in self._done() if each["result"]}
        if self.flow.result:
            try:
                self._task.result = evaluate(self.flow.result, self._context)
            except ValueError as error:
                raise Ended("failed", error=f"result: {error}") from error

    def account(self) -> str:
        return ", ".join(f"{id} {done['state']}" for id, done in self._done())

    def _done(self) -> list[tuple[str, dict[str, Any]]]:
        done = self._context["steps"]
        return [(step.id, done[step.id]) for step in self.flow.steps if step.id in done]

    async def _whole(self, step: Step) -> None:
        """A step with what its error leads to. Raises Ended."""
        handler = self._steps.get(step.on_error)
        if await self._step(step):
            return
        async with self._turns[step.on_error]:  # of two errors at once: the second finds what the first led to
            handled = handler is not None and await self._step(handler)
        if not handled:
            raise Ended("failed", error=f"step {step.id}: {self._context['steps'][step.id]['error']}")

    async def _step(self, step: Step) -> bool:
        """Whether the run goes on."""
        state, result, error = "succeeded", None, ""
        try:
            if step.when and not self._true(step):
                state = "skipped"
                if not any(entry.at == step.id for entry in self._task.steps):
                    await self._runner.append(self._task, Entry("tool", f"skipped: {step.when}", at=step.id))
            elif step.for_each:
                items = evaluate(step.for_each, self._context)
                if not isinstance(items, list) or len(items) > MAX_ITEMS:
                    raise ValueError(f"{step.for_each} gives no list of at most {MAX_ITEMS}")
                result = await self._each(step, items)
            else:
                async with self._slots:
                    result = await self._call(step, step.id, None)
        except (ValueError, CallError, ToolError, Refused) as problem:
            state, error = "failed", str(problem)
        self._context["steps"][step.id] = {"state": state, "result": result, "error": error}
        return state != "failed" or step.on_error == "continue"

    async def _each(self, step: Step, items: Sequence[Any]) -> list[Any]:
        """The results; nothing begins after a failure. Raises what the first of the failed items does."""
        problems, turn = (
            dict[int, BaseException](),
            asyncio.Lock() if alone(self.flow, self._specs, step) else self._slots,
        )

        async def call(n: int, item: Any) -> Any:
            async with turn:
                try:
                    return None if problems else await self._call(step, f"{step.id}[{n}]", item)
                except (ValueError, CallError, ToolError, OutriderError, Ended) as problem:
                    problems[n] = problem

        async with asyncio.TaskGroup() as group:
            calls = [group.create_task(call(n, item)) for n, item in enumerate(items)]
        if problems:
            raise next((each for each in problems.values() if isinstance(each, Ended)), problems[min(problems)])
        return [each.result() for each in calls]

    def _true(self, step: Step) -> bool:
        value = evaluate(step.when, self._context)
        if not isinstance(value, bool):
            raise ValueError(f"{step.when} is neither true nor false")
        return value

    async def _call(self, step: Step, at: str, item: Any) -> Any:
        """The result, from the journal or made now, in as many attempts as are left.

        Raises ToolError when all failed, ValueError, CallError, Refused, Ended when an effect is unknown.
        """
        entries = [entry for entry in self._task.steps if entry.at == at]
        results = [entry for entry in entries if entry.role == "tool"]
        if results and results[-1].ok:
            return results[-1].result
        spec = self._specs.get(step.tool)
        AT.set(at)
        if spec is None:
            raise ValueError(f"the tool {step.tool} is gone")
        call = entries[0].call if entries else None  # what was meant stays what it was
        call = call or validate(Call(step.tool, fill(step.args, {**self._context, "item": item})), [spec])
        begun, error = bool(entries) and entries[-1].role == "intent", results[-1].text if results else ""
        if results and results[-1].result is not None and not spec.repeatable:
            raise ToolError(error)  # it was made, though not as it should be: it is not made again
        if results and entries[-1] is results[-1] and len(entries) > 1 and entries[-2].role in ("ask", "approval"):
            raise Refused(error)  # denied, or nobody answered: it is not asked for again
        for attempt in range(len(results), 1 + (step.retry.times if step.retry else 0)):
            if attempt and step.retry and not begun:
                await self._runner.sleep(step.retry.delay_s)
            made = await self._runner.acts.act(self._task, spec, call, step.timeout_s or spec.timeout_s, at)
            if made.ok:
                return made.result
            begun, error = False, made.text
            if made.result is not None and not spec.repeatable:
                break
        raise ToolError(error)


def _planned(_: Connection, task: Task) -> None:
    if not task.steps or task.steps[0].role != "plan":
        raise Refused(f"{task.id} is no run of a workflow", "run it as a task")


def begins(
    flow: Workflow, specs: Mapping[str, ToolSpec], left: Sequence[Step], running: Sequence[Step], over: AbstractSet[str]
) -> list[Step]:
    """The steps that begin now: in order, up to the first that has to run alone."""
    begin = list[Step]()
    for step in left:
        if not over >= set(step.depends_on) or any(alone(flow, specs, each) for each in running):
            continue
        if alone(flow, specs, step):
            return begin or ([] if running else [step])
        begin.append(step)
    return begin


def alone(flow: Workflow, specs: Mapping[str, ToolSpec], step: Step) -> bool:
    """Whether nothing else may be under way; so it is if this holds of the step that handles its error."""
    risk = specs[step.tool].risk if step.tool in specs else "read"  # it is gone: the step fails without a call
    handler = next((each for each in flow.steps if each.id == step.on_error), None)
    mixes = risk == "read" or (risk == "act" and flow.parallel)
    return not mixes or (handler is not None and alone(flow, specs, handler))


def slots(flow: Workflow) -> int:
    """How many calls run at once."""
    return flow.parallel or READS
