"""Cuts a bundle's files into content-defined chunks, and packs those that no earlier version has.

Invariants: the cut depends on content alone, so any two versions share what they have in common; a chunk lies in a pack
once, and the chunks of a version in the order of its files, so that neighbours are fetched in one range; memory stays
at one chunk beside the index. The numbers behind the choices are in docs/adr/0004-chunks.md.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import zstandard
from pyfastcdc import FastCDC

from edge_agent.wire import durable
from edge_agent.wire.bundle import FileEntry
from edge_agent.wire.chunks import AVERAGE, MAX_CHUNK, MIN_CHUNK, Chunk, chunk_hash, encode_index, pack_chunk

LEVEL = 9
_OWN = ""


def build(files: Sequence[tuple[FileEntry, Path]], known: Mapping[bytes, Chunk], pack: Path) -> tuple[bytes, str]:
    """Write the chunks that are not `known` to `pack`; the index, and the SHA-256 of what was written or nothing."""
    places, chunks, counts = dict(known), [], []
    compressor, digest, end = zstandard.ZstdCompressor(level=LEVEL), hashlib.sha256(), 0
    with pack.open("wb") as out:
        for number, (entry, path) in enumerate(files):
            counts.append(0)
            cutter = FastCDC(AVERAGE, min_size=MIN_CHUNK, max_size=MAX_CHUNK, normalized_chunking=2)
            for cut in cutter.cut_file(path) if entry.size else ():
                hash = chunk_hash(cut.data)
                place = places.get(hash)
                if place is None:
                    packed = pack_chunk(cut.data, compressor)
                    place = places[hash] = Chunk(number, cut.offset, cut.length, hash, _OWN, end, len(packed))
                    out.write(packed)
                    digest.update(packed)
                    end += len(packed)
                chunks.append(place)
                counts[-1] += 1
    durable.sync(pack)
    own = digest.hexdigest()
    moved = (chunk if chunk.pack else chunk._replace(pack=own) for chunk in chunks)
    return encode_index(counts, moved), own if end else ""
