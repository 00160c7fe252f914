"""Which numbers a request says, so that an act gets none that nobody said.

Invariants: pure; only acts are held to it. What an act is done to (a whole number without a unit: line, valve, dock)
and a percentage must be said: in the request or an earlier one, as digits or words (of seven languages),
or by a typed field of a result; "half" and "flat out" are parts of the range. Other amounts can be converted, so it is
enough that some number is said for them. Words like "all", "other" or "than" say numbers that are not written;
a note of a parameter that holds digits ("1: filling, 2: packing") gives them other names: both leave the model free.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.agent.transcript import Task

MAX_SPAN = 64
LANGUAGES = ("en", "de", "fr", "es", "it", "nl", "pt")  # of text2num
_NUMBER = re.compile(r"(?:(?<=\s)-)?\d{1,15}(?:[.,]\d{1,10})?")
_THOUSANDS = re.compile(r"(?<=\d)[,.](?=\d{3}\b)")
_SPAN = re.compile(  # lines 1 to 3, from 1 to 3, 1-3; not: line 2 to 40
    r"\b(?:[^\W\d]+s|from|von|de|da)\s+(\d+)\w*\s+(?:to|bis|tot|à|a)\s+(\d+)|\b(\d+)\s?(?:[-–]|through)\s?(\d+)\b",
    re.IGNORECASE,
)
_ROMAN = {"II": 2.0, "III": 3.0, "IV": 4.0, "V": 5.0, "VI": 6.0, "VII": 7.0, "VIII": 8.0, "IX": 9.0, "X": 10.0}
_NO_NUMBER = re.compile(  # pronouns and articles
    r"\b(?:no|any|some|this|that|the|which|every|each|another|other) one\b"
    r"|(?<!\bet )\b(?:un|une|una|um|uma|een|ein|eine[mnrs]?)\b(?= \w)",
    re.IGNORECASE,
)
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
_PARTS = {
    2: "half|halve[ds]?|hälfte|halb|halbe[mnrs]?|moitié|mitad",
    3: "thirds?|3rds?|drittel|tiers|tercios?",
    4: "quarters?|viertel|quart|cuartos?",
    5: "fifths?|5ths?|fünftel",
    10: "tenths?|10ths?|zehntel",
}
_A = r"(?:a|an|one|1|ein|eine[mnrs]?|un|une)\s+"  # a third, not the third
_PART = re.compile(
    "|".join(
        rf"\b(?:(?P<n{whole}>[2-9])\s+|{'' if whole in (2, 4) else _A})(?P<of{whole}>{words})\b"
        for whole, words in _PARTS.items()
    ),
    re.IGNORECASE,
)
_WHOLE = re.compile(
    r"\b(?:full|flat out|all out|maximum|max|top speed|volle?[mnrs]?|vollgas|maximal|plein|fond|tope|máxim[oa])\b",
    re.IGNORECASE,
)


class Said(NamedTuple):
    """A text with its numbers as digits; each number as often as it is said; parts of a whole (0 to 1)."""

    text: str
    numbers: tuple[float, ...]
    parts: tuple[float, ...]


@lru_cache(64)
def said(text: str) -> Said:
    """In the language that finds most numbers in it."""
    from text_to_num import alpha2digit  # when a request comes, not when the daemon starts

    read = [(alpha2digit(_NO_NUMBER.sub(" ", text), language, 0.0), language) for language in LANGUAGES]
    found, language = max(read, key=lambda each: len(_NUMBER.findall(each[0])))
    whole = alpha2digit(text, language, 0.0)
    plain = _THOUSANDS.sub("", _PART.sub("", found))
    numbers = [float(number.replace(",", ".")) for number in _NUMBER.findall(plain)]
    numbers += [_ROMAN[word] for word in re.findall(r"\b[IVX]+\b", text) if word in _ROMAN]
    for ends in _SPAN.findall(found):
        low, high = (int(end) for end in ends if end)
        if 0 < high - low <= MAX_SPAN:
            numbers += map(float, range(low + 1, high))
    return Said(whole, tuple(numbers), tuple(_parts(whole)))


def _parts(text: str) -> list[float]:
    found = (match.groupdict() for match in _PART.finditer(text))
    parts = [int(got[f"n{n}"] or 1) / n for got in found for n in _PARTS if got[f"of{n}"]]
    return parts or [1.0] * bool(_WHOLE.search(text))


def narrow(specs: Sequence[ToolSpec], task: Task) -> list[ToolSpec]:
    """The tools as this task may call them: an act's numbers are those that are said; without them it is left out."""
    narrowed = (spec if spec.risk == "read" else _narrow(spec, task) for spec in specs)
    return [spec for spec in narrowed if spec is not None]


def unsaid(specs: Sequence[ToolSpec], fit: Sequence[ToolSpec]) -> list[str]:
    """The numbers that acts left out need."""
    left = {spec.name for spec in fit}
    names = (param.name for spec in specs if spec.name not in left for param in spec.params if _held(param))
    return list(dict.fromkeys(names))


def _narrow(spec: ToolSpec, task: Task) -> ToolSpec | None:
    if not (held := [param for param in spec.params if _held(param)]):
        return spec
    request, results = said(task.text), list(_results(task))
    numbers = [*request.numbers, *(n for each in task.before for n in said(each.text).numbers)]
    free = {param.name for param in held if _free(param, request.text)}
    needed = [param for param in held if param.required and param.name not in free]
    if len(needed) > len(numbers) + len(request.parts) and not results:
        return None
    params = list[Param]()
    for param in spec.params:
        if param not in held or param.name in free or (results and not _target(param)):
            params.append(param)
        else:
            parts = [] if _target(param) else [_share(param, part) for part in request.parts]
            params.append(_held_to(param, sorted({*numbers, *parts, *(results if _target(param) else ())})))
    return msgspec.structs.replace(spec, params=params)


def _free(param: Param, text: str) -> bool:
    if not _target(param):
        return bool(_RELATIVE.search(text))
    return bool(_ANY.search(text) or re.search(rf"\b{re.escape(param.name)}s\b(?!\W*\d)", text, re.IGNORECASE))


def _share(param: Param, part: float) -> float:
    """A part of what the parameter can be, "half" of 0..100."""
    low, high = param.low or 0.0, 100.0 if param.high is None else param.high
    return round(low + part * (high - low))


def _held_to(param: Param, said: Sequence[float]) -> Param:
    """Out of range only what is said and nothing else: that is refused by its name."""
    if param.unit not in ("", "%"):
        return param
    known: list[float] = [int(value) if value == int(value) else value for value in said]
    values = [v for v in known if param.kind == "float" or isinstance(v, int)]
    low, high = (-math.inf if param.low is None else param.low), (math.inf if param.high is None else param.high)
    return msgspec.structs.replace(param, values=[v for v in values if low <= v <= high] or values)


def _held(param: Param) -> bool:
    return param.kind in ("int", "float") and not re.search(r"\d", param.about)


def _target(param: Param) -> bool:
    return param.kind == "int" and not param.unit


def _results(task: Task) -> Iterator[float]:
    for step in task.steps:
        if step.role == "tool" and step.ok:
            yield from _numbers(step.result)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield float(value)
