"""Measures of a network's answers. Pure numpy: no I/O, no state, no runtime.

Invariants: every measure is in 0 to 1, 1 is best, and does not depend on the order of the samples; the character
error rate alone has 0 as its best and may pass 1, perplexity is 1 at best. Nothing to measure is a ValueError, never a
silent 0 or NaN.
Sources: van Rijsbergen 1979 (F-beta); Mann and Whitney 1947 (AUC as a rank statistic); Everingham et al. 2010, with
every recall level (average precision); Levenshtein 1966.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class Counts(NamedTuple):
    """True positives, false positives, false negatives."""

    hits: int
    false: int
    missed: int

    def precision(self) -> float:
        """Found that are right; 1 when nothing was found and nothing was there."""
        return self.hits / (self.hits + self.false) if self.hits + self.false else float(not self.missed)

    def recall(self) -> float:
        """Right ones that were found; 1 when nothing was there."""
        return self.hits / (self.hits + self.missed) if self.hits + self.missed else 1.0

    def f_beta(self, beta: float = 1.0) -> float:
        """Recall counts `beta` times as much as precision. Raises ValueError for beta below 0."""
        if beta < 0:
            raise ValueError(f"beta is {beta}, it must be 0 or more")
        square = beta * beta
        weight = (1 + square) * self.hits + square * self.missed + self.false
        return (1 + square) * self.hits / weight if weight else 1.0


def counts(found: ArrayLike, truth: ArrayLike) -> Counts:
    """Two boolean arrays of one shape."""
    a, b = np.asarray(found, bool), np.asarray(truth, bool)
    _same(a, b)
    return Counts(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()))


def agreement(found: Sequence[Hashable], truth: Sequence[Hashable]) -> float:
    """Share of equal answers."""
    _some(len(found), len(truth))
    return sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth)


def auc(scores: ArrayLike, truth: ArrayLike) -> float:
    """Chance that a positive scores above a negative, ties half. Raises ValueError without both classes."""
    a, b = np.asarray(scores, float).ravel(), np.asarray(truth, bool).ravel()
    _same(a, b)
    positives, negatives = int(b.sum()), int((~b).sum())
    if not positives or not negatives:
        raise ValueError("the area under the curve needs positives and negatives")
    _, which, sizes = np.unique(a, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[which.ravel()]
    return float((ranks[b].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def iou(a: ArrayLike, b: ArrayLike) -> Floats:
    """Intersection over union of boxes (n, 4) and (m, 4), x0 y0 x1 y1 → (n, m)."""
    first, second = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    low, high = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    shared = np.clip(high - low, 0, None).prod(-1)
    whole = _area(first) + _area(second) - shared
    return np.asarray(np.divide(shared, whole, out=np.zeros_like(shared), where=whole > 0))


def match(found: ArrayLike, truth: ArrayLike, scores: ArrayLike, at: float = 0.5) -> NDArray[np.bool_]:
    """Which found boxes (n,) are right: best score first, each takes the free true box it overlaps most."""
    overlap = iou(found, truth)
    right = np.zeros(overlap.shape[0], bool)
    for row in np.argsort(-np.asarray(scores, float), kind="stable"):
        if overlap.shape[1] and overlap[row].max() >= at:
            right[row] = True
            overlap[:, overlap[row].argmax()] = -1
    return right


def box_counts(found: Sequence[ArrayLike], truth: Sequence[ArrayLike]) -> Counts:
    """Counts over pictures, each with boxes (n, 4) found and (m, 4) true."""
    _some(len(found), len(truth))
    pairs = zip(found, truth, strict=True)
    hits = sum(int(match(f, t, np.zeros(_boxes(f))).sum()) for f, t in pairs)
    return Counts(hits, sum(map(_boxes, found)) - hits, sum(map(_boxes, truth)) - hits)


def mean_average_precision(
    found: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike]],
    truth: Sequence[tuple[ArrayLike, ArrayLike]],
    at: float = 0.5,
) -> float:
    """mAP at one IoU. A picture found is (boxes (n, 4), scores (n,), classes (n,)), a true one (boxes, classes)."""
    _some(len(found), len(truth))
    classes = sorted({int(c) for _, labels in truth for c in np.asarray(labels).ravel()})
    if not classes:
        raise ValueError("there is no true box")
    return float(np.mean([_average_precision(found, truth, c, at) for c in classes]))


def mean_average_precision_to_95(found: Sequence[Any], truth: Sequence[Any]) -> float:
    """The mean of mAP at IoU 0.50, 0.55 … 0.95, as COCO has it."""
    return float(np.mean([mean_average_precision(found, truth, at / 100) for at in range(50, 100, 5)]))


def _average_precision(found: Sequence[Any], truth: Sequence[Any], kind: int, at: float) -> float:
    scores, right, there = [], [], 0
    for (boxes, s, labels), (true_boxes, true_labels) in zip(found, truth, strict=True):
        mine, real = np.asarray(labels) == kind, np.asarray(true_labels) == kind
        own, target = np.reshape(boxes, (-1, 4))[mine], np.reshape(true_boxes, (-1, 4))[real]
        scores.append(np.asarray(s, float)[mine])
        right.append(match(own, target, scores[-1], at))
        there += len(target)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hits = np.concatenate(right)[order]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hits].sum() / there)


def edits(found: str, truth: str) -> int:
    """Levenshtein distance: insertions, deletions and substitutions."""
    row = list(range(len(truth) + 1))
    for i, a in enumerate(found, 1):
        left, row[0], corner = i, i, row[0]
        for j, b in enumerate(truth, 1):
            left = min(row[j] + 1, left + 1, corner + (a != b))
            corner, row[j] = row[j], left
    return row[-1]


def character_error_rate(found: Sequence[str], truth: Sequence[str]) -> float:
    """Edits per true character over all texts."""
    _some(len(found), len(truth))
    if not (length := sum(map(len, truth))):
        raise ValueError("the true texts have no character")
    return sum(edits(a, b) for a, b in zip(found, truth, strict=True)) / length


def perplexity(losses: Sequence[float]) -> float:
    """Of tokens with these negative logarithms of their probability."""
    _some(len(losses), len(losses))
    return float(np.exp(np.mean(losses)))


def relative_error(found: ArrayLike, truth: ArrayLike) -> float:
    """Size of the difference by the size of the truth (Euclidean); 0 when both are 0."""
    a, b = np.asarray(found, float), np.asarray(truth, float)
    _same(a, b)
    size, error = float(np.linalg.norm(b)), float(np.linalg.norm(a - b))
    return error / size if size else float(error > 0)


def _boxes(boxes: ArrayLike) -> int:
    return len(np.reshape(boxes, (-1, 4)))


def _area(boxes: Floats) -> Floats:
    return np.asarray(np.clip(boxes[..., 2:] - boxes[..., :2], 0, None).prod(-1))


def _some(found: int, truth: int) -> None:
    if not truth or found != truth:
        raise ValueError(f"{found} answers for {truth} samples: there must be as many, and at least one")


def _same(a: NDArray[Any], b: NDArray[Any]) -> None:
    if a.shape != b.shape or not b.size:
        raise ValueError(f"shapes {a.shape} and {b.shape}: they must be equal and not empty")
