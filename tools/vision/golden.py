"""Is a part as it should be: compared with a picture of a good one.

Invariants: pure. The part is looked for near its place (normalized cross-correlation), turned and shifted to lie on the
golden picture (ECC), its light made the same (mean and contrast of the whole), and then compared by structural
similarity in TILE pixels squares. So a lamp, a shake of the camera or a part a little askew is no defect, and each
defect has a place and a figure.
Sources: Wang et al. 2004 (SSIM, 11 pixels, sigma 1.5); Evangelidis and Psarakis 2008 (ECC).
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

from edge_agent.agent.tool import ToolError
from tools.vision.ocr import Floats, Image

TILE = 16
FOUND = 0.35  # the least correlation with which a part is one
_C1, _C2 = 6.5025, 58.5225  # (0.01 · 255)², (0.03 · 255)²


class Defect(NamedTuple):
    """A box in pixels of the golden picture, and the least similarity in it."""

    left: int
    top: int
    width: int
    height: int
    similarity: float


class Compared(NamedTuple):
    """Mean similarity (1: the same), where it is too low, and how far the part lay from its place."""

    similarity: float
    defects: list[Defect]
    shift: float
    turn: float


def compare(image: Image, golden: Image, left: int, top: int, search: int, least: float) -> Compared:
    """The part whose place in the picture begins at (left, top), at most `search` pixels away. Raises ToolError."""
    rows, columns = golden.shape[:2]
    x0, y0 = max(0, left - search), max(0, top - search)
    window = image[y0 : top + rows + search, x0 : left + columns + search]
    if window.shape[0] < rows or window.shape[1] < columns:
        raise ToolError("the part's place is not whole in the picture: is it the right camera?")
    seen, good = (cv2.cvtColor(each, cv2.COLOR_BGR2GRAY) for each in (window, golden))
    match = cv2.matchTemplate(seen, good, cv2.TM_CCOEFF_NORMED)
    _, best, _, (x, y) = cv2.minMaxLoc(match)
    if best < FOUND:
        raise ToolError(f"there is no such part in the picture: the best match is {best:.2f}, {FOUND} at least")
    warp = np.array([[1, 0, x], [0, 1, y]], np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 60, 1e-5)
    try:
        _, warp = cv2.findTransformECC(good, seen, warp, cv2.MOTION_EUCLIDEAN, stop, None, 5)
    except cv2.error:
        warp = np.array([[1, 0, x], [0, 1, y]], np.float32)  # as it was found, without a turn
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    part = cv2.warpAffine(seen, warp, (columns, rows), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    one, other = good.astype(np.float32), part.astype(np.float32)
    other = (other - other.mean()) * (one.std() / max(float(other.std()), 1e-3)) + one.mean()
    similar = ssim(one, other.astype(np.float32))
    place = np.array([x0 + warp[0, 2] - left, y0 + warp[1, 2] - top])
    turn = float(np.degrees(np.arctan2(warp[1, 0], warp[0, 0])))
    return Compared(float(similar.mean()), _defects(similar, least), float(np.hypot(*place)), turn)


def ssim(one: Floats, other: Floats) -> Floats:
    """Structural similarity at each pixel of two grey pictures, 0 to 255."""

    def blurred(picture: Floats) -> Floats:
        return np.asarray(cv2.GaussianBlur(picture, (11, 11), 1.5), np.float32)

    a, b = blurred(one), blurred(other)
    varies_a, varies_b, both = blurred(one * one) - a * a, blurred(other * other) - b * b, blurred(one * other) - a * b
    return np.asarray(((2 * a * b + _C1) * (2 * both + _C2)) / ((a * a + b * b + _C1) * (varies_a + varies_b + _C2)))


def _defects(similar: Floats, least: float) -> list[Defect]:
    rows, columns = (max(1, side // TILE) for side in similar.shape)
    tiles = cv2.resize(similar, (columns, rows), interpolation=cv2.INTER_AREA)
    low = (tiles < least).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(low, connectivity=8)
    wide, high = similar.shape[1] / columns, similar.shape[0] / rows
    found = []
    for n in range(1, count):
        left, top, width, height = (int(stats[n, k]) for k in range(4))
        box = (round(left * wide), round(top * high), round(width * wide), round(height * high))
        found.append(Defect(*box, round(float(tiles[labels == n].min()), 3)))
    return sorted(found, key=lambda defect: defect.similarity)
