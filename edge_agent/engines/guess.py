"""Guesses the next tokens of a text under a grammar, so that the model reads several at once and confirms them.

Invariants: a guess is one that the grammar allows; nothing is decided here, so a wrong one costs time and no more. An
argument is mostly copied from the request; a copied number or text ends where the request goes on otherwise; where
every token that the grammar allows begins alike (`=`, `=-`) the shortest is the likeliest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SOURCE = 256  # tokens at the end of the prompt that may be copied
_FEW = 64
_NUMBER_ENDS = (".", ",", ")")
_TEXT_ENDS = ('")', '",')


class Guesser:
    """For one tokenizer; `allowed` gives the tokens that a matcher allows as zeros and ones."""

    def __init__(self, tokenizer: Any, allowed: Callable[[Any], NDArray[np.uint8]]) -> None:
        self._tokenizer, self._allowed = tokenizer, allowed
        self._digits = {self._token(digit) for digit in "0123456789"}
        self._ends = {kind: [self._token(end) for end in kind] for kind in (_NUMBER_ENDS, _TEXT_ENDS)}
        self._point, self._zero = self._token("."), self._token("0")

    def guess(self, matcher: Any, written: Sequence[int], prompt: Sequence[int], most: int) -> list[int]:
        """At most so many tokens after what is written. Uses up the matcher, which stands there."""
        source = list(prompt[-_SOURCE:])
        guessed: list[int] = []
        while len(guessed) < most and not matcher.is_stopped():
            tokens = matcher.compute_ff_tokens()
            if not tokens:
                token = self._likely(self._allowed(matcher), [*written, *guessed], source)
                if token is None:
                    break
                tokens = [token]
            guessed += tokens
            if not matcher.consume_tokens(tokens):
                break
        return guessed[:most]

    def _likely(self, allowed: NDArray[np.uint8], written: list[int], source: list[int]) -> int | None:
        last = written[-1]
        following = [_following(source, written[-size:]) for size in (2, 1)]
        for token in following:
            if token is not None and allowed[token]:
                return token
        if (begins := self._beginning(np.flatnonzero(allowed))) is not None:
            return begins
        if last == self._point and written[-2:-1] and written[-2] in self._digits and allowed[self._zero]:
            return self._zero
        if last not in self._digits and following == [None, None]:
            return None
        ends = self._ends[_NUMBER_ENDS if last in self._digits else _TEXT_ENDS]
        return next((end for end in ends if allowed[end]), None)

    def _beginning(self, allowed: NDArray[np.intp]) -> int | None:
        """The token with which all that are allowed begin."""
        if not 0 < len(allowed) <= _FEW:
            return None
        texts = {int(token): self._tokenizer.decode_bytes([int(token)]) for token in allowed}
        short = min(texts, key=lambda token: len(texts[token]))
        return short if all(text.startswith(texts[short]) for text in texts.values()) else None

    def _token(self, text: str) -> int:
        return int(self._tokenizer.tokenize_str(text)[0])


def _following(source: list[int], tokens: list[int]) -> int | None:
    """What came after these tokens when they were last written."""
    size = len(tokens)
    starts = range(len(source) - size - 1, -1, -1)
    return next((source[at + size] for at in starts if source[at : at + size] == tokens), None)
