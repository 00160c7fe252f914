"""A language model behind an OpenAI-compatible server, as the `LanguageModel` Protocol: streamed chat completions.

Invariants: loading asks nothing of the server, so a device starts without it. A request is sent again only while no
piece of it was given out, ATTEMPTS times in all, after a random pause below a bound that doubles (full jitter), or as
long as the server asks for; it ends within `timeout_s` and soon after it is cancelled, whatever the server does. What
comes back is bounded. Redirects are not followed, so a key goes to the configured server alone.

What a server cannot do: it takes no Lark grammar. A JSON schema goes along as `response_format`; a text under either is
held back until it is whole, checked here, and Refused when it is outside. Tools are asked for by `Generate.chat`, and
their calls are for the caller to check. There are no adapters, no prefix that is known to be kept, no probabilities.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import re
import ssl
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
from llguidance import LLMatcher, LLTokenizer

from edge_agent.config import Endpoint
from edge_agent.engines.base import EngineInfo, Generate, Piece, check_request
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.wire.bundle import content_digest, scan

FILE = "endpoint.json"
ATTEMPTS = 3
_PAUSE_S, _POLL_S, _CONNECT_S = 0.5, 0.05, 5.0
_MAX_REPLY = 1 << 20
_BUSY = (408, 409, 425, 429)
_TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>\n?|\Z)", re.DOTALL)
_JSON = "start: %json "


class _Busy(Retry):
    """The server answers, and not now; `after_s` is what it asks to wait."""

    def __init__(self, message: str, hint: str, after_s: float) -> None:
        super().__init__(message, hint)
        self.after_s = after_s


class OpenaiModel:
    """The model of one endpoint. One thread at a time."""

    info: EngineInfo

    def __init__(self, path: Path) -> None:
        """Read `path/endpoint.json`. Raises Refused when it, the key or the certificates cannot be read."""
        started = time.perf_counter()
        try:
            self._endpoint = endpoint = msgspec.json.decode((path / FILE).read_bytes(), type=Endpoint)
            tls = ssl.create_default_context(cafile=endpoint.ca_file) if endpoint.ca_file else True
        except (OSError, ValueError) as error:
            raise Refused(f"the endpoint {path.name} cannot be set up: {error}", "see its settings") from error
        self._headers()
        self._loop = asyncio.new_event_loop()
        how: dict[str, Any] = {"verify": tls, "trust_env": endpoint.by_proxy}
        self._client = httpx.AsyncClient(base_url=endpoint.url, timeout=httpx.Timeout(None, connect=_CONNECT_S), **how)
        digest, extra = content_digest(scan(path)), {"timeout_s": endpoint.timeout_s}
        load_s = time.perf_counter() - started
        self.info = EngineInfo("openai", endpoint.url, endpoint.model, digest, load_s, extra)

    def generate(self, request: Generate, cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """Stream the completion. Raises Refused: bad request, key, model or answer; Retry: no server, busy, cut off."""
        check_request(request)
        if request.adapter:
            raise Refused(f"{self.info.model} has no adapter {request.adapter!r}", "an endpoint takes none")
        if request.logprobs:
            raise Refused(f"{self.info.model} is an endpoint, whose probabilities are not read", "leave logprobs out")
        chat, held = dict(request.chat or {"messages": _messages(request.prefix + request.prompt)}), None
        if request.grammar.startswith(_JSON):
            schema = _schema(request.grammar.removeprefix(_JSON))
            held = _matcher(_JSON + msgspec.json.encode(schema).decode())
            named = {"name": "answer", "strict": True, "schema": schema}
            chat.setdefault("response_format", {"type": "json_schema", "json_schema": named})
        elif request.grammar and not request.chat:
            held = _matcher(request.grammar)
        body = {"model": self._endpoint.model, "stream": True, "stream_options": {"include_usage": True}} | chat
        body |= {"max_tokens": request.max_tokens, "temperature": request.temperature}
        body |= {"stop": request.stop} if request.stop else {}
        body |= {"seed": request.seed} if request.temperature else {}
        return self._stream(body, held, cancelled)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Raises Refused: the server chooses what it runs."""
        raise Refused(f"{self.info.model} is behind an endpoint, which takes no adapter", "load it at the server")

    def unload_adapter(self, name: str) -> None:
        """Raises Refused: there is none."""
        raise Refused(f"{self.info.model} has no adapter {name!r}", "it was not loaded")

    def close(self) -> None:
        """Close the connections."""
        self._loop.run_until_complete(self._client.aclose())
        self._loop.close()

    def _stream(self, body: dict[str, Any], held: LLMatcher | None, cancelled: Callable[[], bool]) -> Iterator[Piece]:
        """Drive the asynchronous side, which can be left at any moment, from the worker's thread."""
        began = time.monotonic()
        until = began + self._endpoint.timeout_s
        pieces = self._pieces(body, held, began, until)

        async def following() -> Piece:
            return await anext(pieces)

        last: Piece | None = None
        task: asyncio.Task[Piece] | None = None
        try:
            while last is None:
                task = self._loop.create_task(following())
                while not task.done() and not cancelled():
                    if time.monotonic() >= until:
                        raise Retry(f"{self._where} is not done within {self._endpoint.timeout_s:g} s", "its timeout_s")
                    self._loop.run_until_complete(asyncio.wait({task}, timeout=_POLL_S))
                if not task.done():
                    last = Piece("", done=True, finish="cancelled", total_s=time.monotonic() - began)
                elif (piece := task.result()).done:
                    last = piece
                else:
                    yield piece
        finally:
            if task is not None and not task.done():
                task.cancel()
                self._loop.run_until_complete(asyncio.wait({task}))
            self._loop.run_until_complete(pieces.aclose())
        yield last

    async def _pieces(
        self, body: dict[str, Any], held: LLMatcher | None, began: float, until: float
    ) -> AsyncGenerator[Piece, None]:
        bound = _PAUSE_S
        for attempt in range(1, ATTEMPTS + 1):
            reply = _Reply(began)
            try:
                async with contextlib.aclosing(self._asked(body, reply)) as texts:
                    async for text in texts:
                        if held is None:
                            yield Piece(text)
                yield reply.last(held)
                return
            except Retry as error:
                pause = max(error.after_s if isinstance(error, _Busy) else 0.0, random.uniform(0, bound))
                given = reply.given and held is None
                if given or attempt == ATTEMPTS or time.monotonic() + pause >= until:
                    raise
                await asyncio.sleep(pause)
                bound *= 2

    async def _asked(self, body: dict[str, Any], reply: _Reply) -> AsyncGenerator[str, None]:
        """Send it once; yields text, fills `reply`. Raises Refused, Retry."""
        try:
            async with self._client.stream("POST", "chat/completions", json=body, headers=self._headers()) as response:
                if response.status_code != 200:
                    raise await self._fault(response)
                kind = response.headers.get("content-type", "nothing named")
                if not kind.startswith("text/event-stream"):
                    raise Refused(f"{self._where} answers {kind}, no event stream", "is its url that of an API?")
                async with contextlib.aclosing(_events(response)) as events:
                    async for event in events:
                        if text := reply.take(event):
                            yield text
        except httpx.ConnectError as error:
            raise Retry(f"{self._where} cannot be reached: {error}", "does it run there? is its url right?") from error
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise Retry(f"{self._where} broke off: {why}", "its own log may say why") from error
        if not reply.finish:
            raise Retry(f"{self._where} ended its answer in the middle", "its own log may say why")

    async def _fault(self, response: httpx.Response) -> OutriderError:
        """What an answer other than 200 means."""
        raw, status = b"", response.status_code
        async for chunk in response.aiter_raw():
            raw += chunk
            if len(raw) > 4096:
                break
        said, endpoint = f"{status} {_reason(raw)}".strip(), self._endpoint
        if status in (401, 403):
            given = endpoint.key_file or endpoint.key_env or "no key, give key_file or key_env"
            return Refused(f"{self._where} refuses the key: {said}", f"it is sent {given}")
        if status == 404:
            return Refused(f"{self._where} has no such model or path: {said}", await self._models())
        if status in _BUSY or status >= 500:
            busy = f"{self._where} is busy or broken: {said}"
            return _Busy(busy, "ask less often, or look at its log", _after(response.headers.get("retry-after", "")))
        hint = "redirects are not followed" if status < 400 else "it may not take all that docs/models.md says is sent"
        return Refused(f"{self._where} refuses the request: {said}", hint)

    async def _models(self) -> str:
        """The models that the server lists, for a hint."""
        with contextlib.suppress(httpx.HTTPError, msgspec.MsgspecError, LookupError, TypeError):
            answer = await self._client.get("models", headers=self._headers(), timeout=_CONNECT_S)
            listed = [str(model["id"]) for model in msgspec.json.decode(answer.content)["data"]]
            return f"it lists {', '.join(listed[:10])[:500] or 'none'}"
        return "does its url end in /v1?"

    def _headers(self) -> dict[str, str]:
        endpoint, key = self._endpoint, ""
        if not endpoint.key_file and not endpoint.key_env:
            return {"Accept-Encoding": "identity"}
        with contextlib.suppress(OSError, UnicodeDecodeError):
            key = Path(endpoint.key_file).read_text() if endpoint.key_file else os.environ.get(endpoint.key_env, "")
        key = key.strip()
        if not key or not key.isascii() or not key.isprintable():
            raise Refused(f"{endpoint.key_file or endpoint.key_env} holds no key", "one line of ASCII text, readable")
        return {"Accept-Encoding": "identity", "Authorization": f"Bearer {key}"}

    @property
    def _where(self) -> str:
        return f"{self._endpoint.model} at {self._endpoint.url}"


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct, frozen=True):
    function: _Function
    index: int = 0


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Details(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Event(msgspec.Struct, frozen=True):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Reply:
    """What has come of one answer."""

    def __init__(self, began: float) -> None:
        self.text, self.finish, self.given = "", "", False
        self._began, self._first, self._parts, self._size = began, 0.0, 0, 0
        self._usage = _Usage()
        self._calls: list[tuple[int, str, str]] = []  # index, name, arguments

    def take(self, data: bytes) -> str:
        """Take an event; the text in it. Raises Retry when it is an error, too much, or no event at all."""
        if data == b"[DONE]":
            return ""
        try:
            event = msgspec.json.decode(data, type=_Event)
        except msgspec.MsgspecError as error:
            raise Retry(f"the endpoint sent what is no chat completion: {data[:100]!r}", str(error)) from error
        self._size += len(data)
        if event.error or self._size > _MAX_REPLY * 16:
            raise Retry(f"the endpoint gave up: {_reason(data)}" if event.error else "the endpoint's answer is endless")
        self._usage = event.usage or self._usage
        if not event.choices:
            return ""
        choice = event.choices[0]
        for call in choice.delta.tool_calls or []:
            self._call(call)
        text = choice.delta.content or ""
        if text or choice.delta.tool_calls:
            self._first = self._first or time.monotonic() - self._began
            self._parts += 1
        self.text, self.finish = self.text + text, choice.finish_reason or self.finish
        self.given = self.given or bool(text)
        return text

    def _call(self, part: _Call) -> None:
        at = next((i for i, (index, *_) in enumerate(self._calls) if index == part.index), None)
        name, arguments = part.function.name or "", part.function.arguments or ""
        if at is None or (name and self._calls[at][1]):  # some servers number all calls 0
            self._calls.append((part.index, name, arguments))
        else:
            _, before, had = self._calls[at]
            self._calls[at] = part.index, before or name, had + arguments

    def last(self, held: LLMatcher | None) -> Piece:
        """The end, with the text that was held back. Raises Refused when that is not what was asked for."""
        if held is not None and self.finish == "stop":
            raw = self.text.strip().encode()
            if held.try_consume_tokens(list(raw)) < len(raw) or not held.is_accepting():
                hint = "an endpoint cannot be held to a grammar: a larger model keeps to it more often"
                raise Refused(f"the endpoint wrote {self.text[:100]!r}, which is not what was asked for", hint)
        return Piece(
            "" if held is None else self.text.strip(),
            done=True,
            finish="stop" if self.finish == "tool_calls" else self.finish,
            prompt_tokens=self._usage.prompt_tokens,
            cached_tokens=(self._usage.prompt_tokens_details or _Details()).cached_tokens or 0,
            output_tokens=self._usage.completion_tokens or self._parts,
            first_token_s=self._first,
            total_s=time.monotonic() - self._began,
            calls=[(name, arguments) for _, name, arguments in self._calls],
        )


async def _events(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The data of server-sent events. Raises Retry for a line without end."""
    rest = b""
    async for chunk in response.aiter_raw():
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > _MAX_REPLY:
            raise Retry("the endpoint sent a line without end")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _messages(text: str) -> list[dict[str, str]]:
    """ChatML as messages; other text is the user's. A tool's turn is too: it names no call. Raises Refused if empty."""
    turns = [(role, said) for role, said in _TURN.findall(text)] or [("user", text)]
    if turns[-1] == ("assistant", ""):
        turns.pop()
    if not any(said.strip() for _, said in turns):
        raise Refused("the prompt has 0 tokens", "it takes at least a message")
    return [{"role": "user" if role == "tool" else role, "content": said} for role, said in turns]


def _schema(text: str) -> dict[str, Any]:
    """The schema of a %json grammar; how it spaces is the server's."""
    try:
        schema = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise Refused(f"the grammar is not usable: {error}", "%json takes one JSON schema") from error
    schema.pop("x-guidance", None)
    return schema


def _matcher(grammar: str) -> LLMatcher:
    matcher = LLMatcher(LLTokenizer("byte"), LLMatcher.grammar_from_lark(grammar), log_level=0)
    if matcher.is_error():
        raise Refused(f"the grammar is not usable: {matcher.get_error()[:500]}", "llguidance's Lark syntax")
    return matcher


def _reason(raw: bytes) -> str:
    """The message in an error of a server, or what it begins with."""
    with contextlib.suppress(msgspec.MsgspecError):
        found: Any = msgspec.json.decode(raw)
        for key in ("error", "message", "detail"):
            found = found.get(key, found) if isinstance(found, dict) else found
        return str(found)[:300]
    return raw[:200].decode(errors="replace")


def _after(text: str) -> float:
    """Seconds that a Retry-After asks for; 0 when it says nothing that can be read."""
    with contextlib.suppress(ValueError):
        return max(
            0.0, float(text) if text.strip().isdecimal() else parsedate_to_datetime(text).timestamp() - time.time()
        )
    return 0.0
