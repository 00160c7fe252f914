"""OpenAI's chat completions as requests to an engine, and what it wrote as completions.

Invariants: pure; what is asked and cannot be done is Refused by name, never ignored; the messages become one ChatML
text, as the agent writes it, and cannot open or close a turn. A half-written call is left out, never repaired.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from edge_agent.agent import grammar, prompt
from edge_agent.agent.calls import Answer, Call, Decision, render_all
from edge_agent.agent.functions import Function, Functions
from edge_agent.engines.base import Generate, Piece, Token
from edge_agent.errors import Refused

MAX_TOKENS = 1024
"""How long a completion gets unless its request says otherwise."""
CALLS = 8
_STOPS, _STOP, _TOP = 4, 100, 20
_NEUTRAL: dict[str, Any] = {
    "n": 1, "top_p": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "functions": [],
    "function_call": "auto", "modalities": ["text"], "audio": None,
}  # fmt: skip

_TIERS = {"priority": 1, "flex": 3}  # before and after what says nothing; a person's task goes before all of them
_CHAT = ("messages", "tools", "tool_choice", "parallel_tool_calls", "response_format")


class _Part(msgspec.Struct, frozen=True):
    type: str
    text: str = ""


class _Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str = ""


class _Call(msgspec.Struct, frozen=True):
    function: _Function


class _Message(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[_Part] | None = None
    tool_calls: list[_Call] | None = None


class _Tool(msgspec.Struct, frozen=True):
    function: Function


class _JsonSchema(msgspec.Struct, frozen=True):
    schema: dict[str, Any] = {}


class _Format(msgspec.Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StreamOptions(msgspec.Struct, frozen=True):
    include_usage: bool = False


class Request(msgspec.Struct, frozen=True):
    """The body of POST /v1/chat/completions."""

    model: str
    messages: list[_Message]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    tools: list[_Tool] | None = None
    tool_choice: Literal["auto", "none", "required"] | _Call | None = None
    parallel_tool_calls: bool | None = None
    response_format: _Format | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    service_tier: str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    asked: dict[str, Any] = {}  # all of the above, as it came


def read(body: bytes | bytearray) -> Request:
    """A request. Raises Refused for a body that is none, or that asks for what cannot be done."""
    try:
        asked = msgspec.json.decode(body, type=dict[str, Any])
        request = msgspec.convert(asked, Request)
    except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
        raise Refused(f"the body cannot be read: {error}", "JSON with model and messages") from error
    for name, neutral in _NEUTRAL.items():
        if asked.get(name) not in (None, neutral):
            raise Refused(f"{name} is not supported", f"leave it out, or give {neutral!r}")
    return msgspec.structs.replace(request, asked=asked)


def generate(request: Request) -> tuple[Generate, Functions | None]:
    """What the engine is asked, and the functions that may be called (None: the text is the answer). Raises Refused."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > _STOPS or not all(0 < len(stop) <= _STOP for stop in stops):
        raise Refused("stop is not usable", f"at most {_STOPS} texts of 1 to {_STOP} characters")
    temperature = request.temperature or 0.0
    tokens = next((n for n in (request.max_completion_tokens, request.max_tokens) if n is not None), MAX_TOKENS)
    if not 0 <= temperature <= 2 or tokens < 1:
        raise Refused("temperature or max_tokens is out of range", "temperature 0 to 2, max_tokens 1 or more")
    top, functions = request.top_logprobs or 0, None
    if not 0 <= top <= _TOP or (top and not request.logprobs):
        raise Refused("top_logprobs is not usable", f"0 to {_TOP}, and logprobs true beside it")
    if request.tools and request.tool_choice != "none":
        functions = Functions([tool.function for tool in request.tools])
        if stops or (request.response_format and request.response_format.type != "text"):
            raise Refused("tools go with neither stop nor response_format", "leave these out, or tool_choice none")
        if request.logprobs:
            raise Refused("logprobs go without tools: calls are no text", "leave one out, or tool_choice none")
    asked = Generate(
        "",  # one cache for all conversations: each goes on from what it shares with the one before
        _text(request, functions),
        _grammar(request, functions),
        tokens,
        stops,
        temperature,
        secrets.randbits(32) if request.seed is None else request.seed % 2**63,
        chat={name: request.asked[name] for name in _CHAT if request.asked.get(name) is not None},
        priority=_TIERS.get(request.service_tier or "", 2),
        logprobs=bool(request.logprobs),
        top_logprobs=top,
    )
    return asked, functions


