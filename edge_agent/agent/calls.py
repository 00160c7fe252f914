"""What the model may say, as text and as values: a call, an answer, or nothing.

Invariants: the text form is `name(arg="text", other=2)`, `answer("text")` or `none()`; values are JSON scalars,
arguments are named, in declared order in the canonical form. `parse(render(d)) == d` for every validated decision,
and `grammar.build` accepts exactly what `render` makes. Parsing is bounded and never raises anything but CallError,
whose text is written for the model to read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edge_agent.agent.tool import Param, ToolSpec

MAX_TEXT = 240  # characters of one string value
MAX_DIGITS = 9  # digits before the point of a number
DECIMALS = 4  # digits after it
RESERVED = ("answer", "none")

_NAME = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]{0,62})\s*")
_SCALAR = re.compile(r'"(?:[^"\\\x00-\x1f]|\\.)*"|-?[0-9]{1,18}(?:\.[0-9]{1,18})?|true|false|True|False')
_LIMIT = 8192


class CallError(Exception):
    """The emitted text is no usable call; the message goes back to the model."""


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
    """One JSON scalar; floats in plain decimal notation, always with a point."""
    if isinstance(value, float):
        whole, _, fraction = f"{value:.{DECIMALS}f}".partition(".")
        return f"{whole}.{fraction.rstrip('0') or '0'}"
    return json.dumps(value, ensure_ascii=False)


def parse(text: str) -> Decision:
    """Read what a model emitted. Raises CallError saying what is wrong with it."""
    if len(text) > _LIMIT:
        raise CallError(f"the call is longer than {_LIMIT} characters")
    head = _NAME.match(text)
    if head is None or not text.startswith("(", head.end()):
        raise CallError(f"not a call: {text.strip()[:80]!r}; write name(argument=value)")
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
            args[key[1]], at = _scalar(text, key.end() + 1)
        else:
            value, at = _scalar(text, at)
            positional.append(value)
    if text[at + 1 :].strip():
        raise CallError(f"only one call at a time; left over: {text[at + 1 :].strip()[:60]!r}")
    return _decision(name, args, positional)


def _space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _scalar(text: str, at: int) -> tuple[Any, int]:
    at = _space(text, at)
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
        raise CallError(f"arguments are named: {name}(argument={render_value(positional[0])})")
    return Call(name, args)


def validate(call: Call, specs: Sequence[ToolSpec]) -> Call:
    """The call with its arguments checked, converted and in declared order. Raises CallError with what to change."""
    spec = next((spec for spec in specs if spec.name == call.name), None)
    if spec is None:
        raise CallError(f"unknown tool {call.name}; the tools are: {', '.join(s.name for s in specs) or 'none'}")
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
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match param.kind:
        case "choice" if value in param.choices:
            return value
        case "choice":
            raise CallError(f"{where} is one of {', '.join(param.choices)}, not {render_value(value)}")
        case "str" if isinstance(value, str) and len(value) <= MAX_TEXT:
            return value
        case "bool" if isinstance(value, bool):
            return value
        case "int" if number and math.isfinite(value) and value == int(value):
            return _in_range(where, param, int(value))
        case "float" if number and math.isfinite(value):
            return _in_range(where, param, round(float(value), DECIMALS) + 0.0)
    wanted = {"str": f"a text of at most {MAX_TEXT} characters", "bool": "true or false", "int": "a whole number"}
    raise CallError(f"{where} is {wanted.get(param.kind, 'a number')}, not {str(value)[:60]!r}")


def _in_range(where: str, param: Param, value: int | float) -> int | float:
    low = -(10**MAX_DIGITS) + 1 if param.low is None else param.low
    high = 10**MAX_DIGITS - 1 if param.high is None else param.high
    if not low <= value <= high:
        raise CallError(f"{where} is out of range: {low:g} to {high:g}{param.unit and ' '}{param.unit}, not {value}")
    return value
