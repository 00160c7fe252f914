"""Long-term memory: documents in pieces, found by their words and by their meaning, each with its source.

Invariants: a document is a source, added whole or not at all in one transaction, and adding it again replaces it;
pieces are found by words at once and by meaning as soon as `embed` has been over them; what is oldest in use goes when
the quota is passed, what is past its age goes in any case (a clock that jumps ahead is believed when it has stood there
for a day). Words are BM25 of SQLite's FTS5 over the rarest words of a question; meaning is the Hamming distance of sign
bits (48 bytes a piece in memory), its nearest CANDIDATES ranked again by int8 vectors from disk; both lists are fused
by reciprocal rank (Cormack et al. 2009, k = 60). Only the tool runner and the command line import this: the daemon
process has no numpy.
"""

from __future__ import annotations

import itertools
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.errors import Refused

PIECE = 700  # characters of a piece, about
MAX_DOCUMENT = 4 << 20  # bytes
CANDIDATES = 128
MAX_HITS = 4000  # so many pieces are ranked by the rarest words of a question: the time of a search
BATCH = 8
SCALE = 400
RRF = 60
DAY_S, SET_S = 86400.0, 300.0  # a clock that moves so much against the steady one was set
_WORDS = "porter unicode61 remove_diacritics 2"
_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*#*$|^(\S.{0,78})\n([=\-~^\"*+#])\4{2,}\s*$", re.MULTILINE)
_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS sources (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, added REAL NOT NULL, used REAL NOT NULL, bytes INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS pieces (
    id INTEGER PRIMARY KEY AUTOINCREMENT, source INTEGER NOT NULL REFERENCES sources ON DELETE CASCADE,
    n INTEGER NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, vector BLOB
) STRICT;
CREATE INDEX IF NOT EXISTS pieces_source ON pieces (source);
CREATE INDEX IF NOT EXISTS pieces_new ON pieces (id) WHERE vector IS NULL;
CREATE VIRTUAL TABLE IF NOT EXISTS words USING fts5(
    title, text, content='pieces', content_rowid='id', tokenize='{_WORDS}');
CREATE TRIGGER IF NOT EXISTS piece_in AFTER INSERT ON pieces BEGIN
    INSERT INTO words (rowid, title, text) VALUES (new.id, new.title, new.text); END;
CREATE TRIGGER IF NOT EXISTS piece_out AFTER DELETE ON pieces BEGIN
    INSERT INTO words (words, rowid, title, text) VALUES ('delete', old.id, old.title, old.text); END;
"""

Vectors = NDArray[np.float32]
Embed = Callable[[Sequence[str]], Vectors]
"""Texts to unit vectors, one a row."""


class Piece(msgspec.Struct, frozen=True):
    """A part of a document under its headings."""

    title: str
    text: str


class Found(msgspec.Struct, frozen=True):
    """A piece with where it is from: its source and its number there."""

    source: str
    n: int
    title: str
    text: str
    score: float


class Source(msgspec.Struct, frozen=True):
    """A document that is kept; times are seconds since the Unix epoch."""

    name: str
    pieces: int
    bytes: int
    added: float
    used: float


def pieces(text: str, size: int = PIECE) -> list[Piece]:
    """A document in pieces of about `size` characters, cut at headings (Markdown, reStructuredText), paragraphs, or
    ends of sentences, never inside a word."""
    found: list[Piece] = []
    headings: list[tuple[int, str]] = []
    at = 0
    for head in [*_HEADING.finditer(text), None]:
        found += _section(" / ".join(title for _, title in headings), text[at : head.start() if head else None], size)
        if head is not None:
            level = len(head[1]) if head[1] else 1 + '=-~^"*+#'.index(head[4])
            headings = [*(h for h in headings if h[0] < level), (level, (head[2] or head[3]).strip())]
            at = head.end()
    return found


def _section(title: str, text: str, size: int) -> Iterator[Piece]:
    piece = ""
    for part in (part for paragraph in re.split(r"\n\s*\n", text) for part in _parts(paragraph.strip(), size)):
        if piece and len(piece) + 1 + len(part) > size:
            yield Piece(title, piece)
            piece = ""
        piece = f"{piece}\n{part}".strip()
    if piece:
        yield Piece(title, piece)


def _parts(paragraph: str, size: int) -> Iterator[str]:
    while len(paragraph) > size:
        cut = max(paragraph.rfind(end, size // 2, size) for end in (". ", "? ", "! ", ".\n", "\n", " ")[:5])
        cut = cut if cut > 0 else paragraph.rfind(" ", 1, size)
        cut = cut + 1 if cut > 0 else size
        yield paragraph[:cut].strip()
        paragraph = paragraph[cut:].strip()
    if paragraph:
        yield paragraph


class Memory:
    """One SQLite file. `quota` is bytes of text, `age_s` the longest a source is kept (0: for ever).

    Raises Refused when the file is no memory.
    """

    def __init__(
        self,
        path: Path | str,
        quota: int = 64 << 20,
        age_s: float = 0.0,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._quota, self._age_s, self._clock, self._steady = quota, age_s, clock, steady
        self._stands = 0.0, 0.0  # by how much the clock is before the steady one, and since when (steady)
        self._bits, self._ids = np.zeros((0, 0), np.uint64), np.zeros(0, np.int64)
        self._seen, self._changes = (-1, -1), 0
        self._counts: dict[str, int] = {}  # in how many pieces a word is, as far as it was asked for
        try:
            self._db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._db.execute(f"PRAGMA {pragma}")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise Refused(f"{path} is no memory: {error}", "move it away: a new one is made") from error
        self._stems = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self._stems.execute(f"CREATE VIRTUAL TABLE asked USING fts5(word, tokenize='{_WORDS}')")
        self._stems.execute("CREATE VIRTUAL TABLE stems USING fts5vocab(asked, instance)")

    def close(self) -> None:
        self._db.close()
        self._stems.close()

    def add(self, name: str, text: str) -> int:
        """Keep a document, in place of the one of that name; the number of its pieces. Raises Refused."""
        size = len(text.encode(errors="replace"))
        if not name.strip() or not text.strip() or size > min(MAX_DOCUMENT, self._quota):
            most = min(MAX_DOCUMENT, self._quota) >> 10
            raise Refused(f"{name or 'a document'} has {size >> 10} KiB", f"1 to {most} KiB of text, and a name")
        self._changes += 1
        parts, now = pieces(text.replace("\x00", " ")), self._clock()
        self._db.execute("BEGIN IMMEDIATE")
        with self._db:
            self._db.execute("DELETE FROM sources WHERE name = ?", [name])
            row = [name, now, now, size]
            id = self._db.execute("INSERT INTO sources (name, added, used, bytes) VALUES (?, ?, ?, ?)", row).lastrowid
            rows = [(id, n, part.title, part.text) for n, part in enumerate(parts, 1)]
            self._db.executemany("INSERT INTO pieces (source, n, title, text) VALUES (?, ?, ?, ?)", rows)
            self._sweep()
        return len(parts)

    def forget(self, name: str) -> bool:
        """Whether there was such a source."""
        self._changes += 1
        return self._db.execute("DELETE FROM sources WHERE name = ?", [name]).rowcount > 0

    def sources(self) -> list[Source]:
        """What is kept, the newest first."""
        rows = self._db.execute(
            "SELECT name, (SELECT count(*) FROM pieces WHERE source = s.id), bytes, added, used FROM sources s "
            "ORDER BY added DESC, id DESC"
        )
        return [Source(*row) for row in rows]

    def _sweep(self) -> None:
        """Forget by age, then by quota, the longest unused first."""
        self._age()
        newer = "SELECT id, sum(bytes) OVER (ORDER BY used DESC, id DESC) AS upto FROM sources"
        self._db.execute(f"DELETE FROM sources WHERE id IN (SELECT id FROM ({newer}) WHERE upto > ?)", [self._quota])

    def _age(self) -> int:
        """Forget what is too old: how many. The newest hour that was believed is in `user_version`."""
        if not self._age_s:
            return 0
        now, steady = self._clock(), self._steady()
        if abs(now - steady - self._stands[0]) > SET_S:
            self._stands = now - steady, steady
        seen = self._db.execute("PRAGMA user_version").fetchone()[0] * 3600
        if now - seen > DAY_S and steady - self._stands[1] < DAY_S:
            now = seen
        elif now - seen >= 3600:
            self._db.execute(f"PRAGMA user_version = {int(now // 3600)}")
        return self._db.execute("DELETE FROM sources WHERE added < ?", [now - self._age_s]).rowcount

    def embed(self, embed: Embed, within_s: float = float("inf")) -> int:
        """Give vectors to pieces that have none, for about that long; how many are left without."""
        began = time.monotonic()
        new = "SELECT id, title, text FROM pieces WHERE vector IS NULL ORDER BY id LIMIT ?"
        while (rows := self._db.execute(new, [BATCH]).fetchall()) and time.monotonic() - began < within_s:
            vectors = embed([f"{title}\n{text}".strip() for _, title, text in rows])
            self._changes += 1
            made = [(coarse(vector), id) for (id, _, _), vector in zip(rows, vectors, strict=True)]
            self._db.execute("BEGIN IMMEDIATE")
            with self._db:
                self._db.executemany("UPDATE pieces SET vector = ? WHERE id = ?", made)
        return int(self._db.execute("SELECT count(*) FROM pieces WHERE vector IS NULL").fetchone()[0])

    def search(self, question: str, vector: Vectors | None = None, limit: int = 5) -> list[Found]:
        """The pieces that fit best: by words, and by meaning when the question comes with its vector."""
        self._changes += self._age()
        self._follow()
        score: dict[int, float] = {}
        for ranked in (self._by_words(question), [] if vector is None else self._by_meaning(vector)):
            for rank, id in enumerate(ranked, 1):
                score[id] = score.get(id, 0.0) + 1 / (RRF + rank)
        best = sorted(score, key=lambda id: -score[id])[:limit]
        sql = (
            "SELECT p.id, s.name, n, title, text, s.id FROM pieces p JOIN sources s ON s.id = p.source "
            f"WHERE p.id IN ({', '.join('?' * len(best))})"
        )
        rows = {row[0]: row for row in self._db.execute(sql, best)}
        used = [(self._clock(), source) for source in {row[5] for row in rows.values()}]
        self._db.executemany("UPDATE sources SET used = ? WHERE id = ? AND used < ?1 - 3600", used)
        found = {id: Found(*row[1:5], round(score[id], 5)) for id, row in rows.items()}  # type: ignore[call-arg]
        return [found[id] for id in best if id in found]

    def _by_words(self, question: str) -> list[int]:
        asked = list(dict.fromkeys(re.findall(r"\w+", question.lower())))[:64]
        self._stems.execute("DELETE FROM asked")
        self._stems.executemany("INSERT INTO asked (rowid, word) VALUES (?, ?)", enumerate(asked))
        stems = {str(term): asked[at] for term, at in self._stems.execute("SELECT term, doc FROM stems")}
        for term in stems.keys() - self._counts.keys():
            hits = "SELECT count(*) FROM (SELECT 1 FROM words WHERE words MATCH ? LIMIT ?)"
            self._counts[term] = self._db.execute(hits, [f'"{stems[term]}"', MAX_HITS + 1]).fetchone()[0]
        rarity = sorted((self._counts[term], term) for term in stems if self._counts[term])
        if not rarity:
            return []
        totals = itertools.accumulate(count for count, _ in rarity)
        telling = [term for (_, term), total in zip(rarity, totals, strict=True) if total <= MAX_HITS] or [rarity[0][1]]
        match = " OR ".join(f'"{stems[term]}"' for term in telling)
        hit = "SELECT rowid, bm25(words, 2.0, 1.0) AS score FROM words WHERE words MATCH ? LIMIT ?"
        sql = f"SELECT rowid FROM ({hit}) ORDER BY score LIMIT ?"
        return [id for (id,) in self._db.execute(sql, [match, MAX_HITS, CANDIDATES])]

    def _by_meaning(self, vector: Vectors) -> list[int]:
        if not len(self._ids):
            return []
        asked = np.packbits(vector > 0).view(np.uint64)
        distance = np.bitwise_count(self._bits ^ asked[:, None]).sum(axis=0, dtype=np.uint16)
        near = self._ids[np.argpartition(distance, min(CANDIDATES, len(distance)) - 1)[:CANDIDATES]]
        sql = f"SELECT id, vector FROM pieces WHERE id IN ({', '.join('?' * len(near))})"
        rows = self._db.execute(sql, near.tolist()).fetchall()
        exact = np.stack([np.frombuffer(blob, np.int8) for _, blob in rows]).astype(np.float32) @ vector
        return [rows[at][0] for at in np.argsort(-exact, kind="stable")]

    def _follow(self) -> None:
        """Read again what this or another connection changed."""
        now = (self._db.execute("PRAGMA data_version").fetchone()[0], self._changes)
        if now == self._seen:
            return
        self._counts.clear()
        rows = self._db.execute("SELECT id, vector FROM pieces WHERE vector IS NOT NULL").fetchall()
        self._ids = np.array([id for id, _ in rows], np.int64)
        flat = np.frombuffer(b"".join(blob for _, blob in rows), np.int8)
        if rows:  # word by word of all pieces: four times as fast to compare as piece by piece
            self._bits = np.ascontiguousarray(np.packbits(flat.reshape(len(rows), -1) > 0, axis=1).view(np.uint64).T)
        self._seen = now


def coarse(vector: Vectors) -> bytes:
    """A unit vector as int8 at one scale for all; parts past 127 / SCALE are cut off."""
    return np.clip(vector * SCALE, -127, 127).round().astype(np.int8).tobytes()
