"""Whether what a request makes an act depend on is so: "if line 2 is hotter than 60, stop it".

Invariants: pure; a request has a condition when "if" (or a word like it, four languages) stands in one clause with the
only comparison with a number that is in it, or a question mark or "then" behind it. Until a tool that only reads gave
one number, nothing is known; then the newest number of each such call has to hold, until an act was done. What else a
request may say is left to the model: another comparison, a denied, quoted, repeated or clock's one, what to do
otherwise, the words of a message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from edge_agent.agent.calls import is_number, render
from edge_agent.agent.spoken import QUOTED, readings, said
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Step, Task

Known = Literal["none", "unread", "met", "unmet"]
_MORE = (
    r"above|over|(?<!it is )(?<!it's )past|beyond|exceed\w*|more|greater|higher|hotter|warmer|faster|quicker|bigger"
    r"|larger|stronger|über|mehr|höher|wärmer|heißer|schneller|größer|dépasse|plus|supérieure?|más|mayor|superior|encima"
)
_LESS = (
    r"below|under|beneath|less|lower|cooler|colder|slower|smaller|weaker|fewer|unter|weniger|niedriger|kälter|langsamer"
    r"|kleiner|moins|inférieure?|menos|menor|inferior|debajo"
)
_COMPARES = re.compile(
    rf"(?:\b(?:(?P<more>{_MORE})|(?P<less>{_LESS})"
    r"|(?P<least>at least|mindestens|au moins)|(?P<most>at most|höchstens|au plus))\b|(?P<sign>[<>]=?|[≤≥]))"
    r"(?:\s+(?:than|as|de|que|à|a|del?|the|den|die|la|le|von|about|around|or equal to))*\s*(?P<number>-?\d[\d.,]*)",
    re.IGNORECASE,
)
_IF = re.compile(
    r"\b(?:if|in case|when(?:ever)?|as soon as|wenn|falls|sobald|si|lorsque|quand|cuando)\b"
    r"|(?:^|[.!?]\s)\W*(?:should|once|sollten?)\b",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[,;:.!?]|\b(?:set|put|keep|run|stell\w*|setz\w*|halt\w*|mets|pon)\b", re.IGNORECASE)
_THEN = re.compile(r"[^,.;?]{0,12}(?:\?\s*\w|,?\s(?:and (?:you|we)|then|dann|alors|entonces)\b)", re.IGNORECASE)
_TO = re.compile(r"\b(?:to|auf|à|at|by|um)\s*$", re.IGNORECASE)
_DENIED = re.compile(r"(?:\b(?:not|no longer|never|nicht|kein\w*|pas|no)|n't)(?:\s\w+){0,3}\s*$", re.IGNORECASE)
_CLOCK = re.compile(
    r"\s?(?:\d{3}\b|:|o'clock|[ap]\.?m\b|uhr|h\b|hours?|minutes?|min\b|seconds?|days?|stunden?|minuten?|tage?|heures?|horas?)",
    re.IGNORECASE,
)
_REPEATED = re.compile(r"\b(?:each|every|any|(?:one|1) of|jede[mnrs]?|chaque|cada|alguna?)\b", re.IGNORECASE)
_WORDS = re.compile(
    r"\W*(?:please )?(?:remember|note|tell|write|send|mail|publish|post|merk\w*|schreib\w*)\b", re.IGNORECASE
)
_ELSE = re.compile(
    r"\b(?:otherwise|(?<!or )else|if not|sonst|andernfalls|sinon|si no|de lo contrario)\b"
    r"(?!\W+(?:\w+\W+){0,2}?(?:leave|let|keep|stay\w*|don't|do not|no|nothing|ignore|fine|okay|ok|nichts|lass\w*"
    r"|laiss\w*|rien|nada|dej\w*)\b)",
    re.IGNORECASE,
)


def known(task: Task, specs: Sequence[ToolSpec]) -> Known:
    """What is known of the request's condition, by what `specs` only read."""
    text = QUOTED.sub(" ", said(task.text).text)
    compared = list(_COMPARES.finditer(text))
    if len(compared) != 1 or not _conditional(text, compared[0]):
        return "none"
    limits = list(readings(compared[0]["number"].rstrip(".,")))
    reads = {spec.name for spec in specs if spec.risk == "read"}
    came = [step for step in task.steps if step.role == "tool" and step.ok and step.call is not None]
    values = {render(step.call): _number_of(step) for step in came if step.call and step.call.name in reads}
    if len(limits) != 1 or None in values.values():
        return "none"
    if not values:
        return "unread"
    acted = any(step.call.name not in reads for step in came if step.call)
    free = acted or _REPEATED.search(text) or _ELSE.search(text, compared[0].end())
    holds = (_holds(compared[0], value, limits[0]) for value in values.values() if value is not None)
    return "met" if free or all(holds) else "unmet"


def _conditional(text: str, found: re.Match[str]) -> bool:
    before = text[: found.start()]
    asked = max((word.end() for word in _IF.finditer(before)), default=None)
    joined = asked is not None and not _CLAUSE.search(before, asked)
    if _TO.search(before) or _DENIED.search(before) or _CLOCK.match(text, found.end()) or _WORDS.match(text):
        return False
    return joined or bool(_THEN.match(text, found.end()))


def _holds(found: re.Match[str], value: float, limit: float) -> bool:
    sign = found["sign"] or ""
    if found["least"] or sign in (">=", "≥"):
        return value >= limit
    if found["most"] or sign in ("<=", "≤"):
        return value <= limit
    return value > limit if found["more"] or sign == ">" else value < limit


def _number_of(step: Step) -> float | None:
    """The one number that a reading gave beside its own arguments, or its `value`."""
    result: Any = step.result
    if isinstance(result, Mapping) and step.call is not None:
        found = [each for name, each in result.items() if name not in step.call.args and is_number(each)]
        result = result["value"] if is_number(result.get("value")) else found[0] if len(found) == 1 else None
    return float(result) if is_number(result) else None
