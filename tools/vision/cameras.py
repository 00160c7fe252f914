"""A picture from where cameras of a site are: RTSP, V4L2, video files, pictures that something else writes.

Invariants: each call opens its source, takes one whole picture and closes it, within `timeout_s` for opening and for
reading each; a picture has at most MAX_SIDE pixels a side; no password stands in an error. A video file plays in a
loop by the device's clock, of a folder the newest picture is taken.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import cv2
import msgspec
import numpy as np
from msgspec import Meta

from edge_agent.agent.tool import ToolError
from tools.settings import Secret
from tools.vision.ocr import MAX_SIDE, Image

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class Camera(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`source`: rtsp://…, http://… (MJPEG), /dev/videoN, or a path of a picture, a video, or a folder of pictures.

    `{secret}` in it is the value of the variable `secret`; `settle` pictures of a V4L2 device are dropped, while it
    finds its exposure.
    """

    source: Annotated[str, Meta(min_length=1)]
    secret: Secret = ""
    timeout_s: Annotated[float, Meta(gt=0, le=60)] = 5.0
    settle: Annotated[int, Meta(ge=0, le=60)] = 5
    width: int = 0
    height: int = 0


def grab(name: str, camera: Camera, now: float) -> Image:
    """A picture, BGR (height, width, 3); `now` in seconds. Raises ToolError."""
    source = camera.source
    if camera.secret:
        if not (value := os.environ.get(camera.secret)):
            raise ToolError(f"the camera {name} needs the secret {camera.secret}, which is not set on this device")
        source = source.replace("{secret}", value)
    path = Path(source)
    if "://" in source:
        image = _stream(name, camera, source)
    elif source.startswith("/dev/"):
        image = _device(name, camera, source)
    elif path.is_dir():
        image = _newest(name, path)
    elif path.suffix.lower() in PICTURES:
        image = _picture(name, path)
    else:
        image = _video(name, path, now)
    if max(image.shape) > MAX_SIDE:
        raise ToolError(f"the camera {name} gives {image.shape[1]}x{image.shape[0]} pixels, at most {MAX_SIDE} a side")
    return image


@contextlib.contextmanager
def _capture(name: str, source: str, api: int, params: list[int], hint: str) -> Iterator[Any]:
    capture = cv2.VideoCapture(source, api, params)
    try:
        if not capture.isOpened():
            raise ToolError(f"the camera {name} cannot be opened: {hint}")
        yield capture
    finally:
        capture.release()


def _read(name: str, capture: Any) -> Image:
    good, image = capture.read()
    if not good or image is None:
        raise ToolError(f"the camera {name} gives no picture")
    return np.asarray(image, np.uint8)


def _stream(name: str, camera: Camera, source: str) -> Image:
    limit = int(camera.timeout_s * 1000)
    params = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    with _capture(name, source, cv2.CAP_FFMPEG, params, "is it on, and are its address and password right?") as capture:
        return _read(name, capture)


def _device(name: str, camera: Camera, source: str) -> Image:
    if not Path(source).exists():
        raise ToolError(f"the camera {name} is not there: no {source}")
    os.environ["OPENCV_VIDEOIO_V4L_SELECT_TIMEOUT"] = str(max(1, round(camera.timeout_s)))
    size = [(cv2.CAP_PROP_FRAME_WIDTH, camera.width), (cv2.CAP_PROP_FRAME_HEIGHT, camera.height)]
    params = [value for pair in size if pair[1] for value in pair]
    with _capture(
        name, source, cv2.CAP_V4L2, params, "is it a camera, and may the agent use it (group video)?"
    ) as capture:
        for _ in range(camera.settle):
            _read(name, capture)
        return _read(name, capture)


def _newest(name: str, folder: Path) -> Image:
    try:
        found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
        return _picture(name, max(found, key=lambda path: path.stat().st_mtime_ns))
    except (OSError, ValueError) as error:
        raise ToolError(f"the camera {name} has no picture in {folder}") from error


def _picture(name: str, path: Path) -> Image:
    try:
        image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    except (OSError, cv2.error) as error:
        raise ToolError(f"the camera {name} has no picture at {path}: {error}") from error
    if image is None:
        raise ToolError(f"the camera {name}: {path} is no whole picture")
    return np.asarray(image, np.uint8)


def _video(name: str, path: Path, now: float) -> Image:
    with _capture(name, str(path), cv2.CAP_FFMPEG, [], f"{path} is no picture, no video and no folder") as capture:
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        if frames > 1:
            capture.set(cv2.CAP_PROP_POS_FRAMES, int(now * capture.get(cv2.CAP_PROP_FPS)) % frames)
        return _read(name, capture)
