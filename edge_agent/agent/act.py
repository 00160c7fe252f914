"""From a call to its effect: the one way for the loop and for workflows.

Invariants: policy is asked right before each call; the intent of a call that does more than read is on disk before its
effect, and its result before what follows; a call whose effect is unknown, after a crash or because the tool runner
died, is made again only when its tool is idempotent or takes the call's key (the same both times), and never otherwise;
a dangerous call waits for its approval before its intent, and one that was refused ends the task, or the step of a
workflow. A tool is held to what it declares: its rate, whoever calls it, also over restarts; types, ranges and units of
its result; the reading that has to show its effect.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import msgspec

from edge_agent.agent import policy, prompt
from edge_agent.agent.approval import Approvals
from edge_agent.agent.calls import Call, CallError, is_number, render, validate
from edge_agent.agent.tool import Check, Param, ToolError, ToolSpec
from edge_agent.agent.transcript import State, Step, Task, Transcripts
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.wire.grants import Subject

LOOK_S, INTERRUPTED = 0.2, "interrupted: effect unknown"


class Tools(Protocol):
    """The tool runner's client."""

    async def specs(self) -> Sequence[ToolSpec]:
        """The tools there are, once the runner serves. Raises Retry."""
        ...

    async def call(self, name: str, args: dict[str, Any], timeout_s: float) -> Any:
        """The JSON result. Raises ToolError (ordinary failure), Refused (not made), Retry (effect unknown)."""
        ...


class Ended(Exception):
    """The task is over, or waits; carries its state."""

    def __init__(self, state: State, *, answer: str = "", error: str = "") -> None:
        super().__init__(state, answer, error)
        self.state, self.answer, self.error = state, answer, error


class Limited(Retry):
    """Its tool was called as often as its rate allows."""


class Unconfirmed(ToolError):
    """The call was made and gave `result`, but what has to show its effect does not."""

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


