"""What the model may say, as text and as values: a call, an answer, or nothing.

Invariants: the text form is `name(arg="text", other=2)`, `answer("text")` or `none()`; values are JSON (a few levels
deep), arguments are named, in declared order in the canonical form; several calls stand one on each line, and then
an argument may be `$1` or `$1.field`: the result of the first of them, or a field of it.
`parse(render(d)) == d` for every validated decision, and `grammar.build` accepts exactly what `render` makes. Parsing
is bounded and never raises anything but CallError, whose text is written for the model to read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import msgspec

from edge_agent.agent.tool import Kind, Param, ToolSpec

MAX_TEXT = 240  # characters of one string value
MAX_DIGITS = 15  # digits before the point of a number
DECIMALS = 10  # digits after it
MAX_DEPTH = 5  # lists and dicts inside each other
QUOTED = 60  # characters of what was wrong that an error repeats
RESERVED = ("answer", "none")

_NAME = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]{0,62})\s*")
_SCALAR = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"|-?[0-9]{1,18}(?:\.[0-9]{1,18})?|true|false|True|False')
REF = re.compile(r"\$([1-9])(?:\.([A-Za-z_][A-Za-z0-9_]{0,62}))?(?![\w.])")
_LIMIT = 8192


class CallError(Exception):
    """The emitted text is no usable call; the message goes back to the model."""


class UnknownTool(CallError):
    """It names a tool that there is not."""

    def __init__(self, name: str, names: Sequence[str]) -> None:
        super().__init__(f"unknown tool {name}; the tools are: {', '.join(names) or 'none'}")
        self.name = name


class Ref(msgspec.Struct, frozen=True):
    """What the `n`th call of the same turn gives, or a field of it."""

    n: int
    field: str = ""

    def __str__(self) -> str:
        return f"${self.n}{self.field and '.'}{self.field}"


class Call(msgspec.Struct, frozen=True, tag="call"):
    """One call of a tool, by argument name."""

    name: str
    args: dict[str, Any]


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Text for the person who asked."""

    text: str


class Nothing(msgspec.Struct, frozen=True, tag="none"):
    """No tool fits, or nothing is left to do."""


Decision = Call | Answer | Nothing


def render(decision: Decision) -> str:
    """The canonical text; arguments keep the order of the dict, which `validate` makes the declared one."""
    match decision:
        case Call(name, args):
            return f"{name}({', '.join(f'{key}={render_value(value)}' for key, value in args.items())})"
        case Answer(text):
            return f"answer({render_value(text)})"
        case _:
            return "none()"


def render_value(value: Any) -> str:
    """One JSON value; floats in plain decimal notation, always with a point."""
    if isinstance(value, list):
        return f"[{', '.join(map(render_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{render_value(key)}: {render_value(item)}' for key, item in value.items())}}}"
    if isinstance(value, Ref):
        return str(value)
    if isinstance(value, float):
        whole, _, fraction = f"{value:.{DECIMALS}f}".partition(".")
        return f"{whole}.{fraction.rstrip('0') or '0'}"
    return json.dumps(value, ensure_ascii=False)


def render_all(decisions: Sequence[Decision]) -> str:
    """Several decisions, one on each line; `none()` when there are none."""
    return "\n".join(map(render, decisions)) or render(Nothing())


def parse_all(text: str) -> list[Decision]:
    """Read every call that a model emitted; one that is said again is the same call.

    Raises CallError saying what is wrong with the first bad one.
    """
    if len(text) > _LIMIT:
        raise CallError(f"the calls are longer than {_LIMIT} characters")
    found: list[Decision] = []
    at = 0
    while not found or at < len(text):
        decision, at = _call(text, at)
        if decision not in found:
            found.append(decision)
    return found


def parse(text: str) -> Decision:
    """Read what a model emitted. Raises CallError saying what is wrong with it."""
    if len(text) > _LIMIT:
        raise CallError(f"the call is longer than {_LIMIT} characters")
    decision, at = _call(text, 0)
    if at < len(text):
        raise CallError(f"only one call at a time; left over: {text[at:].strip()[:60]!r}")
    return decision


def _call(text: str, at: int) -> tuple[Decision, int]:
    """The call that begins at `at`, and where the next thing begins."""
    start, head = at, _NAME.match(text, at)
    if head is None or not text.startswith("(", head.end()):
        raise CallError(f"not a call: {text[start:].strip()[:80]!r}; write name(argument=value)")
    name, at = head[1], _space(text, head.end() + 1)
    args: dict[str, Any] = {}
    positional: list[Any] = []
    while not text.startswith(")", at):
        if args or positional:
            if not text.startswith(",", at):
                raise CallError(f"expected , or ) after {text[:at].strip()[-60:]!r}")
            at += 1
        key = _NAME.match(text, at)
        if key and text.startswith("=", key.end()):
            if key[1] in args:
                raise CallError(f"argument {key[1]} is given twice")
            args[key[1]], at = _read(text, key.end() + 1)
        else:
            value, at = _read(text, at)
            positional.append(value)
    return _decision(name, args, positional), _space(text, at + 1)


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _read(text: str, at: int, depth: int = 0) -> tuple[Any, int]:
    """A JSON value and where the text goes on behind it."""
    at = _space(text, at)
    if not text.startswith(("[", "{"), at):
        return _scalar(text, at)
    if depth >= MAX_DEPTH:
        raise CallError(f"lists and dicts are at most {MAX_DEPTH} deep")
    close = "]" if text[at] == "[" else "}"
    items: list[Any] = []
    pairs: dict[str, Any] = {}
    at = _space(text, at + 1)
    while not text.startswith(close, at):
        if items or pairs:
            if not text.startswith(",", at):
                raise CallError(f"expected , or {close} at {text[at : at + 40]!r}")
            at += 1
        value, at = _read(text, at, depth + 1)
        if close == "]":
            items.append(value)
        elif not isinstance(value, str) or not text.startswith(":", at):
            raise CallError(f'expected "key": value at {text[at : at + 40]!r}')
        else:
            pairs[value], at = _read(text, at + 1, depth + 1)
    return items if close == "]" else pairs, _space(text, at + 1)


