"""The chunk index of a bundle: of which chunks each file is made, and where in the hub's packs they lie.

    zstd(msgpack [v, packs, files, hashes, sizes, packed, runs])

Chunks stand in the order of the manifest's files. `hashes` has 16 bytes of SHA-256 a chunk; `sizes` and `packed` have
32 bits, little-endian: bytes of the chunk, and of it as it lies in a pack (zstd; as it is where both are equal). The
chunks of a run lie one behind the other in one pack.

Invariants: where files are cut is the writer's affair, a reader needs no chunker; an index is used only when it fits
its manifest byte for byte; no chunk is larger than MAX_CHUNK, packed or not, so one fits in memory anywhere.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import zstandard

from edge_agent.wire.bundle import FileEntry
from edge_agent.wire.errors import TooBig, Undecodable, VersionRefused

AVERAGE, MIN_CHUNK, MAX_CHUNK = 32 << 10, 8 << 10, 128 << 10
"""What the hub cuts to, in bytes."""
MAX_INDEX = 64 << 20
"""Bytes of an index, packed or not: two million chunks and more, 64 GiB of files."""
INDEX_VERSION = 1
HASH = 16


class Chunk(NamedTuple):
    """`at` in file number `file`; `packed` bytes from `offset` of a pack give `size` bytes of this hash."""

    file: int
    at: int
    size: int
    hash: bytes
    pack: str
    offset: int
    packed: int


class Run(msgspec.Struct, frozen=True, array_like=True):
    """From chunk number `first` on, the packed chunks lie one behind the other from `offset` of pack number `pack`."""

    first: int
    pack: int
    offset: int


class Index(msgspec.Struct, frozen=True, array_like=True):
    """`packs`: SHA-256 of each; `files`: chunks of each file of the manifest."""

    v: int
    packs: list[str]
    files: list[int]
    hashes: bytes
    sizes: bytes
    packed: bytes
    runs: list[Run]

    def chunks(self) -> Iterator[Chunk]:
        """Every chunk in order."""
        sizes, packed, runs = _numbers(self.sizes), _numbers(self.packed), iter([*self.runs, Run(-1, 0, 0)])
        number, pack, offset, upcoming = 0, "", 0, next(runs)
        for file, count in enumerate(self.files):
            at = 0
            for _ in range(count):
                if upcoming.first == number:
                    pack, offset, upcoming = self.packs[upcoming.pack], upcoming.offset, next(runs)
                hash = self.hashes[HASH * number : HASH * (number + 1)]
                yield Chunk(file, at, sizes[number], hash, pack, offset, packed[number])
                at, offset, number = at + sizes[number], offset + packed[number], number + 1


def chunk_hash(data: bytes | memoryview) -> bytes:
    """The first 16 bytes of SHA-256: a forger has to hit one given value, and whole files are checked besides."""
    return hashlib.sha256(data).digest()[:HASH]


def pack_chunk(data: bytes | memoryview, compressor: zstandard.ZstdCompressor) -> bytes:
    """A chunk as it lies in a pack."""
    packed = compressor.compress(data)
    return packed if len(packed) < len(data) else bytes(data)


def unpack_chunk(chunk: Chunk, packed: bytes) -> bytes:
    """The chunk's own bytes, verified. Raises Undecodable; a frame never unpacks past the size it must have."""
    data = packed
    if chunk.packed != chunk.size:
        try:
            if zstandard.frame_content_size(packed) != chunk.size:
                raise Undecodable("the chunk unpacks to another size")
            data = zstandard.ZstdDecompressor(max_window_size=8 << 20).decompress(packed, max_output_size=chunk.size)
        except zstandard.ZstdError as error:
            raise Undecodable(f"the chunk is no zstd frame: {error}") from None
    if len(data) != chunk.size or chunk_hash(data) != chunk.hash:
        raise Undecodable("the chunk has another hash")
    return data


def encode_index(files: Sequence[int], chunks: Iterable[Chunk]) -> bytes:
    """An index of chunks in order; `files` counts those of each file."""
    packs: dict[str, int] = {}
    hashes, sizes, packed, runs, end = bytearray(), array("I"), array("I"), [], ("", 0)
    for number, chunk in enumerate(chunks):
        if (chunk.pack, chunk.offset) != end:
            runs.append(Run(number, packs.setdefault(chunk.pack, len(packs)), chunk.offset))
        end = chunk.pack, chunk.offset + chunk.packed
        hashes += chunk.hash
        sizes.append(chunk.size)
        packed.append(chunk.packed)
    columns = bytes(hashes), sizes.tobytes(), packed.tobytes()
    index = Index(INDEX_VERSION, list(packs), list(files), *columns, runs)
    return zstandard.ZstdCompressor(level=9).compress(msgspec.msgpack.encode(index))


def decode_index(data: bytes, files: Sequence[FileEntry]) -> Index:
    """The index of a manifest's files. Raises TooBig, VersionRefused, Undecodable when it does not fit them."""
    if len(data) > MAX_INDEX:
        raise TooBig(f"a chunk index of {len(data)} bytes")
    try:
        if not 0 <= zstandard.frame_content_size(data) <= MAX_INDEX:
            raise TooBig(f"a chunk index that does not say that it unpacks to at most {MAX_INDEX} bytes")
        raw = zstandard.ZstdDecompressor(max_window_size=128 << 20).decompress(data, max_output_size=MAX_INDEX)
        index = msgspec.msgpack.decode(raw, type=Index)
    except (zstandard.ZstdError, msgspec.DecodeError) as error:
        raise Undecodable(f"not a chunk index: {error}") from None
    if index.v != INDEX_VERSION:
        raise VersionRefused(f"a chunk index of version {index.v}; this side reads {INDEX_VERSION}")
    _check(index, files)
    return index


def _check(index: Index, files: Sequence[FileEntry]) -> None:
    total = sum(index.files)
    firsts = [run.first for run in index.runs]
    if not (
        len(index.files) == len(files)
        and all(count >= 0 for count in index.files)
        and (len(index.hashes), len(index.sizes), len(index.packed)) == (HASH * total, 4 * total, 4 * total)
        and firsts == sorted(set(firsts))
        and (firsts[:1] == [0] or total == 0)
        and all(run.first < total and 0 <= run.pack < len(index.packs) and run.offset >= 0 for run in index.runs)
        and all(len(pack) == 64 and set(pack) <= set("0123456789abcdef") for pack in index.packs)
    ):
        raise Undecodable("the chunk index contradicts itself")
    found = [0] * len(files)
    for chunk in index.chunks():
        if not (0 < chunk.size <= MAX_CHUNK and 0 < chunk.packed <= chunk.size):
            raise Undecodable(f"the chunk index has a chunk of {chunk.packed} bytes for {chunk.size}")
        found[chunk.file] += chunk.size
    for entry, size in zip(files, found, strict=True):
        if size != entry.size:
            raise Undecodable(f"the chunks of {entry.path} have {size} bytes, the manifest says {entry.size}")


def _numbers(column: bytes) -> array[int]:
    numbers = array("I")
    numbers.frombytes(column)
    return numbers
