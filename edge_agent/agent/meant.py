"""What a small model's call means by what it has read: no option that nobody gave a reason for, per cent as hundredths.

Invariants: pure; what is required stays, and so does an option of which one word, number or, for a truth value, word
of its name is in the texts; languages but English have other words for it: there numbers alone are judged. A number
that a text says in per cent is hundredths, unless the parameter is in per cent itself, or a whole number. Measured on
BFCL's development split: of 46 options without a reason 40 were wrong, and none that was right was lost.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from edge_agent.agent.calls import Call, Decision, Ref, parse_all, render_all
from edge_agent.agent.spoken import said
from edge_agent.agent.tool import Param, ToolSpec

_WORD = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_DIGITS = re.compile(r"\d+")
_PER_CENT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s?(?:%|per ?cent\b)", re.IGNORECASE)
_IN_PER_CENT = re.compile(r"%|per ?cent", re.IGNORECASE)
_WHEN = re.compile(
    r"\b(?:to(?:day|night|morrow)|yesterday|now|soon|later|noon|midnight|morning|afternoon|evening|night|next|this|every"
    r"|each|once|\w+day|weeks?|weekends?|months?|years?|hours?|minutes?|seconds?)\b",
    re.IGNORECASE,
)
_FOREIGN = re.compile(
    r"\b(?:der|die|das|dem|auf|und|bitte|ist|nicht|mach|stell|le|les|sur|et|est|mets|el|por|para|pon|una|il|gli|di|alla"
    r"|metti|het|een|zet|niet|um|uma|não)\b",
    re.IGNORECASE,
)
_EMPTY = """a an and are at by for from get has have in include included includes including is it mode name of on only
option options or set show that the to type use value whether with enable enabled flag default"""
_TIMED = re.compile(
    r"_(?:s|ms|min|h)\b|time|every|second|minute|hour|\bdays?\b|interval|delay|wait|period|duration", re.IGNORECASE
)
_FORM = re.compile(r"[A-Z]\w+, ?[A-Z]|\b(?i:state|country|province|region|full|complete)\b")  # Paris, France
_QUOTED = re.compile(r"(?<!\w)(?:'(.{8,240}?)'|\"(.{8,240}?)\"|“(.{8,240}?)”)(?!\w)", re.DOTALL)
_CODE, _STEM, _LONG = 3, 4, 6  # characters: of a value that stands for a word; that tell a word, and a long one
_ENUMERATION = 3


class _Heard(NamedTuple):
    text: str
    quoted: list[str]
    words: frozenset[str]
    numbers: frozenset[float]
    times: Counter[float]  # that a number stands there in digits
    per_cent: frozenset[float]
    when: bool  # whether a time or an amount of time stands in words
    english: bool


def plain(decisions: Sequence[Decision], specs: Sequence[ToolSpec], texts: Sequence[str]) -> list[Decision]:
    """The decisions as the texts that the model has read give a reason for them; one that asks for no more than one
    before it is not said again."""
    known = {spec.name: spec for spec in specs}
    calls = [(each, known[each.name]) for each in decisions if isinstance(each, Call) and each.name in known]
    if not any(_open(param) for _, spec in calls for param in spec.params):
        return list(decisions)
    heard = _heard(tuple(texts))
    needed = Counter(number for call, spec in calls for number in _needed(call, spec))
    spare = heard._replace(numbers=frozenset(n for n in heard.numbers if not 0 < heard.times[n] <= needed[n]))
    means = {id(call): _plain(call, spec, heard, spare) for call, spec in calls}
    made = [means.get(id(each), each) for each in decisions]
    if any(isinstance(value, Ref) for call, _ in calls for value in call.args.values()):
        return made  # they name each other by their places
    return [each for n, each in enumerate(made) if not any(_again(each, before) for before in made[:n])]


def plain_text(text: str, specs: Sequence[ToolSpec], texts: Sequence[str]) -> str:
    """The same for what a model wrote. Raises CallError when it is no whole decision."""
    decisions = parse_all(text)
    made = plain(decisions, specs, texts)
    return text if made == decisions else render_all(made)


def _open(param: Param) -> bool:
    return not param.required or param.kind in ("str", "float", "list")


def _needed(call: Call, spec: ToolSpec) -> Iterator[float]:
    """The numbers that are there because they must be."""
    for param in spec.params:
        value = call.args.get(param.name) if param.required else None
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, int | float) and not isinstance(each, bool):
                yield float(each)


def _again(decision: Decision, before: Decision) -> bool:
    if not (isinstance(decision, Call) and isinstance(before, Call)):
        return decision == before
    one, other = decision.args, before.args
    return (
        decision.name == before.name and one.keys() == other.keys() and all(map(_within, one.values(), other.values()))
    )


def _within(value: Any, other: Any) -> bool:
    """Whether two values are the same, or one list has no item that the other has not."""
    lists = isinstance(value, list) and isinstance(other, list)
    return value == other or (lists and all(each in other for each in value))


def _plain(call: Call, spec: ToolSpec, heard: _Heard, spare: _Heard) -> Call:
    params = {param.name: param for param in spec.params}
    args = dict[str, Any]()
    for name, value in call.args.items():
        param = params.get(name)
        if param is None or param.later:
            args[name] = value
            continue
        said = _as_said(param, value, heard)
        if param.required or _reason(param, said, spare):
            args[name] = said
    return Call(call.name, args)


def _as_said(param: Param, value: Any, heard: _Heard) -> Any:
    """A value that is said in nearly these words, in the very words."""
    match value:
        case str() if param.kind == "str":
            return _whole(_short(param, value, heard), heard)
        case list():
            said = [_as_said(param.items or param, each, heard) for each in value]
            return _once(said, heard)
        case int() | float() if param.kind == "float" and not isinstance(value, bool):
            return _point(_hundredths(param, value, heard), heard)
    return value


def _once(items: list[Any], heard: _Heard) -> list[Any]:
    """An enumeration (three things at least) without what is in it more often than it was said."""

    def often(item: Any) -> float:
        if isinstance(item, str):
            return len(re.findall(rf"(?<!\w){re.escape(item)}(?!\w)", heard.text, re.IGNORECASE)) or math.inf
        return heard.times[item] or math.inf

    plain = all(isinstance(each, str | float | int) and not isinstance(each, bool) for each in items)
    if not plain or len(set(items)) < _ENUMERATION:
        return items
    return [each for n, each in enumerate(items) if items[:n].count(each) < often(each)]


def _whole(value: str, heard: _Heard) -> str:
    """The quotation that a text of three words or more is the beginning of."""
    found = [quoted for quoted in heard.quoted if quoted.startswith(value) and value.count(" ") > 1]
    return found[0] if len(found) == 1 else value


def _point(value: float, heard: _Heard) -> float:
    """The fraction that is said, where a point has slipped by a place or two."""
    if value == int(value) or value in heard.numbers:
        return value
    like = {n for n in heard.numbers if n != int(n) and any(_same(value, n * by) for by in (0.01, 0.1, 10, 100))}
    return like.pop() if len(like) == 1 else value


def _short(param: Param, value: str, heard: _Heard) -> str:
    """Without an article before a name, and what stands behind a comma and nobody said, or asks for."""
    name = re.sub(r"^the (?=[A-Z]\S*(?: [A-Z]\S*){0,3}$)", "", value)
    head, comma, tail = name.rpartition(", ")
    place = comma and not tail[:1].islower() and not _FORM.search(param.about)
    return head if place and heard.english and _named(head, heard) and not _named(tail, heard) else name


def _reason(param: Param, value: Any, heard: _Heard) -> bool:
    """Whether something that was read speaks for an option."""
    match value:
        case bool():
            return not heard.english or _named(_CAMEL.sub(" ", param.name), heard)
        case int() | float():
            if param.unit or _TIMED.search(f"{param.name} {param.about}"):  # it may be converted, or stand in words
                return bool(heard.numbers) or heard.when
            return any(_same(value, number * by) for number in heard.numbers for by in (1, 0.01, 100, 1000))
        case str():
            if len(value) <= _CODE or not heard.english or _named(value, heard):
                return True
            if value.isdecimal():
                return float(value) in heard.numbers
            return bool(_DIGITS.search(value)) and (bool(heard.numbers) or heard.when)
        case list():
            return any(_reason(param, each, heard) for each in value)
        case dict():
            return any(_named(key, heard) or _reason(param, each, heard) for key, each in value.items())
    return True  # the result of another call


def _named(text: str, heard: _Heard) -> bool:
    return any(_near(word, heard.words) for word in map(str.lower, _WORD.findall(text)) if word not in _EMPTY.split())


def _near(word: str, words: frozenset[str]) -> bool:
    """Whether a word is there, in another form or cut short too."""
    word = _singular(word)
    if len(word) < _STEM:
        return word in words
    stem = word[: _STEM + (len(word) > _LONG)]
    return any(each.startswith(stem) or (len(each) >= _STEM and word.startswith(each)) for each in words)


def _singular(word: str) -> str:
    return word[:-1] if len(word) >= _STEM and word.endswith("s") else word


def _hundredths(param: Param, value: float, heard: _Heard) -> float:
    """A number with decimals that is a said percentage but for its point."""
    if param.unit or _IN_PER_CENT.search(f"{param.name} {param.about}"):
        return value
    meant = {n for n in heard.per_cent if any(_same(value, n * 10.0**k) for k in (-4, -3, -1, 0, 1))}
    return round(meant.pop() / 100, 10) if len(meant) == 1 else value


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * max(1.0, abs(a))


@lru_cache(16)
def _heard(texts: tuple[str, ...]) -> _Heard:
    text, found = "\n".join(texts), [said(each) for each in texts]
    every = _WORD.findall(text)
    letters = "".join(every)
    latin = sum(map(str.isascii, letters)) >= 0.7 * len(letters)
    times = Counter(float(each) for each in re.findall(r"\d+(?:\.\d+)?", text))
    return _Heard(
        text,
        [next(filter(None, quoted)) for quoted in _QUOTED.findall(text)],
        frozenset(_singular(word.lower()) for word in every),
        frozenset(times).union(*(each.numbers | each.parts for each in found)),
        times,
        frozenset(map(float, _PER_CENT.findall(text))),
        bool(_WHEN.search(text)) or any(each.amount for each in found),
        latin and len(set(_FOREIGN.findall(text.lower()))) < 2,
    )
