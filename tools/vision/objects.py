"""Things in a picture, by the network `objects` (its recipe: models/recipes/objects.toml).

The network takes (1, 3, 256, 320) float32 RGB, -1 to 1, and gives for each cell of 8 pixels `scores` (classes), 0 where
a neighbour has more, and `boxes` x0 y0 x1 y1. A picture of another shape is made to fit, its rest filled with grey.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from edge_agent.agent.tool import Context, ToolError
from edge_agent.wire.tensor import Tensor
from tools.vision.ocr import Image

NETWORK = "objects"
CLASSES = ("crate", "drum", "bottle", "cone", "sign", "gauge")
WIDTH, HEIGHT = 320, 256
MAX_THINGS = 50
SAME = 0.4  # two boxes of a class that share so much are of one thing


class Thing(NamedTuple):
    """A class, how sure the network is (0 to 1), and the box in pixels of the picture."""

    kind: str
    score: float
    left: int
    top: int
    width: int
    height: int


def find(ctx: Context, image: Image, floor: float = 0.3) -> list[Thing]:
    """Things with a score of `floor` at least, the surest first. Raises ToolError."""
    rows, columns = image.shape[:2]
    scale = min(WIDTH / columns, HEIGHT / rows)
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    canvas = np.full((HEIGHT, WIDTH, 3), 127, np.uint8)
    left, top = (WIDTH - size[0]) // 2, (HEIGHT - size[1]) // 2
    canvas[top : top + size[1], left : left + size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    x = (canvas[:, :, ::-1].astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)[None]
    out = ctx.infer(NETWORK, {"x": Tensor("float32", list(x.shape), np.ascontiguousarray(x).tobytes())})
    if not {"scores", "boxes"} <= out.keys():
        raise ToolError(f"{NETWORK} gives {sorted(out)}, not scores and boxes: it is another network")
    scores, boxes = (
        np.frombuffer(out[name].data, np.float32).reshape(out[name].shape)[0] for name in ("scores", "boxes")
    )
    if len(scores) != len(CLASSES):
        raise ToolError(f"{NETWORK} knows {len(scores)} classes, not {len(CLASSES)}: it is another version")
    kinds, at_rows, at_columns = np.nonzero(scores >= floor)
    found = []
    for kind, row, column in zip(kinds, at_rows, at_columns, strict=True):
        corners = (boxes[:, row, column] - [left, top, left, top]) / scale
        x0, y0, x1, y1 = (int(c) for c in np.clip(corners.round(), 0, [columns, rows, columns, rows]))
        found.append(Thing(CLASSES[kind], round(float(scores[kind, row, column]), 3), x0, y0, x1 - x0, y1 - y0))
    found.sort(key=lambda thing: -thing.score)
    kept = list[Thing]()
    for thing in found[: 4 * MAX_THINGS]:
        if not any(thing.kind == other.kind and _overlap(thing, other) > SAME for other in kept):
            kept.append(thing)
    return kept[:MAX_THINGS]


def _overlap(one: Thing, other: Thing) -> float:
    """Intersection over union."""
    across = min(one.left + one.width, other.left + other.width) - max(one.left, other.left)
    down = min(one.top + one.height, other.top + other.height) - max(one.top, other.top)
    shared = max(0, across) * max(0, down)
    return shared / max(1, one.width * one.height + other.width * other.height - shared)
