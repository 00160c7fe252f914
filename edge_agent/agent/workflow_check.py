"""What is wrong with a workflow before it runs, each problem with its place.

Invariants: pure; a `Workflow` that `check` finds no problem in can run: its steps are a DAG, every tool is there and
may be used by whom it runs as, every expression compiles, names only steps that ran before, and gives what its argument
takes. Types are found by evaluating expressions over samples of what inputs and tools declare, so what nothing is
declared of is not checked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from graphlib import CycleError
from typing import Any

import msgspec
from cronsim import CronSim, CronSimError

from edge_agent.agent import policy
from edge_agent.agent.calls import Call, CallError, parse, validate
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.agent.workflow import (
    HOLE,
    Marks,
    Problem,
    Step,
    Trigger,
    Workflow,
    compiled,
    evaluate,
    sample,
    topic_pattern,
)
from edge_agent.errors import Refused
from edge_agent.wire import windows
from edge_agent.wire.grants import Subject

_EVENTS = re.compile(
    r"(task|workflow)\.(succeeded|failed)(:[\w-]+)?|link\.(up|down)|approval\.(asked|given|denied)"
    r"|update\.(committed|rolled_back)(:[\w.-]+)?|alarm\.(raised|cleared)(:.+)?"
)
ALARMS = Call("past_alarms", {"hours": 1})
_STEP_NAMES = re.compile(r"\bsteps\.([A-Za-z_]\w*)")
_LITERALS = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')
_STREAM = 'such as read_sensor(sensor="vibration", line=2), value: result.value'
_WANTED = {"int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list", "dict": "a dict"}
_GIVEN = _WANTED | {"float": "a number with decimals", "str": "a text"}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "int": int,
    "float": (int, float),
    "bool": bool,
    "list": list,
    "dict": dict,
}


def check(
    flow: Workflow, marks: Marks, specs: Sequence[ToolSpec], allowed: policy.Allowed, subject: Subject | None = None
) -> list[Problem]:
    """All that is wrong, in the order of the file; empty when it can run with these tools as this subject."""
    found = _Check(flow, marks, specs, allowed, subject or runs_as(flow))
    found.whole()
    return sorted(found.problems)


def runs_as(flow: Workflow, issued_at: float = 0.0) -> Subject:
    """Who a run is that a trigger started."""
    return Subject(f"workflow:{flow.workflow}", flow.run_as, issued_at)


def _is(kind: str, value: Any) -> bool:
    """Whether a value that an expression gave over samples is of the kind."""
    return isinstance(value, _TYPES.get(kind, str)) and (kind == "bool" or not isinstance(value, bool))


class _Check:
    def __init__(
        self, flow: Workflow, marks: Marks, specs: Sequence[ToolSpec], allowed: policy.Allowed, subject: Subject
    ) -> None:
        self._flow, self._marks, self._allowed, self._subject = flow, marks, allowed, subject
        self._specs = {spec.name: spec for spec in specs}
        self._steps = {step.id: step for step in flow.steps}
        self._inputs = {param.name: sample(param) for param in flow.inputs}
        self._known = f"steps: {', '.join(id for id in self._steps if id not in flow.handlers())}"
        self.problems: list[Problem] = []

    def _tell(self, path: str, message: str, hint: str = "") -> None:
        self.problems.append(self._marks.problem(path, message, hint))

    def whole(self) -> None:
        flow = self._flow
        for n, trigger in enumerate(flow.triggers):
            self._trigger(f"$.triggers[{n}]", trigger)
        try:
            windows.zone(flow.zone or "UTC")
        except ValueError as error:
            self._tell("$.zone", str(error))
        if flow.triggers and not flow.run_as:
            self._tell("$.triggers", "runs that a trigger starts have no roles", "add run_as: [operator]")
        for n, step in enumerate(flow.steps):
            self._names(f"$.steps[{n}]", step, step.id in [before.id for before in flow.steps[:n]])
        try:
            flow.order()
        except CycleError as error:
            path = list(reversed(error.args[1]))
            where = f"$.steps[{list(self._steps).index(path[0])}].depends_on"
            return self._tell(where, f"the steps wait for each other: {' → '.join(path)}", "break the ring")
        for n, step in enumerate(flow.steps):
            self._step(f"$.steps[{n}]", step)
        if flow.result:
            self._expression("$.result", flow.result, set(self._steps))
        return None

    def _names(self, where: str, step: Step, again: bool) -> None:
        ends, handlers = ("fail", "continue"), self._flow.handlers()
        if step.id in ends or again:
            self._tell(f"{where}.id", f"the id {step.id!r} is taken", "each stands once; not fail, not continue")
        for m, name in enumerate(step.depends_on):
            if name not in self._steps or name in handlers:
                self._tell(f"{where}.depends_on[{m}]", f"there is no step {name!r} to wait for", self._known)
        if step.on_error not in (*ends, *self._steps) or step.on_error == step.id:
            self._tell(f"{where}.on_error", f"{step.on_error!r} is no step", f"fail, continue, or {self._known}")
        elif step.id in handlers and step.on_error not in ends:
            told = "a step that handles an error cannot have one handled"
            self._tell(f"{where}.on_error", told, "fail or continue")

    def _step(self, where: str, step: Step) -> None:
        before = self._before(step)
        if step.when:
            self._expression(f"{where}.when", step.when, before, Param("", "bool"))
        items = step.for_each and self._expression(f"{where}.for_each", step.for_each, before, Param("", "list"))
        item = items[0] if items and isinstance(items, list) else None
        if (spec := self._tool(f"{where}.tool", step.tool)) is None:
            return
        if step.timeout_s > spec.timeout_s:
            told = f"{step.tool} has at most {spec.timeout_s:g} s"
            self._tell(f"{where}.timeout_s", told, "shorter, or leave it out")
        params = {param.name: param for param in spec.params}
        for name in step.args.keys() - params.keys():
            told = f"{spec.name} has no argument {name}"
            self._tell(f"{where}.args.{name}", told, f"it takes: {', '.join(params)}")
        for name, param in params.items():
            if name in step.args:
                self._argument(f"{where}.args.{name}", spec, param, step.args[name], before, item)
            elif param.required:
                self._tell(f"{where}.args", f"{spec.name} needs the argument {name}", "add it to args")

    def _tool(self, where: str, name: str) -> ToolSpec | None:
        """The tool, if there is one; a problem too where it may not be used."""
        if (spec := self._specs.get(name)) is None:
            self._tell(where, f"there is no tool {name!r}", f"tools: {', '.join(self._specs) or 'none'}")
            return None
        try:
            policy.check(spec, self._subject, self._allowed)
        except Refused as refused:
            if self._subject.roles:
                self._tell(where, refused.message, refused.hint)
        return spec

    def _argument(self, where: str, spec: ToolSpec, param: Param, value: Any, before: set[str], item: Any) -> None:
        if isinstance(value, str) and (whole := HOLE.fullmatch(value)):
            self._expression(where, whole[1], before, param, item, offset=2)
        elif inner := expressions(value):
            for expression in inner:
                self._expression(where, expression, before, None, item)
        else:
            try:
                validate(Call(spec.name, {param.name: value}), [msgspec.structs.replace(spec, params=[param])])
            except CallError as error:
                self._tell(where, str(error))

    def _expression(
        self, where: str, text: str, before: set[str], want: Param | None = None, item: Any = None, offset: int = 0
    ) -> Any:
        """Its value over samples; None where nothing is known."""
        used = _STEP_NAMES.findall(_LITERALS.sub('""', text))
        if late := next((name for name in used if name not in before), None):
            gone = late not in self._steps
            told, hint = ("there is no step {}", self._known) if gone else ("step {} need not have run before", "")
            return self._tell(where, f"{text}: {told.format(late)}", hint or f"add {late} to depends_on")
        steps = {id: self._sample(self._steps[id]) for id in before}
        unknown = any(steps[name]["result"] is None for name in used)
        names: list[str] = []
        try:
            names = compiled(text).variables()
            value = evaluate(text, {"inputs": self._inputs, "item": item, "event": {}, "steps": steps})
        except ValueError as error:
            cause = error.__cause__
            if at := re.search(r"<input>:1:(\d+): (.*)", str(cause or error)):
                problem = self._marks.problem(where, f"{text}: {at[2]}")
                column = problem.column + int(at[1]) - 1 + offset
                self.problems.append(msgspec.structs.replace(problem, column=column))
            else:  # what nothing is declared of, and what depends on the value, is not told
                open_ended = unknown or "event" in names or ("item" in names and item is None)
                if not open_ended and not isinstance(cause, IndexError | ArithmeticError):
                    self._tell(where, str(error))
            return None
        if want is not None and not unknown and value is not None and not _is(want.kind, value):
            must = f"{want.name} is" if want.name else "it must be"
            given = _GIVEN.get(kind := type(value).__name__, f"a {kind}")
            self._tell(where, f"{text} gives {given}; {must} {_WANTED.get(want.kind, 'a text')}")
        return value

    def _sample(self, step: Step) -> dict[str, Any]:
        spec = self._specs.get(step.tool)
        result = sample(spec.returns) if spec else None
        return {"state": "succeeded", "error": "", "result": [result] if step.for_each else result}

    def _before(self, step: Step) -> set[str]:
        """Every step that is over when this one runs."""
        found, left = set[str](), [s.id for s in self._flow.steps if s.on_error == step.id] or [*step.depends_on]
        while left:
            if (name := left.pop()) in self._steps and name not in found:
                found.add(name)
                left += self._steps[name].depends_on
        return found

    def _trigger(self, where: str, trigger: Trigger) -> None:
        if sum(map(bool, (trigger.cron, trigger.stream, trigger.event, trigger.mqtt))) != 1:
            told = "a trigger has one of cron, stream, event and mqtt"
            self._tell(where, told, "write another trigger for another cause")
        try:
            CronSim(trigger.cron or "* * * * *", datetime(2026, 1, 1, tzinfo=UTC))
        except CronSimError as error:
            self._tell(f"{where}.cron", f"{trigger.cron!r} is no cron line: {error}", "such as */10 * * * *")
        if trigger.event and not _EVENTS.fullmatch(trigger.event):
            told = f"there is no event {trigger.event!r}"
            hint = "task.failed, workflow.failed:NAME, link.down, update.rolled_back, alarm.raised:SERIES …"
            self._tell(f"{where}.event", told, hint)
        elif trigger.event.startswith("alarm."):
            self._tool(f"{where}.event", ALARMS.name)  # of the pack history
        if trigger.event.endswith(f":{self._flow.workflow}"):
            self._tell(f"{where}.event", "its own end would start it again", "name another workflow")
        if trigger.stream:
            self._stream(where, trigger)
        if trigger.mqtt:
            self._topic(where, trigger)
        try:
            validate(Call(self._flow.workflow, trigger.inputs), [self._flow.signature()])
        except CallError as error:
            self._tell(f"{where}.inputs", str(error))

    def _topic(self, where: str, trigger: Trigger) -> None:
        try:
            topic_pattern(trigger.mqtt)
        except ValueError as error:
            self._tell(f"{where}.mqtt", str(error), "such as plant/+/door")
        try:
            names = set(compiled(trigger.when or "true").variables()) - {"payload", "topic"}
            told = f"{trigger.when}: there is no {', '.join(sorted(names))}" if names else ""
        except ValueError as error:
            told = f"{trigger.when}: {str(error).splitlines()[0]}"
        if told:
            self._tell(f"{where}.when", told, "CEL over payload and topic: payload.open == true")

    def _stream(self, where: str, trigger: Trigger) -> None:
        limit, value = trigger.below if trigger.above is None else trigger.above, trigger.value or "result"
        if limit is None or None not in (trigger.above, trigger.below):
            self._tell(where, "a stream has a threshold: above or below", "above: 7.1")
        elif trigger.clear is not None and (trigger.clear > limit if trigger.below is None else trigger.clear < limit):
            self._tell(f"{where}.clear", "clear lies beyond the threshold", "on the quiet side of it")
        try:
            call = parse(trigger.stream)
            if not isinstance(call, Call):
                raise CallError(f"{trigger.stream} is no call")
            spec = self._specs[validate(call, list(self._specs.values())).name]
            if spec.risk != "read":
                raise CallError(f"{spec.name} does more than read")
            result = sample(spec.returns)
            if result is not None and not _is("float", evaluate(value, {"result": result})):
                raise CallError(f"value: {value} is no number")
        except (CallError, ValueError) as error:
            self._tell(f"{where}.stream", str(error), _STREAM)


def expressions(value: Any) -> list[str]:
    """Every expression inside a value."""
    if isinstance(value, dict | list):
        return [e for item in (value.values() if isinstance(value, dict) else value) for e in expressions(item)]
    return HOLE.findall(value) if isinstance(value, str) else []
