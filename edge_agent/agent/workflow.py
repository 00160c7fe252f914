"""A workflow as it is written: YAML to checked data, every problem with its line and column.

Invariants: pure; a `Workflow` that `check` finds no problem in can run: its steps are a DAG, every tool is there and
may be used by whom it runs as, every expression compiles, names only steps that ran before, and gives what its argument
takes. Expressions are CEL (Common Expression Language: no loops without end, no side effects); types are found by
evaluating them over samples of what inputs and tools declare, so what nothing is declared of is not checked. YAML is
its JSON-like core: no anchors, no tags, and `on` or `no` are texts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from graphlib import CycleError, TopologicalSorter
from types import ModuleType
from typing import Any, ClassVar

import msgspec
import yaml
from cronsim import CronSim, CronSimError

from edge_agent.agent import policy
from edge_agent.agent.calls import Call, CallError, parse, validate
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.errors import Refused
from edge_agent.wire.grants import Subject

sys.modules.setdefault("cel.cli", ModuleType("cel.cli"))  # its command line would take 15 MB and a second
import cel  # noqa: E402

MAX_TEXT = 64 * 1024
MAX_STEPS = 100
MAX_EXPRESSION = 1000
EVENTS = re.compile(r"(task|workflow)\.(succeeded|failed)(:[\w-]+)?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,47}")
_TITLE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_HOLE = re.compile(r"\$\{(.*?)\}", re.DOTALL)
_STEP_NAMES = re.compile(r"\bsteps\.([A-Za-z_]\w*)")
_LITERALS = re.compile(r'"(?:[^"\\]|\\.)*"|\'(?:[^\'\\]|\\.)*\'')


class Retry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often a failed call is made again, and how many seconds later."""

    times: int
    delay_s: float = 1.0


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call of a tool, or one for each item of `for_each`. `on_error`: fail, continue, or the step to run."""

    id: str
    tool: str
    args: dict[str, Any] = {}
    depends_on: list[str] = []
    when: str = ""
    for_each: str = ""
    retry: Retry | None = None
    timeout_s: float = 0.0
    on_error: str = "fail"


class Trigger(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What starts a run, one of: `cron` (in UTC), `stream` (a reading call, sampled), `event`.

    A stream starts one run when `value` of its result has been above (or below) the threshold for `for_s` seconds, and
    no other before it was past `clear` again.
    """

    cron: str = ""
    stream: str = ""
    event: str = ""
    value: str = ""
    above: float | None = None
    below: float | None = None
    clear: float | None = None
    for_s: float = 0.0
    every_s: float = 10.0
    inputs: dict[str, Any] = {}


class Workflow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A definition. `run_as`: the roles of runs that a trigger starts; `result`: an expression, the run's result."""

    workflow: str
    version: str
    steps: list[Step]
    about: str = ""
    run_as: list[str] = []
    inputs: list[Param] = []
    triggers: list[Trigger] = []
    timeout_s: float = 600.0
    result: str = ""

    def signature(self) -> ToolSpec:
        """The inputs, as the parameters of a tool."""
        return ToolSpec(self.workflow, self.about, self.inputs)

    def handlers(self) -> set[str]:
        """Steps that only run when another failed."""
        return {step.on_error for step in self.steps} - {"fail", "continue"}

    def order(self) -> list[Step]:
        """Every step after those it depends on, handlers left out. Raises CycleError."""
        by_id = {step.id: step for step in self.steps}
        graph = {step.id: [name for name in step.depends_on if name in by_id] for step in self.steps}
        return [by_id[id] for id in TopologicalSorter(graph).static_order() if id not in self.handlers()]


class Problem(msgspec.Struct, frozen=True, order=True):
    """What is wrong, where (both counted from 1), and what to do about it."""

    line: int
    column: int
    message: str
    hint: str = ""


class Broken(Exception):
    """The text is no workflow."""

    def __init__(self, *problems: Problem) -> None:
        super().__init__(*problems)
        self.problems = list(problems)


class Marks(dict[str, tuple[int, int]]):
    """Where each value is, by its path as msgspec writes it (`$.steps[0].tool`)."""

    def problem(self, path: str, message: str, hint: str = "") -> Problem:
        """A problem at the value of the path, or at what it is in."""
        while path not in self and len(path) > 1:
            path = path[: max(path.rfind("."), path.rfind("["))]
        line, column = self.get(path, (1, 1))
        return Problem(line, column, message, hint)


