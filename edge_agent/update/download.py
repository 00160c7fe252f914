"""Manifests and files from the hub, by HTTP.

Invariants: a part never grows past the size its manifest names; it is hashed while it streams and only a part with
the right hash is left complete; a cut connection goes on where it stopped (Range), a bounded number of times; the
hub's absence is Retry, other bytes than the manifest's are Refused. Hashing and writing run in threads.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import ssl
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import IO

import httpx
import msgspec

from edge_agent.errors import Refused, Retry
from edge_agent.wire import durable
from edge_agent.wire.bundle import FileEntry, SignedManifest

ATTEMPTS = 5
CHUNK = 1 << 16
MAX_MANIFEST = 1 << 20
Tick = Callable[[int], None]
"""Called with the bytes of the file that are on disk; what it raises stops the download."""


def hub_client(url: str, verify: bool | ssl.SSLContext = True) -> httpx.AsyncClient:
    """A client of the hub's API with bounded waits."""
    return httpx.AsyncClient(base_url=url, verify=verify, timeout=httpx.Timeout(30.0, connect=10.0))


class Downloads:
    """The hub's bundles and blobs. `token` makes a fresh device token for each request."""

    def __init__(self, client: httpx.AsyncClient, token: Callable[[], str], backoff_s: float = 0.5) -> None:
        self._client, self._token, self._backoff_s = client, token, backoff_s

    async def manifest(self, name: str, version: str) -> SignedManifest:
        """The signed manifest of a published version, not yet verified. Raises Retry."""
        body = bytearray()
        try:
            async with self._get(f"/v1/bundles/{name}/{version}", {}) as response:
                _expect(response, f"bundle {name} {version}")
                async for chunk in response.aiter_bytes(CHUNK):
                    body += chunk
                    if len(body) > MAX_MANIFEST:
                        raise Retry(f"the manifest of {name} {version} is over {MAX_MANIFEST} bytes")
            return msgspec.json.decode(body, type=SignedManifest)
        except httpx.HTTPError as error:
            raise _unreachable(error) from error
        except msgspec.DecodeError as error:
            raise Retry(
                f"the answer for {name} {version} is no signed manifest: {error}", "is that the hub?"
            ) from error

    async def blob(self, entry: FileEntry, part: Path, tick: Tick = lambda done: None) -> None:
        """Make `part` the whole file, resuming what is there. Raises Retry, Refused; OSError when the disk is full."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._once(entry, part, tick)
                return
            except httpx.HTTPError as error:
                problem: Retry = _unreachable(error)
            except _Cut as error:
                problem = error
                if error.from_zero:
                    await asyncio.to_thread(part.unlink, missing_ok=True)
            if attempt == ATTEMPTS:
                raise problem
            await asyncio.sleep(self._backoff_s * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))

    async def _once(self, entry: FileEntry, part: Path, tick: Tick) -> None:
        digest, have = await asyncio.to_thread(_resume, part, entry.size)
        resumed = have
        if have < entry.size:
            headers = {"Range": f"bytes={have}-"} if have else {}
            async with self._get(f"/v1/blobs/{entry.sha256}", headers) as response:
                start = _start(response, entry, have)
                if start == 0:
                    digest, have, resumed = hashlib.sha256(), 0, 0
                with await asyncio.to_thread(_open_at, part, start) as file:
                    async for chunk in response.aiter_raw():
                        have += len(chunk)
                        if have > entry.size:
                            await asyncio.to_thread(part.unlink, missing_ok=True)
                            raise Refused(
                                f"{entry.path}: the hub sends more than the {entry.size} bytes of the manifest"
                            )
                        await asyncio.to_thread(_append, file, digest, chunk)
                        tick(have)
            if have < entry.size:
                raise _Cut(f"{entry.path}: the connection ended at byte {have} of {entry.size}")
        await asyncio.to_thread(durable.sync, part)
        if digest.hexdigest() == entry.sha256:
            return
        if resumed:
            raise _Cut(f"{entry.path}: what was resumed does not have the right hash", from_zero=True)
        await asyncio.to_thread(part.unlink, missing_ok=True)
        found = f"expected sha256 {entry.sha256}, found {digest.hexdigest()}"
        raise Refused(f"{entry.path} is not what was signed: {found}", "publish the bundle again as a new version")

    def _get(self, path: str, headers: dict[str, str]) -> AbstractAsyncContextManager[httpx.Response]:
        headers = {"Authorization": f"Bearer {self._token()}", "Accept-Encoding": "identity", **headers}
        return self._client.stream("GET", path, headers=headers)


class _Cut(Retry):
    """Go on soon, from where it stopped or from zero."""

    def __init__(self, message: str, from_zero: bool = False) -> None:
        super().__init__(message, "it is tried again")
        self.from_zero = from_zero


def _unreachable(error: httpx.HTTPError) -> Retry:
    reason = str(error) or type(error).__name__
    return Retry(f"the hub cannot be reached: {reason}", "what is installed goes on; the update is tried again")


def _expect(response: httpx.Response, what: str) -> None:
    """Raises Retry for everything that is not the thing itself."""
    status = response.status_code
    if status in (401, 403):
        raise Retry(f"the hub does not accept this device ({status}) for {what}", "is it enrolled, is its clock right?")
    if status == 404:
        raise Retry(f"the hub has no {what}", "publish it, or assign another version")
    if status >= 500 or status == 429:
        raise _Cut(f"the hub answered {status} for {what}")
    if status not in (200, 206) or "text/html" in response.headers.get("content-type", ""):
        raise Retry(f"not the hub's answer ({status}) for {what}", "is there a proxy or a sign-in page between?")


def _start(response: httpx.Response, entry: FileEntry, have: int) -> int:
    """The byte at which the answer begins. Raises Retry, or Refused when it announces too much."""
    if response.status_code == 416:
        raise _Cut(f"{entry.path}: the hub does not go on from byte {have}", from_zero=True)
    _expect(response, f"file {entry.path}")
    start = 0
    if response.status_code == 206:
        unit, _, span = response.headers.get("content-range", "").partition(" ")
        first = span.partition("-")[0]
        if unit != "bytes" or not first.isdigit() or int(first) != have:
            raise _Cut(f"{entry.path}: the hub went on from another byte than {have}", from_zero=True)
        start = have
    length = response.headers.get("content-length", "")
    if length.isdigit() and start + int(length) > entry.size:
        offered = start + int(length)
        raise Refused(f"{entry.path}: the hub offers {offered} bytes, the manifest says {entry.size}")
    return start


def _resume(part: Path, size: int) -> tuple[hashlib._Hash, int]:
    """The hash and length of what is there; a part that is too long counts for nothing."""
    digest = hashlib.sha256()
    if not part.exists() or part.stat().st_size > size:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(b"")
        return digest, 0
    with part.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest, file.tell()


def _open_at(part: Path, start: int) -> IO[bytes]:
    file = part.open("r+b", buffering=0)
    file.truncate(start)
    file.seek(start)
    return file


def _append(file: IO[bytes], digest: hashlib._Hash, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]
    digest.update(chunk)
