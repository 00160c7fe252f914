"""Where the registry's blobs live: a folder, or an object store of obstore (S3 and its like) with a cache.

Invariants: a blob is durable when `put` returns; the store is the truth and the cache is bounded, so a hub on another
machine sees the same blobs; who reads a local copy checks its hash, and asks for it anew when it is damaged.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from edge_agent.wire import durable
from hub.errors import Fatal, Refused

CACHE = 16 << 30
YOUNG_S = 600.0
"""A copy that was asked for so lately is not removed: somebody may be reading it."""


class Objects(Protocol):
    """Blobs by their SHA-256; a name is never given other content."""

    async def local(self, name: str, anew: bool = False) -> Path | None:
        """Where it can be read, None when it is not there; `anew`: the copy here is damaged. Raises Refused 503."""
        ...

    async def put(self, name: str, file: Path) -> None:
        """Take over a whole and fsynced file. Raises OSError, Refused 503."""
        ...


class Folder:
    """The files themselves, in `root/ab/abcd…`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    async def local(self, name: str, anew: bool = False) -> Path | None:
        path = self.path(name)
        return path if await asyncio.to_thread(path.is_file) else None

    async def put(self, name: str, file: Path) -> None:
        await asyncio.to_thread(_move_durably, file, self.path(name))

    def path(self, name: str) -> Path:
        return self.root / name[:2] / name


class Store:
    """An object store of obstore; copies lie in a folder of at most `limit` bytes."""

    def __init__(self, store: Any, cache: Folder, limit: int = CACHE, clock: Callable[[], float] = time.time) -> None:
        self._store, self._cache, self._limit, self._clock = store, cache, limit, clock
        self._fetching: dict[str, asyncio.Lock] = {}

    async def local(self, name: str, anew: bool = False) -> Path | None:
        from obstore.exceptions import BaseError, NotFoundError

        path = self._cache.path(name)
        lock = self._fetching.setdefault(name, asyncio.Lock())
        async with lock:  # a hundred devices that ask cost one transfer
            try:
                if anew or not path.is_file():
                    await self._fetch(name, path)
                os.utime(path, ns=(int(self._clock() * 1e9), path.stat().st_mtime_ns))  # asked for; not changed
                return path
            except (NotFoundError, FileNotFoundError):
                return None
            except BaseError as error:
                raise _unreachable(error) from error
            finally:
                self._fetching.pop(name, None)

    async def put(self, name: str, file: Path) -> None:
        from obstore.exceptions import BaseError

        try:
            await self._store.put_async(name, file)
        except BaseError as error:
            raise _unreachable(error) from error
        await self._cache.put(name, file)
        await asyncio.to_thread(self._shrink)

    async def _fetch(self, name: str, path: Path) -> None:
        partial = path.with_name(f".{name}.part")
        answer = await self._store.get_async(name)
        await asyncio.to_thread(path.parent.mkdir, parents=True, exist_ok=True)
        with await asyncio.to_thread(partial.open, "wb") as file:
            async for piece in answer.stream():
                await asyncio.to_thread(file.write, piece)
        partial.replace(path)
        await asyncio.to_thread(self._shrink)

    def _shrink(self) -> None:
        """Remove copies, the one asked for longest ago first."""
        found = []
        for path in self._cache.root.glob("[0-9a-f][0-9a-f]/[!.]*"):
            with contextlib.suppress(FileNotFoundError):
                found.append((path.stat().st_atime, path.stat().st_size, path))
        over = sum(size for _, size, _ in found) - self._limit
        for used, size, path in sorted(found):
            if over <= 0 or used > self._clock() - YOUNG_S:
                return
            path.unlink(missing_ok=True)
            over -= size


def at(url: str, folder: Path) -> Objects:
    """`s3://bucket/prefix` and the like, with the credentials of the environment; empty: `folder`. Raises Fatal."""
    if not url:
        return Folder(folder)
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ModuleNotFoundError as error:
        raise Fatal("--blobs needs obstore", "pip install 'outrider[hub]'") from error
    try:
        plain = urlsplit(os.environ.get("AWS_ENDPOINT", "")).scheme == "http"
        return Store(from_url(url, client_options={"allow_http": plain}), Folder(folder))
    except (ValueError, BaseError) as error:
        raise Fatal(f"blobs at {url}: {error}", "s3://BUCKET/PREFIX, with AWS_* in the environment") from error


def _unreachable(error: Exception) -> Refused:
    return Refused(503, f"the object store does not answer: {error}", "is it there, are its credentials right?")


def _move_durably(partial: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(path)
    for folder in (path.parent, path.parent.parent):
        durable.sync(folder)
