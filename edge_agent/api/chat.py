"""OpenAI's chat completions and list of models, for the installed language models and their adapters.

Invariants: `run:model` is asked for the name that the request gives; a generation ends when its client leaves; what is
wrong with a request is told before the first event of a stream, what goes wrong after it is an event of its own.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edge_agent.agent.functions import Functions
from edge_agent.api import completions
from edge_agent.api.access import RUN_MODEL, Caller, Gate, Problem, answer, said
from edge_agent.api.completions import Request
from edge_agent.engines.base import Generate, Piece, Token
from edge_agent.errors import OutriderError, Retry

MAX_CHAT = 1024 * 1024
CHAT_S = 300.0


def routes(gate: Gate) -> list[Route]:
    """What OpenAI's clients call."""
    return [
        gate.route("/v1/models", "GET", "read:device", _models),
        gate.route("/v1/models/{name}", "GET", "read:device", _model),
        gate.route("/v1/chat/completions", "POST", "", _chat),  # the model's name is in the body
    ]


async def _models(caller: Caller) -> Response:
    return answer({"object": "list", "data": [_shown(name) for name in caller.device.models.languages()]})


async def _model(caller: Caller) -> Response:
    return answer(_shown(_known(caller, caller.request.path_params["name"])))


def _shown(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "outrider"}


def _known(caller: Caller, name: str) -> str:
    names = caller.device.models.languages()
    if name not in names:
        raise Problem(404, f"there is no language model {name}", f"installed: {', '.join(names) or 'none'}")
    return name


async def _chat(caller: Caller) -> Response:
    request = completions.read(await caller.body(MAX_CHAT))
    caller.must(RUN_MODEL, request.model)
    asked, functions = completions.generate(request)
    pieces = _pieces(caller, _known(caller, request.model), asked)
    about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(caller.now), "model": request.model}
    if request.stream:
        first = await caller.unless_gone(anext(pieces))
        return _Events(_events(request, functions, about, first, pieces))
    piece = await caller.unless_gone(_whole(pieces))
    message, finish = completions.message(piece, functions)
    likely = completions.logprobs(request, piece.tokens)
    choice = {"index": 0, "message": message, "finish_reason": finish, "logprobs": likely}
    whole = {"object": "chat.completion", "choices": [choice], "usage": completions.usage(piece)}
    return answer(about | whole)


async def _pieces(caller: Caller, name: str, asked: Generate) -> AsyncGenerator[Piece, None]:
    with caller.metrics.timed(name):
        async with contextlib.aclosing(caller.device.models.stream(name, asked, CHAT_S)) as pieces:
            async for piece in pieces:
                yield piece
                if piece.done:
                    return
        raise Retry("the language model broke off", "ask again")


async def _whole(pieces: AsyncGenerator[Piece, None]) -> Piece:
    text, tokens = "", list[Token]()
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            text += piece.text
            tokens += piece.tokens
    return msgspec.structs.replace(piece, text=text, tokens=tokens)


class _Events(StreamingResponse):
    """Server-sent events, whose source is closed when the client leaves."""

    def __init__(self, source: AsyncGenerator[bytes, None]) -> None:
        super().__init__(source, headers={"Cache-Control": "no-cache"}, media_type="text/event-stream")
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._source):
            await super().__call__(scope, receive, send)


async def _events(
    request: Request,
    functions: Functions | None,
    about: dict[str, Any],
    piece: Piece,
    pieces: AsyncGenerator[Piece, None],
) -> AsyncGenerator[bytes, None]:
    def event(delta: dict[str, Any], finish: str | None = None, likely: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": likely}
        return _event(about | {"object": "chat.completion.chunk", "choices": [choice]})

    text = ""
    async with contextlib.aclosing(pieces):
        yield event({"role": "assistant", "content": None if functions else ""})
        try:
            while True:
                text += piece.text
                if piece.text and not functions:
                    yield event({"content": piece.text}, likely=completions.logprobs(request, piece.tokens))
                if piece.done:
                    break
                piece = await anext(pieces)
        except OutriderError as error:
            yield _event(said("/v1/chat/", Problem(503, error.message, error.hint)))
            return
    message, finish = completions.message(msgspec.structs.replace(piece, text=text), functions)
    if functions:
        for index, call in enumerate(message.get("tool_calls", [])):
            yield event({"tool_calls": [{"index": index, **call}]})
        if message["content"]:
            yield event({"content": message["content"]})
    yield event({}, finish)
    if request.stream_options and request.stream_options.include_usage:
        yield _event(about | {"object": "chat.completion.chunk", "choices": [], "usage": completions.usage(piece)})
    yield b"data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
