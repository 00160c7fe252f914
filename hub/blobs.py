"""What devices upload beside their records: images, logs, support bundles.

    <data>/uploads/<device>/<sha256>                whole, read back with that hash
    <data>/uploads/<device>/<sha256>.<size>.part    what has come of it

Invariants: a blob gets its name only whole and fsynced; one whose hash is wrong is begun anew; a device has at most
`quota` bytes here, declared sizes counted; one writer a blob. Parts that nobody went on with for STALE_S go, and with
old records (hub/retention.py) what did not come again since.
"""

import asyncio
import hashlib
import os
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from edge_agent.wire import durable
from edge_agent.wire.bundle import SHA256
from hub.errors import Refused

QUOTA = 1 << 30  # bytes of a device
STALE_S = 7 * 86400.0


class Uploads:
    """Blobs by device and SHA-256. A device's name is one that enrolment took."""

    def __init__(self, data_dir: Path, quota: int = QUOTA) -> None:
        self._folder, self._quota = data_dir / "uploads", quota
        self._busy: set[tuple[str, str]] = set()
        self._lock = threading.Lock()  # nothing goes while a device is told that it is here

    async def begin(self, device: str, sha256: str, size: int) -> int:
        """How many bytes are here, all only of one that is whole. Raises Refused 422 (also for its size), 423, 507."""
        if size <= 0:
            raise Refused(422, f"a blob of {size} bytes", "declare its size in Upload-Length")
        here = await asyncio.to_thread(self._begin, device, _checked(sha256), size)
        if here < size:
            return here
        try:
            return await self.append(device, sha256, here, _nothing())  # its last step may have been cut off
        except Refused as refused:
            if refused.status != 422:
                raise
            return await asyncio.to_thread(self._begin, device, sha256, size)

    async def state(self, device: str, sha256: str) -> tuple[int, int]:
        """Bytes here and bytes in all. Raises Refused 404."""
        path, size = await asyncio.to_thread(self._find, device, _checked(sha256))
        return (await asyncio.to_thread(path.stat)).st_size, size

    async def append(self, device: str, sha256: str, at: int, pieces: AsyncIterator[bytes]) -> int:
        """Add what comes, as far as it comes: how many bytes are here then.

        Raises Refused 404, 409 for another offset than `state` gives, 413 for more than was declared, 422 for another
        hash, 423 while somebody else appends, 507 when the disk is full.
        """
        path, size = await asyncio.to_thread(self._find, device, _checked(sha256))
        if (device, sha256) in self._busy:
            raise Refused(423, "this blob is being uploaded", "wait for that to end, then ask for the offset")
        self._busy.add((device, sha256))
        try:
            here = (await asyncio.to_thread(path.stat)).st_size
            if at != here:
                raise Refused(409, f"offset {at}, but {here} bytes are here", "go on from there")
            if path.name == sha256:
                return here
            with await asyncio.to_thread(path.open, "ab", 0) as file:
                async for piece in pieces:
                    here += len(piece)
                    if here > size:
                        raise Refused(413, f"more than the {size} bytes that were declared", "begin it anew")
                    await asyncio.to_thread(file.write, piece)
            if here == size:
                await asyncio.to_thread(_complete, path, sha256)
            return here
        except OSError as error:
            raise Refused(507, f"the hub cannot keep it: {error}", "free some space on the hub's disk") from error
        finally:
            self._busy.discard((device, sha256))

    async def file(self, device: str, sha256: str) -> Path:
        """A whole blob. Raises Refused 404."""
        path, _ = await asyncio.to_thread(self._find, device, _checked(sha256))
        if path.name != sha256:
            raise Refused(404, f"blob {sha256} of {device} has not come whole", "the device goes on with it by itself")
        return path

    async def prune(self, before: float) -> int:
        """Take away what came, or came again, before that; and stale parts. How many."""
        return await asyncio.to_thread(self._prune, before)

    def _prune(self, before: float) -> int:
        gone = 0
        for path in self._folder.glob("*/*"):
            with self._lock, suppress(FileNotFoundError):  # it is whole by now, or was not what it was declared to be
                gone += self._take(path, before)
        return gone

    def _take(self, path: Path, before: float) -> bool:
        """Take it away if it is older than that, or a stale part, and nobody writes to it. Whether it went."""
        if path.suffix == ".part":
            before = max(before, time.time() - STALE_S)
        old = path.stat().st_mtime < before and (path.parent.name, path.name.partition(".")[0]) not in self._busy
        if old:
            path.unlink()
        return old

    def _begin(self, device: str, sha256: str, size: int) -> int:
        with self._lock:
            folder = self._folder / device
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            taken = 0
            for path in folder.iterdir():
                if path.name.startswith(sha256):
                    if (known := _size(path)) != size:
                        raise Refused(422, f"this blob was declared with {known} bytes, not {size}", "which is it?")
                    os.utime(path)  # its age begins anew
                    return path.stat().st_size
                if not self._take(path, 0.0):
                    taken += _size(path)
            if taken + size > self._quota:
                said = f"{device} has {taken} bytes here and may have {self._quota}"
                raise Refused(507, said, "remove some at the hub")
            (folder / f"{sha256}.{size}.part").touch()
        durable.sync(folder)
        return 0

    def _find(self, device: str, sha256: str) -> tuple[Path, int]:
        for path in (self._folder / device).glob(f"{sha256}*"):
            return path, _size(path)
        raise Refused(404, f"{device} has begun no blob {sha256}", "POST /v1/uploads first")


def _checked(sha256: str) -> str:
    if not SHA256.fullmatch(sha256):
        raise Refused(422, f"{sha256[:80]!r} is not a SHA-256", "64 hexadecimal digits, lower case")
    return sha256


async def _nothing() -> AsyncIterator[bytes]:
    yield b""


def _size(path: Path) -> int:
    return int(path.name.split(".")[1]) if path.suffix == ".part" else path.stat().st_size


def _complete(path: Path, sha256: str) -> None:
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            path.unlink()
            raise Refused(422, f"what came is not {sha256}", "begin it anew")
        os.fsync(file.fileno())
    path.replace(path.with_name(sha256))
    durable.sync(path.parent)
