"""Text in a picture: PP-OCR detection and recognition around two networks that run elsewhere.

Invariants: an image is at most MAX_SIDE on a side; at most MAX_LINES lines are read, in reading order; a batch of
crops is one shape, widths in steps of WIDTH_STEP, so a network sees few shapes. The networks are asked for by name
through the tool's context and nothing here knows where they run.
Sources: DB (Liao et al. 2020, arXiv:1911.08947) for the boxes; CTC (Graves et al. 2006) for the text.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyclipper

from edge_agent.agent.tool import Context, ToolError
from edge_agent.wire.tensor import Tensor

DETECTOR, RECOGNIZER = "ppocr-det", "ppocr-rec"
MAX_SIDE = 4096
MAX_LINES = 64
_PIXEL, _BOX, _UNCLIP, _MIN_SIDE = 0.3, 0.5, 1.6, 3.0  # the published thresholds of PP-OCR's detector
HEIGHT, WIDTH_STEP, MAX_WIDTH, BATCH = 48, 64, 1280, 8

Image = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]


class Line(NamedTuple):
    """A line of text, its mean character probability, and its corners (4, 2) in pixels, clockwise from top left."""

    text: str
    confidence: float
    box: Floats


def read_text(ctx: Context, image: Image, side: int = 512, min_confidence: float = 0.6) -> list[Line]:
    """Lines of a BGR image (height, width, 3), in reading order. `side`: what the detector sees, in pixels.

    Raises ToolError when the image is no such picture or a network is not there.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ToolError(f"the picture is {image.dtype}{list(image.shape)}, it must be uint8[height, width, 3]")
    if max(image.shape) > MAX_SIDE:
        raise ToolError(f"the picture is {image.shape[1]}x{image.shape[0]} pixels, at most {MAX_SIDE} a side")
    boxes = find_boxes(_detect(ctx, image, side), image.shape[1], image.shape[0])
    boxes = _reading_order(boxes)[:MAX_LINES]
    read = _recognize(ctx, [_crop(image, box) for box in boxes])
    lines = [Line(text, confidence, box) for (text, confidence), box in zip(read, boxes, strict=True)]
    return [line for line in lines if line.text.strip() and line.confidence >= min_confidence]


def _detect(ctx: Context, image: Image, side: int) -> Floats:
    height, width = image.shape[:2]
    scale = side / max(height, width)
    size = [max(32, round(n * scale / 32) * 32) for n in (width, height)]
    output = ctx.infer(DETECTOR, {"x": _tensor(cv2.resize(image, size)[None])})
    return np.asarray(_array(next(iter(output.values())))[0, 0], np.float32)


