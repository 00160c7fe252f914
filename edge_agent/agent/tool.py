"""What a tool is: a typed function whose signature is the schema and whose docstring is the prompt.

Invariants: a `ToolSpec` is plain data that crosses processes and is the only thing prompt, grammar, policy and
validation read; `Tool` adds the function itself and exists only in the process that runs it. A parameter is an
int, a float, a bool, a str, a choice of literals, a list of one of these, or a dict (with declared fields, or with
free keys); anything else is refused when the tool is declared. A function with a parameter `key` does its effect once
for each value of it: the device makes a call whose effect is unknown again with the same key. One with a parameter
`subject` is told who asks. What a tool declares beside its function (rate, permission, check, undo) the device holds it
to, not the tool (act.py).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    TypedDict,
    Unpack,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import msgspec

from edge_agent.wire.grants import Subject
from edge_agent.wire.tensor import Tensor

Risk = Literal["read", "act", "danger"]
Kind = Literal["int", "float", "bool", "str", "choice", "list", "dict"]
_KINDS: dict[type, Kind] = {int: "int", float: "float", bool: "bool", str: "str"}
_RATE = re.compile(r"([1-9][0-9]{0,5})/(s|min|h|day)")
_SECONDS = {"s": 1.0, "min": 60.0, "h": 3600.0, "day": 86400.0}


class ToolError(Exception):
    """An ordinary failure of a tool: its text goes back to the model as the result."""


class Context(Protocol):
    """What a running tool may ask of the device; a tool takes it as a parameter named `ctx`."""

    def infer(self, model: str, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run an installed network. Raises ToolError when it is not installed or refuses the inputs."""
        ...

    def now(self) -> float:
        """Seconds since the Unix epoch, by the device's trusted clock."""
        ...


class Range(msgspec.Struct, frozen=True):
    """Bounds (inclusive) and unit of a number: `Annotated[int, Range(1, 3)]`."""

    low: float | None = None
    high: float | None = None
    unit: str = ""


class ForLater(msgspec.Struct, frozen=True):
    """What will be a request, or go with one: `Annotated[str, ForLater()]`; a model adds nothing to it (said.py)."""


class Param(msgspec.Struct, frozen=True):
    """One parameter of a tool as prompt, grammar and validation see it.

    `items` describes the elements of a list (None: any), `fields` the keys of a dict (empty: any keys); `about` is a
    short note on the value that the model reads; a number is one of `values`, where there are some.
    """

    name: str
    kind: Kind
    choices: list[str] = []
    low: float | None = None
    high: float | None = None
    unit: str = ""
    required: bool = True
    default: Any = None
    about: str = ""
    items: Param | None = None
    fields: list[Param] = []
    values: list[float] = []
    later: bool = False

    def refused(self, value: Any) -> str:
        """Why a value of the right type may not be it, or an empty text."""
        return f"is not {value}: nobody said that number" if self.values and value not in self.values else ""


class Check(msgspec.Struct, frozen=True):
    """How the device sees that an act did what it said: `value` of the result of a reading `tool` is `equals`.

    Arguments and `equals` are values, `$name` of an argument of the act, or `$result.name` of what it gave; `value` is
    empty for the whole result. It is read again until it is `within` that of it (numbers) or `wait_s` are over.
    """

    tool: str
    args: dict[str, Any]
    equals: Any
    value: str = "value"
    within: float = 0.0
    wait_s: float = 0.0


class Undo(msgspec.Struct, frozen=True):
    """The call that takes an act back: values, `$name` of the act's arguments, or `$result.name` of what it gave."""

    tool: str
    args: dict[str, Any] = {}


