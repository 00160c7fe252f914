"""The agent's request as OpenAI's messages and tools, for a model behind an endpoint, and the answer as its text.

Invariants: pure; it says what prompt.py and grammar.py say, to a model that is neither prompted nor held by us; what
comes back becomes a text for `calls.parse`, is validated like any other, and is never repaired.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from edge_agent.agent.calls import Answer, Call, CallError, Nothing, parse, render
from edge_agent.agent.prompt import Turn
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.engines.base import Piece

SYSTEM = (
    "You run a device through its tools. Do what is asked, one tool call at a time; when it is done, answer in a "
    "sentence. When no tool does it, call none and reply with exactly none()."
)
MAX_ANSWER = 2000
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string", "list": "array", "dict": "object"}


def chat(specs: Sequence[ToolSpec], turns: Sequence[Turn]) -> dict[str, Any]:
    """The request for the next call, as `Generate.chat` takes it."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
    called = ""
    for turn in turns:
        if turn.role == "tool":
            told: dict[str, Any] = {"role": "tool", "tool_call_id": called} if called else {"role": "user"}
            messages.append(told | {"content": turn.text})
            called = ""
            continue
        said: dict[str, Any] = {"role": turn.role, "content": turn.text}
        if turn.role == "assistant" and (call := _call(turn.text)):
            called = f"call_{len(messages)}"
            function = {"name": call.name, "arguments": json.dumps(call.args, ensure_ascii=False)}
            said |= {"content": None, "tool_calls": [{"id": called, "type": "function", "function": function}]}
        messages.append(said)
    return {"messages": messages, "tools": [_tool(spec) for spec in specs], "parallel_tool_calls": False}


def said(piece: Piece) -> str:
    """A whole answer to a `chat` as a call, an answer or none; anything else as it came, for `parse` to refuse."""
    text = piece.text.strip()[:MAX_ANSWER]
    if piece.calls:
        name, arguments = piece.calls[0]
        try:
            args = msgspec.json.decode(arguments or "{}", type=dict[str, Any])
        except msgspec.MsgspecError:
            return f"{name}({arguments})"
        return render(Call(name, {key: value for key, value in args.items() if value is not None}))
    if not text and piece.finish == "stop":
        return render(Nothing())
    try:
        parse(text)
    except CallError:
        return render(Answer(text)) if text else text
    return text


def _call(text: str) -> Call | None:
    try:
        decision = parse(text)
    except CallError:
        return None
    return decision if isinstance(decision, Call) else None


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
