"""Who decides what may be installed: the TUF repository says what exists, the director what this device is to have.

    <folder>/director.json                          the last directive that was accepted
    <folder>/first-root.json                        where trust began
    <folder>/{timestamp, snapshot, …}.json, root_history/    python-tuf's

Invariants: the first root comes from the key this device enrolled with, every later one from the root before. Nothing
is used before both signatures are checked, so neither the keys of targets nor the director's install anything alone.
The director's counter and the clock's floor, which only signed times raise, are on disk before what they allow. Trust
is asked for new installs only: what is installed goes on when it has expired. What is refused here may be the doing of
whoever stands between: it is named and tried again, and quarantines nothing.
"""

from __future__ import annotations

import asyncio
import platform
import re
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tuf.api import exceptions as tuf
from tuf.api.metadata import TargetFile
from tuf.ngclient import FetcherInterface, Updater

from edge_agent.errors import Refused, Retry
from edge_agent.update.download import Downloads, NotThere
from edge_agent.update.slots import Offer
from edge_agent.wire import durable
from edge_agent.wire.bundle import SHA256, Directive, Sealed, Target, open_directive, open_root, target_paths
from edge_agent.wire.chunks import MAX_INDEX
from edge_agent.wire.errors import WireError
from edge_agent.wire.messages import MAX_MESSAGE
from edge_agent.wire.signing import VerifyKey

MAX_METADATA = 5_000_000
"""Bytes of a metadata file: python-tuf's largest bound."""
LONGEST = MAX_MESSAGE, MAX_INDEX
"""Bytes of a manifest and of a chunk index, whatever was signed: none that is longer could be read."""
_ALARMS: tuple[tuple[type[Exception], str, str], ...] = (
    (tuf.ExpiredMetadataError, "", "freeze: the hub's metadata has expired"),
    (tuf.BadVersionNumberError, r"snapshot version|\w v\d", "mix-and-match: metadata of different times"),
    (tuf.BadVersionNumberError, "", "rollback: metadata older than what this device has seen"),
    (tuf.LengthOrHashMismatchError, "", "mix-and-match: a file is not the one that was signed"),
    (tuf.UnsignedMetadataError, "", "arbitrary software: too few signatures of trusted keys"),
    (tuf.DownloadLengthMismatchError, "", "endless data: more than was signed"),
    (tuf.SlowRetrievalError, "", "slow retrieval"),
    (tuf.RepositoryError, "", "the hub's metadata is not valid"),
)
_HINT = "what is installed goes on; see `outrider trust show` at the hub, and who stands between"


class Trust(Protocol):
    """Says what a version is made of."""

    async def resolve(self, name: str, version: str) -> Offer:
        """Raises Retry, naming what is wrong."""
        ...


class Accepted(msgspec.Struct, frozen=True):
    """What is remembered of the last directive; `issued` is the clock's floor."""

    counter: int = 0
    issued: float = 0.0
    text: str = ""


class Director:
    """Checks the directives of one device. Its methods block: call them in a thread."""

    def __init__(self, folder: Path, key: VerifyKey, fleet: str, device: str, hardware: str = "") -> None:
        self._path, self._key = folder / "director.json", key
        self._fleet, self._device, self._hardware = fleet, device, hardware or platform.machine()
        self._last: Accepted | None = None

    def accept(self, document: Mapping[str, Any]) -> dict[str, Target]:
        """What is to be installed, of the desired document's `director`. Raises Refused, naming what is wrong."""
        try:
            directive = open_directive(self._key, sealed := msgspec.convert(document, Sealed))
        except (WireError, msgspec.ValidationError) as error:
            raise Refused(f"arbitrary software: the directive is not the hub's: {error}") from error
        last, text = self.last(), sealed.text
        if (directive.fleet, directive.device) != (self._fleet, self._device):
            raise Refused(f"another device's directive: it is for {directive.device} of {directive.fleet}")
        if directive.hardware not in ("", self._hardware):
            raise Refused(f"wrong hardware: the directive is for {directive.hardware}, this is {self._hardware}")
        if directive.counter < last.counter or (directive.counter == last.counter and text != last.text):
            raise Refused(f"replayed directive: number {directive.counter} after {last.counter}")
        if directive.counter > last.counter:
            self._keep(directive, text)
        return directive.bundles

    def fits(self, hardware: list[str]) -> None:
        """Raises Refused when a manifest is for other machines."""
        if hardware and self._hardware not in hardware:
            raise Refused(f"wrong hardware: it is for {', '.join(hardware)}, this is {self._hardware}")

    def last(self) -> Accepted:
        """Raises Refused when the record is damaged: then nobody can say what was already seen."""
        if self._last is None:
            try:
                self._last = msgspec.json.decode(self._path.read_bytes(), type=Accepted)
            except FileNotFoundError:
                self._last = Accepted()
            except msgspec.DecodeError as error:
                raise Refused(f"{self._path} is damaged: {error}", "enrol this device again") from error
        return self._last

    def _keep(self, directive: Directive, text: str) -> None:
        floor = max(self.last().issued, directive.issued)
        accepted = Accepted(directive.counter, floor, text)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        durable.write(self._path, msgspec.json.encode(accepted))
        self._last = accepted