def marks_of(marks: Marks, path: str) -> list[str]:
    """The keys of what stands at a path that ends with its point."""
    return [key[len(path) :] for key in marks if key.startswith(path) and key[len(path) :].isidentifier()]


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


for _tag, _pattern, _first in (
    ("null", r"~|null|", ["~", "n", ""]),
    ("bool", r"true|false", ["t", "f"]),
    ("int", r"[-+]?[0-9]{1,15}", list("-+0123456789")),
    ("float", r"[-+]?[0-9]*\.?[0-9]+([eE][-+]?[0-9]{1,2})?", list("-+.0123456789")),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), _first)
_SCALARS: dict[str, Any] = {"null": lambda _: None, "bool": "true".__eq__, "int": int, "float": float, "str": str}


def read(text: str) -> tuple[Workflow, Marks]:
    """A definition and where its parts stand. Raises Broken."""
    marks = Marks()
    if len(text) > MAX_TEXT:
        raise Broken(Problem(1, 1, f"the file is longer than {MAX_TEXT >> 10} KiB"))
    try:
        node = yaml.compose(text, _Loader)
        value = _plain(node, "$", marks, set()) if node else {}
        flow = msgspec.convert(value, Workflow)
        inputs = [msgspec.structs.replace(p, required=p.required and p.default is None) for p in flow.inputs]
        return msgspec.structs.replace(flow, inputs=inputs), marks
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise Broken(Problem(line, column, f"not YAML: {error.problem or error.context}")) from error
    except yaml.YAMLError as error:
        raise Broken(Problem(1, 1, f"not YAML: {error}")) from error
    except RecursionError as error:
        raise Broken(Problem(1, 1, "nested too deep")) from error
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        field = re.search("unknown field `(.*)`", message)
        path = path.strip("`") or "$"
        hint = f"known here: {_fields(path)}" if field else ""
        raise Broken(marks.problem(f"{path}.{field[1]}" if field else path, message, hint)) from error


def _plain(node: yaml.Node, path: str, marks: Marks, seen: set[int]) -> Any:
    marks.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    kind = node.tag.rpartition(":")[2]
    if id(node) in seen or kind not in (*_SCALARS, "seq", "map"):
        raise Broken(marks.problem(path, "anchors, aliases and tags are not taken", "write it out"))
    seen.add(id(node))
    if isinstance(node, yaml.ScalarNode):
        return _SCALARS[kind](node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, f"{path}[{n}]", marks, seen) for n, item in enumerate(node.value)]
    found: dict[str, Any] = {}
    for key, item in node.value:
        at = f"{path}.{key.value}"
        if not isinstance(key, yaml.ScalarNode) or at in marks:
            where = Problem(key.start_mark.line + 1, key.start_mark.column + 1, f"the key {key.value!r} is not taken")
            raise Broken(msgspec.structs.replace(where, hint="a key is a text and stands once"))
        value = _plain(item, at, marks, seen)
        if isinstance(item, yaml.CollectionNode):
            marks[at] = (key.start_mark.line + 1, key.start_mark.column + 1)
        found[key.value] = value
    return found


def _fields(path: str) -> str:
    kind: type[msgspec.Struct] = Workflow
    for name, of in (("steps", Step), ("triggers", Trigger), ("inputs", Param), ("retry", Retry)):
        if re.search(rf"\.{name}(\[\d+\])?$", path):
            kind = of
    return ", ".join(kind.__struct_fields__)


# what an expression sees and gives


def evaluate(expression: str, context: Mapping[str, Any]) -> Any:
    """The value, plain JSON. Raises ValueError with what is wrong."""
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters")
    try:
        value = cel.evaluate(expression, dict(context))
        msgspec.json.encode(value)
    except KeyError as error:
        raise ValueError(f"{expression}: there is no {error.args[0]}") from error
    except (TypeError, RuntimeError, ArithmeticError, LookupError, ValueError) as error:
        raise ValueError(f"{expression}: {str(error).splitlines()[0].partition('. ')[0]}") from error
    return value


