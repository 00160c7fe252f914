"""Bytes from the hub, by HTTP: small files whole, chunks by ranges of packs.

Invariants: no answer grows past the size that was signed, and none may trickle for ever; a chunk is verified before it
is kept, neighbours come in one range, and a cut costs at most the chunk it fell in: what is left is asked for anew, a
bounded number of times without progress. Nothing that comes over the wire can do more than fail: the hub's absence and
a tampered chunk alike are Retry. Unpacking, hashing and writing run in threads.
"""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager

import httpx

from edge_agent.errors import Retry
from edge_agent.update.assembly import Assembly
from edge_agent.wire.chunks import Chunk, unpack_chunk
from edge_agent.wire.errors import Undecodable

ATTEMPTS = 5
PIECE = 1 << 16
SLOWEST, PATIENCE_S = 1024.0, 30.0
"""Bytes a second that an answer must bring after this many seconds."""
Tick = Callable[[int], None]
"""Called with the bytes that are still to come; what it raises stops the download."""


def hub_client(url: str, verify: bool | ssl.SSLContext = True) -> httpx.AsyncClient:
    """A client of the hub's API with bounded waits."""
    return httpx.AsyncClient(base_url=url, verify=verify, timeout=httpx.Timeout(30.0, connect=10.0))


class NotThere(Retry):
    """The hub does not have it."""


class Downloads:
    """The hub's files. `token` makes a fresh device token for each request."""

    def __init__(self, client: httpx.AsyncClient, token: Callable[[], str], backoff_s: float = 0.5) -> None:
        self._client, self._token, self._backoff_s = client, token, backoff_s

    async def whole(self, path: str, limit: int) -> bytes:
        """A file of at most `limit` bytes. Raises Retry, NotThere for 403 and 404 of metadata."""
        body, pace = bytearray(), _Pace(path)
        try:
            async with self._get(path, {}) as response:
                _expect(response, path)
                async for piece in response.aiter_raw(PIECE):
                    body += piece
                    if len(body) > limit:
                        raise Retry(f"endless data: {path} has more than {limit} bytes", "is that the hub?")
                    pace.at(len(body))
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        return bytes(body)

    async def fill(self, assembly: Assembly, tick: Tick = lambda left: None, only: Sequence[Chunk] = ()) -> None:
        """Fetch every chunk an assembly wants, or `only` some of them. Raises Retry; OSError when the disk is full."""
        idle, hashes = 0, {chunk.hash for chunk in only}
        while wanted := [chunk for chunk in assembly.wanted() if not hashes or chunk.hash in hashes]:
            try:
                for span in _spans(wanted):
                    await self._span(span, assembly, tick)
                continue
            except httpx.HTTPError as error:
                problem: Retry = _unreachable(error)
            except _Cut as error:
                problem = error
            idle = idle + 1 if wanted[0].hash in assembly else 1
            if idle == ATTEMPTS:
                raise problem
            await asyncio.sleep(self._backoff_s * 2 ** (idle - 1) * random.uniform(0.5, 1.0))

    async def _span(self, span: Sequence[Chunk], assembly: Assembly, tick: Tick) -> None:
        pack, first, end = span[0].pack, span[0].offset, span[-1].offset + span[-1].packed
        left, pace, buffer, received = iter(span), _Pace(f"pack {pack[:12]}"), bytearray(), 0
        upcoming = next(left, None)
        async with self._get(f"/v1/blobs/{pack}", {"Range": f"bytes={first}-{end - 1}"}) as response:
            _begins(response, pack, first, end)
            async for piece in response.aiter_raw(PIECE):
                buffer += piece
                received += len(piece)
                if received > end - first:
                    raise _Cut(f"endless data: pack {pack[:12]} goes on past byte {end}")
                pace.at(received)
                ready = []
                while upcoming is not None and len(buffer) >= upcoming.packed:
                    ready.append((upcoming, bytes(buffer[: upcoming.packed])))
                    del buffer[: upcoming.packed]
                    upcoming = next(left, None)
                if ready:
                    tick(await asyncio.to_thread(_keep, assembly, ready))
        if upcoming is not None:
            raise _Cut(f"pack {pack[:12]}: the connection ended at byte {first + received} of {end}")

    def _get(self, path: str, headers: dict[str, str]) -> AbstractAsyncContextManager[httpx.Response]:
        bearer = {"Authorization": f"Bearer {token}"} if (token := self._token()) else {}
        return self._client.stream("GET", path, headers={"Accept-Encoding": "identity", **bearer, **headers})


class _Cut(Retry):
    """Go on soon, from where it stopped."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "it is tried again")


class _Pace:
    """Raises Cut when an answer trickles."""

    def __init__(self, what: str) -> None:
        self._what, self._began = what, time.monotonic()

    def at(self, received: int) -> None:
        seconds = time.monotonic() - self._began
        if seconds > PATIENCE_S and received < seconds * SLOWEST:
            raise _Cut(f"slow retrieval: {received} bytes of {self._what} in {seconds:.0f} s")


def _spans(wanted: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    """Chunks that lie one behind the other, together."""
    span = [wanted[0]]
    for chunk in wanted[1:]:
        if (chunk.pack, chunk.offset) != (span[-1].pack, span[-1].offset + span[-1].packed):
            yield span
            span = []
        span.append(chunk)
    yield span


def _keep(assembly: Assembly, ready: Sequence[tuple[Chunk, bytes]]) -> int:
    for chunk, packed in ready:
        try:
            assembly.put(chunk.hash, unpack_chunk(chunk, packed))
        except Undecodable as error:
            raise _Cut(f"tampered chunk at byte {chunk.offset} of pack {chunk.pack[:12]}: {error}") from error
    return assembly.left


def _unreachable(error: httpx.HTTPError) -> Retry:
    reason = str(error) or type(error).__name__
    return Retry(f"the hub cannot be reached: {reason}", "what is installed goes on; the update is tried again")


def _expect(response: httpx.Response, what: str) -> None:
    """Raises Retry for everything that is not the thing itself."""
    status = response.status_code
    if status in (401, 403):
        raise Retry(f"the hub does not accept this device ({status}) for {what}", "is it enrolled, is its clock right?")
    if status == 404:
        raise NotThere(f"the hub has no {what}", "publish it again, or assign another version")
    if status >= 500 or status == 429:
        raise _Cut(f"the hub answered {status} for {what}")
    if status not in (200, 206) or "text/html" in response.headers.get("content-type", ""):
        raise Retry(f"not the hub's answer ({status}) for {what}", "is there a proxy or a sign-in page between?")


def _begins(response: httpx.Response, pack: str, first: int, end: int) -> None:
    """Raises Retry when the answer is not the range that was asked for."""
    _expect(response, f"pack {pack}")
    span = response.headers.get("content-range", "")
    if response.status_code != 206 or not span.startswith(f"bytes {first}-"):
        raise Retry(f"the hub answers {span or 'everything'} for bytes {first} to {end}", "is there a proxy between?")