def find_boxes(probability: Floats, width: int, height: int) -> list[Floats]:
    """Corners (4, 2) of text lines from a probability map, scaled to width x height."""
    rows, columns = probability.shape
    mask = cv2.dilate((probability > _PIXEL).astype(np.uint8), np.ones((2, 2), np.uint8))
    contours, _ = cv2.findContours(mask, cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
    boxes = []
    for contour in sorted(contours, key=cv2.contourArea, reverse=True)[: 2 * MAX_LINES]:
        corners = _corners(contour)
        if _short_side(corners) < _MIN_SIDE or _mean_inside(probability, corners) < _BOX:
            continue
        grown = _grow(corners)
        if grown is None or _short_side(grown) < _MIN_SIDE + 2:
            continue
        scaled = grown * np.array([width / columns, height / rows], np.float32)
        boxes.append(np.clip(scaled, 0, [width - 1, height - 1]).astype(np.float32))
    return boxes


def _corners(contour: np.ndarray) -> Floats:
    """Corners of the smallest rectangle around a contour, clockwise from top left."""
    points = cv2.boxPoints(cv2.minAreaRect(contour))
    left, right = np.split(points[np.argsort(points[:, 0], kind="stable")], 2)
    (tl, bl), (tr, br) = left[np.argsort(left[:, 1])], right[np.argsort(right[:, 1])]
    return np.array([tl, tr, br, bl], np.float32)


def _short_side(corners: Floats) -> float:
    return min(math.dist(corners[0], corners[1]), math.dist(corners[0], corners[3]))


def _mean_inside(probability: Floats, corners: Floats) -> float:
    x, y, w, h = cv2.boundingRect(corners)
    x, y = max(x, 0), max(y, 0)
    window = probability[y : y + h, x : x + w]
    mask = np.zeros(window.shape, np.uint8)
    cv2.fillPoly(mask, [(corners - (x, y)).astype(np.int32)], 1)
    return float(cv2.mean(window, mask)[0])


def _grow(corners: Floats) -> Floats | None:
    """Undo the shrinking that the detector was trained with: offset by area x ratio / perimeter."""
    distance = cv2.contourArea(corners) * _UNCLIP / cv2.arcLength(corners, True)
    offset = pyclipper.PyclipperOffset()
    offset.AddPath(corners.round().astype(int).tolist(), pyclipper.JT_ROUND, pyclipper.ET_CLOSEDPOLYGON)
    paths = offset.Execute(distance)
    return _corners(np.array(paths[0], np.float32)) if paths else None


def _reading_order(boxes: list[Floats]) -> list[Floats]:
    """Top to bottom, and left to right where the middles of two boxes lie within half a line."""
    rows: list[list[Floats]] = []
    for box in sorted(boxes, key=lambda b: float(b[:, 1].mean())):
        last = rows[-1][-1] if rows else None
        if last is not None and box[:, 1].mean() - last[:, 1].mean() < 0.5 * _short_side(last):
            rows[-1].append(box)
        else:
            rows.append([box])
    return [box for row in rows for box in sorted(row, key=lambda b: float(b[:, 0].min()))]


def _crop(image: Image, box: Floats) -> Image:
    """The line straightened to HEIGHT, its width by its shape, at most MAX_WIDTH; a standing line is read downwards."""
    across = max(math.dist(box[0], box[1]), math.dist(box[3], box[2]))
    down = max(math.dist(box[0], box[3]), math.dist(box[1], box[2]))
    if down > 1.5 * across:
        box, across, down = np.roll(box, -1, axis=0), down, across
    width = min(max(math.ceil(HEIGHT * across / max(down, 1.0)), 8), MAX_WIDTH)
    target = np.array([[0, 0], [width, 0], [width, HEIGHT], [0, HEIGHT]], np.float32)
    matrix = cv2.getPerspectiveTransform(box, target)
    warped = cv2.warpPerspective(image, matrix, (width, HEIGHT), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(warped, np.uint8)


def _recognize(ctx: Context, crops: list[Image]) -> list[tuple[str, float]]:
    """Text and confidence of each crop; crops of like width share a batch."""
    answers: list[tuple[str, float]] = [("", 0.0)] * len(crops)
    order = sorted(range(len(crops)), key=lambda i: crops[i].shape[1])
    for first in range(0, len(order), BATCH):
        some = order[first : first + BATCH]
        width = math.ceil(crops[some[-1]].shape[1] / WIDTH_STEP) * WIDTH_STEP
        batch = np.full((len(some), HEIGHT, width, 3), 127.5, np.float32)  # normalizes to zero
        for row, index in enumerate(some):
            batch[row, :, : crops[index].shape[1]] = crops[index]
        output = ctx.infer(RECOGNIZER, {"x": _tensor(batch)})
        if not {"codepoint", "confidence"} <= output.keys():
            raise ToolError(f"{RECOGNIZER} gives {sorted(output)}, not code points: it must pass models.ppocr.finish")
        points, confidence = _array(output["codepoint"]), _array(output["confidence"])
        for row, index in enumerate(some):
            answers[index] = decode(points[row], confidence[row])
    return answers


def decode(points: np.ndarray, confidence: np.ndarray) -> tuple[str, float]:
    """Greedy CTC: code points (steps,), 0 the blank → text and the mean probability of its characters."""
    first = points != np.concatenate([[0], points[:-1]])
    keep = first & (points != 0)
    return "".join(map(chr, points[keep])), round(float(confidence[keep].mean()), 4) if keep.any() else 0.0


def _tensor(images: np.ndarray) -> Tensor:
    """Pixels (count, height, width, 3) as the networks take them: float32, -1 to 1, channels first."""
    planes = (np.asarray(images, np.float32) / 127.5 - 1).transpose(0, 3, 1, 2)
    return Tensor("float32", list(planes.shape), planes.tobytes())


def _array(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)
