"""The agent's request as OpenAI's messages and tools, for a model behind an endpoint, and the answer as its text.

Invariants: pure; it says what prompt.py and grammar.py say, to a model that is neither prompted nor held by us; what
comes back becomes a text for `calls.parse`, is validated like any other, and is never repaired.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from edge_agent.agent.calls import REF, Answer, Call, CallError, Nothing, Ref, parse, render
from edge_agent.agent.prompt import Form, Turn
from edge_agent.agent.taint import decisions
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.engines.base import Piece

SYSTEM = (
    "You run a device through its tools. Do what is asked; when it is done, answer in a "
    "sentence. When no tool does it, call none and reply with exactly none()."
)
SEVERAL = (
    " Calls that need nothing of one another may come in one turn; a later one of them may take "
    '"$1.field" for a field of the result of the first.'
)
FORMS: dict[Form, str] = {
    "command": "",
    "question": " Where it only asks, change nothing: read what it needs and answer with values and units.",
    "analysis": " Read all that bears on it before you answer; then compare, and conclude.",
}
MAX_ANSWER = 2000
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "list": "array", "dict": "object"}


def chat(
    specs: Sequence[ToolSpec], turns: Sequence[Turn], several: bool = False, form: Form = "command"
) -> dict[str, Any]:
    """The request for the next call, or `several`, as `Generate.chat` takes it."""
    system = SYSTEM + FORMS[form] + (SEVERAL if several else "")
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}]
    called: list[str] = []
    for turn in turns:
        if turn.role == "tool":
            told = {"role": "tool", "tool_call_id": called.pop(0)} if called else {"role": "user"}
            messages.append(told | {"content": turn.text})
            continue
        said: dict[str, Any] = {"role": turn.role, "content": turn.text}
        for n, decision in enumerate(decisions(turn.text) if turn.role == "assistant" else []):
            if isinstance(decision, Answer):
                said["content"] = decision.text
            elif isinstance(decision, Call):
                called.append(f"call_{len(messages)}_{n}")
                arguments = json.dumps(decision.args, ensure_ascii=False, default=str)
                function = {"name": decision.name, "arguments": arguments}
                made = {"id": called[-1], "type": "function", "function": function}
                said |= {"content": None, "tool_calls": [*said.get("tool_calls", []), made]}
        messages.append(said)
    if not specs:  # a server refuses an empty list
        return {"messages": messages}
    return {"messages": messages, "tools": [_tool(spec) for spec in specs], "parallel_tool_calls": several}


def said(piece: Piece) -> str:
    """A whole answer to a `chat` as a call, an answer or none; anything else as it came, for `parse` to refuse."""
    text = piece.text.strip()[:MAX_ANSWER]
    if piece.calls:
        return "\n".join(_written(name, arguments, n) for n, (name, arguments) in enumerate(piece.calls))
    if not text and piece.finish == "stop":
        return render(Nothing())
    try:
        parse(text)
    except CallError:
        return render(Answer(text)) if text else text
    return text


def _written(name: str, arguments: str, before: int) -> str:
    """A call as text; where others stand before it, a text "$1.field" refers to one of them."""
    try:
        args = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
    except msgspec.MsgspecError:
        return f"{name}({arguments})"
    for key, value in args.items():
        ref = REF.fullmatch(value) if before and isinstance(value, str) else None
        args[key] = Ref(int(ref[1]), ref[2] or "") if ref else value
    return render(Call(name, {key: value for key, value in args.items() if value is not None}))


def _tool(spec: ToolSpec) -> dict[str, Any]:
    function = {"name": spec.name, "description": spec.description, "parameters": schema_of(spec.params)}
    return {"type": "function", "function": function}


def schema_of(params: Sequence[Param]) -> dict[str, Any]:
    required = [param.name for param in params if param.required]
    parts = {param.name: _schema(param) for param in params}
    return {"type": "object", "properties": parts, "required": required, "additionalProperties": False}


def _schema(param: Param) -> dict[str, Any]:
    about = " ".join(filter(None, [param.about, f"in {param.unit}" if param.unit else ""]))
    schema: dict[str, Any] = {"description": about} if about else {}
    if param.kind == "choice":
        return schema | {"type": "string", "enum": param.choices}
    schema["type"] = _TYPES[param.kind]
    schema |= {key: at for key, at in (("minimum", param.low), ("maximum", param.high)) if at is not None}
    if param.items:
        schema["items"] = _schema(param.items)
    return schema | schema_of(param.fields) if param.fields else schema
