"""The plant's cameras: photographs with a printed label in front, as a lens over a conveyor would see them.

Invariants: `truth` and `frame` are functions of (seed, camera, product). A tool gets pixels only; `truth` is for
tests and the demo. Backgrounds are photographs from scikit-image's wheel, letters Pillow's own scalable font.
"""

from __future__ import annotations

from datetime import date, timedelta
from functools import lru_cache
from random import Random
from typing import Any

import cv2
import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 640, 480
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "rocket")
_LABEL = (340, 168)  # pixels, before the lens

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
_Floats = np.ndarray[Any, np.dtype[np.float32]]


def truth(seed: int, camera: int, product: int) -> list[str]:
    """The three lines printed on a product's label: lot, serial number, expiry date."""
    dice = Random(f"{seed}/{camera}/{product}/label")
    lot = f"{dice.choice(_LETTERS)}{dice.randrange(1000, 10000)}-{dice.choice(_LETTERS)}"
    expiry = date(2027, 1, 1) + timedelta(days=dice.randrange(1200))
    return [f"LOT {lot}", f"SN {dice.randrange(10**8):08d}", f"EXP {expiry.isoformat()}"]


def frame(seed: int, camera: int, product: int) -> Pixels:
    """What a camera sees of a product: BGR, (480, 640, 3)."""
    dice = np.random.default_rng([seed & 0xFFFFFFFF, camera, product])
    picture = _background(dice)
    label, mask = _print(truth(seed, camera, product), dice)
    lens = _lens(dice)
    picture = _blend(picture, label, mask, lens) * _light(dice)
    picture = cv2.GaussianBlur(picture, (0, 0), dice.uniform(0.4, 2.0))
    picture += dice.normal(0, dice.uniform(2, 14), picture.shape).astype(np.float32)
    return np.asarray(picture.clip(0, 255), np.uint8)


def _background(dice: np.random.Generator) -> _Floats:
    photograph = _photograph(_PHOTOGRAPHS[dice.integers(len(_PHOTOGRAPHS))])
    rows, columns = photograph.shape[:2]
    height = int(dice.integers(rows // 2, rows * 3 // 4))
    width = min(columns, height * WIDTH // HEIGHT)
    top, left = int(dice.integers(rows - height + 1)), int(dice.integers(columns - width + 1))
    part = photograph[top : top + height, left : left + width]
    return np.asarray(cv2.resize(part, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC), np.float32)


@lru_cache
def _photograph(name: str) -> Pixels:
    picture = np.asarray(getattr(skimage.data, name)(), np.uint8)
    return np.asarray(cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR if picture.ndim == 2 else cv2.COLOR_RGB2BGR), np.uint8)


def _print(text: list[str], dice: np.random.Generator) -> tuple[_Floats, _Floats]:
    """The label (BGR) and where it is opaque (0 to 1)."""
    paper, ink = int(dice.integers(205, 250)), int(dice.integers(10, 70))
    label = Image.new("L", _LABEL, paper)
    draw = ImageDraw.Draw(label)
    draw.rounded_rectangle((3, 3, _LABEL[0] - 4, _LABEL[1] - 4), radius=12, outline=ink, width=2)
    for row, line in enumerate(text):
        draw.text((22, 16 + 47 * row), line, fill=ink, font=ImageFont.load_default(size=38))
    opaque = Image.new("L", _LABEL, 0)
    ImageDraw.Draw(opaque).rounded_rectangle((0, 0, _LABEL[0] - 1, _LABEL[1] - 1), radius=14, fill=255)
    tint = np.array([dice.uniform(0.86, 1), dice.uniform(0.94, 1), 1], np.float32)
    return np.asarray(label)[:, :, None] * tint, np.asarray(np.asarray(opaque) / 255, np.float32)


def _lens(dice: np.random.Generator) -> _Floats:
    """Label pixels → picture pixels: size, turn, place and a pull at each corner."""
    width, height = _LABEL
    corners = np.array([[0, 0], [width, 0], [width, height], [0, height]], np.float32)
    scale, turn = dice.uniform(0.6, 1.2), np.radians(dice.uniform(-9, 9))
    spin = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]]) * scale
    centre = np.array([dice.uniform(0.42, 0.58) * WIDTH, dice.uniform(0.38, 0.62) * HEIGHT])
    seen = (corners - [width / 2, height / 2]) @ spin + centre + dice.uniform(-16, 16, (4, 2))
    return np.asarray(cv2.getPerspectiveTransform(corners, seen.astype(np.float32)), np.float32)


def _blend(picture: _Floats, label: _Floats, mask: _Floats, lens: _Floats) -> _Floats:
    warped = cv2.warpPerspective(label, lens, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    opaque = cv2.warpPerspective(mask, lens, (WIDTH, HEIGHT))[:, :, None]
    return np.asarray(picture * (1 - opaque) + warped * opaque, np.float32)


def _light(dice: np.random.Generator) -> _Floats:
    """A lamp at one side: brightness falls linearly across the picture, (480, 640, 1)."""
    angle, fall = dice.uniform(0, 2 * np.pi), dice.uniform(0, 0.45)
    x, y = np.meshgrid(np.linspace(-1, 1, WIDTH), np.linspace(-1, 1, HEIGHT))
    ramp = (np.cos(angle) * x + np.sin(angle) * y) / np.sqrt(2)
    return np.asarray(dice.uniform(0.75, 1.05) * (1 - fall * (1 + ramp) / 2), np.float32)[:, :, None]
