"""What a small model's call to read means by what it has read: no option that nothing gives a reason for.

Invariants: pure. Acts are taken at their word: they are refused (said.py) or done, never changed; so is everything in
another language than English, whose words are not those of names and choices. What is required stays, and so does an
option of which a word or a number, or for a truth value a word of its name, is in the texts. A rate that a text says in
per cent is hundredths, a date has the form that its parameter's note writes, a place loses what stands behind its comma
and nobody said, an enumeration does not stutter, and what asks for no more than a reading before it is not read again.
Measured on BFCL's development split (docs/agent.md).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from edge_agent.agent.calls import MAX_DIGITS, Call, Decision, Ref, is_number, parse_all, render_all
from edge_agent.agent.spoken import said
from edge_agent.agent.tool import Param, ToolSpec

_WORD = re.compile(r"[^\W\d_]+")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_NUMBER = re.compile(r"\d{1,15}(?:\.\d{1,9})?")
_PER_CENT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s?(?:%|per ?cent\b)", re.IGNORECASE)
_RATE = re.compile(r"rate|ratio|fraction|probab|yield|return|discount|interest|growth|margin|\btax", re.IGNORECASE)
_IN_PER_CENT = re.compile(r"%|per ?cent", re.IGNORECASE)
_PLACE = re.compile(r"place|city|town|location|address|area|origin|destination|departure|where", re.IGNORECASE)
_FORM = re.compile(r"[A-Z]\w+, ?[A-Z]|\b(?i:state|country|province|region|full|complete)\b")  # Paris, France
_DATE = re.compile(
    r"(?P<year>\d{4})-(?P<month>\d\d?)-(?P<day>\d\d?)(?:[T ](?P<hour>\d\d?):(?P<minute>\d\d)(?::(?P<second>\d\d))?Z?)?"
)
_DATE_FORM = re.compile(
    r"\b(?P<date>(?:yyyy|dd|mm)(?:[-/.](?:yyyy|dd|mm)){2})(?P<time>[ T]hh:mm(?::ss)?)?(?![\w:])", re.IGNORECASE
)
_TAIL = re.compile(r"[A-Z][A-Za-z. ]*|[\d-]+")
_WHEN = re.compile(
    r"\b(?:to(?:day|night|morrow)|yesterday|now|soon|shortly|recent\w*|regular\w*|later|since|before|after|until|noon"
    r"|midnight|morning|afternoon|evening|(?:over)?night|dawn|dusk|sun\w+|lunch|shift|past|last|next|this|every|each|once"
    r"|\w+day|weeks?|weekends?|months?|quarter\w*|years?|hours?|minutes?|seconds?|bit|while|moment|close|christmas)\b",
    re.IGNORECASE,
)
_TIMED = re.compile(
    r"_(?:s|ms|min|h)\b|time|every|second|minute|hour|\bdays?\b|interval|delay|wait|period|duration", re.IGNORECASE
)
_COUNTED = re.compile(
    r"\b(?:couple|pair|dozens?|both|twice|thrice|single|latest|few|several|half|double|all|every|possible|most"
    r"|max\w*|min\w*|no)\b",
    re.IGNORECASE,
)
_REPEATED = re.compile(r"\b(?:twice|times|same|each|again|back|round|repeat\w*|all)\b", re.IGNORECASE)
_FOREIGN = re.compile(
    r"[^\x00-\x7f°€£–—‘’“”…²³]"
    r"|\b(?:der|die|das|dem|auf|und|bitte|ist|nicht|mach|zwei|drei|alle|heute|zeig|wie|le|les|sur|et|est|mets|ce|trois|toutes"
    r"|quelle|el|por|para|pon|una|dos|hoy|que|il|gli|di|alla|metti|due|het|een|zet|niet|um|uma)\b",
    re.IGNORECASE,
)
_EMPTY = """a an and are at by for from get has have in include included includes including is it mode name of on only
option options or set show that the to type use value whether with enable enabled flag default"""
_CODE, _STEM, _LONG = 3, 4, 6  # characters: of a value that stands for a word; that tell a word, and a long one
_ENUMERATION = 3


class _Heard(NamedTuple):
    text: str
    words: frozenset[str]
    numbers: frozenset[float]
    times: Counter[float]  # that a number stands there in digits
    per_cent: frozenset[float]  # that are said in no other way
    when: bool  # whether a time or an amount of time stands in words


def plain(decisions: Sequence[Decision], specs: Sequence[ToolSpec], texts: Sequence[str]) -> list[Decision]:
    """The decisions as the texts that the model has read give a reason for them; a reading that asks for no more than
    one before it is left out."""
    reads = {spec.name: spec for spec in specs if spec.risk == "read"}
    calls = [(each, reads[each.name]) for each in decisions if isinstance(each, Call) and each.name in reads]
    heard = _heard(tuple(texts)) if any(_open(param) for _, spec in calls for param in spec.params) else None
    if heard is None or _FOREIGN.search(heard.text):
        return list(decisions)
    needed = Counter(number for _, _, number in {each for call, spec in calls for each in _needed(call, spec)})
    spare = heard._replace(numbers=frozenset(n for n in heard.numbers if not 0 < heard.times[n] <= needed[n]))
    means = {id(call): _plain(call, spec, heard, spare) for call, spec in calls}
    made = [means.get(id(each), each) for each in decisions]
    if any(isinstance(value, Ref) for call, _ in calls for value in call.args.values()):
        return made  # they name each other by their places
    return [each for n, each in enumerate(made) if not any(_again(each, before, reads) for before in made[:n])]


def plain_text(text: str, specs: Sequence[ToolSpec], texts: Sequence[str]) -> str:
    """The same for what a model wrote. Raises CallError when it is no whole decision."""
    decisions = parse_all(text)
    made = plain(decisions, specs, texts)
    return text if made == decisions else render_all(made)


def _open(param: Param) -> bool:
    return not param.required or param.kind in ("str", "float", "list")


def _needed(call: Call, spec: ToolSpec) -> Iterator[tuple[str, str, float]]:
    """The numbers that are there because they must be, and for which parameter."""
    for param in spec.params:
        value = call.args.get(param.name) if param.required else None
        for each in value if isinstance(value, list) else [value]:
            if is_number(each):
                yield call.name, param.name, float(each)


def _again(decision: Decision, before: Decision, reads: dict[str, ToolSpec]) -> bool:
    if not (isinstance(decision, Call) and isinstance(before, Call)) or decision.name not in reads:
        return decision == before
    one, other = decision.args, before.args
    return decision.name == before.name and all(name in other and _within(one[name], other[name]) for name in one)


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
        made = _as_said(param, value, heard)
        if param.required or _reason(param, made, spare):
            args[name] = made
    return Call(call.name, args)


def _as_said(param: Param, value: Any, heard: _Heard) -> Any:
    """A value that is nearly said, as it is said."""
    match value:
        case str() if param.kind == "str":
            made = _place(param, value, heard)
            return made if made in heard.text else _dated(param, made)
        case list():
            return _once([_as_said(param.items or param, each, heard) for each in value], heard)
        case _ if param.kind == "float" and is_number(value):
            return _hundredths(param, value, heard)
    return value


def _once(items: list[Any], heard: _Heard) -> list[Any]:
    """An enumeration (three things at least) without an item that is said again and was said once."""

    def once(item: Any) -> bool:
        if isinstance(item, str):
            return len(re.findall(rf"(?<!\w){re.escape(item)}(?!\w)", heard.text, re.IGNORECASE)) == 1
        return heard.times[item] == 1

    simple = all(isinstance(each, str) or is_number(each) for each in items)
    if not simple or len(set(items)) < _ENUMERATION or _REPEATED.search(heard.text):
        return items
    return [each for n, each in enumerate(items) if each not in items[:n] or not once(each)]


def _place(param: Param, value: str, heard: _Heard) -> str:
    """Without an article before a name, and for a place without what stands behind a comma and nobody said, or asks."""
    name = re.sub(r"^the (?=[A-Z]\S*(?: [A-Z]\S*){0,3}$)", "", value)
    head, comma, tail = name.rpartition(", ")
    place = comma and _PLACE.search(f"{param.name} {param.about}") and not _FORM.search(param.about)
    if not place or name.lower() in heard.text.lower() or not _TAIL.fullmatch(tail):
        return name
    return head if _named(head, heard) and not _named(tail, heard) else name


def _dated(param: Param, value: str) -> str:
    """A date (ISO 8601) in the form that the parameter's note writes: DD/MM/YYYY."""
    form, date = _DATE_FORM.search(param.about), _DATE.fullmatch(value)
    if form is None or date is None or (date["hour"] and not form["time"]):
        return value
    shown = {"yyyy": date["year"], "mm": date["month"].zfill(2), "dd": date["day"].zfill(2)}
    made = re.sub("yyyy|mm|dd", lambda found: shown[found[0].lower()], form["date"], flags=re.IGNORECASE)
    clock = f"{(date['hour'] or '').zfill(2)}:{date['minute'] or '00'}:{date['second'] or '00'}"
    return made + (form["time"][0] + clock[: len(form["time"]) - 1] if form["time"] else "")


