"""Whether what a request makes an act depend on is so: "if line 2 is hotter than 60, stop it".

Invariants: pure; a request has a condition when a word like "if" stands before the one comparison with a number that is
in it, or a question mark or "then" behind it (four languages). Until a tool that only reads gave a number, nothing is
known; then its newest one decides, or where the request says "both" or "all", the one that holds least. A request that
says what else to do is open once it was read; more than one comparison is left to the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal

from edge_agent.agent.spoken import said
from edge_agent.agent.tool import ToolSpec
from edge_agent.agent.transcript import Step, Task

Known = Literal["none", "unread", "met", "unmet"]
_MORE = r"""above|over|past|beyond|exceed\w*|more|greater|higher|hotter|warmer|faster|quicker|bigger|larger|stronger
at least|über|mehr|höher|wärmer|heißer|schneller|größer|mindestens|dépasse|plus|supérieure?|más|mayor|superior|encima"""
_LESS = r"""below|under|beneath|less|lower|cooler|colder|slower|smaller|weaker|fewer|at most|unter|weniger|niedriger
kälter|langsamer|kleiner|höchstens|moins|inférieure?|menos|menor|inferior|debajo"""


def _any(words: str) -> str:
    return "|".join(word for line in words.splitlines() for word in line.split("|"))


_COMPARES = re.compile(
    rf"(?:\b(?:(?P<more>{_any(_MORE)})|(?P<less>{_any(_LESS)}))\b|(?P<over>[>≥])|(?P<under>[<≤]))"
    r"(?:\s+(?:than|as|de|que|à|a|del?|the|den|die|la|le|von|or equal to)\b)*\s*(?P<number>-?\d+(?:[.,]\d+)?)",
    re.IGNORECASE,
)
_IF = re.compile(
    r"\b(?:if|in case|should|when(?:ever)?|once|as soon as|wenn|falls|sobald|sollte|si|lorsque|quand|cuando)\b",
    re.IGNORECASE,
)
_THEN = re.compile(r"[^,.;?]{0,12}(?:\?\s*\w|,?\s(?:and (?:you|we)|then|dann|alors|entonces)\b)", re.IGNORECASE)
_BOTH = re.compile(r"\b(?:both|all|each|every|beide\w*|alle\w*|tou(?:s|tes)|todas?|todos|ambas|ambos)\b", re.IGNORECASE)
_ELSE = re.compile(
    r"\b(?:otherwise|(?<!or )else|if not|sonst|andernfalls|sinon|si no|de lo contrario)\b"
    r"(?!\W+(?:\w+\W+){0,2}?(?:leave|let|keep|stay\w*|don't|do not|nothing|nichts|lass\w*|laiss\w*|rien|nada|dej\w*))",
    re.IGNORECASE,
)


def known(task: Task, specs: Sequence[ToolSpec]) -> Known:
    """What is known of the request's condition, by what `specs` only read."""
    text = said(task.text).text
    compared = list(_COMPARES.finditer(text))
    if len(compared) != 1:
        return "none"
    found = compared[0]
    if not (_IF.search(text, 0, found.start()) or _THEN.match(text, found.end())):
        return "none"
    reads = {spec.name for spec in specs if spec.risk == "read"}
    values = [value for step in task.steps if (value := _read(step, reads)) is not None]
    if not values:
        return "unread"
    limit = float(found["number"].replace(",", "."))
    judged = values if _BOTH.search(text) else values[-1:]
    met = min(judged) >= limit if found["more"] or found["over"] else max(judged) <= limit
    return "met" if met or _ELSE.search(text, found.end()) else "unmet"


def _read(step: Step, reads: Set[str]) -> float | None:
    """The one number that a reading gave beside its own arguments."""
    if step.role != "tool" or not step.ok or step.call is None or step.call.name not in reads:
        return None
    result: Any = step.result
    if isinstance(result, Mapping):
        own = step.call.args
        found = [each for name, each in result.items() if name not in own and _number(each)]
        result = found[0] if len(found) == 1 else None
    return float(result) if _number(result) else None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
