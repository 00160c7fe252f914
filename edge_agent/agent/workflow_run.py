"""Runs a workflow, step by step, from wherever its journal stands.

Invariants: the definition and the inputs are the first entry of a run, so a file that changes meanwhile changes no run;
the intent of a call is on disk before its effect and its result before the next step, so after a crash what is over
stays over, and a call of unknown effect is made again only when its tool is idempotent or takes the call's key (the
run, the step, the item: the same in every attempt); policy is asked right before each call, for the subject of the run.
Steps run one at a time, in an order that the definition alone decides. A step whose `when` is false is skipped, which
does not hold up what depends on it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from edge_agent.agent import policy, prompt
from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.loop import MAX_RUNS, Ended, Tools, Transcripts
from edge_agent.agent.tool import Param, ToolError, ToolSpec
from edge_agent.agent.transcript import Step as Entry
from edge_agent.agent.transcript import Task
from edge_agent.agent.workflow import Broken, Step, Workflow, check, evaluate, fill, read
from edge_agent.errors import OutriderError, Refused
from edge_agent.wire.grants import Subject

MAX_ITEMS = 1000


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
    ) -> None:
        self._tools, self._transcripts, self._allowed = tools, transcripts, allowed
        self._clock, self._sleep = clock, sleep

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
        """Run an accepted run to its end. Raises Refused for an unknown id."""
        task = await self._transcripts.get(id)
        if task is None or not task.steps or task.steps[0].role != "plan":
            raise Refused(f"there is no run {id}", "accept it first")
        if task.state == "running":
            task.runs += 1
            await self._transcripts.save(task)
            try:
                if task.runs > MAX_RUNS:
                    raise Ended("failed", error=f"given up: it was cut off {MAX_RUNS} times")
                flow, _ = read(task.steps[0].text)
                async with asyncio.timeout(flow.timeout_s):
                    await _Run(self, task, flow, await self._tools.specs()).run()
            except Ended as end:
                task.state, task.answer, task.error = end.state, end.answer, end.error
            except TimeoutError:
                task.state, task.error = "failed", f"out of time: {flow.timeout_s:g} s"
            except OutriderError as error:
                task.state, task.error = "failed", str(error)
            task.finished = self._clock()
            await self._transcripts.save(task)
        return task

    async def append(self, task: Task, entry: Entry) -> None:
        await self._transcripts.append(task, msgspec.structs.replace(entry, ts=self._clock()))

    async def call(self, task: Task, spec: ToolSpec, call: Call, at: str, limit_s: float) -> Any:
        policy.check(spec, task.subject, self._allowed)
        return await self._tools.call(call.name, spec.keyed_args(call.args, f"{task.id}:{at}"), limit_s)

    async def pause(self, seconds: float) -> None:
        await self._sleep(seconds)


class _Run:
    """One run under way: what each step gave, by its id."""

    def __init__(self, runner: Runner, task: Task, flow: Workflow, specs: Sequence[ToolSpec]) -> None:
        self._runner, self._task, self._flow = runner, task, flow
        self._specs = {spec.name: spec for spec in specs}
        self._handling = {step.id: step for step in flow.steps if step.id in flow.handlers()}
        begun = task.steps[0].result
        self._context: dict[str, Any] = {"inputs": begun["inputs"], "event": begun["event"], "item": None, "steps": {}}

    async def run(self) -> None:
        """Raises Ended at the end."""
        for step in self._flow.order():
            await self._step(step)
            done = self._context["steps"][step.id]
            if done["state"] != "failed" or step.on_error == "continue":
                continue
            if handler := self._handling.get(step.on_error):
                await self._step(handler)
                handled = self._context["steps"][handler.id]
                if handled["state"] != "failed" or handler.on_error == "continue":
                    continue
            raise Ended("failed", answer=self._account(), error=f"step {step.id}: {done['error']}")
        self._task.result = {id: done["result"] for id, done in self._context["steps"].items() if done["result"]}
        if self._flow.result:
            try:
                self._task.result = evaluate(self._flow.result, self._context)
            except ValueError as error:
                raise Ended("failed", answer=self._account(), error=f"result: {error}") from error
        raise Ended("succeeded", answer=self._account())

    def _account(self) -> str:
        return ", ".join(f"{id} {done['state']}" for id, done in self._context["steps"].items())

    async def _step(self, step: Step) -> None:
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
                result = [await self._call(step, f"{step.id}[{n}]", item) for n, item in enumerate(items)]
            else:
                result = await self._call(step, step.id, None)
        except (ValueError, CallError, ToolError) as problem:
            state, error = "failed", str(problem)
        self._context["steps"][step.id] = {"state": state, "result": result, "error": error}

    def _true(self, step: Step) -> bool:
        value = evaluate(step.when, self._context)
        if not isinstance(value, bool):
            raise ValueError(f"{step.when} is neither true nor false")
        return value

    async def _call(self, step: Step, at: str, item: Any) -> Any:
        """The result, from the journal or made now, in as many attempts as are left.

        Raises ToolError when all failed, ValueError, CallError, Ended when an effect is unknown.
        """
        entries = [entry for entry in self._task.steps if entry.at == at]
        results = [entry for entry in entries if entry.role == "tool"]
        if results and results[-1].ok:
            return results[-1].result
        spec = self._specs.get(step.tool)
        if spec is None:
            raise ValueError(f"the tool {step.tool} is gone")
        cut_off = bool(entries) and entries[-1].role == "intent"
        left = 1 + (step.retry.times if step.retry else 0) - len(results)
        call = entries[0].call if entries else None  # what was meant stays what it was
        call = call or validate(Call(step.tool, fill(step.args, {**self._context, "item": item})), [spec])
        if cut_off and not spec.repeatable:
            await self._unknown(call, at)
        error = results[-1].text if results else ""
        for attempt in range(left):
            if (results or attempt) and step.retry and not cut_off:
                await self._runner.pause(step.retry.delay_s)
            if not cut_off:
                await self._runner.append(self._task, Entry("intent", call=call, at=at))
            cut_off = False
            try:
                return await self._attempt(step, spec, call, at)
            except ToolError as failed:
                error = str(failed)
        raise ToolError(error)

    async def _attempt(self, step: Step, spec: ToolSpec, call: Call, at: str) -> Any:
        began, value, text, ok = time.monotonic(), None, "", True
        try:
            value = await self._runner.call(self._task, spec, call, at, step.timeout_s or spec.timeout_s)
            value = shaped(spec.name, spec.returns, value)
            text = prompt.result_text(value)
        except (ToolError, Refused) as error:
            text, ok = str(error), False
        except OutriderError as error:
            if not spec.repeatable:
                await self._unknown(call, at)
            text, ok = f"{call.name} did not finish: {error}", False
        ms = (time.monotonic() - began) * 1e3
        await self._runner.append(self._task, Entry("tool", text, call, value, ok, ms=ms, at=at))
        if not ok:
            raise ToolError(text)
        return value

    async def _unknown(self, call: Call, at: str) -> None:
        reason = f"interrupted: effect unknown of {at}: {call.name}"
        await self._runner.append(self._task, Entry("tool", reason, call, ok=False, at=at))
        raise Ended("failed", answer=self._account(), error=f"{reason} (look at the device before you start it again)")


def shaped(tool: str, returns: Param | None, value: Any) -> Any:
    """The result as it is declared: whole numbers where numbers with decimals are meant become such.

    Raises ToolError when it is something else: the tool broke its word.
    """
    if returns is None:
        return value
    if returns.kind == "list" and isinstance(value, list):
        return [shaped(tool, returns.items, item) for item in value]
    if returns.kind == "dict" and isinstance(value, dict):
        missing = [field.name for field in returns.fields if field.required and field.name not in value]
        if missing:
            raise ToolError(f"the result of {tool} has no {missing[0]}")
        kinds = {field.name: field for field in returns.fields}
        return {key: shaped(tool, kinds.get(key), item) for key, item in value.items()}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    right = {
        "int": number and value == int(value),
        "float": number,
        "bool": isinstance(value, bool),
        "str": isinstance(value, str),
        "choice": value in returns.choices,
    }
    if not right.get(returns.kind, False):
        raise ToolError(f"the {returns.name} of {tool} is {value!r:.60}, which is no {returns.kind}")
    return float(value) if returns.kind == "float" else int(value) if returns.kind == "int" else value