class ToolSpec(msgspec.Struct, frozen=True):
    """The declaration of a tool, without its function.

    `returns` is what it gives, as far as the function says; `keyed`: it takes the key of a call, `asked`: who asks.
    `rate` is like "6/min" (s, min, h, day); `permission` is `verb:noun`, needed beside the one that its risk implies.
    A `concurrent` function may run in several threads at once; of all others one runs at a time. `typical_s` is how
    long a call takes, where that is known; 0: it is not.
    """

    name: str
    description: str
    params: list[Param]
    risk: Risk = "read"
    idempotent: bool = True
    timeout_s: float = 10.0
    examples: list[tuple[str, dict[str, Any]]] = []
    returns: Param | None = None
    keyed: bool = False
    asked: bool = False
    rate: str = ""
    permission: str = ""
    check: Check | None = None
    undo: Undo | None = None
    concurrent: bool = False
    typical_s: float = 0.0

    def __post_init__(self) -> None:
        if self.rate and not _RATE.fullmatch(self.rate):
            raise TypeError(f"tool {self.name}: the rate {self.rate!r} is not like 6/min (s, min, h or day)")
        if self.permission and not re.fullmatch(r"[a-z-]+:[a-z-]+", self.permission):
            raise TypeError(f"tool {self.name}: the permission {self.permission!r} is not like open:valve")
        if self.risk == "read" and (self.check or self.undo):
            raise TypeError(f"tool {self.name} only reads: it has nothing to check or to undo")
        names = [param.name for param in self.params]
        for hook in (self.check, self.undo):
            for text in (*hook.args.values(), getattr(hook, "equals", None)) if hook else ():
                name = text[1:] if isinstance(text, str) and text.startswith("$") else ""
                if name and name not in names and name.partition(".")[0] != "result":
                    raise TypeError(
                        f"tool {self.name}: {text} is no argument of it: {', '.join(names) or 'it has none'}"
                    )

    def __hash__(self) -> int:
        return hash((self.name, self.description))

    @property
    def limit(self) -> tuple[int, float] | None:
        """So many calls in so many seconds."""
        found = _RATE.fullmatch(self.rate)
        return (int(found[1]), _SECONDS[found[2]]) if found else None

    @property
    def repeatable(self) -> bool:
        """A call of unknown effect may be made again."""
        return self.idempotent or self.keyed

    def keyed_args(self, args: dict[str, Any], key: str, subject: Subject) -> dict[str, Any]:
        """The arguments of a call, with its key and who asks where the tool takes them."""
        asked = {"subject": msgspec.to_builtins(subject)} if self.asked else {}
        return args | ({"key": key} if self.keyed else {}) | asked


class Tool(msgspec.Struct, frozen=True):
    """A declared tool with its function, in the process that runs it."""

    spec: ToolSpec
    function: Callable[..., Any]
    wants_context: bool


class Declared(TypedDict, total=False):
    """What a declaration says beside the function; see `ToolSpec`."""

    risk: Risk
    idempotent: bool
    timeout_s: float
    examples: list[tuple[str, dict[str, Any]]]
    rate: str
    permission: str
    check: Check
    undo: Undo
    concurrent: bool
    typical_s: float


def tool(**declared: Unpack[Declared]) -> Callable[[Callable[..., Any]], Tool]:
    """Declare a function as a tool; bound methods go through `declare`. The first docstring line is the description."""
    return partial(declare, **declared)


def declare(function: Callable[..., Any], **declared: Unpack[Declared]) -> Tool:
    """Make a Tool of a typed function. Raises TypeError when a parameter has no type a model can fill in, or a
    declaration is none."""
    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    doc = (inspect.getdoc(function) or "").strip().split("\n")[0]
    if not doc:
        raise TypeError(f"tool {function.__name__} has no docstring; its first line is what the model reads")
    params = [
        _param(function.__name__, name, hints.get(name), p.default)
        for name, p in signature.parameters.items()
        if name not in ("ctx", "self", "key", "subject")
    ]
    try:
        returns = _param(function.__name__, "result", hints.get("return"), inspect.Parameter.empty)
    except TypeError:
        returns = None  # anything
    taken = {"keyed": "key" in signature.parameters, "asked": "subject" in signature.parameters}
    spec = ToolSpec(function.__name__, doc, params, returns=returns, **taken, **declared)
    return Tool(spec, function, "ctx" in signature.parameters)


def _param(tool_name: str, name: str, hint: Any, default: Any) -> Param:
    bounds, later = Range(), False
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        bounds = next((e for e in extras if isinstance(e, Range)), bounds)
        later = ForLater() in extras
    required = default is inspect.Parameter.empty
    fallback = None if required else default
    if get_origin(hint) is Literal:
        choices = [str(c) for c in get_args(hint)]
        return Param(name, "choice", choices=choices, required=required, default=fallback)
    if get_origin(hint) is list:
        items = _param(tool_name, name, get_args(hint)[0], inspect.Parameter.empty)
        return Param(name, "list", required=required, default=fallback, items=items)
    if is_typeddict(hint):
        typed = get_type_hints(hint, include_extras=True)
        fields = [_param(tool_name, key, of, inspect.Parameter.empty) for key, of in typed.items()]
        fields = [msgspec.structs.replace(f, required=f.name in hint.__required_keys__) for f in fields]
        return Param(name, "dict", required=required, default=fallback, fields=fields)
    if hint is dict or get_origin(hint) is dict:
        return Param(name, "dict", required=required, default=fallback, later=later)
    kind = _KINDS.get(hint)
    if kind is None:
        hint_text = "use int, float, bool, str, Literal, list[...] or dict"
        raise TypeError(f"tool {tool_name}: parameter {name} has type {hint!r}; {hint_text}")
    return Param(name, kind, [], bounds.low, bounds.high, bounds.unit, required, fallback, later=later)
