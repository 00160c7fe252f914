"""How sure a decision is: the model's own probability, made honest, and the vote of samples on what is called.

Invariants: pure. A model that tells no probabilities is neither sure nor unsure (None), and is asked once. Votes are of
parsed calls, so two ways to write one call are one; what is no call has no vote.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import msgspec

from edge_agent.agent.calls import render_all
from edge_agent.agent.taint import decisions
from edge_agent.engines.base import Piece


class Calibration(msgspec.Struct, frozen=True):
    """Platt's two numbers over the logarithm of a text's probability; by default that probability itself counts.

    Platt, Probabilistic outputs for support vector machines (1999).
    """

    a: float = 0.0
    b: float = 0.0

    def probability(self, piece: Piece) -> float | None:
        """That the decision is right; None when the model does not tell."""
        if not piece.choices:
            return None
        if not (self.a or self.b):
            return piece.probability
        return 1 / (1 + math.exp(min(700.0, -(self.a * piece.mean_logprob * piece.choices + self.b))))


def vote(pieces: Sequence[Piece], calibration: Calibration) -> tuple[Piece, float, str]:
    """The first that says what most say, how sure that is (the mean of its probability and its share), the count."""
    texts = [render_all(found) if (found := decisions(piece.text)) else "" for piece in pieces]
    counts = Counter(text for text in texts if text)
    if not counts:
        return pieces[0], 0.0, f"0/{len(pieces)}"
    winner, votes = counts.most_common(1)[0]  # of equals, the one that was said first
    piece = pieces[texts.index(winner)]
    share = votes / len(pieces)
    own = calibration.probability(piece)
    return piece, share if own is None else (own + share) / 2, f"{votes}/{len(pieces)}"
