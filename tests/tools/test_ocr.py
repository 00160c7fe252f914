"""Text is read from real pixels by the real networks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import skimage.data

from edge_agent.agent.tool import ToolError
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.wire.tensor import Tensor
from models.errors import ModelError
from models.ppocr import finish
from tools.sim.camera import frame, truth
from tools.vision.ocr import MAX_SIDE, decode, find_boxes, read_text

LABELS = 60
PAGE = [
    "Region-based segmentation",
    "Let us first determine markers of the coins and the",
    "background. These markers are pixels that we can label",
    "unambiguously as either object or background. Here,",
    "the markers are found at the two extreme parts of the",
    "histogram of grey values:",
]


def edits(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_printed_labels_are_read_under_blur_perspective_noise_and_light(ctx: Any, capsys: Any) -> None:
    wrong = characters = right = 0
    spent = 0.0
    for product in range(LABELS):
        picture = frame(11, product % 3 + 1, product)
        began = time.perf_counter()
        text = " ".join(line.text for line in read_text(ctx, picture, side=384))
        spent += time.perf_counter() - began
        want = " ".join(truth(11, product % 3 + 1, product))
        wrong, characters = wrong + edits(text, want), characters + len(want)
        right += text.replace(" ", "") == want.replace(" ", "")
    with capsys.disabled():
        figure = f"character error rate {wrong / characters:.2%}, {right}/{LABELS} right but for spaces"
        print(f"\n{LABELS} labels: {figure}, {1000 * spent / LABELS:.0f} ms a label")
    assert wrong / characters <= 0.02
    assert right >= 0.95 * LABELS


def test_the_scanned_page_is_read_line_by_line(ctx: Any, capsys: Any) -> None:
    page = cv2.cvtColor(skimage.data.page(), cv2.COLOR_GRAY2BGR)
    lines = [line.text for line in read_text(ctx, np.asarray(page, np.uint8), side=640)]
    wrong = edits(" ".join(lines[:6]), " ".join(PAGE))
    with capsys.disabled():
        print(f"\nscanned page: {wrong} of {len(' '.join(PAGE))} characters wrong, last line {lines[-1]!r}")
    assert wrong <= 5
    assert "np.zeros_like(coins)" in lines[-1]


def test_a_picture_without_text_gives_no_lines(ctx: Any) -> None:
    assert read_text(ctx, np.full((480, 640, 3), 120, np.uint8)) == []
    assert read_text(ctx, np.asarray(cv2.cvtColor(skimage.data.gravel(), cv2.COLOR_GRAY2BGR), np.uint8)) == []


def test_a_label_that_runs_downwards_is_laid_down(ctx: Any) -> None:
    standing = np.asarray(cv2.rotate(frame(11, 1, 0), cv2.ROTATE_90_CLOCKWISE), np.uint8)
    text = {line.text.replace(" ", "") for line in read_text(ctx, standing)}
    assert text == {line.replace(" ", "") for line in truth(11, 1, 0)}


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((480, 640), np.uint8),
        np.zeros((480, 640, 4), np.uint8),
        np.zeros((480, 640, 3), np.float32),
        np.zeros((0, 640, 3), np.uint8),
        np.zeros((8, MAX_SIDE + 1, 3), np.uint8),
    ],
)
def test_what_is_no_picture_is_refused_before_a_network_runs(bare_ctx: Any, picture: Any) -> None:
    with pytest.raises(ToolError, match="the picture is"):
        read_text(bare_ctx, picture)


def test_ctc_collapses_repeats_and_keeps_what_a_blank_parts() -> None:
    points = np.array([0, 65, 65, 0, 65, 66, 66, 0, 32, 67], np.int32)
    assert decode(points, np.full(10, 0.5, np.float32)) == ("AAB C", 0.5)
    assert decode(np.zeros(4, np.int32), np.ones(4, np.float32)) == ("", 0.0)


def test_a_box_is_found_where_the_map_says_and_grown_to_the_whole_line() -> None:
    probability = np.zeros((96, 128), np.float32)
    probability[40:48, 20:100] = 0.9
    probability[70:71, 20:22] = 0.9  # too small to be text
    (box,) = find_boxes(probability, 1280, 960)
    (left, top), (right, bottom) = box.min(axis=0), box.max(axis=0)
    assert left < 200
    assert top < 400
    assert right > 1000
    assert bottom > 480
    assert bottom - top < 300


def test_the_finished_recognizer_says_what_the_published_one_says(
    ppocr_models: dict[str, Path], networks: dict[str, OnnxNetwork]
) -> None:
    published = OnnxNetwork(ppocr_models["rec"])
    pixels = np.random.default_rng(1).uniform(-1, 1, (2, 3, 48, 192)).astype(np.float32)
    inputs = {"x": Tensor("float32", [2, 3, 48, 192], pixels.tobytes())}
    (raw,) = published.infer(inputs).values()
    probability = np.frombuffer(raw.data, np.float32).reshape(raw.shape)
    found = networks["ppocr-rec"].infer(inputs)
    points = np.frombuffer(found["codepoint"].data, np.int32).reshape(raw.shape[:2])
    confidence = np.frombuffer(found["confidence"].data, np.float32).reshape(raw.shape[:2])
    assert ((points == 0) == (probability.argmax(2) == 0)).all()
    assert confidence == pytest.approx(probability.max(2), abs=1e-6)


def test_another_network_is_not_finished(ppocr_models: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no PP-OCR recognition network"):
        finish(ppocr_models["det"], tmp_path / "x.onnx")