def _scalar(text: str, at: int) -> tuple[Any, int]:
    if ref := REF.match(text, at):
        return Ref(int(ref[1]), ref[2] or ""), _space(text, ref.end())
    found = _SCALAR.match(text, at)
    if found is None:
        raise CallError(f'expected "text", a number, true or false at {text[at : at + 40]!r}')
    raw = found[0].lower() if found[0] in ("True", "False") else found[0]
    try:
        value = json.loads(raw)
        if isinstance(value, str):
            value.encode()
    except ValueError as error:
        raise CallError(f"bad value {raw[:60]!r}: {error}") from error
    return value, _space(text, found.end())


def _decision(name: str, args: dict[str, Any], positional: list[Any]) -> Decision:
    if name == "answer":
        said = positional or list(args.values())
        if len(said) != 1 or not isinstance(said[0], str):
            raise CallError('answer takes one text: answer("...")')
        return Answer(said[0])
    if name == "none":
        if args or positional:
            raise CallError("none takes no arguments: none()")
        return Nothing()
    if positional:
        raise CallError(f"arguments are named: {name}(argument={render_value(positional[0])[:QUOTED]})")
    return Call(name, args)


def validate(call: Call, specs: Sequence[ToolSpec]) -> Call:
    """The call with its arguments checked, converted and in declared order. Raises CallError with what to change."""
    spec = next((spec for spec in specs if spec.name == call.name), None)
    if spec is None:
        raise UnknownTool(call.name, [spec.name for spec in specs])
    names = [param.name for param in spec.params]
    unknown = [name for name in call.args if name not in names]
    if unknown:
        raise CallError(f"{spec.name} has no argument {unknown[0]}; it takes: {', '.join(names) or 'nothing'}")
    return Call(spec.name, _arguments(spec, call.args))


def _arguments(spec: ToolSpec, args: Mapping[str, Any]) -> dict[str, Any]:
    checked: dict[str, Any] = {}
    for param in spec.params:
        if param.name in args:
            checked[param.name] = _value(spec.name, param, args[param.name])
        elif param.required:
            raise CallError(f"{spec.name} needs the argument {param.name}")
    return checked


def _value(tool: str, param: Param, value: Any) -> Any:
    where = f"{param.name} of {tool}"
    made = _typed(tool, where, param, value)
    if why := param.refused(made):
        raise CallError(f"{where} {why}")
    return made


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a number, as no truth value is."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _typed(tool: str, where: str, param: Param, value: Any) -> Any:
    number = is_number(value) and abs(value) < 1e300  # not NaN either
    match param.kind:
        case "choice" if value in param.choices:
            return value
        case "choice":
            raise CallError(f"{where} is one of {', '.join(param.choices)}, not {render_value(value)[:QUOTED]}")
        case "str" if isinstance(value, str) and len(value) <= MAX_TEXT:
            return value
        case "bool" if isinstance(value, bool):
            return value
        case "list" if isinstance(value, list):
            return [_value(tool, param.items, item) if param.items else _plain(where, item) for item in value]
        case "dict" if isinstance(value, dict):
            return _fields(where, param, value) if param.fields else _plain(where, value)
        case "int" if number and value == int(value):
            return _in_range(where, param, int(value))
        case "float" if number:
            return _in_range(where, param, round(float(value), DECIMALS) + 0.0)
    wanted = {"list": "a list like [1, 2]", "dict": 'a dict like {"key": 1}'}
    wanted |= {"str": f"a text of at most {MAX_TEXT} characters", "bool": "true or false", "int": "a whole number"}
    raise CallError(f"{where} is {wanted.get(param.kind, 'a number')}, not {str(value)[:QUOTED]!r}")


def _fields(where: str, param: Param, value: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in param.fields]
    if unknown := [key for key in value if key not in names]:
        raise CallError(f"{where} has no key {unknown[0][:QUOTED]}; its keys are: {', '.join(names)}")
    if missing := [field.name for field in param.fields if field.required and field.name not in value]:
        raise CallError(f"{where} needs the key {missing[0]}")
    return {f.name: _value(where, f, value[f.name]) for f in param.fields if f.name in value}


def _plain(where: str, value: Any, depth: int = MAX_DEPTH + 1) -> Any:
    """Any JSON value, with its depth, texts and numbers bounded."""
    if not depth:
        raise CallError(f"{where} is nested deeper than {MAX_DEPTH}")
    if isinstance(value, list):
        return [_plain(where, item, depth - 1) for item in value]
    if isinstance(value, dict):
        return {_plain(where, key): _plain(where, item, depth - 1) for key, item in value.items()}
    kind: Kind = "bool" if isinstance(value, bool) else "int" if isinstance(value, int) else "str"
    return _value(where, Param("value", "float" if isinstance(value, float) else kind), value)


def _in_range(where: str, param: Param, value: int | float) -> int | float:
    low = -(10**MAX_DIGITS) + 1 if param.low is None else param.low
    high = 10**MAX_DIGITS - 1 if param.high is None else param.high
    if not low <= value <= high:
        raise CallError(f"{where} is out of range: {low:g} to {high:g}{param.unit and ' '}{param.unit}, not {value}")
    return value
