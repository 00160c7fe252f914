"""The device's long-term memory as tools: documents and notes in, pieces with their sources out.

Invariants: what is added is found by its words at once; its vectors are made by the network EMBEDDER where that is
installed (its vocabulary comes with it), a little in each call, so no call is long; without it words alone are
searched, and the answer says so. Documents come from the folder `documents` of the options (default: beside the
memory), and from `documents/` in the bundles that are installed, whose version is followed before each call that reads:
a document that a new version has no more is forgotten.
"""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TypedDict

import msgspec
import numpy as np
from numpy.typing import NDArray

from edge_agent.agent.memory import Memory, Vectors
from edge_agent.agent.tool import Context, Range, Tool, ToolError, declare
from edge_agent.errors import Refused
from edge_agent.wire import durable
from edge_agent.wire.tensor import Tensor

EMBEDDER = "minilm"
MAX_TOKENS = 256
EMBED_S = 5.0
MAX_FILES = 1000  # of the documents of a bundle
_log = logging.getLogger("outrider.knowledge")
_OPTIONS = {"documents": "", "quota_mb": "64", "days": "0", "vocabulary": ""}


class Passage(TypedDict):
    """A part of a document."""

    source: str
    part: int
    title: str
    text: str


class Passages(TypedDict):
    """The best first; `by` is what they were searched by."""

    passages: list[Passage]
    by: str


