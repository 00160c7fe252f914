"""Conversations as tokens, packed into rows of one length.

Invariants: a token reads its own conversation and nothing else, at the positions it would have alone, so a packed row
trains exactly what its conversations would train one by one; what is predicted is every right assistant turn with its
end token, the tools' own examples included, and never a turn that a tool answered with an error.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_TURN = re.compile(r"(<\|im_start\|>(\w+)\n)(.*?)(<\|im_end\|>\n|$)", re.DOTALL)
_END = "<|im_end|>"


class Conversation(NamedTuple):
    """Tokens, and for each whether it is to be predicted."""

    tokens: list[int]
    learned: list[bool]


def conversation(text: str, encode: Callable[[str], list[int]]) -> Conversation:
    """Tokens of a ChatML text whose last turn is the assistant's, without its end."""
    tokens: list[int] = []
    learned: list[bool] = []
    turns = [match.groups() for match in _TURN.finditer(text)]
    for index, (opening, role, body, _) in enumerate(turns):
        after = turns[index + 1] if index + 1 < len(turns) else None
        failed = after is not None and after[1] == "tool" and after[2].startswith("error:")
        learn = role == "assistant" and not failed
        for part, known in ((opening, False), (body + _END, learn), ("\n", False)):
            piece = encode(part)
            tokens += piece
            learned += [known] * len(piece)
    return Conversation(tokens[:-1], learned[:-1])


def conversations(folder: Path) -> Callable[[int], Iterator[Conversation]]:
    """Generated conversations of a seed, without end, in the tokens of a built model folder."""
    from llguidance import LLTokenizer

    from models.toolcaller.data.generate import generate

    tokenizer = LLTokenizer(str(folder / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer.tokenize_str(text, parse_special=True)
        return tokens

    return lambda seed: (conversation(e.prompt + e.completion, encode) for e in generate(seed, sys.maxsize))


@dataclass
class Row:
    """Tokens with position and conversation, and where (`at`) which token (`target`) comes next."""

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)

    def add(self, item: Conversation) -> None:
        """Append a conversation."""
        start, count = len(self.tokens), len(item.tokens)
        owner = self.owners[-1] + 1 if self.owners else 0
        self.tokens += item.tokens
        self.positions += range(count)
        self.owners += [owner] * count
        for index, learn in enumerate(item.learned):
            if learn and index:
                self.at.append(start + index - 1)
                self.target.append(item.tokens[index])

    def mask(self) -> NDArray[np.bool_]:
        """(n, n), True where the row's token may read the column's."""
        owner = np.array(self.owners)
        allowed: NDArray[np.bool_] = np.tril(owner[None, :] == owner[:, None])
        return allowed


def rows(items: Iterable[Conversation], length: int) -> Iterator[Row]:
    """Fill rows of at most `length` tokens in order; a conversation longer than that is left out."""
    row = Row()
    for item in items:
        if len(item.tokens) > length:
            continue
        if len(row.tokens) + len(item.tokens) > length:
            yield row
            row = Row()
        row.add(item)
    if row.tokens:
        yield row
