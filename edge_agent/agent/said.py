"""Which numbers a request says, so that an act gets none that nobody said.

Invariants: pure; only acts are held to it. What an act is done to (a whole number without a unit: line, valve, dock)
and a percentage must be said: in the request or an earlier one, as digits or words (of seven languages),
or by a typed field of a result; "half" and "flat out" are parts of the range. So must a number with decimals and no
unit, unless nothing that is said is in its range. Amounts with a unit can be converted, so it is enough that some
number is said for them. Words like "all", "other" or "than" say numbers that are not written; a note of a parameter
that holds digits ("1: filling, 2: packing") gives them other names; where more than MAX_VALUES are said, all may be
meant: these leave the model free. What no number is said for is left out: an optional argument, else the act. What a
model writes for later (`ForLater`), a request or a workflow's inputs, says no such number or word that is not known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple

from msgspec.structs import asdict, replace

from edge_agent.agent.calls import DECIMALS, MAX_DIGITS, Call, CallError, render_value, validate
from edge_agent.agent.taint import HIDDEN, texts, without
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.agent.transcript import Task

MAX_SPAN, MAX_VALUES, MAX_NAMED = 64, 64, 5
LANGUAGES = ("en", "de", "fr", "es", "it", "nl", "pt")  # of text2num
_NUMBER = re.compile(
    rf"(?:(?<![\w)])[-−]|\bminus )?\d{{1,{MAX_DIGITS}}}(?:[.,]\d{{1,{DECIMALS}}}){{0,9}}", re.IGNORECASE
)
_SPAN = re.compile(  # lines 1 to 3, from line 1 to line 3, 1-3; not: line 2 to 40
    r"\b(?:[^\W\d]+s|(?:from|von|de|da)(?: [^\W\d]+)?)\s+(\d{1,9})(?:st|nd|rd|th)?\s+(?:to|bis|tot|à|a)\s+"
    r"(?:[^\W\d]+ )?(\d{1,9})|\b(\d{1,9})\s?(?:[-–]|through)\s?(\d{1,9})\b",
    re.IGNORECASE,
)
_WORDS = {"II": 2.0, "III": 3.0, "IV": 4.0, "V": 5.0, "VI": 6.0, "VII": 7.0, "VIII": 8.0, "IX": 9.0, "X": 10.0}
_WORDS |= {"twice": 2.0, "zweimal": 2.0, "dreimal": 3.0}
_SPELT = """three four five seven eight eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
twenty thirty forty fifty sixty seventy eighty ninety hundred first second third fourth fifth sixth seventh eighth ninth
tenth"""
_OTHERS = "there these tree trees fist forth seen sever several severe thirsty seconds threw theme even event"
_NOT_ENGLISH = re.compile(
    r"[äöüßéèêàçñóíáúãõìòù]|\b(?:der|die|das|den|dem|auf|und|bitte|linie|mach|stell|le|la|les|sur|et|mets|ligne|el|los|las"
    r"|y|por|para|pon|il|lo|gli|di|al|alla|metti|linea|het|een|de|op|zet|lijn|o|os|as|em|na|no|linha|um|uma)\b",
    re.IGNORECASE,
)
_NO_NUMBER = re.compile(  # pronouns, articles, and English words that are numbers in Spanish and Italian
    r"\b(?:no|any|some|this|that|the|which|every|each|another|other) one\b"
    r"|(?<!\bet )\b(?:un|une|una|um|uma|een|ein|eine[mnrs]?)\b(?= \w)"
    r"|\bat once\b|\bonce (?:more|again)\b|\b(?:is|are|was|were) due\b|\bdue (?:to|for|on|in|at|by)\b",
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
    2: "half|halve[ds]?|halfway|hälfte|halb|halbe[mnrs]?|moitié|mitad",
    3: "thirds?|3rds?|drittel|tiers|tercios?",
    4: "quarters?|fourths|4ths|viertel|quart|cuartos?",
    5: "fifths?|5ths?|fünftel",
    10: "tenths?|10ths?|zehntel",
}
_A = r"(?:a|an|one|1|ein|eine[mnrs]?|un|une)\s+"  # a third, not the third
_ONE = r"(?!hal|quarter\b|quart\b|cuarto\b|moitié|mitad)"  # 3 quarters, not: line 3 half speed
_PART = re.compile(
    "|".join(
        rf"\b(?:(?P<n{whole}>[2-9])[\s-]+{_ONE}|{'' if whole in (2, 4) else _A})(?P<of{whole}>{words})\b"
        for whole, words in _PARTS.items()
    )
    + "|(?P<sign>[½¼¾])|(?<![\\d/.])(?P<over>[1-9])/(?P<under>[2-9]|10)(?![\\d/.])",
    re.IGNORECASE,
)
_SIGNS = {"½": 0.5, "¼": 0.25, "¾": 0.75}
_WHOLE = re.compile(
    r"\b(?:full|fastest|highest|as (?:fast|hard|high) as|wide open|flat out|all out|maximum|max|top speed"
    r"|volle?[mnrs]?|vollgas|maximal|plein|fond|tope|máxim[oa])\b",
    re.IGNORECASE,
)
_AMOUNT = re.compile(  # a minute, an hour, tomorrow
    r"\b(?:an?|per|each|every|eine[rmn]?|jede[mnrs]?|une?|cada|chaque|un[oa]?|ogni|een|elk[e]?|uma?)\s+"
    r"(?:sec|min|hour|day|week|month|notch|sekunde|stunde|tag|woche|monat|heure|jour|semaine|mois|hora|día|dia|semana"
    r"|mes|mês|ora|giorno|settimana|mese|uur|dag|maand)"
    r"|\b(?:noon|midnight|tomorrow|tonight|hourly|daily|nightly|weekly|mittags?|mitternacht|demain|midi|minuit|mañana"
    r"|mediodía|domani|mezzogiorno|mezzanotte|morgen|middag|middernacht|amanhã|meio-dia)\b",
    re.IGNORECASE,
)


class Said(NamedTuple):
    """A text with its numbers as digits; what they can be read as, and how many there are; parts of a whole (0 to 1);
    whether an amount is said in words alone."""

    text: str
    numbers: frozenset[float]
    many: int
    parts: frozenset[float]
    amount: bool


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


@lru_cache(64)
def said(text: str) -> Said:
    """In the language that finds most numbers in it, with slips of typing where it finds none."""
    found = _said(text)
    spelt = text if found.many else re.sub(r"\b(?:tow|[A-Za-z]{4,10})\b", _spelt, text)
    return found if spelt == text else _said(spelt)


def _said(text: str) -> Said:
    from text_to_num import alpha2digit  # when a request comes, not when the daemon starts

    text = re.sub(r"(?<=[^\W\d_])-(third|quarter|fifth|tenth)\b", r" \1s", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=[^\W\d_])-(?=[^\W\d_])", " ", text)
    languages = LANGUAGES if _NOT_ENGLISH.search(text) else LANGUAGES[:1]
    read = [(alpha2digit(_NO_NUMBER.sub(" ", text), language, 0.0), language) for language in languages]
    found, language = max(read, key=lambda each: len(_NUMBER.findall(each[0])))
    whole = alpha2digit(text, language, 0.0)
    written = _NUMBER.findall(_PART.sub("", found))
    words = [_WORDS[word] for word in re.findall(r"\w+", text) if word in _WORDS]
    numbers = {number for each in written for number in _readings(each)}.union(words)
    for ends in _SPAN.findall(found):
        low, high = (int(end) for end in ends if end)
        if 0 < high - low <= MAX_SPAN:
            numbers.update(map(float, range(low + 1, high)))
    count = len(words) + sum(each.count(",") + 1 for each in written)
    return Said(whole, frozenset(numbers), count, frozenset(_parts(whole)), bool(_AMOUNT.search(text)))


def _spelt(found: re.Match[str]) -> str:
    """The number that a word with one slip, like thrid, is nearest to."""
    word = found[0].lower()
    like = [each for each in _SPELT.split() if each[0] == word[0] and abs(len(each) - len(word)) < 2]
    near = [] if word in _OTHERS.split() else get_close_matches(word, like, 1, 0.8)
    return "two" if word == "tow" else next(iter(near), found[0])


def _readings(written: str) -> Iterator[float]:
    """1,200 can be a thousand and more, one and a bit, or two numbers; 1.2 is one."""
    sign, parts = -1.0 if written[0] in "-−mM" else 1.0, re.findall(r"\d+", written)
    if len(parts) <= 2:
        yield sign * float(".".join(parts))
    thousands = 1 < len(parts) <= MAX_DIGITS // 3 and all(len(part) == 3 for part in parts[1:])
    if thousands:
        yield sign * float("".join(parts)[:MAX_DIGITS])
    if (len(parts) > 2 or "," in written) and parts[0] != "0" and not (thousands and len(parts[0]) < 3):
        yield from (sign * float(part) for part in parts)


def _parts(text: str) -> list[float]:
    found = [match.groupdict() for match in _PART.finditer(text)]
    parts = [int(got[f"n{n}"] or 1) / n for got in found for n in _PARTS if got[f"of{n}"]]
    parts += [_SIGNS[got["sign"]] for got in found if got["sign"]]
    parts += [int(got["over"]) / int(got["under"]) for got in found if got["over"]]
    return [part for part in parts if part <= 1] or [1.0] * bool(_WHOLE.search(text))


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
    open_ = [(_ANY, known.every), (_RELATIVE, known.relative), (_AMOUNT, known.amount)]
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
    elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 10**MAX_DIGITS:  # not NaN
        yield float(value)
