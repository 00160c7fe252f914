"""A long request in the parts that its own words count: "First, … Then, … Finally, …".

Invariants: pure; the parts are the whole text, in its order, each with a wish or a question of its own; a request on a
condition, one that quotes several sentences, and one whose sentences begin with no such word, is one part. A small
model does one thing well where it loses the third of four; it reads a part with the earlier ones and what came of them
before it, and says `none()` when nothing is left to do of that part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache

from edge_agent.agent.prompt import Turn

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
_QUOTED = re.compile(r"\"[^\"]*\"|[“„][^“”]*[“”]|«[^»]*»")
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
    sentences = [each.strip() for each in _SENTENCE.split(request.strip()) if each.strip()]
    whole = request.strip()
    if whole[:1] == '"' and whole.count('"') <= 2:  # all of it is said in quotation marks
        whole = whole.strip('"')
    torn = any(_SENTENCE.search(quoted[0]) for quoted in _QUOTED.finditer(whole))
    if len(sentences) < 2 or torn or _CONDITION.search(request):
        return [request]
    found = [sentences[0]]
    for sentence in sentences[1:]:
        opens = len(found) == 1 and bool(_FIRST.match(sentence)) and not _COUNTS.match(found[0])
        if _COUNTS.match(sentence) and not opens:
            found.append(sentence)
        else:
            found[-1] += f" {sentence}"
    made = found[:1]
    for part in found[1:]:
        if _WISHES.search(part):
            made.append(part)
        else:
            made[-1] += f" {part}"
    return made if 1 < len(made) <= MAX_PARTS else [request]