class Acts:
    """Makes calls for tasks."""

    def __init__(
        self,
        tools: Tools,
        transcripts: Transcripts,
        allowed: policy.Allowed,
        clock: Callable[[], float],
        approvals: Approvals | None = None,
    ) -> None:
        self._tools, self._transcripts, self._allowed, self._clock = tools, transcripts, allowed, clock
        self._approvals = approvals

    async def act(self, task: Task, spec: ToolSpec, call: Call, limit_s: float, at: str = "", why: str = "") -> Step:
        """What came back, as the last step of the task; goes on with a call that its last step `at` there left open.

        It waits for an approval when it is dangerous, or for another reason `why`.

        Raises Refused when policy or a person forbids it, Ended when its effect is unknown, or it waits.
        """
        mine, later = [step for step in task.steps if step.at == at], spec.risk == "read" and spec.repeatable
        begun = bool(mine) and mine[-1].role == "intent"
        if begun and not spec.repeatable:
            await self._unknown(task, call, at)
        policy.check(spec, task.subject, self._allowed)
        asked = bool(mine) and mine[-1].role in ("ask", "approval")
        if (spec.risk == "danger" or why or asked) and not begun:
            await self._approved(task, call, at, mine[-1] if mine else None, why)
        if not begun:
            try:
                await within_rate(self._transcripts, spec, self._clock())
            except Limited as error:
                return await self._over(task, Step("tool", str(error), call, ok=False, at=at), later)
            await self._transcripts.append(task, Step("intent", call=call, ts=self._clock(), at=at), later)
        key = f"{task.id}:{at or sum(step.role == 'intent' for step in task.steps)}"
        began, value, text, ok = time.monotonic(), None, "", True
        try:
            value = await perform(self._tools, spec, call, key, task.subject, limit_s)
            text = prompt.result_text(value)
        except (ToolError, Refused) as error:
            text, ok, value = str(error), False, getattr(error, "result", None)
        except OutriderError as error:
            if not spec.repeatable:
                await self._unknown(task, call, at)
            text, ok = f"{call.name} did not finish: {error}", False
        ms = (time.monotonic() - began) * 1e3
        return await self._over(task, Step("tool", text, call, value, ok, ms=ms, at=at), later)

    async def undo(self, task: Task, n: int) -> Step:
        """Take the effect of step `n` back, once, however often this is asked for; the step that says so.

        Raises Refused (it cannot be taken back), what `act` raises, and Retry.
        """
        at, specs = f"undo:{n}", {spec.name: spec for spec in await self._tools.specs()}
        if done := [each for each in task.steps if each.at == at and each.role == "tool" and each.ok]:
            return done[-1]
        if n not in undoable(task, list(specs.values())):
            raise Refused(f"step {n} of {task.id} has no effect that can be taken back", "a tool declares how: undo=")
        call = task.steps[n].call
        assert call is not None
        undo = specs[call.name].undo
        assert undo is not None
        try:
            back = validate(Call(undo.tool, _filled(undo.args, call, task.steps[n].result)), list(specs.values()))
        except (CallError, KeyError, TypeError) as error:
            raise Refused(
                f"{render(call)} is not undone by {undo.tool}: {error}", "mend the tool's declaration"
            ) from None
        return await self.act(task, specs[back.name], back, specs[back.name].timeout_s, at)

    async def _over(self, task: Task, step: Step, later: bool) -> Step:
        step = msgspec.structs.replace(step, ts=self._clock())
        await self._transcripts.append(task, step, later)
        return step

    async def _approved(self, task: Task, call: Call, at: str, last: Step | None, why: str) -> None:
        """Raises Ended("waiting") while there is no approval, Refused when there will be none."""
        now, said = self._clock(), ""
        if self._approvals is None:
            raise Refused(f"{call.name} needs an approval: {why or 'it is dangerous'}", "here nobody can give one")
        if last is None or last.role not in ("ask", "approval"):
            last = msgspec.structs.replace(self._approvals.ask(task, call, at, now), why=why)
            await self._transcripts.append(task, last)
        if last.role == "approval":
            said = self._approvals.problem(task, last, now)
        elif now < last.expires:
            raise Ended("waiting", error=f"waits for an approval of {render(call)}{last.why and ': '}{last.why}")
        else:
            said = f"nobody approved {render(call)} in time"
        if said:
            await self._transcripts.append(task, Step("tool", said, call, ok=False, ts=now, at=at))
            raise Refused(said)

    async def _unknown(self, task: Task, call: Call, at: str) -> NoReturn:
        reason = f"{INTERRUPTED} of {at}{at and ': '}{render(call)}"
        await self._transcripts.append(task, Step("tool", reason, call, ok=False, ts=self._clock(), at=at))
        raise Ended("failed", error=f"{reason} (look at the device before you ask again)")


def undoable(task: Task, specs: Sequence[ToolSpec]) -> list[int]:
    """The steps of a task whose effects can still be taken back, the last first."""
    hooks = {spec.name for spec in specs if spec.undo}
    over = [step for step in task.steps if step.role == "tool" and (step.ok or step.text.startswith(INTERRUPTED))]
    gone = {step.at for step in over}
    made = [
        n
        for n, step in enumerate(task.steps)
        if step.role == "tool" and step.call and step.call.name in hooks and (step.ok or step.result is not None)
    ]
    return [n for n in reversed(made) if f"undo:{n}" not in gone and not task.steps[n].at.startswith("undo:")]


async def within_rate(transcripts: Transcripts, spec: ToolSpec, now: float) -> None:
    """Count a call of a tool that declares a rate, durably, before it is made. Raises Limited."""
    if spec.limit is None:
        return
    count, seconds = spec.limit
    if (free := await transcripts.take(spec.name, count, seconds, now)) > now:
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(math.ceil(free)))
        told = f"{spec.name} may be called {spec.rate}, and was"
        raise Limited(told, f"it may be called again in {math.ceil(free - now)} s, at {at} UTC")


