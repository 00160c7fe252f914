"""Conversations as tokens, packed into rows of one length; what conversations of one catalogue share is read once.

Invariants: a token reads its own conversation and nothing else, at the positions it would have alone, so a packed row
trains exactly what its conversations would train one by one (what they share is learned once); what is predicted is
every right assistant turn with its end token, the tools' own examples included, and never a turn that a tool answered
with an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from models.toolcaller.data.written import Group

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


Bunch = Sequence[Conversation]
"""Conversations that begin alike: what they share is read once."""


def bunches(folder: Path, site: Sequence[Group] = (), focus: Collection[str] = ()) -> Callable[[int], Iterator[Bunch]]:
    """Generated bunches of a seed, without end, in the tokens of a built model folder; `site` and `focus` as there."""
    from llguidance import LLTokenizer

    from models.toolcaller.data.bunches import bunches as generated

    tokenizer = LLTokenizer(str(folder / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        tokens: list[int] = tokenizer.tokenize_str(text, parse_special=True)
        return tokens

    return lambda seed: (
        [conversation(e.prompt + e.completion, encode) for e in bunch] for bunch in generated(seed, site, focus)
    )


@dataclass
class Row:
    """Tokens with position, node and the nodes' parents, and where (`at`) which token (`target`) comes next.

    A node is a run of tokens: the beginning that a bunch shares (its own parent), or what one conversation adds to it.
    """

    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    nodes: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    at: list[int] = field(default_factory=list)
    target: list[int] = field(default_factory=list)

    def add(self, item: Conversation, start: int, parent: int, last: int) -> int:
        """Append the tokens of `item` from `start` as a child of `parent`, which ends at row index `last`.

        Returns the new node.
        """
        node = len(self.parents)
        self.parents.append(node if parent < 0 else parent)
        for index in range(start, len(item.tokens)):
            if item.learned[index] and index:
                self.at.append(len(self.tokens) - 1 if index > start else last)
                self.target.append(item.tokens[index])
            self.tokens.append(item.tokens[index])
            self.positions.append(index)
            self.nodes.append(node)
        return node

    def mask(self) -> NDArray[np.bool_]:
        """(n, n), True where the row's token may read the column's: its own node and the one before, up to itself."""
        node, parents = np.array(self.nodes), np.array(self.parents)
        above = parents[node]
        allowed: NDArray[np.bool_] = (node[None, :] == node[:, None]) | (node[None, :] == above[:, None])
        return np.tril(allowed)


def rows(items: Iterable[Bunch], length: int) -> Iterator[Row]:
    """Fill rows of at most `length` tokens in order; a conversation longer than that is left out."""
    row = Row()
    for bunch in items:
        fit = [item for item in bunch if len(item.tokens) <= length]
        shared = _alike([item.tokens for item in fit]) if len(fit) > 1 else 0
        parent = last = -1
        for item in fit:
            added = len(item.tokens) - (shared if parent >= 0 else 0)
            if len(row.tokens) + added > length:
                yield row
                row, parent = Row(), -1
            if parent < 0 and shared:
                head = Conversation(item.tokens[:shared], item.learned[:shared])
                parent = row.add(head, 0, -1, -1)
                last = len(row.tokens) - 1
            row.add(item, shared, parent, last)
    if row.tokens:
        yield row


def _alike(texts: Sequence[Sequence[int]]) -> int:
    """Leading tokens that all have, short of the shortest's last."""
    least = min(map(len, texts)) - 1
    return next((i for i in range(least) if any(text[i] != texts[0][i] for text in texts)), least)
