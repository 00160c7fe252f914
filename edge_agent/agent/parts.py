"""A long request in the parts that its own words count: "First, … Then, … Finally, …".

Invariants: pure; the parts are the whole text, in its order, each with a wish or a question of its own; a request of
which some words say something of several parts (a condition, a time, another order, that all is taken back or only
told), and one whose sentences begin with no such word, is one part; what it quotes neither counts nor is divided, so
the parts are the same where quotations are hidden (taint.py). A small model does one thing well where it loses the
third of four; it reads a part with the earlier ones and what came of them before it, and says `none()` or answers when
nothing is left to do of that part.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise

from edge_agent.agent.prompt import Turn, request_at
from edge_agent.agent.spoken import QUOTED

MAX_PARTS = 8
_SENTENCE = re.compile(
    r"(?<=[\w)'\"%°.\s][.?!])(?<![.?!:\n]\s\d[.)])(?<!^\d[.)])(?<!\b[Nn][or]\.)\s+(?=[\"'“¿¡]?[A-ZÀ-Þ0-9])"
    r"|\n(?=[^\S\n]*\d+[.)]\s)",
    re.MULTILINE,
)
_AND = r"\W*(?:(?:and|but|und|aber|et|mais|y|pero)\s)?"
_COUNTS = re.compile(
    rf"{_AND}(?:first(?:ly)?|secondly|thirdly|(?:second|third|fourth|fifth|next|later)(?=[,:])|then|also"
    r"|after (?:that|this|the|which|creating|completing|\w+ing)|afterwards?|finally|lastly|additionally|furthermore"
    r"|moreover|in addition|another|(?:erstens|zweitens|drittens|zuerst|dann|danach|anschließend|außerdem|schließlich"
    r"|zuletzt)|(?:d'abord|premièrement|deuxièmement|ensuite|puis|enfin|après cela)"
    r"|(?:primero|luego|después|además|finalmente|por último))\b(?!-)"
    r"(?!\W+(?:(?:I|we|he|she|they) (?:(?!need)\w+ed|was|were|had|did|saw|went|thought)|habe ich|j'ai|he \w+do)\b)"
    r"|\W*\d[.)]\s(?!(?:and|or|und|oder|et|ou|y|o)\b)",
    re.IGNORECASE,
)
_FIRST = re.compile(rf"{_AND}(?:first(?:ly)?|erstens|zuerst|d'abord|premièrement|primero)\b|\W*1[.)]", re.IGNORECASE)
_TOGETHER = re.compile(
    r"\b(?:if|unless|otherwise|in (?:that )?case|as soon as|(?:only|as long|so long) (?:as|while|when)|wenn|falls"
    r"|sofern|sobald|solange|sonst|si|sinon|dans ce cas|dès que|lorsque|en ese caso|mientras"
    r"|wait (?:for|until|till|\d+|an?)|warte|attends|attendez|espera)\b"
    r"|(?:^|[.!?,]\s)(?:(?:and|then|und|dann)\s)?(?:when(?:ever)?|once|should|sollten?|quand|cuando)\b"  # …, then
    r"(?!\s(?:you|I|we|that|this|done|is|are|was|were|do|does|did|will)\b)[^.?!]*,"
    r"|(?:^|[.!?]\s)(?:(?!\b(?:wh\w+|how|(?:can|could|would|will) (?:I|we|you|it be)|wie|welche\w*|wo|kann\w*|könn\w*"
    r"|qu[aeéi]\w*|combien|cu\w+|cómo)\b)(?:[^.!?]|\.(?=\S)))*\?\s(?:[^.!?]+[.!])?\s*"  # is it hot? Then …
    r"(?:and\s)?(?:then|dann|alors|entonces)\b"
    r"|(?:^|[.!?,;]\s)(?:(?:but|then|dann|puis|luego)\s)?(?:no|wait|hold on|nein|non|moment)[,!]"  # taken back
    r"|\b(?:then again|never ?mind|second thoughts?|(?:forget|scratch|cancel|undo) (?:it|that|this|all|everything)"
    r"|instead(?! of)|doch (?:nicht|lieber)|stattdessen|reverse order|before (?:that|this|each|every|any|you)|vorher"
    r"|bevor|avant (?:ça|cela|de|que)|antes|not (?:yet|before|until)|(?:do not|don't) do (?:it|any\w*)|only the first"
    r"|(?:all|any|both|none|each) (?:of )?(?:this|that|these|those)|tomorrow|tonight|morgen|demain|mañana|jede[nrs]?"
    r"|chaque|cada|(?:every|each) (?:morning|evening|night|hour|week|month|shift|\w*day|\d+))\b"
    r"|(?:^|[.!?]\s)(?:both\b|(?:in|at|um|à|dans|en|a las) \d{1,3}\b)"
    r"|(?:\b(?:says?|said|writes?|wrote|told|tell (?!me|us)|message|manual|procedure|note|remember|remind|explain"
    r"|schedule|not|never|sagt\w*|schreib\w*|steht|merk\w*|nicht|nie|dit|écri\w*|jamais|dice|dijo|escrib\w*|nunca)|n't)\b"
    r"[^.?!:\n]{0,60}:\s",  # the manual says: …
    re.IGNORECASE,
)
_WISHES = re.compile(
    r"\?|\b(?:can|could|would|will) you\b|\bplease\b|\b(?:I|you|we)(?:'d|'m|'re| would| am| are)?(?: \w+)? (?:want"
    r"|need|like|have to|interested|curious|planning|trying|looking|decide)\b|\bbitte\b|\bveuillez\b|\bpor favor\b"
    rf"|^(?:{_COUNTS.pattern})[\W_]*(?!(?:the|an?|it\w*|its|this|that|these|those|they|he|she|we|you|i|my|your|our|his|her"
    r"|their|there|each|all|both|some|in|on|at|for|with|of|by|to|as|note|make sure|consider|assume|remember|suppose"
    r"|imagine|keep in mind|(?:some|any|no|every)(?:one|body|thing)|ones?|lines?|is|are|was|don|do not|never|no|not|der"
    r"|die|das|es|er|sie|ich|wir|ist|sind|war|nicht|le|la|les|il|elle|est|ne|el|los|las|está|hace|nunca)\b)[^\W\d]",
    re.IGNORECASE,
)


def asked(turns: Sequence[Turn], over: Callable[[str], bool]) -> list[Turn]:
    """The turns with the parts of the last request one by one: the next behind each decision that one is `over`."""
    at, made, left = request_at(turns), list[Turn](), list[str]()
    for n, turn in enumerate(turns):
        left += parts(turn.text) if n == at else []
        made.append(Turn("user", left.pop(0)) if n == at else turn)
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
    if _TOGETHER.search(text) or any(_FIRST.match(text, at) for at in counted):
        return [request]
    wished = [at for at, end in pairwise([*counted, len(text)]) if _WISHES.search(text[at:end])]
    made = [whole[at:end].strip() for at, end in pairwise([0, *wished, len(text)])]
    return made if 1 < len(made) <= MAX_PARTS else [request]
