"""The fleet's own language model: an OpenAI-compatible server that devices reach through the hub by their own tokens.

Invariants: the server's key stays here, and what it says of that key too; at most CONCURRENT requests go at a time, of
one device or user EACH, one more is 429, and who takes nothing for TAKE_S is cut off; an answer is passed on as it
comes, at most MAX_BYTES of it; redirects are not followed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator
from functools import partial

import httpx
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from hub.errors import Fatal, Refused

CONCURRENT, EACH = 16, 4
MAX_BYTES = 4 << 20
TIMEOUT = httpx.Timeout(120.0, connect=5.0)
TAKE_S = 30.0
_log = logging.getLogger(__name__)


class Upstream:
    """The server at `url`, up to and with `/v1`. Raises Fatal for one that is no URL."""

    def __init__(self, url: str, key: str = "") -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        try:
            parsed = httpx.URL(url)
        except httpx.InvalidURL:
            parsed = httpx.URL()
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.userinfo or parsed.query:
            raise Fatal(f"--models {url!r} is no URL", "like http://127.0.0.1:11434/v1, the key in OUTRIDER_MODELS_KEY")
        self._client = httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT, trust_env=False)
        self._active = Counter[str]()  # requests by who made them

    async def pass_on(self, request: Request, path: str, who: str) -> StreamingResponse:
        """The server's answer. Raises Refused: 429 too many at once, 502 no server or not our key, 504 too slow."""
        body = await request.body()
        of = f" of {who}" if self._active[who] >= EACH else ""
        if of or self._active.total() >= CONCURRENT:
            told = f"{EACH if of else CONCURRENT} requests{of} are with the fleet's model"
            raise Refused(429, told, "try again when one is answered", retry_after_s=2)
        self._active[who] += 1
        try:
            kind = {"Content-Type": "application/json"}
            asked = self._client.build_request(request.method, path, content=body, headers=kind)
            answer = await _unless_left(request, asyncio.create_task(self._client.send(asked, stream=True)))
        except BaseException as error:
            self._left(who)
            if isinstance(error, httpx.TimeoutException):
                raise Refused(504, "the fleet's model does not answer in time", "ask less, or look at it") from error
            if isinstance(error, httpx.HTTPError):
                raise Refused(502, "the fleet's model cannot be reached", "does it run where --models says?") from error
            raise
        if answer.status_code in (401, 403) or answer.is_redirect:
            await self._done(answer, who)
            raise Refused(502, f"the fleet's model refuses the hub: {answer.status_code}", "see OUTRIDER_MODELS_KEY")
        return _Passed(self, answer, who)

    async def close(self) -> None:
        await self._client.aclose()

    async def _done(self, answer: httpx.Response, who: str) -> None:
        self._left(who)
        await answer.aclose()

    def _left(self, who: str) -> None:
        self._active -= Counter([who])  # who has none takes no memory


class _Passed(StreamingResponse):
    """An answer on its way; its place is free again when it is told, or nobody listens any more."""

    def __init__(self, upstream: Upstream, answer: httpx.Response, who: str) -> None:
        kept = {name: answer.headers[name] for name in ("content-type", "retry-after") if name in answer.headers}
        super().__init__(_bounded(answer), answer.status_code, kept)
        self._done = partial(upstream._done, answer, who)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def within(message: Message) -> None:
            async with asyncio.timeout(TAKE_S):
                await send(message)

        try:
            await super().__call__(scope, receive, within)
        except* (TimeoutError, httpx.HTTPError) as problems:  # what is not whole is closed with no end
            _log.warning("an answer of the fleet's model is cut off: %r", problems.exceptions[0])
        finally:
            await self._done()


async def _unless_left(request: Request, sending: asyncio.Task[httpx.Response]) -> httpx.Response:
    """The answer, which may begin after a minute of thought; it is given up when nobody waits for it."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.create_task(left())
    try:
        await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not sending.done():
            raise Refused(499, "nobody waits for this answer", "it was given up")
        return sending.result()
    finally:
        sending.cancel()
        leaving.cancel()
        await asyncio.wait({sending, leaving})


async def _bounded(answer: httpx.Response) -> AsyncIterator[bytes]:
    told = 0
    async for chunk in answer.aiter_bytes():
        told += len(chunk)
        if told > MAX_BYTES:
            return  # cut off: whoever reads it sees no end
        yield chunk
