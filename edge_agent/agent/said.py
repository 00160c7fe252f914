"""Tools as a request says their numbers, so that an act gets none that nobody said.

Invariants: pure; only acts are held to it. What an act is done to (a whole number without a unit: line, valve, dock)
and a percentage must be said: in the request or an earlier one (spoken.py), or by a typed field of a result; "half" and
"flat out" are parts of the range. So must a number with decimals and no unit, unless nothing that is said is in its
range. Amounts with a unit can be converted, so it is enough that some number is said for them. Words like "all",
"other" or "than" say numbers that are not written; a note of a parameter that holds digits ("1: filling, 2: packing")
gives them other names; where more than MAX_VALUES are said, all may be meant: these leave the model free. What no
number is said for is left out: an optional argument, else the act. What a model writes for later (`ForLater`), a
request or a workflow's inputs, says no such number or word that is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from msgspec.structs import asdict, replace

from edge_agent.agent.calls import DECIMALS, MAX_DIGITS, Call, CallError, is_number, render_value, validate
from edge_agent.agent.spoken import AMOUNT, said
from edge_agent.agent.taint import HIDDEN, texts, without
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.agent.transcript import Task

MAX_VALUES, MAX_NAMED = 64, 5
_ANY = re.compile(
    r"(?<!\bat )(?<!that's )\ball\b(?! right)|\bthe (?:left|right)\b|\b(?:les|las|los) (?:deux|dos)\b"
    r"|\b(?:both|each|every\w*|entire|whole|others?|another|rest|remaining|last|next|previous|middle|dozen|pair|couple"
    r"|alle[mnrs]?|beide[nrs]?|jede[mnrs]?|ganze[nrs]?|andere[mnrs]?|übrigen|letzte[nrs]?|mittlere[nrs]?"
    r"|tou(?:s|te|tes)|chaque|autres?|dernière|tod[oa]s?|amb[oa]s|cada|otr[oa]s?|últim[oa])\b",
    re.IGNORECASE,
)
_RELATIVE = re.compile(
    r"\b(?:by|um|de) (?:\d|a |half)|\b\d[^.,;]{0,12}\b(?:more|less|faster|slower|higher|lower|mehr|weniger)\b"
    r"|\b(?:double|twice|triple|plus|minus|than|times|as much|same|normal|usual|default|minimum|slowest|lowest|doppelt"
    r"|gleiche[nrs]?|minimal|doble|mism[oa]|même|mínim[oa])\b",
    re.IGNORECASE,
)


class _Known(NamedTuple):
    texts: list[str]
    every: bool  # a word of them leaves what is acted on free
    relative: bool  # one leaves the amounts free
    requests: frozenset[float]
    targets: list[int]  # of requests and results
    results: frozenset[float]
    parts: frozenset[float]
    many: int
    amount: bool
    names: frozenset[str]  # of what is acted on


class _Later(Param, frozen=True):
    """Words that a model writes for later: they say nothing that is not known now."""

    known: _Known | None = None

    def refused(self, value: Any) -> str:
        new = _new(re.sub(r"\\.", " ", render_value(value)), self.known) if self.known else ""
        return f"says {new}, which nobody said here: only what was said, not quoted, can be done later" if new else ""


def narrow(specs: Sequence[ToolSpec], task: Task, heard: bool = False) -> list[ToolSpec]:
    """The tools as this task may call them: an act's numbers are those that are said; without them it is left out.

    With `heard` untrusted texts say numbers too: for a call that a person has to approve.
    """
    if all(spec.risk == "read" for spec in specs):
        return list(specs)
    known = _know(specs, task, heard)
    if len(known.requests) > MAX_VALUES:
        return list(specs)
    narrowed = (spec if spec.risk == "read" else _narrow(spec, known) for spec in specs)
    return [spec for spec in narrowed if spec is not None]


def added(call: Call, specs: Sequence[ToolSpec], task: Task) -> list[str]:
    """The arguments of a call that say what was not said: `line 2`."""
    spec, known, found = next(spec for spec in specs if spec.name == call.name), _know(specs, task), list[str]()
    for param in spec.params:
        if param.name in call.args:
            one, held = Call(call.name, {param.name: call.args[param.name]}), _all([param], known)
            try:
                validate(one, [replace(spec, params=held or [])])
            except CallError:
                found.append(f"{param.name} {render_value(call.args[param.name])}")
    return found


def _know(specs: Sequence[ToolSpec], task: Task, heard: bool = False) -> _Known:
    request, earlier = said(task.text), [said(each.text) for each in task.before]
    others = list(map(said, texts(task, {spec.name: spec for spec in specs}))) if heard else []
    read = [request.text, *(each.text for each in (*others, *(() if request.many else earlier[-1:])))]
    requests = request.numbers.union(*(each.numbers for each in (*earlier, *others)))
    parts = request.parts.union(*(each.parts for each in others))
    results = frozenset(_results(task, specs))
    targets = sorted(int(number) for number in requests | results if number == int(number))
    many = request.many + len(parts) + sum(each.many for each in (*earlier, *others))
    every, relative = (any(words.search(text) for text in read) for words in (_ANY, _RELATIVE))
    top = max((param.high or 0.0 for spec in specs for param in spec.params if _target(param)), default=0.0)
    if every and many == 1 and not parts and max(requests, default=0.0) <= top:
        relative = True  # "everything on 3": the number is what is acted on, and how much stands in words
    names = frozenset(name for spec in specs for name in _names(spec.params))
    amount = request.amount or any(each.amount for each in others)
    return _Known(read, every, relative, requests, targets, results, parts, many, amount, names)


def _new(text: str, known: _Known) -> str:
    """The first of what a text says that is not known: a number, or a word that would leave one open."""
    says = said(text)
    have = known.requests.union(known.results, (100 * part for part in known.parts))
    numbers = sorted(says.numbers.union(100 * part for part in says.parts) - have)
    open_ = [(_ANY, known.every), (_RELATIVE, known.relative), (AMOUNT, known.amount)]
    open_ += [(words, any(map(words.search, known.texts))) for words in map(_plural, known.names)]
    words = [found[0] for each, free in open_ if not free and (found := each.search(says.text))]
    return next((new for new in (HIDDEN * (HIDDEN in text), *(f"{n:.15g}" for n in numbers), *words) if new), "")


def unsaid(specs: Sequence[ToolSpec], fit: Sequence[ToolSpec]) -> list[str]:
    """The numbers that acts left out need, the first few."""
    left = {spec.name for spec in fit}
    names = (param.name for spec in specs if spec.name not in left for param in _needed(spec.params))
    return list(dict.fromkeys(names))[:MAX_NAMED]


def _narrow(spec: ToolSpec, known: _Known) -> ToolSpec | None:
    needed = [param for param in _needed(spec.params) if not _free(param, known)]
    in_words = known.amount and any(param.unit not in ("", "%") for param in needed)
    if len(needed) > known.many + in_words and not known.results:
        return None
    params = _all(spec.params, known)
    return None if params is None else replace(spec, params=params)


def _needed(params: Sequence[Param]) -> Iterator[Param]:
    """The numbers that a call cannot be without; of a list, what its items are."""
    for param in params:
        if param.required and param.items is not None:
            yield from _needed([_item(param, param.items)])
        elif param.required:
            yield from _needed(param.fields)
        if param.required and _held(param):
            yield param


def _all(params: Sequence[Param], known: _Known) -> list[Param] | None:
    """Held to what is known; None when one that is required has no number."""
    held = [(param, _held_to(param, known)) for param in params]
    if any(param.required and made is None for param, made in held):
        return None
    return [made for _, made in held if made is not None]


def _held_to(param: Param, known: _Known) -> Param | None:
    """None when nobody said a number for it. Out of range only what is said and nothing else: that is refused by its
    name."""
    if param.later:
        return _Later(**asdict(param), known=known)
    if param.items is not None:
        items = _held_to(_item(param, param.items), known)
        return None if items is None else replace(param, items=items)
    if param.fields:
        fields = _all(param.fields, known)
        return None if fields is None else replace(param, fields=fields)
    if not _held(param) or param.unit not in ("", "%") or _free(param, known):
        return param
    if known.results and not _target(param):
        return param
    low, high = (-math.inf if param.low is None else param.low), (math.inf if param.high is None else param.high)
    values = known.targets if _target(param) else sorted(_values(param, known))
    within = [value for value in values if low <= value <= high]
    if len(within) > MAX_VALUES or (values and not within and param.kind == "float" and not param.unit):
        return param
    return replace(param, values=within or values[:MAX_VALUES]) if values else None


def _values(param: Param, known: _Known) -> set[float]:
    """What is said, as a percentage or a number with decimals can have it."""
    low, high = param.low or 0.0, 100.0 if param.high is None else param.high
    numbers = {*known.requests, *(low + part * (high - low) for part in known.parts)}
    if param.unit:
        numbers |= {100 * part for part in (*known.parts, *known.requests) if 0 < part < 1}
    else:
        numbers |= {number / 100 for number in known.requests if high == 1}
        numbers |= {number + part for number in known.requests for part in known.parts if part < 1}
    if param.kind == "int":
        return {rounded(number) for number in numbers for rounded in (math.floor, math.ceil)}
    return {int(number) if number == int(number) else round(number, DECIMALS) for number in numbers}


def _item(of: Param, items: Param) -> Param:
    """What a list has, under a name of its own: `lines` are of each a line."""
    return replace(items, name=of.name.removesuffix("s"), required=True)


def _free(param: Param, known: _Known) -> bool:
    if not _target(param):
        return known.relative
    return known.every or any(map(_plural(param.name).search, known.texts))


def _plural(name: str) -> re.Pattern[str]:
    return re.compile(rf"\b{re.escape(name.partition('_')[0])}s\b(?!\W*\d)", re.IGNORECASE)


def _names(params: Sequence[Param]) -> Iterator[str]:
    for param in params:
        yield from _names(param.fields if param.items is None else [_item(param, param.items)])
        if _target(param):
            yield param.name


def _held(param: Param) -> bool:
    return param.kind in ("int", "float") and not re.search(r"\d", param.about)


def _target(param: Param) -> bool:
    return param.kind == "int" and not param.unit


def _results(task: Task, specs: Sequence[ToolSpec]) -> Iterator[float]:
    returns = {spec.name: spec.returns for spec in specs}
    for step in task.steps:
        if step.role == "tool" and step.ok:
            yield from _numbers(without(step.result, returns.get(step.call.name) if step.call else None))


def _numbers(value: Any) -> Iterator[float]:
    """Of a result with no text in it but declared choices."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, str):
        yield from map(float, re.findall(rf"\d{{1,{MAX_DIGITS}}}", value))
    elif is_number(value) and abs(value) < 10**MAX_DIGITS:  # not NaN
        yield float(value)
