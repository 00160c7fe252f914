"""Large payloads that go by HTTP: images, logs, support bundles; a record tells of each.

    <folder>/<n>-<sha256>    waits for the hub, in the order of n
    <folder>/unread          the last one that the disk did not give back

Invariants: the file is on disk before the record that names it; it leaves when the hub has it whole, or when the quota
makes it the victim (oldest first, told by a record too). A cut costs nothing that the hub has: it is asked how much is
there, and the rest is sent (tus 1.0). What the hub refuses for good, and what cannot be read, is told and let go; what
it refuses for now is tried again later, as long as the quota lets it wait. None of these holds up those behind it, and
who stands between takes none.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import random
import re
import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import httpx

from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.rhythm import wait_up_to
from edge_agent.sync.outbox import Outbox
from edge_agent.trouble import Trouble
from edge_agent.wire import durable

QUOTA = 256 << 20  # bytes that may wait
PIECE = 1 << 16
BACKOFF_S = (1.0, 60.0)
HELD_S = (1.0, 3600.0)  # a blob that was refused waits so long, others meanwhile pass it: first and longest
IN_A_ROW = 3  # so many that were refused say more of the hub than of themselves
_FOR_GOOD, _EVERYONE = (400, 413, 422), (401, 403, 429)
_SHORT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # the machine's trouble, not a file's
_NAME = re.compile(r"[0-9]+-[0-9a-f]{64}")
PRIORITY = 4
log = logging.getLogger(__name__)


class Blobs:
    """`run()` uploads what `put` keeps; `token` makes a fresh device token for each request."""

    def __init__(
        self, folder: Path, outbox: Outbox, client: httpx.AsyncClient, token: Callable[[], str], quota: int = QUOTA
    ) -> None:
        self._folder, self._outbox, self._client, self._token, self.quota = folder, outbox, client, token, quota
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for part in folder.glob(".*.part"):  # of a process that was killed
            part.unlink()
        self._out = set[str]()  # told as lost, and perhaps still in the folder
        self._held = dict[str, tuple[float, float]]()  # refused for now: until when (monotonic), and how long that is
        self._next = 1 + max((_order(path) for path in self._waiting()), default=0)
        self._put, self._more = asyncio.Lock(), asyncio.Event()
        self._trouble = Trouble(log, "uploads wait")

    async def put(self, content: bytes, name: str, media_type: str = "application/octet-stream") -> str:
        """Its SHA-256, once it and its record are on disk. Raises Refused past the quota, Retry for a full disk."""
        if not 0 < len(content) <= self.quota:
            raise Refused(f"{name} has {len(content)} bytes", f"1 to {self.quota} can be uploaded")
        async with self._put:
            sha256 = await asyncio.to_thread(lambda: hashlib.sha256(content).hexdigest())
            for path in await asyncio.to_thread(self._victims, len(content)):
                await self._let_go(path, "quota")
            try:
                await asyncio.to_thread(durable.write, self._folder / f"{self._next}-{sha256}", content, 0o600)
            except OSError as error:
                raise Retry(f"cannot keep {name}: {error}", "free some space on the disk") from error
            self._next += 1
            about = {"sha256": sha256, "size": len(content), "name": name, "media_type": media_type}
            await self._outbox.append("blob", about, PRIORITY)
        self._more.set()
        return sha256

    async def run(self) -> None:
        delay = BACKOFF_S[0]
        while True:
            self._more.clear()
            try:
                await self._round()
                if not self._held:
                    self._trouble.over()
                delay = BACKOFF_S[0]
                wait = max(0.05, min(self._held.values())[0] - time.monotonic()) if self._held else None
                await wait_up_to(wait, self._more)
            except (Retry, httpx.HTTPError, OSError) as error:
                self._trouble.tell(error)
                await asyncio.sleep(random.uniform(0, delay))
                delay = min(delay * 2, BACKOFF_S[1])

    async def _round(self) -> None:
        listed = await asyncio.to_thread(self._waiting)
        self._out.intersection_update(path.name for path in listed)
        self._held = {path.name: held for path in listed if (held := self._held.get(path.name))}
        refused = 0
        for path in sorted(listed, key=self._until):
            if path.name in self._out or self._until(path) > time.monotonic():
                continue
            try:
                await self._upload(path)
                self._held.pop(path.name, None)
                refused = 0
            except _Held as error:
                wait = min(self._held.get(path.name, (0.0, HELD_S[0] / 2))[1] * 2, HELD_S[1])
                self._held[path.name] = time.monotonic() + wait * random.uniform(0.5, 1.0), wait
                if (refused := refused + 1) == IN_A_ROW:
                    raise
                self._trouble.tell(error)
            except _Unreadable as error:
                log.error("blob %s is set aside: %s", path.name, error)
                await self._let_go(path, f"unreadable: {error}", path.with_name("unread"))

    def _until(self, path: Path) -> float:
        return self._held.get(path.name, (0.0, 0.0))[0]

    async def _upload(self, path: Path) -> None:
        """Raises Retry or httpx.HTTPError when it is to be tried again (_Held: by itself), _Unreadable when in vain."""
        with _reading():
            size = (await asyncio.to_thread(path.stat)).st_size
        sha256 = path.name.partition("-")[2]
        named = {"Upload-Length": str(size), "Upload-Metadata": f"sha256 {b64encode(sha256.encode()).decode()}"}
        answer = await self._ask("POST", "/v1/uploads", named)
        offset = int(answer.headers.get("Upload-Offset", 0)) if answer.status_code == 201 else 0
        if answer.status_code == 201 and offset < size:
            told = {"Upload-Offset": str(offset), "Content-Length": str(size - offset)}
            told["Content-Type"] = "application/offset+octet-stream"
            answer = await self._ask("PATCH", f"/v1/uploads/{sha256}", told, _pieces(path, offset))
        if answer.is_success:
            await self._drop(path)
        elif answer.status_code in _FOR_GOOD:
            await self._let_go(path, f"refused: {answer.text[:200]}")
        else:
            kind = Retry if answer.status_code in _EVERYONE else _Held
            raise kind(f"the hub answers {answer.status_code} to a blob: {answer.text[:200]}")

    async def _ask(
        self, method: str, path: str, headers: dict[str, str], content: AsyncIterator[bytes] | None = None
    ) -> httpx.Response:
        shown = {"Authorization": f"Bearer {self._token()}", "Tus-Resumable": "1.0.0"}
        answer = await self._client.request(method, path, headers=shown | headers, content=content)
        told = answer.headers.get("content-type", "")
        page = answer.status_code in (400, 422) and not told.startswith("application/problem+json")
        if page or (answer.is_success and "Tus-Resumable" not in answer.headers):
            hint = "is there a proxy or a sign-in page between?"
            raise Retry(f"not the hub's answer ({answer.status_code}) to a blob", hint)
        return answer

    async def _let_go(self, path: Path, why: str, to: Path | None = None) -> None:
        if path.name in self._out:
            return
        self._out.add(path.name)
        try:
            await self._outbox.append("blob", {"sha256": path.name.partition("-")[2], "lost": why}, PRIORITY)
        except OutriderError:
            self._out.discard(path.name)
            raise
        await self._drop(path, to)

    async def _drop(self, path: Path, to: Path | None = None) -> None:
        """Out of the queue, also when the disk does not let go of it."""
        try:
            await asyncio.to_thread(lambda: path.replace(to) if to else path.unlink(missing_ok=True))
        except FileNotFoundError:
            return
        except OSError as error:
            log.error("%s stays on the disk: %s", path, error)
            self._out.add(path.name)

    def _victims(self, size: int) -> list[Path]:
        waiting = [(path, _size(path)) for path in self._waiting() if path.name not in self._out]
        room, victims = self.quota - size - sum(size for _, size in waiting), []
        for path, size in waiting:
            if room >= 0:
                break
            victims.append(path)
            room += size
        return victims

    def _waiting(self) -> list[Path]:
        return sorted((path for path in self._folder.iterdir() if _NAME.fullmatch(path.name)), key=_order)


class _Held(Retry):
    """The hub does not take it now."""


class _Unreadable(Exception):
    """A file that the disk does not give back."""


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _SHORT:
            raise
        raise _Unreadable(error.strerror or str(error)) from error


def _order(path: Path) -> int:
    return int(path.name.partition("-")[0])


async def _pieces(path: Path, offset: int) -> AsyncIterator[bytes]:
    with _reading(), await asyncio.to_thread(path.open, "rb") as file:
        file.seek(offset)
        while piece := await asyncio.to_thread(file.read, PIECE):
            yield piece


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # it was uploaded meanwhile, or cannot be read
        return 0