def _text(request: Request, functions: Functions | None) -> str:
    messages = request.messages
    if not messages:
        raise Refused("messages is empty", "give at least one message")
    first = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
    system = [_content(message) for message in messages[:first]]
    if functions:
        form = prompt.SYSTEM if request.parallel_tool_calls is False else prompt.SYSTEM_ALL
        text = prompt.preamble(functions.specs, "\n".join([*system, form]), shots=False)
    else:
        text = prompt.chatml("system", "\n".join(system)) if system else ""
    for message in messages[first:]:
        said, role = _content(message), "system" if message.role == "developer" else message.role
        if calls := message.tool_calls:
            said = render_all([Call(c.function.name, _object(c.function)) for c in calls])
        elif functions and role == "assistant":
            answered: Sequence[Decision] = [Answer(said)] if said else []
            said = render_all(answered)
        text += prompt.chatml(role, said)
    return text + prompt.suffix([])


def _content(message: _Message) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for part in message.content:
        if part.type != "text":
            raise Refused(f"a message has a part of type {part.type!r}", "text alone; images go to a network")
    return "".join(part.text for part in message.content)


def _object(called: _Function) -> dict[str, Any]:
    try:
        return msgspec.json.decode(called.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise Refused(
            f"the arguments of {called.name} are no JSON object: {error}", "send them as they came"
        ) from error


def _grammar(request: Request, functions: Functions | None) -> str:
    if functions:
        choice, specs = request.tool_choice, functions.specs
        if isinstance(choice, _Call):
            specs = [spec for spec in specs if spec.name == choice.function.name]
            if not specs:
                raise Refused(f"tool_choice names {choice.function.name!r}", "name one of tools")
        free = choice in (None, "auto")
        several = 1 if isinstance(choice, _Call) or request.parallel_tool_calls is False else CALLS
        return grammar.build(specs, answer=free, none=free, several=several)
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return ""
    schema: dict[str, Any] = {"type": "object"}
    if wanted.type == "json_schema":
        if wanted.json_schema is None:
            raise Refused("response_format has no json_schema", "give json_schema with name and schema")
        schema = wanted.json_schema.schema
    spaces = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    return f"start: %json {msgspec.json.encode(schema | {'x-guidance': spaces}).decode()}\n"


def message(piece: Piece, functions: Functions | None) -> tuple[dict[str, Any], str]:
    """The message in a whole completion, and why it ended."""
    calls = piece.calls or []
    content: str | None = piece.text or (None if calls else "")
    if functions and piece.calls is None:
        content, calls = functions.read(piece.text)
    said: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        said["tool_calls"] = [
            {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": args}}
            for name, args in calls
        ]
    return said, "tool_calls" if calls and piece.finish == "stop" else piece.finish


def logprobs(request: Request, tokens: Sequence[Token]) -> dict[str, Any] | None:
    """What a choice tells of its tokens, where its request asks for it."""
    if not request.logprobs:
        return None

    def one(text: bytes, logprob: float) -> dict[str, Any]:
        return {"token": text.decode(errors="replace"), "logprob": logprob, "bytes": list(text)}

    content = [one(t.text, t.logprob) | {"top_logprobs": [one(*each) for each in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def usage(piece: Piece) -> dict[str, Any]:
    """What it took."""
    return {
        "prompt_tokens": piece.prompt_tokens,
        "completion_tokens": piece.output_tokens,
        "total_tokens": piece.prompt_tokens + piece.output_tokens,
        "prompt_tokens_details": {"cached_tokens": piece.cached_tokens},
    }
