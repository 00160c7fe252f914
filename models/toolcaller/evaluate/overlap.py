"""Whether a text shares words in a row with what is held back for evaluation.

Invariant: what is held back is kept as hashes: nothing of it is shown by a check that fails.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from models.fetch import Progress, quiet
from models.toolcaller.data.catalogue import name_hash
from models.toolcaller.evaluate import bfcl

_FILES = re.compile(r"bfcl_eval/data/BFCL_v4_(live_)?(simple|multiple|parallel|irr|rel)\w*\.json")


def grams(text: str, size: int) -> set[int]:
    """Hashes of every run of `size` words."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {hash(tuple(words[i : i + size])) for i in range(len(words) - size + 1)}


class Held:
    """Names and runs of words of BFCL's single-turn cases, or of other texts, as hashes."""

    def __init__(self, texts: Iterable[str], names: Iterable[str] = (), size: int = 8) -> None:
        self.size = size
        self.names = {name_hash(name) for name in names}
        self.grams = {gram for text in texts for gram in grams(text, size)}

    @classmethod
    def load(cls, cache: Path, progress: Progress = quiet) -> Held:
        """BFCL's. Raises ModelError when its wheel cannot be had."""
        found = list(_cases(bfcl.fetch_wheel(cache, progress)))
        texts = [message["content"] for case in found for turn in case["question"] for message in turn]
        return cls(texts, [function["name"] for case in found for function in case["function"]])

    def shares(self, text: str) -> bool:
        """Does the text hold a run of words that is held back?"""
        return not self.grams.isdisjoint(grams(text, self.size))

    def named(self, name: str) -> bool:
        """Is this the name of a function that is held back?"""
        return name_hash(name) in self.names


def _cases(wheel: Path) -> Iterator[dict[str, Any]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in filter(_FILES.fullmatch, archive.namelist()):
            yield from (json.loads(line) for line in archive.read(name).decode().splitlines() if line.strip())
