"""Which numbers a text says, as digits or in words of seven languages, and what of it stands in quotation marks.

Invariants: pure; nothing is converted: a number is what the text calls it, a part (half, 3/4) is of a whole. A number
that the text takes back ("to 60. Hang on, 62") is not said there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from functools import lru_cache
from typing import NamedTuple

from edge_agent.agent.calls import DECIMALS, MAX_DIGITS

MAX_SPAN = 64
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
_TAKES_BACK = re.compile(  # 45, no, make that 54; not: 50, wait 3 minutes; 2, wait, and then 3
    r"[,.:;…–—-]{1,3}\s*(?:(?:oh|ah|ach|äh|uh|er),?\s)?"
    r"(?:(?:no(?!\.\s*\d)|nope|nein|non|wait|hang on|hold on|scratch that|correction|quatsch)"
    r"(?:\s*[,.:;…–—-]{1,3}|\s(?=wait|sorry|make that|i mean|it's))|(?:sorry|i mean|make that|pardon|perdón)\b)[\s,]*"
    r"(?:(?:wait|sorry|no|make that|i mean|it's|it is|to|at|on|auf|à|a|the|actually|rather)\b[\s,]*){0,4}"
    r"(?P<noun>[^\W\d]+\s)?(?=\d+(?! (?:is|are|ist|sind)\b))",
    re.IGNORECASE,
)
_BACK, _NEAR = 120, 30  # characters that are looked back over, and that a number without a noun is near
AMOUNT = re.compile(  # a minute, an hour, tomorrow
    r"\b(?:an?|per|each|every|eine[rmn]?|jede[mnrs]?|une?|cada|chaque|un[oa]?|ogni|een|elk[e]?|uma?)\s+"
    r"(?:sec|min|hour|day|week|month|notch|sekunde|stunde|tag|woche|monat|heure|jour|semaine|mois|hora|día|dia|semana"
    r"|mes|mês|ora|giorno|settimana|mese|uur|dag|maand)"
    r"|\b(?:noon|midnight|tomorrow|tonight|hourly|daily|nightly|weekly|mittags?|mitternacht|demain|midi|minuit|mañana"
    r"|mediodía|domani|mezzogiorno|mezzanotte|morgen|middag|middernacht|amanhã|meio-dia)\b",
    re.IGNORECASE,
)

QUOTED = re.compile(  # not the inch of 2"; passages of any length, so that each mark finds its own other one
    r"""(?<!\d)["“„”]([^"“„”]+)["“”]|[«»]([^«»]+)[«»]|[‹›]([^‹›]+)[‹›]"""
    r"""|(?<!\w)['‘‚]((?:[^'‘’]|(?<=\w)['’](?=\w))+?)['’](?!\w)"""
)


class Said(NamedTuple):
    """A text with its numbers as digits; what they can be read as, and how many there are; parts of a whole (0 to 1);
    whether an amount is said in words alone."""

    text: str
    numbers: frozenset[float]
    many: int
    parts: frozenset[float]
    amount: bool


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
    found = _mended(found)
    whole = _mended(alpha2digit(text, language, 0.0))
    written = _NUMBER.findall(_PART.sub("", found))
    words = [_WORDS[word] for word in re.findall(r"\w+", text) if word in _WORDS]
    numbers = {number for each in written for number in readings(each)}.union(words)
    for ends in _SPAN.findall(found):
        low, high = (int(end) for end in ends if end)
        if 0 < high - low <= MAX_SPAN:
            numbers.update(map(float, range(low + 1, high)))
    count = len(words) + sum(each.count(",") + 1 for each in written)
    return Said(whole, frozenset(numbers), count, frozenset(_parts(whole)), bool(AMOUNT.search(text)))


def _mended(text: str) -> str:
    """Without the numbers that are taken back: each the last before, of the same noun where the new one has one."""
    for found in reversed(list(_TAKES_BACK.finditer(text))):
        start = max(0, found.start() - _BACK)
        before = text[start : found.start()]
        same = rf"\b{re.escape(found['noun'].strip())}\s+(\d+)" if found["noun"] else r"(?!)()"
        old = list(re.finditer(same, before, re.IGNORECASE))
        old = old or list(re.finditer(rf"(\d+(?:[.,]\d+)*)(?=\D{{0,{_NEAR}}}$)", before))
        if old:
            text = text[: start + old[-1].start(1)] + text[start + old[-1].end(1) :]
    return text


def _spelt(found: re.Match[str]) -> str:
    """The number that a word with one slip, like thrid, is nearest to."""
    word = found[0].lower()
    like = [each for each in _SPELT.split() if each[0] == word[0] and abs(len(each) - len(word)) < 2]
    near = [] if word in _OTHERS.split() else get_close_matches(word, like, 1, 0.8)
    return "two" if word == "tow" else next(iter(near), found[0])


def readings(written: str) -> Iterator[float]:
    """What a written number may be: 1,200 can be a thousand and more, one and a bit, or two numbers; 1.2 is one."""
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
