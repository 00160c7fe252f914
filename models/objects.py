"""Plant scenes with things in them, and a small detector that was trained on them.

Invariants: a scene is a function of (part, index); photographs of the evaluation part stand behind no other part's
scenes. The graph takes `x` (batch, 3, 256, 320) float32, -1 to 1, and gives, for every cell of 8 pixels, `scores`
(batch, classes, 32, 40), 0 where a neighbour of the same class has more, and `boxes` (batch, 4, 32, 40), x0 y0 x1 y1 in
pixels. `python -m models.objects` trains it again and writes recipes/objects.safetensors (torch; the rest needs none).
Sources: Zhou, Wang and Kraehenbuehl 2019 (objects as points, its focal loss); Tian et al. 2019 (distances to the four
sides); Rezatofighi et al. 2019 (GIoU).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from models.fetch import Progress

Array = NDArray[Any]
CLASSES = ("crate", "drum", "bottle", "cone", "sign", "gauge")
WIDTH, HEIGHT, CELL = 320, 256, 8
WEIGHTS = Path(__file__).with_name("recipes") / "objects.safetensors"
FLOOR = 0.05  # of a score that counts as an answer
LAYERS = (
    # name, input, channels in and out, kernel, stride
    ("c1", "x", 3, 16, 3, 2), ("c2", "c1", 16, 32, 3, 2), ("c3", "c2", 32, 64, 3, 2), ("c4", "c3", 64, 64, 3, 1),
    ("c5", "c4", 64, 96, 3, 2), ("c6", "c5", 96, 96, 3, 1), ("c7", "c6", 96, 96, 3, 1), ("side", "c4", 64, 64, 1, 1),
    ("deep", "c7", 96, 64, 1, 1), ("neck", "sum", 64, 64, 3, 1), ("head", "neck", 64, len(CLASSES) + 4, 1, 1),
)  # fmt: skip
"""`sum` is `side` and `deep`, which is made twice as large; all but `side`, `deep` and `head` end in a ReLU."""
LINEAR = ("side", "deep", "head")


def scene(part: str, index: int) -> tuple[Array, Array, Array]:
    """A picture (3, 256, 320), -1 to 1, boxes (n, 4) in pixels, classes (n,)."""
    from PIL import Image, ImageFilter

    from models.tasks import photograph

    dice = np.random.default_rng([("training", "calibration", "evaluation").index(part), index, 7])
    picture = photograph("evaluation" if part == "evaluation" else "calibration", dice, WIDTH, HEIGHT)
    boxes, classes = np.zeros((0, 4)), list[int]()
    for _ in range(int(dice.integers(1, 7))):
        kind, size = int(dice.integers(len(CLASSES))), int(28 * 4 ** dice.uniform(0, 1))
        thing = _DRAWN[kind](dice, size)
        thing = thing.rotate(dice.uniform(-12, 12), Image.Resampling.BICUBIC, expand=True)
        thing = thing.crop(thing.getchannel("A").point(lambda a: 255 * (a > 127)).getbbox())
        if thing.width >= WIDTH or thing.height >= HEIGHT:
            continue
        left, top = int(dice.integers(WIDTH - thing.width)), int(dice.integers(HEIGHT - thing.height))
        box = np.array([left, top, left + thing.width, top + thing.height], float)
        shared = (np.minimum(boxes[:, 2:], box[2:]) - np.maximum(boxes[:, :2], box[:2])).clip(0).prod(1)
        if (shared > 0.2 * (boxes[:, 2:] - boxes[:, :2]).prod(1)).any():
            continue
        picture.paste(thing, (left, top), thing)
        boxes, classes = np.vstack([boxes, box]), [*classes, kind]
    picture = picture.filter(ImageFilter.GaussianBlur(float(dice.uniform(0, 1.6))))
    left_light, right_light = dice.uniform(0.55, 1.1, 2)
    light = np.linspace(left_light, right_light, WIDTH)[None, :, None]
    pixels = np.asarray(picture, np.float32) * light + dice.normal(0, dice.uniform(1, 16), (HEIGHT, WIDTH, 3))
    return (pixels.clip(0, 255).transpose(2, 0, 1) / 127.5 - 1).astype(np.float32), boxes, np.array(classes, int)


def _canvas(width: int, height: int) -> tuple[Any, Any]:
    from PIL import Image, ImageDraw

    image = Image.new("RGBA", (width, height))
    return image, ImageDraw.Draw(image)


def _tone(dice: np.random.Generator, red: int, green: int, blue: int) -> tuple[int, int, int]:
    """A colour about this one, lighter or darker."""
    tone = np.array([red, green, blue]) * dice.uniform(0.65, 1.15) + dice.normal(0, 12, 3)
    return tuple(int(c) for c in tone.clip(0, 255))  # type: ignore[return-value]


def _crate(dice: np.random.Generator, size: int) -> Any:
    width, wood = int(size * dice.uniform(1.0, 1.5)), _tone(dice, 170, 125, 75)
    image, draw = _canvas(width, size)
    draw.rectangle((0, 0, width - 1, size - 1), wood)
    dark, edge = _tone(dice, 95, 65, 35), max(2, size // 9)
    planks = int(dice.integers(3, 6))
    for plank in range(1, planks):
        draw.line((0, plank * size // planks, width, plank * size // planks), dark, max(1, size // 30))
    draw.rectangle((0, 0, width - 1, size - 1), None, dark, edge)
    draw.line((edge, size - edge, width - edge, edge), dark, edge)
    return image


def _drum(dice: np.random.Generator, size: int) -> Any:
    width, rim = int(size * dice.uniform(0.6, 0.8)), max(4, size // 5)
    body = _tone(dice, *((40, 80, 170), (170, 50, 45), (60, 130, 80), (70, 70, 75))[dice.integers(4)])
    dark = tuple(int(0.6 * c) for c in body)
    image, draw = _canvas(width, size)
    draw.rectangle((0, rim // 2, width - 1, size - 1 - rim // 2), body)
    draw.ellipse((0, size - 1 - rim, width - 1, size - 1), body)
    draw.ellipse((0, 0, width - 1, rim), tuple(min(255, int(1.3 * c)) for c in body), dark)
    for part in (1, 2):
        height = rim // 2 + part * (size - rim) // 3
        draw.arc((0, height - rim // 2, width - 1, height + rim // 2), 0, 180, dark, max(2, size // 24))
    return image


def _bottle(dice: np.random.Generator, size: int) -> Any:
    width = int(size * dice.uniform(0.3, 0.42))
    glass = _tone(dice, *((60, 120, 60), (120, 75, 30), (190, 205, 215), (60, 90, 160))[dice.integers(4)])
    image, draw = _canvas(width, size)
    shoulder, neck = int(size * 0.42), int(width * 0.3)
    draw.rounded_rectangle((0, shoulder - width // 4, width - 1, size - 1), max(2, width // 5), glass)
    draw.polygon([(neck, size // 6), (width - neck, size // 6), (width - 1, shoulder), (0, shoulder)], glass)
    draw.rectangle((neck, 0, width - neck, size // 4), glass)
    draw.rectangle((neck, 0, width - neck, size // 14), _tone(dice, 200, 60, 50))
    draw.rectangle((0, int(size * 0.55), width - 1, int(size * 0.8)), _tone(dice, 230, 225, 210))
    return image


def _cone(dice: np.random.Generator, size: int) -> Any:
    width, orange = int(size * dice.uniform(0.7, 0.9)), _tone(dice, 240, 105, 25)
    image, draw = _canvas(width, size)
    draw.polygon([(width * 0.43, 0), (width * 0.57, 0), (width * 0.85, size * 0.9), (width * 0.15, size * 0.9)], orange)
    for high, low in ((0.28, 0.45), (0.6, 0.74)):
        left, right = 0.43 - 0.31 * high, 0.43 - 0.31 * low
        sides = [(width * left, size * high), (width * (1 - left), size * high)]
        sides += [(width * (1 - right), size * low), (width * right, size * low)]
        draw.polygon(sides, _tone(dice, 235, 235, 235))
    draw.rectangle((0, int(size * 0.9), width - 1, size - 1), orange)
    return image


def _sign(dice: np.random.Generator, size: int) -> Any:
    width, black = int(size * 1.15), _tone(dice, 25, 25, 25)
    image, draw = _canvas(width, size)
    draw.polygon([(width // 2, 0), (width - 1, size - 1), (0, size - 1)], black)
    inner = [(width // 2, size * 0.13), (width * 0.9, size * 0.93), (width * 0.1, size * 0.93)]
    draw.polygon(inner, _tone(dice, 245, 205, 30))
    if dice.random() < 0.5:
        draw.line((width / 2, size * 0.38, width / 2, size * 0.68), black, max(2, size // 11))
        draw.ellipse((width * 0.46, size * 0.75, width * 0.54, size * 0.84), black)
    else:
        bolt = ((0.54, 0.34), (0.4, 0.64), (0.5, 0.64), (0.46, 0.86), (0.6, 0.56), (0.5, 0.56))
        draw.polygon([(width * x, size * y) for x, y in bolt], black)
    return image


def _gauge(dice: np.random.Generator, size: int) -> Any:
    image, draw = _canvas(size, size)
    draw.ellipse((0, 0, size - 1, size - 1), _tone(dice, 240, 240, 235), _tone(dice, 70, 70, 75), max(3, size // 10))
    middle = size / 2
    for tick in np.linspace(0.75, 2.25, 9) * np.pi:
        way = np.array([np.cos(tick), np.sin(tick)]) * size
        draw.line((*(middle + 0.31 * way), *(middle + 0.38 * way)), (30, 30, 30), max(1, size // 32))
    angle = dice.uniform(0.75, 2.25) * np.pi
    tip = middle + 0.33 * size * np.array([np.cos(angle), np.sin(angle)])
    draw.line((middle, middle, *tip), _tone(dice, 190, 35, 30), max(2, size // 18))
    return image


_DRAWN: tuple[Callable[[np.random.Generator, int], Any], ...] = (_crate, _drum, _bottle, _cone, _sign, _gauge)


def found(scores: Array, boxes: Array, floor: float = FLOOR) -> tuple[Array, Array, Array]:
    """Boxes (n, 4), scores (n,) and classes (n,) in one picture's `scores` and `boxes`."""
    classes, rows, columns = np.nonzero(scores > floor)
    return boxes[:, rows, columns].T, scores[classes, rows, columns], classes


