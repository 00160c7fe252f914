"""The object detector: what it learns is what the graph's boxes mean, and the shipped weights find things."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_agent.engines.onnxruntime import OnnxNetwork
from models import objects, tasks
from models.golden import tensors
from models.package import build
from models.recipe import _Asked


@given(st.integers(0, 10_000), st.sampled_from(["training", "calibration", "evaluation"]))
@settings(max_examples=15, deadline=None)
def test_things_lie_inside_their_scene_and_targets_give_their_boxes_back(index: int, part: str) -> None:
    picture, boxes, classes = objects.scene(part, index)
    assert picture.shape == (3, objects.HEIGHT, objects.WIDTH)
    assert np.abs(picture).max() <= 1
    assert (boxes >= 0).all()
    assert (boxes <= [objects.WIDTH, objects.HEIGHT] * 2).all()
    heat, sides, _ = objects.targets(boxes, classes)
    rows, columns = heat.shape[1:]
    y, x = np.mgrid[:rows, :columns] * 8.0 + 4
    said = np.stack([x, y, x, y]) + np.array([-8, -8, 8, 8])[:, None, None] * sides
    for box, kind in zip(boxes, classes, strict=True):
        row, column = int((box[1] + box[3]) / 16), int((box[0] + box[2]) / 16)
        assert heat[kind, row, column] == pytest.approx(1)
        others = [other for other in boxes if other is not box and (said[:, row, column] == other).all()]
        assert others or said[:, row, column] == pytest.approx(box)


def test_a_mirrored_scene_has_mirrored_boxes() -> None:
    seen = objects.scene("training", 3)
    turned = objects._mirrored(objects._mirrored(seen, True), True)
    for one, other in zip(turned, seen, strict=True):
        np.testing.assert_allclose(one, other)


def test_the_shipped_detector_finds_things_it_was_not_trained_on(model_cache: Path) -> None:
    engine = OnnxNetwork(build("objects", model_cache), probe=tensors(objects.probe()))
    task, found, truth = tasks.TASKS["objects"], [], []
    for sample, known in task.samples("evaluation", 24):
        found += task.answers(_Asked(engine, []), sample)
        truth += known
    engine.close()
    assert task.score(found, truth) > 0.7
    nothing = [(boxes[:0], scores[:0], classes[:0]) for boxes, scores, classes in found]
    assert task.score(nothing, truth) == 0
