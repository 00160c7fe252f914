"""A long request in the parts that its own words count: "First, … Then, … Finally, …".

Invariants: pure; the parts are the whole text, in its order, each with a wish or a question of its own; a request on a
condition, and one whose sentences begin with no such word, is one part; what it quotes neither counts nor is divided,
so the parts are the same where quotations are hidden (taint.py). A small model does one thing well where it loses the
third of four; it reads a part with the earlier ones and what came of them before it, and says `none()` or answers when
nothing is left to do of that part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

from edge_agent.agent.prompt import Turn
from edge_agent.agent.spoken import QUOTED

MAX_PARTS = 8
_SENTENCE = re.compile(
    r"(?<=[\w)'\"%°.][.?!])(?<![.?!:\n]\s\d[.)])(?<!^\d[.)])\s+(?=[\"'“]?[A-ZÄÖÜÀÉ0-9])|\n(?=[^\S\n]*\d+[.)]\s)",
    re.MULTILINE,
)
_COUNTS = re.compile(
    r"\W*(?:(?:and|but|und|et|y)\s)?(?:first(?:ly)?|second(?:ly)?|third(?:ly)?|fourth(?:ly)?|fifth|then|next|also|later"
    r"|after (?:that|this|the|which|creating|completing|\w+ing)|afterwards?|finally|lastly|additionally|furthermore"
    r"|moreover|in addition|another|(?:erstens|zweitens|drittens|zuerst|dann|danach|außerdem|schließlich|zuletzt)"
    r"|(?:d'abord|ensuite|puis|enfin)|(?:primero|luego|después|además|finalmente))\b|\W*\d[.)]\s",
    re.IGNORECASE,
)
_FIRST = re.compile(r"\W*(?:first(?:ly)?|erstens|zuerst|d'abord|primero)\b|\W*1[.)]", re.IGNORECASE)
_CONDITION = re.compile(r"\b(?:if|unless|otherwise|in case|wenn|falls|sofern|si)\b", re.IGNORECASE)
_WISHES = re.compile(
    r"\?|\b(?:can|could|would|will) you\b|\bplease\b|\b(?:I|you|we)(?:'d|'m|'re| would| am| are)?(?: \w+)? (?:want"
    r"|need|like|have to|interested|curious|planning|trying|looking|decide)\b|\bbitte\b|\bveuillez\b|\bpor favor\b"
    rf"|^(?:{_COUNTS.pattern})[\W_]*(?!(?:the|an?|it\w*|its|this|that|these|those|they|he|she|we|you|i|my|your|our|his|her"
    r"|their|there|each|all|both|some|in|on|at|for|with|of|by|to|as|note|make sure|consider|assume|remember|suppose"
    r"|imagine|keep in mind|shift|weeks?|months?|years?|days?|times?|things?|ones?|lines?|aid|floor|quarter|half|\w+day"
    r"|der|die|das|es|er|sie|ich|wir|le|la|les|il|elle|el|los|las)\b)[^\W\d]",
    re.IGNORECASE,
)


def asked(turns: Sequence[Turn], over: Callable[[str], bool]) -> list[Turn]:
    """The turns with the parts of the last request one by one: the next behind each decision that one is `over`."""
    at = max((n for n, turn in enumerate(turns) if turn.role == "user"), default=None)
    if at is None:
        return list(turns)
    first, *left = parts(turns[at].text)
    made = [*turns[:at], Turn("user", first)]
    for turn in turns[at + 1 :]:
        made.append(turn)
        if left and turn.role == "assistant" and over(turn.text):
            made.append(Turn("user", left.pop(0)))
    return made


@lru_cache(16)
def parts(request: str) -> Sequence[str]:
    """The parts of a request, one where it has no more."""
    whole = request.strip()
    text = whole if QUOTED.fullmatch(whole) else QUOTED.sub(lambda quoted: "x" * len(quoted[0]), whole)
    counted = [each.end() for each in _SENTENCE.finditer(text) if _COUNTS.match(text, each.end())]
    if counted and _FIRST.match(text, counted[0]) and not _COUNTS.match(text):
        del counted[0]  # what stands before it leads up to it
    if _CONDITION.search(text):
        return [request]
    wished = [at for at, end in pairwise([*counted, len(text)]) if _WISHES.search(text[at:end])]
    made = [whole[at:end].strip() for at, end in pairwise([0, *wished, len(text)])]
    return made if 1 < len(made) <= MAX_PARTS else [request]