def fill(value: Any, context: Mapping[str, Any]) -> Any:
    """The value with each `${expression}` in it evaluated; one that is the whole text keeps its type.

    Raises ValueError.
    """
    if isinstance(value, dict):
        return {key: fill(item, context) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, context) for item in value]
    if not isinstance(value, str):
        return value
    if whole := _HOLE.fullmatch(value):
        return evaluate(whole[1], context)
    return _HOLE.sub(lambda hole: _text(evaluate(hole[1], context)), value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def expressions(value: Any) -> list[str]:
    """Every expression inside a value."""
    if isinstance(value, dict | list):
        return [e for item in (value.values() if isinstance(value, dict) else value) for e in expressions(item)]
    return _HOLE.findall(value) if isinstance(value, str) else []


def sample(param: Param | None) -> Any:
    """A value of the declared type; None where nothing is declared."""
    if param is None:
        return None
    if param.kind == "dict":
        return {field.name: sample(field) for field in param.fields} or None
    if param.kind == "list":
        return [sample(param.items)] if param.items else None
    if param.kind == "choice":
        return param.choices[0]
    low = param.low if param.low is not None else min(1.0, param.high if param.high is not None else 1.0)
    return {"int": int(low), "float": float(low) + 0.5, "bool": True, "str": "text"}[param.kind]


def _is(param: Param, value: Any) -> bool:
    """Whether a value that an expression gave over samples is of the parameter's kind."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return {
        "int": number and not isinstance(value, float),
        "float": number,
        "bool": isinstance(value, bool),
        "list": isinstance(value, list),
        "dict": isinstance(value, dict),
    }.get(param.kind, isinstance(value, str))


# the check


def check(
    flow: Workflow, marks: Marks, specs: Sequence[ToolSpec], allowed: policy.Allowed, subject: Subject | None = None
) -> list[Problem]:
    """All that is wrong, in the order of the file; empty when it can run with these tools as this subject."""
    return sorted(_Check(flow, marks, specs, allowed, subject or runs_as(flow)).problems())


def runs_as(flow: Workflow, issued_at: float = 0.0) -> Subject:
    """Who a run is that a trigger started."""
    return Subject(f"workflow:{flow.workflow}", flow.run_as, issued_at)


class _Check:
    def __init__(
        self, flow: Workflow, marks: Marks, specs: Sequence[ToolSpec], allowed: policy.Allowed, subject: Subject
    ) -> None:
        self._flow, self._marks, self._allowed, self._subject = flow, marks, allowed, subject
        self._specs = {spec.name: spec for spec in specs}
        self._ids = {step.id: step for step in flow.steps}
        self._inputs = {param.name: sample(param) for param in flow.inputs}

    def problems(self) -> Iterator[Problem]:
        flow, at = self._flow, self._marks.problem
        if not _TITLE.fullmatch(flow.workflow):
            yield at("$.workflow", f"{flow.workflow!r} is no name", "small letters, digits and -")
        if not 0 < len(flow.steps) <= MAX_STEPS:
            yield at("$.steps", f"{len(flow.steps)} steps", f"1 to {MAX_STEPS}")
        for n, param in enumerate(flow.inputs):
            if unknown := [p for p in marks_of(self._marks, f"$.inputs[{n}].") if p not in Param.__struct_fields__]:
                yield at(f"$.inputs[{n}].{unknown[0]}", f"an input has no {unknown[0]}", _fields("$.inputs"))
            if not _NAME.fullmatch(param.name) or (param.kind == "choice" and not param.choices):
                yield at(f"$.inputs[{n}]", f"{param.name!r} is no input", "a name of letters; a choice has choices")
        for n, trigger in enumerate(flow.triggers):
            yield from self._trigger(f"$.triggers[{n}]", trigger)
        if flow.triggers and not flow.run_as:
            yield at("$.triggers", "runs that a trigger starts have no roles", "add run_as: [operator]")
        yield from self._shape()
        try:
            flow.order()
        except CycleError as error:
            path = list(reversed(error.args[1]))
            n = next(n for n, step in enumerate(flow.steps) if step.id == path[0])
            yield at(f"$.steps[{n}].depends_on", f"the steps wait for each other: {' → '.join(path)}", "break the ring")
            return
        for n, step in enumerate(flow.steps):
            yield from self._step(f"$.steps[{n}]", step)
        if flow.result:
            yield from self._expression("$.result", flow.result, set(self._ids), None)

    def _shape(self) -> Iterator[Problem]:
        at, seen = self._marks.problem, set[str]()
        for n, step in enumerate(self._flow.steps):
            where = f"$.steps[{n}]"
            if not _NAME.fullmatch(step.id) or step.id in ("fail", "continue") or step.id in seen:
                yield at(f"{where}.id", f"the id {step.id!r} is taken or no name", "letters, digits and _, each once")
            seen.add(step.id)
            for m, name in enumerate(step.depends_on):
                if name not in self._ids or name in self._flow.handlers():
                    yield at(f"{where}.depends_on[{m}]", f"there is no step {name!r} to wait for", self._known())
            if step.on_error not in ("fail", "continue", *self._ids) or step.on_error == step.id:
                yield at(f"{where}.on_error", f"{step.on_error!r} is no step", f"fail, continue, or {self._known()}")
            if step.id in self._flow.handlers() and step.on_error not in ("fail", "continue"):
                yield at(
                    f"{where}.on_error", "a step that handles an error cannot have one handled", "fail or continue"
                )

    def _known(self) -> str:
        return f"steps: {', '.join(id for id in self._ids if id not in self._flow.handlers())}"

    def _step(self, where: str, step: Step) -> Iterator[Problem]:
        at, before = self._marks.problem, self._before(step)
        item: Any = None
        for name in ("when", "for_each"):
            if expression := getattr(step, name):
                want = Param("", "bool") if name == "when" else Param("", "list")
                found: list[Any] = []
                yield from self._expression(f"{where}.{name}", expression, before, want, item, found)
                item = found[0][0] if name == "for_each" and found and isinstance(found[0], list) else item
        spec = self._specs.get(step.tool)
        if spec is None:
            yield at(f"{where}.tool", f"there is no tool {step.tool!r}", f"tools: {', '.join(self._specs) or 'none'}")
            return
        try:
            policy.check(spec, self._subject, self._allowed)
        except Refused as refused:
            if self._subject.roles or spec.risk == "danger":
                yield at(f"{where}.tool", refused.message, refused.hint)
        if step.timeout_s < 0 or step.timeout_s > spec.timeout_s:
            yield at(f"{where}.timeout_s", f"{step.tool} has at most {spec.timeout_s:g} s", "shorter, or leave it out")
        if step.retry and not 1 <= step.retry.times <= 10:
            yield at(f"{where}.retry", f"{step.retry.times} times", "1 to 10")
        names = [param.name for param in spec.params]
        for name in step.args:
            if name not in names:
                yield at(f"{where}.args.{name}", f"{spec.name} has no argument {name}", f"it takes: {', '.join(names)}")
        for param in spec.params:
            if param.name in step.args:
                yield from self._argument(
                    f"{where}.args.{param.name}", spec, param, step.args[param.name], before, item
                )
            elif param.required:
                yield at(f"{where}.args", f"{spec.name} needs the argument {param.name}", "add it to args")

    def _argument(
        self, where: str, spec: ToolSpec, param: Param, value: Any, before: set[str], item: Any
    ) -> Iterator[Problem]:
        if whole := isinstance(value, str) and _HOLE.fullmatch(value):
            yield from self._expression(where, whole[1], before, param, item, offset=2)
        elif inner := expressions(value):
            for expression in inner:
                yield from self._expression(where, expression, before, None, item)
        else:
            try:
                validate(Call(spec.name, {param.name: value}), [msgspec.structs.replace(spec, params=[param])])
            except CallError as error:
                yield self._marks.problem(where, str(error))

    def _expression(
        self,
        where: str,
        expression: str,
        before: set[str],
        want: Param | None,
        item: Any = None,
        found: list[Any] | None = None,
        offset: int = 0,
    ) -> Iterator[Problem]:
        bare = _LITERALS.sub('""', expression)
        used = _STEP_NAMES.findall(bare)
        for name in used:
            if name not in self._ids:
                yield self._marks.problem(where, f"{expression}: there is no step {name}", self._known())
                return
            if name not in before:
                hint = f"add {name} to depends_on"
                yield self._marks.problem(where, f"{expression}: step {name} need not have run before", hint)
                return
        steps = {id: self._sample(self._ids[id]) for id in before}
        unknown = any(steps[name]["result"] is None for name in used)
        context = {"inputs": self._inputs, "item": item, "event": {}, "steps": steps}
        try:
            cel.compile(expression)
            value = evaluate(expression, context)
        except ValueError as error:
            cause = error.__cause__
            open_ended = ("item" in bare and item is None) or "event" in bare
            if (unknown or open_ended) and "Failed to parse" not in str(error):
                return  # nothing is declared of what it reads
            if isinstance(cause, IndexError | ArithmeticError):
                return  # it depends on the value
            yield self._parse_error(where, expression, error, offset)
            return
        if want is not None and not unknown and value is not None and not _is(want, value):
            kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list"}
            given = {
                "int": "a whole number",
                "float": "a number with decimals",
                "bool": "true or false",
                "str": "a text",
            }
            got = given.get(type(value).__name__, f"a {type(value).__name__}")
            name = f"{want.name} is" if want.name else "it must be"
            yield self._marks.problem(where, f"{expression} gives {got}; {name} {kind.get(want.kind, 'a text')}")
        if found is not None:
            found.append(value)

    def _parse_error(self, where: str, expression: str, error: ValueError, offset: int) -> Problem:
        problem = self._marks.problem(where, str(error))
        if at := re.search(r"<input>:1:(\d+): (.*)", str(error.__cause__ or error)):
            column = problem.column + int(at[1]) - 1 + offset
            return msgspec.structs.replace(problem, column=column, message=f"{expression}: {at[2]}")
        return problem

    def _sample(self, step: Step) -> dict[str, Any]:
        spec = self._specs.get(step.tool)
        result = sample(spec.returns) if spec else None
        return {"state": "succeeded", "error": "", "result": [result] if step.for_each else result}

    def _before(self, step: Step) -> set[str]:
        """Every step that is over when this one runs."""
        first = [s.id for s in self._flow.steps if s.on_error == step.id] or step.depends_on
        found, left = set[str](), list(first)
        while left:
            name = left.pop()
            if name in self._ids and name not in found:
                found.add(name)
                left += self._ids[name].depends_on
        return found

    def _trigger(self, where: str, trigger: Trigger) -> Iterator[Problem]:
        at = self._marks.problem
        if sum(map(bool, (trigger.cron, trigger.stream, trigger.event))) != 1:
            yield at(where, "a trigger has one of cron, stream and event", "write another trigger for another cause")
        if trigger.cron:
            try:
                CronSim(trigger.cron, datetime(2026, 1, 1, tzinfo=UTC))
            except CronSimError as error:
                yield at(f"{where}.cron", f"{trigger.cron!r} is no cron line: {error}", "such as */10 * * * *")
        if trigger.event and not EVENTS.fullmatch(trigger.event):
            yield at(f"{where}.event", f"there is no event {trigger.event!r}", "task.failed, workflow.failed:NAME …")
        if trigger.event.endswith(f":{self._flow.workflow}"):
            yield at(f"{where}.event", "its own end would start it again", "name another workflow")
        if trigger.stream:
            yield from self._stream(where, trigger)
        try:
            validate(Call(self._flow.workflow, trigger.inputs), [self._flow.signature()])
        except CallError as error:
            yield at(f"{where}.inputs", str(error))

    def _stream(self, where: str, trigger: Trigger) -> Iterator[Problem]:
        at, limit = self._marks.problem, trigger.below if trigger.above is None else trigger.above
        if (trigger.above is None) == (trigger.below is None) or limit is None:
            yield at(where, "a stream has a threshold: above or below", "above: 7.1")
        elif trigger.clear is not None and (trigger.clear > limit if trigger.below is None else trigger.clear < limit):
            yield at(f"{where}.clear", "clear lies beyond the threshold", "on the quiet side of it")
        if trigger.every_s < 0.1 or trigger.for_s < 0:
            yield at(where, "every_s is at least 0.1, for_s at least 0")
        try:
            call = parse(trigger.stream)
            if not isinstance(call, Call):
                raise CallError(f"{trigger.stream} is no call")
            spec = self._specs[validate(call, list(self._specs.values())).name]
            if spec.risk != "read":
                raise CallError(f"{spec.name} does more than read")
            result = sample(spec.returns)
            if result is not None and not _is(
                Param("", "float"), evaluate(trigger.value or "result", {"result": result})
            ):
                raise CallError(f"value: {trigger.value or 'result'} is no number")
        except (CallError, ValueError) as error:
            yield at(
                f"{where}.stream", str(error), 'such as read_sensor(sensor="vibration", line=2), value: result.value'
            )