async def perform(tools: Tools, spec: ToolSpec, call: Call, key: str, subject: Subject, limit_s: float) -> Any:
    """Make a call: the result as it is declared, its effect confirmed. Raises as `Tools.call`; Unconfirmed."""
    value = await tools.call(call.name, spec.keyed_args(call.args, key, subject), limit_s)
    value = shaped(spec.name, spec.returns, value)
    if spec.check is not None and (wrong := await _unlike(tools, spec.check, call, value)):
        raise Unconfirmed(f"{render(call)} was made, but {wrong}", value)
    return value


async def _unlike(tools: Tools, check: Check, call: Call, result: Any) -> str:
    """What is wrong with what the check reads; empty when it is as it should be."""
    deadline = time.monotonic() + check.wait_s
    where = f"{check.tool}{check.value and ' '}{check.value}"
    while True:
        try:
            specs = {spec.name: spec for spec in await tools.specs() if spec.risk == "read"}
            wanted = _filled({"it": check.equals}, call, result)["it"]
            look = validate(Call(check.tool, _filled(check.args, call, result)), list(specs.values()))
            seen = await tools.call(look.name, look.args, specs[look.name].timeout_s)
            seen = shaped(look.name, specs[look.name].returns, seen)
            seen = seen[check.value] if check.value else seen
        except (CallError, ToolError, OutriderError, KeyError, TypeError) as error:
            return f"{where} cannot be read back: {error}"
        numbers = all(isinstance(each, int | float) for each in (seen, wanted))
        if abs(seen - wanted) <= check.within if numbers else seen == wanted:
            return ""
        if time.monotonic() >= deadline:
            return f"{where} read back {seen!r:.60} where {wanted!r:.60} was set"
        await asyncio.sleep(LOOK_S)


def _filled(args: dict[str, Any], call: Call, result: Any = None) -> dict[str, Any]:
    """The arguments with `$name` and `$result.name` in place; an argument that was left out is left out."""
    filled = {}
    for key, value in args.items():
        name = value[1:] if isinstance(value, str) and value.startswith("$") else ""
        if name == "result" or name.startswith("result."):
            filled[key] = result[name[7:]] if name[7:] else result
        elif not name or name in call.args:
            filled[key] = call.args[name] if name else value
    return filled


def shaped(tool: str, returns: Param | None, value: Any) -> Any:
    """The result as it is declared: whole numbers where numbers with decimals are meant become such.

    Raises ToolError when it is something else, or out of its range or in another unit: the tool broke its word.
    """
    if returns is None:
        return value
    if returns.kind == "list" and isinstance(value, list):
        return [shaped(tool, returns.items, item) for item in value]
    if returns.kind == "dict" and isinstance(value, dict):
        if missing := [field.name for field in returns.fields if field.required and field.name not in value]:
            raise ToolError(f"the result of {tool} has no {missing[0]}")
        for field in returns.fields:  # a number beside `unit` is in that unit
            if field.unit and field.name in value and value.get("unit", field.unit) != field.unit:
                told = f"the {field.name} of {tool} is in {value['unit']!r:.20}, where {field.unit} is declared"
                raise ToolError(told)
        kinds = {field.name: field for field in returns.fields}
        return {key: shaped(tool, kinds.get(key), item) for key, item in value.items()}
    number = is_number(value) and abs(value) < 1e308
    match returns.kind:
        case "int" if number and value == int(value):
            return _ranged(tool, returns, int(value))
        case "float" if number:
            return _ranged(tool, returns, float(value))
        case "bool" if isinstance(value, bool):
            return value
        case "str" if isinstance(value, str):
            return value
        case "choice" if value in returns.choices:
            return value
    raise ToolError(f"the {returns.name} of {tool} is {value!r:.60}, which is no {returns.kind}")


def _ranged(tool: str, returns: Param, value: int | float) -> int | float:
    low = -math.inf if returns.low is None else returns.low
    high = math.inf if returns.high is None else returns.high
    if not low <= value <= high:
        told = f"{value:g}{returns.unit and ' '}{returns.unit}, out of its range {low:g} to {high:g}"
        raise ToolError(f"the {returns.name} of {tool} is {told}: it is not used")
    return value