class WordPiece:
    """BERT's uncased tokenizer (Devlin et al. 2018): text to ids, [CLS] first and [SEP] last."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self._ids = {word: id for id, word in enumerate(vocabulary)}
        self._cls, self._sep, self._unknown = (self._ids[name] for name in ("[CLS]", "[SEP]", "[UNK]"))

    def ids(self, text: str, most: int = MAX_TOKENS) -> list[int]:
        """At most `most` ids."""
        plain = unicodedata.normalize("NFD", text.lower())
        spaced = "".join(_spaced(c) for c in plain if unicodedata.category(c) not in ("Mn", "Cc", "Cf") or c.isspace())
        found: list[int] = []
        for word in spaced.split():
            found += self._word(word)
            if len(found) >= most - 2:
                break
        return [self._cls, *found[: most - 2], self._sep]

    def _word(self, word: str) -> list[int]:
        found, at = [], 0
        while at < len(word) and len(word) <= 100:
            for end in range(len(word), at, -1):
                if (id := self._ids.get(("##" if at else "") + word[at:end])) is not None:
                    break
            else:
                return [self._unknown]
            found.append(id)
            at = end
        return found or [self._unknown]


def _spaced(c: str) -> str:
    cjk = "\u4e00" <= c <= "\u9fff" or "\u3400" <= c <= "\u4dbf"
    symbol = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return f" {c} " if cjk or symbol or unicodedata.category(c).startswith("P") else c


def batch(words: WordPiece, texts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
    """Texts as the network takes them."""
    rows = [words.ids(text) for text in texts]
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for at, row in enumerate(rows):
        ids[at, : len(row)] = row
    return {"ids": ids, "mask": (np.arange(ids.shape[1]) < np.array([[len(row)] for row in rows])).astype(np.int64)}


def embed(ctx: Context, words: WordPiece, texts: Sequence[str]) -> Vectors:
    """Unit vectors, one a row. Raises ToolError where the network is not installed."""
    inputs = batch(words, texts)
    sent = {name: Tensor("int64", list(value.shape), value.tobytes()) for name, value in inputs.items()}
    out = ctx.infer(EMBEDDER, sent)["vectors"]
    return np.frombuffer(out.data, np.float32).reshape(out.shape)


class Bundles:
    """The documents of the bundles below `root`, each under `bundle/file`, in the memory as far as `known` says."""

    def __init__(self, root: Path, known: Path) -> None:
        self._root, self._known = root, known
        try:
            self._taken = msgspec.json.decode(known.read_bytes(), type=dict[str, tuple[str, list[str]]])
        except (FileNotFoundError, msgspec.MsgspecError):
            self._taken = {}

    def follow(self, memory: Memory) -> None:
        """Add what came and forget what went since the last time."""
        there = {link.parent.name: link.readlink().name for link in self._root.glob("*/current") if link.is_symlink()}
        changed = {name for name in there.keys() | self._taken if there.get(name) != self._taken.get(name, ("",))[0]}
        for name in sorted(changed):
            folder, before = self._root / name / "current" / "files" / "documents", self._taken.pop(name, ("", []))[1]
            added = [self._add(memory, name, folder, path) for path in islice(sorted(folder.rglob("*")), MAX_FILES)]
            for gone in set(before) - set(added):
                memory.forget(gone)
            if name in there:
                self._taken[name] = there[name], [source for source in added if source]
        if changed:
            durable.write(self._known, msgspec.json.encode(self._taken))

    def _add(self, memory: Memory, bundle: str, folder: Path, path: Path) -> str:
        source = f"{bundle}/{path.relative_to(folder)}"
        try:
            return source if path.is_file() and memory.add(source, path.read_text()) else ""
        except (OSError, UnicodeDecodeError, Refused) as error:
            _log.error("%s is not kept: %s", source, error)
            return ""


class Vocabulary:
    """The tokenizer of a vocab.txt, read again when another one is there; None while there is none."""

    def __init__(self, path: Path) -> None:
        self._path, self._from = path, Path()
        self._read: WordPiece | None = None

    def __call__(self) -> WordPiece | None:
        try:
            there = self._path.resolve(strict=True)
            if there != self._from:
                self._from, self._read = there, WordPiece(there.read_text().splitlines())
            return self._read
        except (OSError, KeyError):
            return None


class Knowledge:
    """The tools, over one memory."""

    def __init__(
        self,
        memory: Memory,
        documents: Path,
        words: Callable[[], WordPiece | None],
        follow: Callable[[Memory], None] = lambda _: None,
    ) -> None:
        self._memory, self._documents, self._words, self._follow = memory, documents, words, follow

    def remember(self, topic: str, text: str, ctx: Context) -> str:
        """Keep a short note under a topic, in place of the one before."""
        return self._keep(f"note: {topic}", text, ctx)

    def add_document(self, name: str, ctx: Context) -> str:
        """Read a text document of the documents folder into the memory."""
        path = (self._documents / name).resolve()
        if not path.is_relative_to(self._documents.resolve()) or not path.is_file():
            raise ToolError(f"there is no document {name!r} in {self._documents}")
        try:
            return self._keep(name, path.read_text(), ctx)
        except (OSError, UnicodeDecodeError) as error:
            raise ToolError(f"{name} cannot be read: {error}") from error

    def forget(self, source: str) -> str:
        """Take a document or a note out of the memory."""
        if not self._memory.forget(source):
            raise ToolError(f"there is no source {source!r}")
        return f"forgot {source}"

    def search_knowledge(self, question: str, ctx: Context, count: Annotated[int, Range(1, 10)] = 3) -> Passages:
        """Find what manuals, documents and notes say about a question."""
        self._follow(self._memory)
        vector, by, words = None, "words (no embedding network is installed)", self._words()
        if words is not None:
            try:
                self._memory.embed(partial(embed, ctx, words), 0.5)
                vector, by = embed(ctx, words, [question])[0], "words and meaning"
            except ToolError:
                by = "words (no embedding network is installed)"
        found = self._memory.search(question, vector, count)
        return {
            "passages": [{"source": f.source, "part": f.n, "title": f.title, "text": f.text} for f in found],
            "by": by,
        }

    def list_sources(self) -> dict[str, Any]:
        """List the documents and notes in the memory."""
        self._follow(self._memory)
        return {"sources": [f"{source.name} ({source.pieces} parts)" for source in self._memory.sources()[:50]]}

    def _keep(self, name: str, text: str, ctx: Context) -> str:
        try:
            count = self._memory.add(name, text)
        except Refused as refused:
            raise ToolError(str(refused)) from refused
        if (words := self._words()) is not None:
            try:
                left = self._memory.embed(partial(embed, ctx, words), EMBED_S)
            except ToolError as error:
                return f"kept {name} in {count} parts, found by words alone: {error}"
            return f"kept {name} in {count} parts" + (
                f"; {left} parts are found by words alone until later" if left else ""
            )
        return f"kept {name} in {count} parts"


def limits(options: dict[str, str]) -> tuple[int, float]:
    """Quota in bytes and age in seconds. Raises ValueError."""
    given = _OPTIONS | options
    return int(float(given["quota_mb"]) * 2**20), float(given["days"]) * 86400


def pack(state: Path, options: dict[str, str]) -> list[Tool]:
    """The memory's tools. Options: `documents` (folder), `quota_mb` (64), `days` a source is kept (0: for ever),
    `vocabulary` (a vocab.txt in place of the one that the bundle of the embedding network brings).

    Raises ValueError for a wrong option.
    """
    if unknown := options.keys() - _OPTIONS.keys():
        raise ValueError(f"the memory has no option {', '.join(sorted(unknown))}; it has {', '.join(_OPTIONS)}")
    given = _OPTIONS | options
    documents = Path(given["documents"] or state / "documents")
    documents.mkdir(parents=True, exist_ok=True)
    memory = Memory(state / "knowledge.db", *limits(options))
    bundles = state.parent / "bundles"
    words = Path(given["vocabulary"] or bundles / EMBEDDER / "current" / "files" / "vocab.txt")
    tools = Knowledge(memory, documents, Vocabulary(words), Bundles(bundles, state / "knowledge-bundles.json").follow)
    return [
        declare(tools.search_knowledge, timeout_s=20.0),
        declare(tools.remember, risk="act", timeout_s=20.0),
        declare(tools.add_document, risk="act", timeout_s=60.0),
        declare(tools.forget, risk="act"),
        declare(tools.list_sources),
    ]