def _reason(param: Param, value: Any, heard: _Heard) -> bool:
    """Whether something that was read speaks for an option."""
    match value:
        case bool():
            return _named(_CAMEL.sub(" ", param.name), heard)
        case int() | float():
            if param.unit or _TIMED.search(f"{param.name} {param.about}"):  # it may be converted, or stand in words
                return bool(heard.numbers) or heard.when
            by = (1, 0.01, 100, 1000)
            return bool(_COUNTED.search(heard.text)) or any(_same(value, n * k) for n in heard.numbers for k in by)
        case str() if value.isdecimal() and len(value) < MAX_DIGITS:
            return float(value) in heard.numbers
        case str():
            timed = bool(_NUMBER.search(value)) and (bool(heard.numbers) or heard.when)
            return len(value) <= _CODE or timed or _named(value, heard)
        case list():
            return any(_reason(param, each, heard) for each in value)
        case dict():
            return any(_named(key, heard) or _reason(param, each, heard) for key, each in value.items())
    return True  # the result of another call


def _named(text: str, heard: _Heard) -> bool:
    """Whether a word of it is there; where it has only words that say nothing, all of it."""
    words = [word for word in map(str.lower, _WORD.findall(text)) if word not in _EMPTY.split()]
    return any(_near(word, heard.words) for word in words) if words else text.strip().lower() in heard.text.lower()


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
    """A rate that is a said percentage but for its point."""
    about = f"{param.name} {param.about}"
    whole = param.unit or (param.high or 0.0) > 1 or _IN_PER_CENT.search(about) or not _RATE.search(about)
    meant = {n for n in heard.per_cent if any(_same(value, n * 10.0**k) for k in (-4, -3, -1, 0, 1))}
    return value if whole or len(meant) != 1 else round(meant.pop() / 100, 10)


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-9 * max(1.0, abs(a))


@lru_cache(16)
def _heard(texts: tuple[str, ...]) -> _Heard:
    text, found = "\n".join(texts), [said(each) for each in texts]
    times = Counter(map(float, _NUMBER.findall(text)))
    others = set(map(float, _NUMBER.findall(_PER_CENT.sub(" ", text))))
    return _Heard(
        text,
        frozenset(_singular(word.lower()) for word in _WORD.findall(text)),
        frozenset(times).union(*(each.numbers | each.parts for each in found)),
        times,
        frozenset(map(float, _PER_CENT.findall(text))) - others,
        bool(_WHEN.search(text)) or any(each.amount for each in found),
    )
