"""The words the model sees: tool signatures, examples, the request, results.

Invariants: pure functions of tool specs and turns, so training and serving share one form (ChatML, as SmolLM2 was
tuned); the preamble depends on the tools and its form alone, so its KV state is kept between tasks; text that did not
come from here (requests, results) cannot open or close a turn and is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from edge_agent.agent.calls import Call, Nothing, render
from edge_agent.agent.tool import Param, ToolSpec

MAX_REQUEST = 2000
MAX_RESULT = 600
MAX_EXAMPLES = 40
ASIDES = ("How tall is Mount Everest?", "tell me a joke", "book me a flight to Rome")

Form = Literal["command", "question", "analysis"]
_ANALYSIS = re.compile(r"\b(compare|analy[sz]e|analysis|summari[sz]e|summary|explain|report on|trend)\b", re.IGNORECASE)
_QUESTION = re.compile(r"\s*(what|how|which|who|when|where|why|is|are|does|do|did|has|have)\b", re.IGNORECASE)
_ASKS = re.compile(
    r"\s*(what|how|which|who|whose|when|where|why|is|are|was|were|does|do|did|has|have"
    r"|was|wie|welche[mnrs]?|wer|wo|wann|warum|ist|sind|hat|haben|läuft|laufen)\b[^.!?;\n]*\?\s*",
    re.IGNORECASE,
)
_WISH = re.compile(
    r"\b(about|please|can|could|would|will|may|might|possible|able|don't|not|let|let's|then"
    r"|bitte|kann|kannst|könn\w*|möglich|dann|nicht)\b",
    re.IGNORECASE,
)
_JOINED = re.compile(r"[,;]|\.\s|\s(and|then|und|dann)\s", re.IGNORECASE)
_CONDITION = re.compile(
    r"\b(if|when|whenever|unless|once|until|should|which|whichever|depending|otherwise|in case|wenn|falls|sofern)\b",
    re.IGNORECASE,
)

SYSTEM = (
    "You run a device through its tools. Reply to each request with the one call that does it, "
    "then with none() when nothing is left to do."
)


SYSTEM_ALL = (
    "You have tools. Reply to the request with every call that it asks for, one on each line, "
    "or with none() when the tools cannot do it."
)


class Turn(msgspec.Struct, frozen=True):
    """One turn of the conversation after the preamble."""

    role: Literal["user", "assistant", "tool"]
    text: str


def request_at(turns: Sequence[Turn]) -> int:
    """Where the last request of the turns stands; -1 without one."""
    return max((n for n, turn in enumerate(turns) if turn.role == "user"), default=-1)


def form(request: str) -> Form:
    """What is asked for, by its words' form alone: it changes how a model is told to go about it, nothing else."""
    if _ANALYSIS.search(request):
        return "analysis"
    return "question" if request.rstrip().endswith("?") or _QUESTION.match(request) else "command"


def only_asks(request: str) -> bool:
    """Whether a request is one question and no wish or condition in a question's form (English, German)."""
    after = request.strip().partition(" ")[2]  # the question's own word is no condition: "which line is hot?"
    condition = _CONDITION.search(request if "," in request else after)
    return bool(_ASKS.fullmatch(request)) and not _WISH.search(request) and not condition


def joined(request: str) -> bool:
    """Whether a request joins several things, none of them on a condition, by its form alone."""
    return bool(_JOINED.search(request.rstrip(" .?!"))) and not _CONDITION.search(request)


def signature(spec: ToolSpec) -> str:
    """`name(a: "x"|"y", b: int 1..3) - Description.`"""
    return f"{spec.name}({', '.join(_param(param) for param in spec.params)}) - {spec.description}"


def _param(param: Param) -> str:
    note = f" ({param.about})" if param.about else ""
    return f"{param.name}{'' if param.required else '?'}: {_type(param)}{note}"


def _type(param: Param) -> str:
    """`"a"|"b"`, `int 1..3 mm`, `[str]`, `{x: int, y?: int}`, `dict`."""
    if param.kind == "choice":
        return "|".join(f'"{choice}"' for choice in param.choices)
    if param.kind == "list":
        return f"[{_type(param.items) if param.items else 'any'}]"
    if param.kind == "dict" and param.fields:
        return f"{{{', '.join(_param(field) for field in param.fields)}}}"
    bounds = ""
    if param.low is not None or param.high is not None:
        bounds = f" {_bound(param.low)}..{_bound(param.high)}"
    return f"{param.kind}{bounds}{param.unit and ' '}{param.unit}"


def _bound(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def preamble(specs: Sequence[ToolSpec], system: str = SYSTEM, *, shots: bool = True) -> str:
    """System text, signatures and, with `shots`, the tools' own examples; the same for every request with these tools.

    The first example of each tool goes to its end, result and `none()`; the others show the call alone, which costs a
    third of the tokens.
    """
    listing = "\n".join(signature(spec) for spec in specs)
    text = chatml("system", f"{system}\n{listing}")
    ended: set[str] = set()
    for request, call in examples(specs) if shots else ():
        text += chatml("user", request) + chatml("assistant", render(call))
        if isinstance(call, Call) and call.name not in ended:
            ended.add(call.name)
            text += chatml("tool", result_text({**call.args, "ok": True})) + chatml("assistant", render(Nothing()))
    return text


def examples(specs: Sequence[ToolSpec]) -> list[tuple[str, Call | Nothing]]:
    """The tools' examples, one of each in turn, at most MAX_EXAMPLES; every other round a request for no tool."""
    shown: list[tuple[str, Call | Nothing]] = []
    for i in range(max((len(spec.examples) for spec in specs), default=0)):
        turn = [spec for spec in specs if i < len(spec.examples)]
        if shown and len(shown) + len(turn) > MAX_EXAMPLES:
            break
        shown += [(spec.examples[i][0], Call(spec.name, spec.examples[i][1])) for spec in turn]
        if i % 2 == 0 and i // 2 < len(ASIDES):
            shown.append((ASIDES[i // 2], Nothing()))
    return shown


def suffix(turns: Sequence[Turn]) -> str:
    """The task's own part of the prompt, ending where the model writes."""
    return "".join(chatml(turn.role, turn.text) for turn in turns) + "<|im_start|>assistant\n"


def chatml(role: str, text: str) -> str:
    """One complete turn; special tokens inside the text are broken up."""
    return f"<|im_start|>{role}\n{text.replace('<|', '< |').strip()}<|im_end|>\n"


def result_text(value: Any) -> str:
    """A tool's JSON result as the model and people read it, bounded."""
    if isinstance(value, dict):
        text = ", ".join(f"{key}: {_brief(item)}" for key, item in value.items())
    elif isinstance(value, list):
        text = "; ".join(result_text(item) for item in value) or "nothing"
    else:
        text = _brief(value)
    return text if len(text) <= MAX_RESULT else text[: MAX_RESULT - 1] + "…"


def _brief(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return value
    if value is None:
        return "done"
    return msgspec.json.encode(value).decode()


def error_text(message: str) -> str:
    """An error as a result the model can act on."""
    return f"error: {message}"[:MAX_RESULT]