def make(weights: Path, target: Path, _: Progress) -> None:
    """Write the network of trained weights."""
    from safetensors.numpy import load_file

    onnx.save(graph({name: value.astype(np.float32) for name, value in load_file(weights).items()}), str(target))


def probe() -> dict[str, Array]:
    """A picture that training did not see."""
    return {"x": scene("evaluation", 0)[0][None]}


def graph(weights: dict[str, Array]) -> onnx.ModelProto:
    """The network; `weights` has `NAME.weight` and `NAME.bias` of every layer."""
    nodes, held, classes = [], dict(weights), len(CLASSES)
    for name, source, _in, _out, kernel, stride in LAYERS:
        if name == "neck":
            held["twice"] = np.array([1, 1, 2, 2], np.float32)
            nodes.append(helper.make_node("Resize", ["deep", "", "twice"], ["wide"], "wide", mode="nearest"))
            nodes.append(helper.make_node("Add", ["side", "wide"], ["sum"], "sum"))
        given, out = [source, f"{name}.weight", f"{name}.bias"], name if name in LINEAR else f"{name}.raw"
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", given, [out], name, pads=pads, strides=[stride] * 2))
        if name not in LINEAR:
            nodes.append(helper.make_node("Relu", [out], [name], f"{name}.relu"))
    rows, columns = HEIGHT // CELL, WIDTH // CELL
    y, x = np.mgrid[:rows, :columns] * float(CELL) + CELL / 2
    held["centres"] = np.stack([x, y, x, y])[None].astype(np.float32)
    held["ways"] = CELL * np.array([-1, -1, 1, 1], np.float32).reshape(1, 4, 1, 1)
    held["parts"] = np.array([classes, 4], np.int64)
    nodes += [
        helper.make_node("Split", ["head", "parts"], ["logits", "sides"], "split", axis=1),
        helper.make_node("Sigmoid", ["logits"], ["chance"], "chance"),
        helper.make_node("MaxPool", ["chance"], ["most"], "most", kernel_shape=[3, 3], pads=[1] * 4),
        helper.make_node("Equal", ["chance", "most"], ["peak"], "peak"),
        helper.make_node("Cast", ["peak"], ["kept"], "kept", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["chance", "kept"], ["scores"], "scores"),
        helper.make_node("Exp", ["sides"], ["cells"], "cells"),
        helper.make_node("Mul", ["cells", "ways"], ["away"], "away"),
        helper.make_node("Add", ["centres", "away"], ["boxes"], "boxes"),
    ]
    stored = [numpy_helper.from_array(value, name) for name, value in held.items()]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, HEIGHT, WIDTH])]
    made = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", count, rows, columns])
        for name, count in (("scores", classes), ("boxes", 4))
    ]
    drawn = helper.make_graph(nodes, "objects", given, made, stored)
    model = helper.make_model(drawn, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def targets(boxes: Array, classes: Array) -> tuple[Array, Array, Array]:
    """What the network should say of a scene: heat (classes, rows, columns), sides (4, …) in cells, their weight."""
    rows, columns = HEIGHT // CELL, WIDTH // CELL
    y, x = np.mgrid[:rows, :columns] * float(CELL) + CELL / 2
    heat, sides, counts = (
        np.zeros((len(CLASSES), rows, columns)),
        np.ones((4, rows, columns)),
        np.zeros((rows, columns)),
    )
    for box, kind in zip(boxes, classes, strict=True):
        cx, cy, w, h = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, box[2] - box[0], box[3] - box[1]
        column, row = int(cx / CELL), int(cy / CELL)
        bell = np.exp(-(((x - x[row, column]) / (0.18 * w + 2)) ** 2) - ((y - y[row, column]) / (0.18 * h + 2)) ** 2)
        heat[kind] = np.maximum(heat[kind], bell)
        near = (bell > 0.4) & (x > box[0]) & (x < box[2]) & (y > box[1]) & (y < box[3])
        away = np.stack([x - box[0], y - box[1], box[2] - x, box[3] - y]) / CELL
        sides, counts = np.where(near, away, sides), np.maximum(counts, near * bell)
    return heat, sides, counts


def train(steps: int = 1500, scenes: int = 2400, batch: int = 12, target: Path = WEIGHTS) -> None:
    """Train from nothing and write the weights (float16, norms folded in); half an hour on one core."""
    import torch
    from safetensors.numpy import save_file
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(1)
    layers = nn.ModuleDict()
    for name, _, before, after, kernel, stride in LAYERS:
        conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=name in LINEAR)
        layers[name] = conv if name in LINEAR else nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())
    with torch.no_grad():
        layers["head"].bias[: len(CLASSES)] = -4.0

    def forward(x: Any) -> Any:
        known = {"x": x}
        for name, source, *_ in LAYERS:
            if name == "neck":
                known["sum"] = known["side"] + F.interpolate(known["deep"], scale_factor=2)
            known[name] = layers[name](known[source])
        return known["head"]

    best = torch.optim.AdamW(layers.parameters(), 2e-3, weight_decay=1e-3)
    plan = torch.optim.lr_scheduler.OneCycleLR(best, 4e-3, steps, pct_start=0.1)
    dice, pool = np.random.default_rng(1), [(x.astype(np.float16), b, c) for x, b, c in map(_seen, range(scenes))]
    for step in range(steps):
        some = [_mirrored(pool[i], bool(dice.integers(2))) for i in dice.integers(scenes, size=batch)]
        wanted = zip(*(targets(b, c) for _, b, c in some), strict=True)
        heat, sides, counts = (torch.tensor(np.stack(each), dtype=torch.float32) for each in wanted)
        out = forward(torch.tensor(np.stack([x for x, _, _ in some])) * float(dice.uniform(0.85, 1.15)))
        chance = out[:, : len(CLASSES)].sigmoid().clamp(1e-4, 1 - 1e-4)
        hit, there = (heat > 0.999).float(), max(1, sum(len(b) for _, b, _ in some))
        focal = -(hit * (1 - chance) ** 2 * chance.log() + (1 - hit) * (1 - heat) ** 4 * chance**2 * (1 - chance).log())
        giou = _giou(out[:, len(CLASSES) :].clamp(-6, 6).exp(), sides)
        loss = focal.sum() / there + 2 * ((1 - giou) * counts).sum() / counts.sum().clamp(min=1)
        best.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(layers.parameters(), 10.0)
        best.step()
        plan.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step} of {steps}, loss {loss.item():.3f}", flush=True)
        if step % 500 == 499 or step == steps - 1:
            save_file({n: v.astype(np.float16) for n, v in _folded(layers).items()}, target)


