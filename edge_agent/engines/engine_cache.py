"""Compiled engines, kept on disk so that each is built once.

    <folder>/<name>.engine, <name>.json      an engine; its key, SHA-256 and what its build reported
    <folder>/.<name>.part, .lock             what is being built; who builds

Invariants: an engine is served only when its JSON names the asked key and the engine's own hash, so what is damaged,
half published or of another device is built again. Engine, then JSON: each is written beside, fsynced and renamed. One
builder at a time works in a folder, other processes included: two builds at once would share a small device's memory.
The sum of the files stays within `max_bytes`: the engines that were used longest ago go first, and one larger than all
of it is served but not kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.engines.tensorrt_build import Profile, Report
from edge_agent.errors import Retry
from edge_agent.wire import durable

MAX_BYTES = 2 << 30


class Key(msgspec.Struct, frozen=True):
    """What an engine depends on; `device` is a compute capability (`sm86`), or a GPU's name and capability."""

    digest: str
    precision: str
    runtime: str
    version: str
    device: str
    profile: Profile = {}

    @property
    def name(self) -> str:
        """The key as a file name."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:32]


class _Entry(msgspec.Struct, frozen=True):
    key: Key
    sha256: str
    report: dict[str, Any] = {}


class EngineCache:
    """The engines of one folder; many threads and processes may use it at once."""

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES, wait_s: float = 1800.0) -> None:
        self._folder, self._max_bytes, self._wait_s = folder, max_bytes, wait_s

    def get(self, key: Key, build: Callable[[Path], Report]) -> bytes:
        """The engine of `key`, built into the given path if it is not kept.

        Raises what `build` raises, and Retry when another builder takes too long or the disk does not take it.
        """
        if (kept := self._kept(key)) is not None:
            return kept
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._alone():
                if (kept := self._kept(key)) is not None:
                    return kept  # another built it meanwhile
                return self._made(key, build)
        except OSError as error:
            raise Retry(f"the engine cannot be kept: {error}", f"is there space in {self._folder}?") from error

    def _made(self, key: Key, build: Callable[[Path], Report]) -> bytes:
        self._sweep()
        part = self._folder / f".{key.name}.part"
        try:
            report = build(part)
            engine = part.read_bytes()
            entry = _Entry(key, hashlib.sha256(engine).hexdigest(), msgspec.to_builtins(report))
            facts = msgspec.json.encode(entry)
            if len(engine) + len(facts) <= self._max_bytes:
                self._make_room(self._max_bytes - len(engine) - len(facts), key.name)
                publish(part, self._folder / f"{key.name}.engine", facts)
        finally:
            part.unlink(missing_ok=True)
        return engine

    def _kept(self, key: Key) -> bytes | None:
        path = self._folder / f"{key.name}.engine"
        try:
            entry = msgspec.json.decode(path.with_suffix(".json").read_bytes(), type=_Entry)
            engine = path.read_bytes()
            if entry.key != key or entry.sha256 != hashlib.sha256(engine).hexdigest():
                return None
            os.utime(path.with_suffix(".json"))
        except (OSError, ValueError):  # absent, no JSON, not ours to read: it is built again
            return None
        return engine

    def _sweep(self) -> None:
        """Remove what a build or a publication that was cut off has left."""
        for path in self._folder.iterdir():
            if path.suffix == ".part" or (path.suffix == ".engine" and not path.with_suffix(".json").exists()):
                path.unlink(missing_ok=True)

    def _make_room(self, size: int, name: str) -> None:
        """Remove the entry of this name, and the ones used longest ago until the others take at most `size` bytes."""
        pairs = [(facts, facts.with_suffix(".engine")) for facts in self._folder.glob("*.json")]
        sizes = {pair: sum(path.stat().st_size for path in pair if path.exists()) for pair in pairs}
        total = sum(sizes.values())
        for pair in sorted(pairs, key=lambda pair: (pair[0].stem != name, pair[0].stat().st_mtime)):
            if total > size or pair[0].stem == name:
                total -= sizes[pair]
                for path in pair:
                    path.unlink(missing_ok=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        until = time.monotonic() + self._wait_s
        with (self._folder / ".lock").open("wb") as lock:  # closing it, or the end of the process, lets go
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise Retry(f"another engine is being built in {self._folder}", "ask again later") from None
                    time.sleep(0.1)
            yield


def publish(part: Path, path: Path, facts: bytes) -> None:
    """Give a built engine its name, then write the JSON beside it; on disk when it returns."""
    durable.sync(part)
    part.replace(path)
    durable.sync(path.parent)
    durable.write(path.with_suffix(".json"), facts)
