"""Measures: their definitions, and what must hold for any answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import metrics
from models.metrics import Counts

FLAGS = st.lists(st.booleans(), min_size=1, max_size=40)
SCORED = st.lists(st.tuples(st.integers(-5, 5), st.booleans()), min_size=2, max_size=40)
TEXT = st.text("ab1 ", max_size=12)
BOX = st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 9)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
BOXES = st.lists(BOX, max_size=6, unique=True)


def test_f_beta_of_known_counts() -> None:
    found = Counts(hits=6, false=2, missed=4)
    assert found.precision() == 0.75
    assert found.recall() == 0.6
    assert found.f_beta(1) == pytest.approx(2 * 0.75 * 0.6 / (0.75 + 0.6))
    assert found.f_beta(2) == pytest.approx(5 * 0.75 * 0.6 / (4 * 0.75 + 0.6))
    assert found.f_beta(0) == found.precision()


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.floats(0, 100))
def test_f_beta_lies_between_precision_and_recall(hits: int, false: int, missed: int, beta: float) -> None:
    found = Counts(hits, false, missed)
    low, high = sorted([found.precision(), found.recall()])
    if hits:
        assert low - 1e-9 <= found.f_beta(beta) <= high + 1e-9
    assert 0 <= found.f_beta(beta) <= 1


@given(FLAGS)
def test_perfect_answers_score_one(truth: list[bool]) -> None:
    assert metrics.counts(truth, truth).f_beta(3) == 1
    assert metrics.agreement(truth, truth) == 1


@given(SCORED)
def test_auc_is_the_share_of_ordered_pairs(rows: list[tuple[int, bool]]) -> None:
    high = [s for s, positive in rows if positive]
    low = [s for s, positive in rows if not positive]
    scores, truth = zip(*rows, strict=True)
    if not high or not low:
        with pytest.raises(ValueError, match="positives and negatives"):
            metrics.auc(scores, truth)
        return
    pairs = [(h > n) + 0.5 * (h == n) for h in high for n in low]
    assert metrics.auc(scores, truth) == pytest.approx(sum(pairs) / len(pairs))
    assert metrics.auc([2 * s + 1 for s in scores], truth) == pytest.approx(metrics.auc(scores, truth))
    assert metrics.auc([-s for s in scores], truth) == pytest.approx(1 - metrics.auc(scores, truth))


@given(TEXT, TEXT, TEXT)
def test_edits_are_a_distance(a: str, b: str, c: str) -> None:
    assert metrics.edits(a, a) == 0
    assert metrics.edits(a, b) == metrics.edits(b, a)
    assert metrics.edits(a, c) <= metrics.edits(a, b) + metrics.edits(b, c)
    assert abs(len(a) - len(b)) <= metrics.edits(a, b) <= max(len(a), len(b))


def test_character_error_rate_is_edits_per_true_character() -> None:
    assert metrics.character_error_rate(["L0T", "SN 12"], ["LOT", "SN 123"]) == pytest.approx(2 / 9)


@given(BOXES, BOXES)
def test_iou_is_symmetric_and_one_for_the_same_box(a: list[Any], b: list[Any]) -> None:
    overlap = metrics.iou(a, b)
    assert overlap.shape == (len(a), len(b))
    assert np.allclose(overlap, metrics.iou(b, a).T)
    assert ((overlap >= 0) & (overlap <= 1)).all()
    assert np.allclose(np.diag(metrics.iou(a, a)), 1)


def test_iou_of_half_covered_boxes_is_a_third() -> None:
    assert metrics.iou([[0, 0, 2, 2]], [[1, 0, 3, 2]]) == pytest.approx(1 / 3)


@given(BOXES, BOXES)
def test_no_true_box_is_found_twice(found: list[Any], truth: list[Any]) -> None:
    counted = metrics.box_counts([found + found], [truth])
    assert counted.hits <= len(truth)
    assert counted.hits + counted.false == 2 * len(found)
    assert counted.hits + counted.missed == len(truth)


@given(st.lists(BOX, min_size=1, max_size=6, unique=True))
def test_all_boxes_found_is_an_average_precision_of_one(boxes: list[Any]) -> None:
    kinds = [i % 2 for i in range(len(boxes))]
    picture = (boxes, list(range(len(boxes))), kinds)
    assert metrics.mean_average_precision([picture], [(boxes, kinds)], at=0.99) == 1
    assert metrics.mean_average_precision([([], [], [])], [(boxes, kinds)]) == 0


def test_average_precision_of_a_worked_example() -> None:
    """Right, wrong, right over two true boxes: precision 1 up to recall 0.5, then 2/3."""
    truth = [([[0, 0, 2, 2], [5, 5, 8, 8]], [0, 0])]
    found = [([[0, 0, 2, 2], [10, 10, 12, 12], [5, 5, 8, 8]], [0.9, 0.8, 0.7], [0, 0, 0])]
    assert metrics.mean_average_precision(found, truth) == pytest.approx((1 + 2 / 3) / 2)
    confused = [(found[0][0], found[0][1], [0, 0, 1])]
    assert metrics.mean_average_precision(confused, truth) == pytest.approx(0.5)


@given(st.lists(st.floats(-9, 9), min_size=1, max_size=9), st.floats(0.1, 3))
def test_relative_error_scales_with_the_difference(values: list[float], scale: float) -> None:
    truth = np.array(values) + 20
    assert metrics.relative_error(truth, truth) == 0
    assert metrics.relative_error(truth * (1 + scale), truth) == pytest.approx(scale)


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.agreement([], []),
        lambda: metrics.agreement([1], [1, 2]),
        lambda: metrics.counts([], []),
        lambda: metrics.character_error_rate(["a"], [""]),
        lambda: metrics.mean_average_precision([([], [], [])], [([], [])]),
        lambda: Counts(1, 1, 1).f_beta(-1),
        lambda: metrics.relative_error([1, 2], [1]),
    ],
)
def test_nothing_to_measure_is_an_error(call: Any) -> None:
    with pytest.raises(ValueError, match=r"."):
        call()


def test_order_of_samples_does_not_matter() -> None:
    dice = np.random.default_rng(0)
    found: Sequence[Any] = [np.tile(dice.integers(0, 9, (3, 2)), 2) + np.array([0, 0, 4, 4]) for _ in range(5)]
    truth: Sequence[Any] = [f + dice.integers(0, 2, f.shape) for f in found]
    assert metrics.box_counts(found, truth) == metrics.box_counts(found[::-1], truth[::-1])