def _giou(one: Any, other: Any) -> Any:
    """Of boxes around one point, as distances (n, 4, rows, columns) to their sides."""

    def area(sides: Any) -> Any:
        return (sides[:, 0] + sides[:, 2]) * (sides[:, 1] + sides[:, 3])

    inner, hull = area(one.minimum(other)), area(one.maximum(other))
    union = area(one) + area(other) - inner
    return inner / union - (hull - union) / hull


def _seen(index: int) -> tuple[Array, Array, Array]:
    return scene("training", index)


def _mirrored(seen: tuple[Array, Array, Array], turn: bool) -> tuple[Array, Array, Array]:
    x, boxes, classes = seen
    if not turn:
        return x.astype(np.float32), boxes, classes
    return (
        x[:, :, ::-1].astype(np.float32),
        np.array([WIDTH, 0, WIDTH, 0]) + boxes[:, [2, 1, 0, 3]] * [-1, 1, -1, 1],
        classes,
    )


def _folded(layers: Any) -> dict[str, Array]:
    """Weights and biases as numpy, batch norms folded into the convolution before them."""
    held: dict[str, Array] = {}
    for name, layer in layers.items():
        conv, norm = (layer, None) if name in LINEAR else (layer[0], layer[1])
        weight = conv.weight.detach().numpy().copy()
        bias = conv.bias.detach().numpy().copy() if norm is None else np.zeros(len(weight), np.float32)
        if norm is not None:
            grow = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
            weight, bias = (
                weight * grow[:, None, None, None],
                norm.bias.detach().numpy() - norm.running_mean.numpy() * grow,
            )
        held |= {f"{name}.weight": weight, f"{name}.bias": bias}
    return held


if __name__ == "__main__":
    train()
