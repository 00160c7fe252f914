"""Data and measures of the shipped recipes: made here or taken from installed packages, so nothing is downloaded.

Invariants: a sample is a function of (part, index); the parts `calibration` and `evaluation` share no text, picture,
photograph or sound. A task asks a network through `run`, which the recipe gives it, so what it asks FP32 on the
calibration part is the calibration data. Every measure is in 0 to 1, 1 is best.

- labels: lines of a plant label, drawn, turned, shrunk, blurred and noised; character accuracy, 1 - error rate.
- scenes: such labels before photographs; F1 of text boxes at IoU 0.5.
- objects: drawn things before photographs (models/objects.py); mAP at IoU 0.5.
- digits: the UCI test set of handwritten digits (scikit-learn's copy, CC BY 4.0); top-1.
- speech: speech-like sound, NOT speech: a voiced source through vowel formants in syllables, in noise of 0 to 15 dB;
  AUC of 32 ms frames against noises, tones and clicks. It compares precisions, it says nothing about real voices.
- photographs: crops of scikit-image's photographs; share of crops with the class that FP32 says.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models import metrics, objects

Array = NDArray[Any]
Run = Callable[[dict[str, Array]], dict[str, Array]]
PARTS = ("calibration", "evaluation")
BATCH, RATE, WINDOW, CONTEXT = 8, 16000, 512, 64
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"
_PHOTOGRAPHS = {
    "calibration": ("astronaut", "brick", "coins", "grass", "gravel", "rocket"),
    "evaluation": ("chelsea", "coffee", "camera"),
}


@dataclass(frozen=True)
class Task:
    """`samples(part, count)` gives (sample, truths); `answers(run, sample)` one answer a truth; `score` compares them.

    `count` is in the task's own units: labels, pictures, digits, seconds of sound. Where `truth` is `fp32`, the truths
    are the FP32 network's answers.
    """

    metric: str
    samples: Callable[[str, int], Iterator[tuple[Any, list[Any]]]]
    answers: Callable[[Run, Any], list[Any]]
    score: Callable[[list[Any], list[Any]], float]
    truth: str = "made"


def _dice(part: str, index: int) -> np.random.Generator:
    return np.random.default_rng([PARTS.index(part), index])


def _text(dice: np.random.Generator, part: str) -> str:
    """A line of a label. A text belongs to one part by its checksum."""
    while True:
        day = date(2027, 1, 1) + timedelta(days=int(dice.integers(1200)))
        lot = f"{_LETTERS[dice.integers(22)]}{dice.integers(1000, 10000)}-{_LETTERS[dice.integers(22)]}"
        value = f"{dice.choice(['Flow', 'Temp', 'Press', 'Line'])} {dice.integers(1, 1000) / 10:.1f}"
        unit = dice.choice(["bar", "mm/s", "kg", "L/min"])
        forms = (f"LOT {lot}", f"SN {dice.integers(10**8):08d}", f"EXP {day.isoformat()}", f"{value} {unit}")
        text = forms[dice.integers(len(forms))]
        if zlib.crc32(text.encode()) % 2 == PARTS.index(part):
            return text


def label(part: str, index: int) -> tuple[Array, str]:
    """A degraded line as the reader takes it (3, 48, width), -1 to 1, and its text."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    dice, cubic = _dice(part, index), Image.Resampling.BICUBIC
    text, font = _text(dice, part), ImageFont.load_default(size=38)
    width, paper, ink = int(font.getbbox(text)[2]) + 20, int(dice.integers(190, 250)), int(dice.integers(10, 110))
    image = Image.new("L", (width, 56), paper)
    ImageDraw.Draw(image).text((10, 6), text, fill=ink, font=font)
    image = image.rotate(float(dice.uniform(-3, 3)), cubic, fillcolor=paper)
    small = int(dice.integers(14, 48))
    image = image.resize((width * small // 56, small), Image.Resampling.BILINEAR)
    image = image.filter(ImageFilter.GaussianBlur(float(dice.uniform(0, 1.2))))
    pixels = np.asarray(image, float) * np.linspace(1, dice.uniform(0.6, 1), image.width)
    pixels = pixels + dice.normal(0, dice.uniform(2, 16), pixels.shape)
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((width * 48 // 56, 48), cubic)
    line = np.asarray(image, np.float32) / 127.5 - 1
    return np.repeat(line[None], 3, 0), text


def _labels(part: str, count: int) -> Iterator[tuple[Array, list[str]]]:
    """Batches of up to BATCH lines of like width, padded with grey to a step of 64, as the device's reader does."""
    lines = sorted((label(part, i) for i in range(count)), key=lambda line: line[0].shape[2])
    for first in range(0, count, BATCH):
        some = lines[first : first + BATCH]
        batch = np.zeros((len(some), 3, 48, -(-some[-1][0].shape[2] // 64) * 64), np.float32)
        for row, (pixels, _) in enumerate(some):
            batch[row, :, :, : pixels.shape[2]] = pixels
        yield batch, [text for _, text in some]


def _read(run: Run, batch: Array) -> list[str]:
    return texts(run({"x": batch})["codepoint"])


def texts(points: Array) -> list[str]:
    """What a reader says whose output is the code point (n, steps) of each step."""
    first = points != np.pad(points, ((0, 0), (1, 0)))[:, :-1]  # greedy CTC: 0 is the blank
    return ["".join(map(chr, row[keep & (row != 0)])) for row, keep in zip(points, first, strict=True)]


@cache
def _photograph(name: str) -> Array:
    import skimage.data

    pixels = np.asarray(getattr(skimage.data, name)(), np.uint8)
    return np.repeat(pixels[..., None], 3, 2) if pixels.ndim == 2 else pixels[..., :3]


def photograph(part: str, dice: np.random.Generator, width: int, height: int) -> Any:
    """A random part of a random photograph, as a Pillow image of width x height."""
    from PIL import Image

    picture = _photograph(_PHOTOGRAPHS[part][dice.integers(len(_PHOTOGRAPHS[part]))])
    part_height = int(picture.shape[0] * dice.uniform(0.4, 0.95))
    part_width = min(picture.shape[1], part_height * width // height)
    top = int(dice.integers(picture.shape[0] - part_height + 1))
    left = int(dice.integers(picture.shape[1] - part_width + 1))
    cut = Image.fromarray(picture[top : top + part_height, left : left + part_width])
    return cut.resize((width, height), Image.Resampling.BICUBIC)


def scene(part: str, index: int) -> tuple[Array, Array]:
    """A picture (1, 3, 384, 512), -1 to 1, with one to three labels, and the boxes (n, 4) of their lines."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    dice = _dice(part, index)
    picture = photograph(part, dice, 512, 384)
    boxes = []
    for column in range(int(dice.integers(1, 4))):
        size = int(dice.integers(12, 22))
        font, lines = ImageFont.load_default(size=size), [_text(dice, part) for _ in range(int(dice.integers(1, 4)))]
        widest = int(max(font.getbbox(text)[2] for text in lines)) + 16
        label_size = (widest, int(len(lines) * size * 1.6) + 10)
        paper, ink = int(dice.integers(190, 250)), int(dice.integers(10, 90))
        tag, mask = Image.new("RGB", label_size, (paper,) * 3), Image.new("L", label_size, 255)
        turn, at = dice.uniform(-5, 5), np.array([dice.integers(4, 330), 14 + 124 * column + dice.integers(0, 14)])
        for row, text in enumerate(lines):
            place = (8, int(8 + row * size * 1.6))
            ImageDraw.Draw(tag).text(place, text, fill=(ink,) * 3, font=font)
            box = np.array(font.getbbox(text)) + np.tile(place, 2) + 0.25 * size * np.array([-1, -1, 1, 1])
            boxes.append(_turned(box, label_size, turn) + np.tile(at, 2))
        picture.paste(tag.rotate(turn, Image.Resampling.BICUBIC), tuple(at.tolist()), mask.rotate(turn))
    picture = picture.filter(ImageFilter.GaussianBlur(float(dice.uniform(0.2, 2.2))))
    pixels = np.asarray(picture, np.float32) * dice.uniform(0.7, 1.05)
    pixels = (pixels + dice.normal(0, dice.uniform(2, 40), pixels.shape)).clip(0, 255)
    return (pixels.transpose(2, 0, 1)[None] / 127.5 - 1).astype(np.float32), np.array(boxes).clip(0, [511, 383] * 2)


def _turned(box: Array, size: tuple[int, int], degrees: float) -> Array:
    """The upright box around a box (x0 y0 x1 y1) turned about the middle of its picture."""
    middle, angle = np.array(size) / 2, np.radians(degrees)
    corners = np.array([[box[x], box[y]] for x in (0, 2) for y in (1, 3)]) - middle
    spin = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = corners @ spin + middle
    return np.concatenate([moved.min(0), moved.max(0)])


def _scenes(part: str, count: int) -> Iterator[tuple[Array, list[Array]]]:
    for index in range(count):
        picture, boxes = scene(part, index)
        yield picture, [boxes]


def _boxes(run: Run, picture: Array) -> list[Array]:
    """Upright boxes around the regions of the detector's map, grown by its published unclip ratio of 1.6."""
    from skimage.measure import label as regions
    from skimage.measure import regionprops

    chance = next(iter(run({"x": picture}).values()))[0, 0]
    found = []
    for region in regionprops(regions(chance > 0.3), chance):
        top, left, bottom, right = region.bbox
        grow = (bottom - top) * (right - left) * 1.6 / (2 * (bottom - top + right - left))
        if region.intensity_mean >= 0.5 and min(bottom - top, right - left) >= 3:
            found.append([left - grow, top - grow, right + grow, bottom + grow])
    return [np.array(found, np.float64).reshape(-1, 4)]


def _objects(part: str, count: int) -> Iterator[tuple[Array, list[tuple[Array, Array]]]]:
    """Batches of up to BATCH scenes."""
    for first in range(0, count, BATCH):
        some = [objects.scene(part, index) for index in range(first, min(first + BATCH, count))]
        yield np.stack([x for x, _, _ in some]), [(boxes, classes) for _, boxes, classes in some]


def _detected(run: Run, pictures: Array) -> list[tuple[Array, Array, Array]]:
    answer = run({"x": pictures})
    return [objects.found(*one) for one in zip(answer["scores"], answer["boxes"], strict=True)]


@cache
def digits(part: str) -> tuple[Array, Array]:
    """Pictures (n, 1, 8, 8), 0 to 1, and classes (n,): `training` 1000, `calibration` 200, `evaluation` 597."""
    table = np.loadtxt(Path(__file__).with_name("recipes") / "digits.csv.gz", delimiter=",", dtype=np.float32)
    table = table[np.random.default_rng(0).permutation(len(table))]
    first, last = {"training": (0, 1000), "calibration": (1000, 1200), "evaluation": (1200, 1797)}[part]
    return (table[first:last, :-1] / 16).reshape(-1, 1, 8, 8), table[first:last, -1].astype(int)


def _digits(part: str, count: int) -> Iterator[tuple[Array, list[int]]]:
    pictures, classes = (a[:count] for a in digits(part))
    for first in range(0, len(classes), 64):
        yield pictures[first : first + 64], classes[first : first + 64].tolist()


def _classes(run: Run, pictures: Array) -> list[int]:
    return [int(c) for c in next(iter(run({"x": pictures}).values())).argmax(1)]


def sound(part: str, index: int, seconds: float = 2.0) -> tuple[Array, bool]:
    """A clip at 16 kHz, -1 to 1, and whether it is speech-like: even indices are."""
    dice, count = _dice(part, index), int(seconds * RATE)
    noise = _noise(dice, count)
    if index % 2:
        return noise.astype(np.float32), False
    voice = _voice(dice, count) + noise * 10 ** (-dice.uniform(0, 15) / 20)
    return (0.4 * voice / np.abs(voice).max()).astype(np.float32), True


def _voice(dice: np.random.Generator, count: int) -> Array:
    from scipy.signal import lfilter

    time = np.arange(count) / RATE
    pitch = dice.uniform(90, 220) * (1 + 0.1 * np.sin(2 * np.pi * dice.uniform(2, 5) * time))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    source = np.sum([np.sin(k * phase) / k for k in range(1, 24)], axis=0) + dice.normal(0, 0.05, count)
    vowels = ((730, 1090, 2440), (270, 2290, 3010), (300, 870, 2240), (530, 1840, 2480), (570, 840, 2410))
    out, start = np.zeros(count), 0
    while start < count:
        syllable = source[start : start + int(dice.uniform(0.12, 0.28) * RATE)]
        for formant, width in zip(vowels[dice.integers(5)], (80, 110, 160), strict=True):
            radius, angle = np.exp(-np.pi * width / RATE), 2 * np.pi * formant * dice.uniform(0.95, 1.05) / RATE
            syllable = lfilter([1 - radius], [1, -2 * radius * np.cos(angle), radius**2], syllable)
        syllable = syllable / np.abs(syllable).max() * np.hanning(len(syllable) + 2)[1:-1] ** 0.5
        out[start : start + len(syllable)] = syllable * dice.uniform(0.4, 1)
        start += len(syllable) + int(dice.uniform(0, 0.06) * RATE)
    return out


def _noise(dice: np.random.Generator, count: int) -> Array:
    time, kind = np.arange(count) / RATE, dice.integers(4)
    out = dice.normal(0, 1, count)
    if kind == 1:
        out = np.cumsum(out) - np.convolve(np.cumsum(out), np.ones(800) / 800, "same")
    elif kind == 2:
        out = np.sum([np.sin(2 * np.pi * dice.uniform(50, 2000) * time) for _ in range(4)], axis=0)
    elif kind == 3:
        out = np.convolve(out * (dice.random(count) < 0.002) + 1e-3 * out, np.exp(-np.arange(400) / 60), "same")
    return np.asarray(0.4 * out / np.abs(out).max())


def _sounds(part: str, count: int) -> Iterator[tuple[Array, list[bool]]]:
    """Batches of up to 16 clips of two seconds; `count` is in seconds; a truth a frame."""
    frames = 2 * RATE // WINDOW
    for first in range(0, max(count // 2, 2), 16):
        clips = [sound(part, index) for index in range(first, min(first + 16, max(count // 2, 2)))]
        yield np.array([clip for clip, _ in clips]), [speech for _, speech in clips for _ in range(frames)]


def _speech(run: Run, clips: Array) -> list[float]:
    """Chances of speech, clip by clip, frame by frame; state and context go from frame to frame."""
    state = np.zeros((2, len(clips), 128), np.float32)
    context, chances = np.zeros((len(clips), CONTEXT), np.float32), []
    for start in range(0, clips.shape[1] - WINDOW + 1, WINDOW):
        window = np.concatenate([context, clips[:, start : start + WINDOW]], 1)
        answer = run({"input": window, "state": state})
        state, context = answer["stateN"], window[:, -CONTEXT:]
        chances.append(answer["output"][:, 0])
    return [float(c) for c in np.array(chances).T.ravel()]


def _photographs(part: str, count: int) -> Iterator[tuple[Array, list[None]]]:
    """Batches of up to BATCH crops (n, 3, 224, 224), normalized as EfficientNet-lite was trained."""
    for first in range(0, count, BATCH):
        crops = [photograph(part, _dice(part, i), 224, 224) for i in range(first, min(first + BATCH, count))]
        pixels = (np.array([np.asarray(c, np.float32) for c in crops]) - 127) / 128
        yield pixels.transpose(0, 3, 1, 2).copy(), [None] * len(crops)


TASKS = {
    "labels": Task("character_accuracy", _labels, _read, lambda a, t: 1 - metrics.character_error_rate(a, t)),
    "scenes": Task("box_f1", _scenes, _boxes, lambda a, t: metrics.box_counts(a, t).f_beta(1)),
    "objects": Task("map_50", _objects, _detected, metrics.mean_average_precision),
    "digits": Task("top_1", _digits, _classes, metrics.agreement),
    "speech": Task("auc", _sounds, _speech, metrics.auc),
    "photographs": Task("top_1_agreement", _photographs, _classes, metrics.agreement, truth="fp32"),
}
