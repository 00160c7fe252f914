"""Cameras of a site as tools: read a label, find things, inspect a part, keep a picture.

Invariants: the networks run elsewhere and are asked for by name; what is read is untrusted text; results have places in
pixels of the picture and how sure they are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

import cv2
import msgspec
from msgspec import Meta

from edge_agent.agent.tool import Context, Param, Range, Tool, ToolError, declare
from tools import settings
from tools.vision import golden, objects
from tools.vision.cameras import Camera, grab
from tools.vision.ocr import read_text

MAX_KEPT = 100


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`golden` is a picture of a good one, as `camera` sees it with its left top corner at (`left`, `top`) pixels; it
    may lie `search` pixels off. A square of it that is less similar than `least` is a defect."""

    camera: str
    golden: str
    left: Annotated[int, Meta(ge=0)] = 0
    top: Annotated[int, Meta(ge=0)] = 0
    search: Annotated[int, Meta(ge=0, le=500)] = 24
    least: Annotated[float, Meta(gt=0, lt=1)] = 0.6


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file; `fields` are regular expressions whose first group is a value on a label."""

    cameras: Annotated[dict[str, Camera], Meta(min_length=1, max_length=32)]
    parts: dict[str, Part] = {}
    fields: dict[str, str] = {}
    score: Annotated[float, Meta(gt=0, lt=1)] = 0.3
    side: Annotated[int, Meta(ge=128, le=2048)] = 512

    def __post_init__(self) -> None:
        for name, part in self.parts.items():
            if part.camera not in self.cameras:
                raise ValueError(f"the part {name} is of the camera {part.camera}, which is not there")
        for name, pattern in self.fields.items():
            try:
                groups = re.compile(pattern).groups
            except re.error as error:
                raise ValueError(f"the field {name} is no regular expression: {error}") from error
            if groups != 1:
                raise ValueError(f"the field {name} has {groups} groups (…), not one")


class Defect(TypedDict):
    """Where a part differs, in pixels of the golden picture."""

    left: int
    top: int
    width: int
    height: int
    similarity: Annotated[float, Range(-1, 1)]


class Inspected(TypedDict):
    """`good`: no defect; `similarity` of the whole part, 1 at most; how far it lay from its place."""

    good: bool
    similarity: Annotated[float, Range(-1, 1)]
    defects: list[Defect]
    shift_px: float
    turn_degrees: float


class Vision:
    """The tools."""

    def __init__(self, given: Settings, pictures: Path) -> None:
        self._given, self._pictures = given, pictures
        self._golden = {name: _golden(name, part) for name, part in given.parts.items()}

    def read_label(self, camera: str, ctx: Context) -> dict[str, Any]:
        """Look through a camera and read what is printed there: the lines, and the values of a label."""
        lines = read_text(ctx, grab(camera, self._given.cameras[camera], ctx.now()), side=self._given.side)
        if not lines:
            raise ToolError(f"the camera {camera} sees nothing that can be read")
        text = "\n".join(line.text for line in lines)
        found = {name: m[1] for name, pattern in self._given.fields.items() if (m := re.search(pattern, text))}
        sure = round(min(line.confidence for line in lines), 3)
        return {**found, "lines": [line.text for line in lines], "confidence": sure}

    def detect_objects(self, camera: str, ctx: Context) -> dict[str, Any]:
        """Look through a camera and find crates, drums, bottles, cones, signs and gauges: what and where."""
        found = objects.find(ctx, grab(camera, self._given.cameras[camera], ctx.now()), self._given.score)
        return {"count": len(found), "objects": [thing._asdict() for thing in found]}

    def inspect_part(self, part: str, ctx: Context) -> Inspected:
        """Look at a part and compare it with a good one: whether it is good, and where it is not."""
        about = self._given.parts[part]
        image = grab(about.camera, self._given.cameras[about.camera], ctx.now())
        seen = golden.compare(image, self._golden[part], about.left, about.top, about.search, about.least)
        return {
            "good": not seen.defects,
            "similarity": round(seen.similarity, 3),
            "defects": [cast(Defect, each._asdict()) for each in seen.defects[:20]],
            "shift_px": round(seen.shift, 1),
            "turn_degrees": round(seen.turn, 2),
        }

    def keep_picture(self, camera: str, ctx: Context) -> str:
        """Keep a picture of what a camera sees now, on the device."""
        image = grab(camera, self._given.cameras[camera], ctx.now())
        self._pictures.mkdir(parents=True, exist_ok=True)
        file = self._pictures / f"{camera}-{ctx.now():.0f}.png"
        if not cv2.imwrite(str(file), image):
            raise ToolError(f"the picture cannot be written to {file}")
        kept = sorted(self._pictures.glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[:-MAX_KEPT]:
            old.unlink()
        return f"kept {file.name}, {image.shape[1]}x{image.shape[0]} pixels"


def _golden(name: str, part: Part) -> Any:
    image = cv2.imread(part.golden, cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"the golden picture of {name} cannot be read: {part.golden}")
    return image


def pack(state: Path, options: dict[str, str]) -> Sequence[Tool]:
    """`read_label`, `detect_objects`, `keep_picture`, and `inspect_part` where there are parts. Raises ValueError."""
    given = settings.read("vision", state, options, Settings)
    tools, cameras = Vision(given, state / "pictures"), given.cameras
    limit = 10 + 2 * max(camera.timeout_s for camera in cameras.values())
    sure = Param("confidence", "float", low=0, high=1)
    lines = Param("lines", "list", items=Param("line", "str"))
    values = [Param(name, "str", required=False) for name in given.fields]
    box = [Param(name, "int") for name in ("left", "top", "width", "height")]
    thing = settings.fields(Param("kind", "choice", choices=list(objects.CLASSES)), Param("score", "float"), *box)
    things = settings.fields(Param("count", "int"), Param("objects", "list", items=thing))
    made = [
        settings.choosing(
            declare(tools.read_label, timeout_s=limit, concurrent=True),
            settings.fields(*values, lines, sure),
            camera=cameras,
        ),
        settings.choosing(declare(tools.detect_objects, timeout_s=limit, concurrent=True), things, camera=cameras),
        settings.choosing(declare(tools.keep_picture, risk="act", timeout_s=limit), camera=cameras),
    ]
    if given.parts:
        made.append(settings.choosing(declare(tools.inspect_part, timeout_s=limit, concurrent=True), part=given.parts))
    return made
