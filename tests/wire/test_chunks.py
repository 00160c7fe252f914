"""The chunk index: written and read alike, and nothing that a broken or hostile one can do."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.wire.bundle import FileEntry
from edge_agent.wire.chunks import (
    MAX_CHUNK,
    Chunk,
    Index,
    Run,
    chunk_hash,
    decode_index,
    encode_index,
    pack_chunk,
    unpack_chunk,
)
from edge_agent.wire.errors import TooBig, Undecodable, VersionRefused

PACKS = ["0" * 64, "f" * 64]
COMPRESSOR = zstandard.ZstdCompressor(level=3)


def files_of(sizes: list[int]) -> list[FileEntry]:
    return [FileEntry(f"f{number}", size, "a" * 64) for number, size in enumerate(sizes)]


@st.composite
def cut(draw: st.DrawFn) -> list[list[Chunk]]:
    """Chunks of some files, here and there in packs."""
    size = st.integers(1, MAX_CHUNK)
    place = st.tuples(st.binary(min_size=16, max_size=16), size, st.sampled_from(PACKS), st.integers(0, 1 << 40))
    found = []
    for number, places in enumerate(draw(st.lists(st.lists(place, max_size=4), max_size=3))):
        at, chunks = 0, []
        for hash, length, pack, offset in places:
            chunks.append(Chunk(number, at, length, hash, pack, offset, draw(st.integers(1, length))))
            at += length
        found.append(chunks)
    return found


@given(cut())
def test_an_index_is_read_back_as_it_was_written(files: list[list[Chunk]]) -> None:
    flat = [chunk for chunks in files for chunk in chunks]
    entries = files_of([sum(chunk.size for chunk in chunks) for chunks in files])
    assert list(decode_index(encode_index([len(chunks) for chunks in files], flat), entries).chunks()) == flat


@given(st.binary(max_size=400))
def test_rubbish_is_undecodable(data: bytes) -> None:
    for raw in (data, COMPRESSOR.compress(data)):
        with pytest.raises(Undecodable):
            decode_index(raw, files_of([1]))


def index(**changes: object) -> bytes:
    good = {
        "v": 1, "packs": PACKS[:1], "files": [1], "hashes": bytes(16), "sizes": b"\x05\0\0\0", "packed": b"\x05\0\0\0",
        "runs": [Run(0, 0, 0)],
    }  # fmt: skip
    return COMPRESSOR.compress(msgspec.msgpack.encode(Index(**(good | changes))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"files": [2]}, "contradicts"),
        ({"files": [1, 0]}, "contradicts"),
        ({"files": [-1]}, "contradicts"),
        ({"hashes": bytes(15)}, "contradicts"),
        ({"runs": []}, "contradicts"),
        ({"runs": [Run(0, 1, 0)]}, "contradicts"),
        ({"runs": [Run(0, 0, -1)]}, "contradicts"),
        ({"runs": [Run(0, 0, 0), Run(0, 0, 0)]}, "contradicts"),
        ({"runs": [Run(0, 0, 0), Run(1, 0, 0)]}, "contradicts"),
        ({"packs": ["../" + "0" * 61]}, "contradicts"),
        ({"sizes": b"\0\0\0\0"}, "chunk of"),
        ({"packed": b"\x06\0\0\0"}, "chunk of"),
        ({"sizes": b"\xff\xff\xff\0"}, "chunk of"),
        ({"sizes": b"\x06\0\0\0"}, "6 bytes, the manifest says 5"),
    ],
)
def test_an_index_that_contradicts_itself_or_its_manifest_is_refused(changes: dict[str, object], says: str) -> None:
    decode_index(index(), files_of([5]))
    with pytest.raises(Undecodable, match=says):
        decode_index(index(**changes), files_of([5]))


def test_an_index_of_another_version_is_refused_by_its_name() -> None:
    with pytest.raises(VersionRefused, match="version 2"):
        decode_index(index(v=2), files_of([5]))


def test_neither_an_index_nor_a_chunk_unpacks_past_its_bound() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(65 << 20))
    assert len(bomb) < 10_000
    with pytest.raises(TooBig):
        decode_index(bomb, files_of([1]))
    data = bytes(1000)
    chunk = Chunk(0, 0, 1000, chunk_hash(data), PACKS[0], 0, len(bomb))
    with pytest.raises(Undecodable, match="another size"):
        unpack_chunk(chunk, bomb)


@given(st.binary(min_size=1, max_size=5000), st.integers(0, 1 << 30))
def test_a_chunk_is_given_only_as_it_was_hashed(data: bytes, where: int) -> None:
    packed = pack_chunk(data, COMPRESSOR)
    chunk = Chunk(0, 0, len(data), chunk_hash(data), PACKS[0], 0, len(packed))
    assert unpack_chunk(chunk, packed) == data
    flipped = bytearray(packed)
    flipped[where % len(packed)] ^= 1 + where % 255
    with contextlib.suppress(Undecodable):
        assert unpack_chunk(chunk, bytes(flipped)) == data  # a bit that zstd does not read