class DurableUpdater(Updater):
    """python-tuf's client; what it remembers is on disk before it counts, and its clock does not go below a floor."""

    def __init__(self, folder: Path, url: str, fetcher: FetcherInterface, root: bytes | None, floor: float = 0) -> None:
        super().__init__(str(folder), url, fetcher=fetcher, bootstrap=root)
        self._trusted_set.reference_time = datetime.fromtimestamp(max(time.time(), floor), UTC)

    def _persist_file(self, filename: str, data: bytes) -> None:
        durable.write(Path(filename), data)


class Fetcher(FetcherInterface):
    """Fetches metadata for a thread through the loop's client, which bounds time and size."""

    def __init__(self, downloads: Downloads, loop: asyncio.AbstractEventLoop) -> None:
        self._downloads, self._loop = downloads, loop
        self.failed: Retry | None = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        waiting = asyncio.run_coroutine_threadsafe(self._downloads.whole(url, MAX_METADATA), self._loop)
        try:
            return iter([waiting.result()])
        except NotThere as error:
            raise tuf.DownloadHTTPError(str(error), 404) from error
        except Retry as error:
            self.failed = error
            raise tuf.DownloadError(str(error)) from error


class Repository:
    """The hub's TUF repository as this device knows it."""

    def __init__(self, folder: Path, downloads: Downloads, director: Director, key: VerifyKey) -> None:
        self._folder, self._downloads, self._director, self._key = folder, downloads, director, key

    async def resolve(self, name: str, version: str) -> Offer:
        """Raises Retry, naming what is wrong."""
        root, fetcher = await self._first_root(), Fetcher(self._downloads, asyncio.get_running_loop())
        try:
            targets = await asyncio.to_thread(self._look_up, root, fetcher, target_paths(name, version))
            return Offer(*[await self._target(*each) for each in zip(targets, LONGEST, strict=True)])
        except tuf.DownloadError as error:
            raise fetcher.failed or named(error) from error
        except tuf.RepositoryError as error:
            raise named(error) from error

    def _look_up(self, root: bytes, fetcher: Fetcher, paths: tuple[str, ...]) -> list[TargetFile]:
        updater = DurableUpdater(self._folder, "/v1/trust", fetcher, root, self._director.last().issued)
        updater.refresh()
        found = []
        for path in paths:
            if (target := updater.get_targetinfo(path)) is None:
                raise Retry(f"the hub has no {path}: nobody who may has signed it", "publish it, or assign another")
            found.append(target)
        return found

    async def _target(self, target: TargetFile, longest: int) -> bytes:
        if target.length > longest:
            raise Retry(f"endless data: {target.path} is signed with {target.length} bytes", f"at most {longest}")
        digest = target.hashes.get("sha256", "")
        if not SHA256.fullmatch(digest):
            raise Retry(f"arbitrary software: {target.path} is signed with no SHA-256", "sign it again with one")
        data = await self._downloads.whole(f"/v1/blobs/{digest}", target.length)
        target.verify_length_and_hashes(data)
        return data

    async def _first_root(self) -> bytes:
        """Given once, over the hub's key; then pinned."""
        path = self._folder / "first-root.json"
        if path.exists():
            return await asyncio.to_thread(path.read_bytes)
        answer = await self._downloads.whole("/v1/trust", MAX_METADATA)
        try:
            root = open_root(self._key, msgspec.json.decode(answer, type=Sealed))
        except (WireError, msgspec.DecodeError) as error:
            hint = f"it must be signed by the key this device enrolled with ({self._key.key_id})"
            raise Retry(f"arbitrary software: the first root is not the hub's: {error}", hint) from error
        self._folder.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(durable.write, path, root)
        return root


def named(error: Exception) -> Retry:
    """What an error of python-tuf means."""
    for kind, text, name in _ALARMS:
        if isinstance(error, kind) and re.search(text, str(error)):
            return Retry(f"{name} ({error})", _HINT)
    return Retry(f"the hub cannot be reached: {error}", "what is installed goes on; the update is tried again")
