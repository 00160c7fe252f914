"""Puts the files of a version together out of chunks: those on this device already, and those that were fetched.

Invariants: a part has its full length on disk before the first chunk is fetched, so a full disk shows at once; every
chunk is verified before it is written to its place; which chunks are there is read from the parts themselves, so
nothing is remembered that a power loss could make a lie of. Memory: an entry for each chunk that is wanted.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from edge_agent.wire.bundle import FileEntry
from edge_agent.wire.chunks import Chunk, Index, chunk_hash


class Seed(msgspec.Struct, frozen=True):
    """A version on this device: its folder, its files, and how they were cut."""

    folder: Path
    files: Sequence[FileEntry]
    index: Index


class Assembly:
    """`missing` are the files to make, each as `<parts>/<sha256>`. All methods block: call them in a thread."""

    def __init__(self, parts: Path, files: Sequence[FileEntry], index: Index, missing: Iterable[FileEntry]) -> None:
        self._parts = parts
        self.missing = {entry.sha256: entry for entry in missing}
        self._wanted: dict[bytes, Chunk] = {}
        self._places: dict[bytes, list[tuple[str, int]]] = {}
        self._sizes: dict[bytes, int] = {}
        self.left = 0  # bytes that still have to come, packed
        seen: set[tuple[str, int]] = set()
        for chunk in index.chunks():
            place = files[chunk.file].sha256, chunk.at
            if place[0] in self.missing and place not in seen:
                seen.add(place)
                if chunk.hash not in self._wanted:
                    self._wanted[chunk.hash] = chunk
                    self._sizes[chunk.hash] = chunk.size
                    self.left += chunk.packed
                self._places.setdefault(chunk.hash, []).append(place)

    @property
    def size(self) -> int:
        """Bytes of disk that the parts do not have yet."""
        held = (path.stat().st_blocks * 512 for name in self.missing if (path := self._parts / name).is_file())
        return max(0, sum(entry.size for entry in self.missing.values()) - sum(held))

    def wanted(self) -> list[Chunk]:
        """One place in a pack for each chunk that is not here, in the order of the packs."""
        return sorted(self._wanted.values(), key=lambda chunk: (chunk.pack, chunk.offset))

    def open(self, seeds: Iterable[Seed]) -> None:
        """Give the parts their length, take what is in them, then what the seeds have. Raises OSError."""
        self._parts.mkdir(parents=True, exist_ok=True)
        resumed = set()
        for name, entry in self.missing.items():
            path = self._parts / name
            if path.is_file() and path.stat().st_size == entry.size:
                resumed.add(name)
                continue
            with path.open("wb") as part:
                if entry.size:
                    os.posix_fallocate(part.fileno(), 0, entry.size)
        if resumed:
            self._read_back(resumed)
        for seed in seeds:
            for chunk in seed.index.chunks():
                if chunk.hash in self._wanted:
                    data = read(seed.folder / seed.files[chunk.file].path, chunk.at, chunk.size)
                    if chunk_hash(data) == chunk.hash:
                        self.put(chunk.hash, data)

    def put(self, hash: bytes, data: bytes) -> None:
        """Write a verified chunk wherever it belongs."""
        for name, at in self._places.get(hash, ()):
            with (self._parts / name).open("r+b", buffering=0) as part:
                part.seek(at)
                view = memoryview(data)
                while view:
                    view = view[part.write(view) :]
        if (chunk := self._wanted.pop(hash, None)) is not None:
            self.left -= chunk.packed

    def __contains__(self, hash: bytes) -> bool:
        """Whether a chunk is still to come."""
        return hash in self._wanted

    def get(self, hash: bytes) -> bytes:
        """A chunk that has come, unchecked; nothing when it has not."""
        if hash in self._wanted or hash not in self._sizes:
            return b""
        name, at = self._places[hash][0]
        return read(self._parts / name, at, self._sizes[hash])

    def part(self, entry: FileEntry) -> Path:
        return self._parts / entry.sha256

    def _read_back(self, resumed: set[str]) -> None:
        for hash, chunk in list(self._wanted.items()):
            for name, at in self._places[hash]:
                data = read(self._parts / name, at, chunk.size) if name in resumed else b""
                if len(data) == chunk.size and chunk_hash(data) == hash:
                    self.put(hash, data)
                    break


def read(path: Path, at: int, size: int) -> bytes:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            return file.read(size)
    except OSError:
        return b""
