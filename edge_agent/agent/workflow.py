"""A workflow as it is written: YAML to checked data, every problem with its line and column.

Invariants: pure; what the Structs below say of a field holds of every `Workflow` that was read. Expressions are CEL
(Common Expression Language: no loops without end, no side effects). YAML is its JSON-like core: no anchors, no tags,
and `on` or `no` are texts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from graphlib import TopologicalSorter
from types import ModuleType
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from edge_agent.agent.tool import Param, ToolSpec

MAX_TEXT = 64 * 1024
MAX_EXPRESSION = 1000
HOLE = re.compile(r"\$\{(.*?)\}", re.DOTALL)
Name = Annotated[str, Meta(pattern="^[A-Za-z_][A-Za-z0-9_]{0,47}$")]
Title = Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9-]{0,63}$")]
Seconds = Annotated[float, Meta(ge=0)]


class Retry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often a failed call is made again, and how many seconds later."""

    times: Annotated[int, Meta(ge=1, le=10)]
    delay_s: Seconds = 1.0


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One call of a tool, or one for each item of `for_each`. `on_error`: fail, continue, or the step to run."""

    id: Name
    tool: str
    args: dict[str, Any] = {}
    depends_on: list[str] = []
    when: str = ""
    for_each: str = ""
    retry: Retry | None = None
    timeout_s: Seconds = 0.0
    on_error: str = "fail"


class Trigger(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What starts a run, one of: `cron` (in the workflow's zone), `stream` (a reading call, sampled), `event`, `mqtt`.

    A stream starts one run when `value` of its result has been above (or below) the threshold for `for_s` seconds, and
    no other before it was past `clear` again. `mqtt` is a topic of the site's broker, with wildcards; each message that
    `when` (CEL over `payload` and `topic`) is true of starts a run, but none within `debounce_s` of the last one.
    """

    cron: str = ""
    stream: str = ""
    event: str = ""
    mqtt: str = ""
    when: str = ""
    debounce_s: Seconds = 0.0
    value: str = ""
    above: float | None = None
    below: float | None = None
    clear: float | None = None
    for_s: Seconds = 0.0
    every_s: Annotated[float, Meta(ge=0.1)] = 10.0
    inputs: dict[str, Any] = {}


class Input(Param, frozen=True, forbid_unknown_fields=True):
    """A value that a run is given; without a default it must be."""

    name: Name

    def __post_init__(self) -> None:
        if self.kind == "choice" and not self.choices:
            raise ValueError(f"the input {self.name} has no choices")
        if self.default is not None:
            msgspec.structs.force_setattr(self, "required", False)


class Workflow(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A definition. `run_as`: the roles of runs that a trigger starts; `result`: an expression, the run's result.

    `zone` is the IANA time zone of its cron lines, the device's when it is empty. So many calls run at once in
    `parallel`; 0: those that read do, and acts one by one.
    """

    workflow: Title
    version: str
    steps: Annotated[list[Step], Meta(min_length=1, max_length=100)]
    about: str = ""
    run_as: list[str] = []
    inputs: list[Input] = []
    triggers: list[Trigger] = []
    zone: str = ""
    parallel: Annotated[int, Meta(ge=0, le=16)] = 0
    timeout_s: float = 600.0
    result: str = ""

    def signature(self) -> ToolSpec:
        """The inputs, as the parameters of a tool."""
        return ToolSpec(self.workflow, self.about, [*self.inputs])

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


def read(text: str) -> tuple[Workflow, Marks]:
    """A definition and where its parts stand. Raises Broken."""
    from edge_agent.agent.workflow_yaml import plain  # a device without workflows does not load PyYAML

    marks = Marks()
    if len(text) > MAX_TEXT:
        raise Broken(Problem(1, 1, f"the file is longer than {MAX_TEXT >> 10} KiB"))
    try:
        return msgspec.convert(plain(text, marks), Workflow), marks
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        field = re.search("unknown field `(.*)`", message)
        path = path.strip("`") or "$"
        hint = f"known here: {_fields(path)}" if field else ""
        raise Broken(marks.problem(f"{path}.{field[1]}" if field else path, message, hint)) from error


def _fields(path: str) -> str:
    kind: type[msgspec.Struct] = Workflow
    for name, of in (("steps", Step), ("triggers", Trigger), ("inputs", Input), ("retry", Retry)):
        if re.search(rf"\.{name}(\[\d+\])?$", path):
            kind = of
    return ", ".join(kind.__struct_fields__)


def topic_pattern(topic: str) -> re.Pattern[str]:
    """What a topic filter (OASIS MQTT 5.0, 4.7) matches. Raises ValueError when it is none, or of the broker's own."""
    levels = topic.split("/")
    wild = [level for level in levels if set(level) & set("+#")]
    if not topic or topic.startswith("$") or "\0" in topic or len(topic.encode()) > 1024:
        raise ValueError(f"{topic!r} is no topic of a site")
    if any(level not in ("+", "#") for level in wild) or "#" in levels[:-1]:
        raise ValueError(f"{topic!r}: + stands for one whole level, # for all that is left")
    parts = [{"+": "[^/]*", "#": ".*"}.get(level) or re.escape(level) for level in levels]
    rest = f"(/{parts.pop()})?" if levels[-1] == "#" and len(levels) > 1 else ""
    return re.compile(f"(?!\\$){'/'.join(parts)}{rest}", re.DOTALL)


def compiled(expression: str) -> Any:
    """The expression, ready to run. Raises ValueError."""
    if len(expression) > MAX_EXPRESSION:
        raise ValueError(f"an expression has at most {MAX_EXPRESSION} characters")
    sys.modules.setdefault("cel.cli", ModuleType("cel.cli"))  # its command line would take 15 MB and a second
    import cel

    return cel.compile(expression)


def evaluate(expression: str, context: Mapping[str, Any]) -> Any:
    """The value, plain JSON. Raises ValueError with what is wrong."""
    try:
        value = compiled(expression).execute(dict(context))
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
    if whole := HOLE.fullmatch(value):
        return evaluate(whole[1], context)
    return HOLE.sub(lambda hole: _text(evaluate(hole[1], context)), value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()


def sample(param: Param | None) -> Any:
    """A value of the declared type; None where nothing is declared."""
    if param is None:
        return None
    if param.kind == "dict":
        made = {field.name: sample(field) for field in param.fields}
        units = [field.unit for field in param.fields if field.unit]
        return (made | {"unit": units[0]} if units and made.get("unit") == "text" else made) or None
    if param.kind == "list":
        return [sample(param.items)] if param.items else None
    if param.kind == "choice":
        return param.choices[0]
    low = param.low if param.low is not None else min(1.0, param.high if param.high is not None else 1.0)
    half = float(low) + 0.5 if param.high is None or low + 0.5 <= param.high else float(low)
    return {"int": int(low), "float": half, "bool": True, "str": "text"}[param.kind]
