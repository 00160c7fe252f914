"""Cameras as a site has them, real networks, real pictures: labels, things, parts; a camera that is not there."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import skimage.data

from edge_agent.agent.act import shaped
from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.tool import Tool, ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.errors import Fatal
from models import objects as trained
from tests.tools.conftest import EngineContext
from tools.sim.camera import frame, truth
from tools.vision import cameras, golden, objects
from tools.vision.cameras import Camera, grab

FIELDS = """
[fields]
lot = 'LOT\\s*(\\S+)'
serial = 'SN\\s*(\\S+)'
expiry = 'EXP\\s*(\\S+)'
"""


def tools(folder: Path, text: str) -> dict[str, Tool]:
    (folder / "vision.toml").write_text(text)
    return {tool.spec.name: tool for tool in load("tools.vision.pack", folder, {"config": str(folder / "vision.toml")})}


def film(path: Path, pictures: list[Any], rate: int = 10) -> None:
    """An H.264 file."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=rate, options={"crf": "18", "g": "5"})
        stream.height, stream.width, stream.pix_fmt = *pictures[0].shape[:2], "yuv420p"
        for picture in pictures:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")))
        out.mux(stream.encode())


@pytest.fixture(scope="module")
def rtsp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a stream that shows product 3 of camera 1."""
    folder = tmp_path_factory.mktemp("films")
    film(folder / "line.mp4", [frame(7, 1, 3)] * 40)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    argv = [sys.executable, "-m", "tests.tools.rtsp_peer", str(folder), str(port)]
    with subprocess.Popen(argv, cwd=Path(__file__).parents[2], stdout=subprocess.DEVNULL) as process:
        for _ in range(1000):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.02)
        yield f"rtsp://127.0.0.1:{port}/line.mp4"
        process.kill()


def test_a_label_is_read_over_rtsp(tmp_path: Path, ctx: EngineContext, rtsp: str) -> None:
    made = tools(tmp_path, f'[cameras.line]\nsource = "{rtsp}"\ntimeout_s = 20\n{FIELDS}')
    read = made["read_label"]
    result = read.function(camera="line", ctx=ctx)
    assert [result[name] for name in ("lot", "serial", "expiry")] == [line.split(" ")[1] for line in truth(7, 1, 3)]
    assert shaped("read_label", read.spec.returns, result) == result
    assert len(result["lines"]) >= 3
    with pytest.raises(CallError, match="is one of line"):
        validate(Call("read_label", {"camera": rtsp}), [read.spec])


def test_labels_are_read_from_a_folder_that_something_else_fills(tmp_path: Path, ctx: EngineContext) -> None:
    made = tools(tmp_path, f'[cameras.line]\nsource = "{tmp_path}/pictures"\n{FIELDS}')
    with pytest.raises(ToolError, match="the camera line"):
        made["read_label"].function(camera="line", ctx=ctx)
    (tmp_path / "pictures").mkdir()
    right = 0
    for product in range(4):
        file = tmp_path / "pictures" / f"{9 - product}.jpg"
        cv2.imwrite(str(file), frame(11, 2, product))
        os.utime(file, ns=(product * 10**9, product * 10**9))
        result = made["read_label"].function(camera="line", ctx=ctx)
        right += result.get("lot") == truth(11, 2, product)[0].split(" ")[1]
    assert right == 4
    cv2.imwrite(str(tmp_path / "pictures" / "blank.png"), np.full((200, 300, 3), 128, np.uint8))
    with pytest.raises(ToolError, match="the camera line sees nothing that can be read"):
        made["read_label"].function(camera="line", ctx=ctx)


@pytest.fixture(scope="module")
def detector(tmp_path_factory: pytest.TempPathFactory) -> OnnxNetwork:
    folder = tmp_path_factory.mktemp("objects")
    trained.make(trained.WEIGHTS, folder / "model.onnx", lambda *_: None)
    return OnnxNetwork(folder)


def overlap(box: Any, thing: dict[str, Any]) -> float:
    """Intersection over union of a true box and a found thing."""
    left, top, right, bottom = (
        thing["left"],
        thing["top"],
        thing["left"] + thing["width"],
        thing["top"] + thing["height"],
    )
    across, down = min(box[2], right) - max(box[0], left), min(box[3], bottom) - max(box[1], top)
    shared = max(0.0, across) * max(0.0, down)
    return float(shared / ((box[2] - box[0]) * (box[3] - box[1]) + thing["width"] * thing["height"] - shared))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_things_are_found_where_they_are(tmp_path: Path, detector: OnnxNetwork, scale: float) -> None:
    ctx, hits, wrong, there = EngineContext({"objects": detector}), 0, 0, 0
    made = tools(tmp_path, f'score = 0.4\n[cameras.yard]\nsource = "{tmp_path}/yard.png"\n')
    for index in range(12):
        picture, boxes, kinds = trained.scene("evaluation", index)
        seen = ((picture.transpose(1, 2, 0)[:, :, ::-1] + 1) * 127.5).round().astype(np.uint8)
        seen = cv2.resize(seen, None, fx=scale, fy=scale)
        seen = (
            cv2.copyMakeBorder(seen, 0, 0, 40, 40, cv2.BORDER_CONSTANT, value=(90, 90, 90)) if scale > 1 else seen
        )  # another shape
        cv2.imwrite(str(tmp_path / "yard.png"), seen)
        result = made["detect_objects"].function(camera="yard", ctx=ctx)
        assert shaped("detect_objects", made["detect_objects"].spec.returns, result) == result
        truths = [
            (b * scale + ([40, 0, 40, 0] if scale > 1 else 0), trained.CLASSES[k])
            for b, k in zip(boxes, kinds, strict=True)
        ]
        good = [any(t["kind"] == kind and overlap(box, t) > 0.5 for t in result["objects"]) for box, kind in truths]
        hits, there, wrong = hits + sum(good), there + len(good), wrong + max(0, result["count"] - sum(good))
    assert hits >= 0.7 * there, (hits, there)
    assert wrong <= 0.4 * there, (wrong, there)


def test_the_device_knows_the_detectors_classes_and_sizes() -> None:
    assert (objects.CLASSES, objects.WIDTH, objects.HEIGHT) == (trained.CLASSES, trained.WIDTH, trained.HEIGHT)


def test_without_the_network_the_error_names_it(tmp_path: Path, bare_ctx: EngineContext) -> None:
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((10, 10, 3), np.uint8))
    made = tools(tmp_path, f'[cameras.a]\nsource = "{tmp_path}/a.png"\n')
    with pytest.raises(ToolError, match="objects is not installed"):
        made["detect_objects"].function(camera="a", ctx=bare_ctx)


class Bench:
    """A tray of coins under a camera that shakes and a lamp that changes; sometimes a coin is missing."""

    LEFT, TOP, WIDTH, HEIGHT = 60, 50, 224, 176
    COIN = (150, 112, 46)  # the middle and size of one, in the part

    def __init__(self) -> None:
        self.dice = np.random.default_rng(3)
        self.tray = cv2.cvtColor(skimage.data.coins(), cv2.COLOR_GRAY2BGR)
        self.good = self.tray[self.TOP : self.TOP + self.HEIGHT, self.LEFT : self.LEFT + self.WIDTH].copy()

    def picture(self, whole: bool = True) -> Any:
        picture = self.tray.astype(np.float32)
        if not whole:
            x, y, size = self.COIN
            part = picture[self.TOP + y - size // 2 :, self.LEFT + x - size // 2 :][:size, :size]
            part[:] = 60 + self.dice.normal(0, 3, part.shape)
        middle = (self.LEFT + self.WIDTH / 2, self.TOP + self.HEIGHT / 2)
        turn = cv2.getRotationMatrix2D(middle, self.dice.uniform(-3, 3), 1)
        turn[:, 2] += self.dice.uniform(-12, 12, 2)
        picture = cv2.warpAffine(picture, turn, picture.shape[1::-1], borderMode=cv2.BORDER_REFLECT)
        picture = picture * self.dice.uniform(0.6, 1.3) + self.dice.uniform(-15, 15)
        picture += self.dice.normal(0, self.dice.uniform(1, 6), picture.shape)
        return picture.clip(0, 255).astype(np.uint8)


def test_a_part_is_inspected_whatever_the_lamp_and_the_shake(tmp_path: Path, bare_ctx: EngineContext) -> None:
    bench = Bench()
    cv2.imwrite(str(tmp_path / "good.png"), bench.good)
    made = tools(
        tmp_path,
        f'[cameras.bench]\nsource = "{tmp_path}/now.png"\n[parts.tray]\ncamera = "bench"\n'
        f'golden = "{tmp_path}/good.png"\nleft = {bench.LEFT}\ntop = {bench.TOP}\n',
    )
    said = {True: 0, False: 0}
    for n in range(40):
        cv2.imwrite(str(tmp_path / "now.png"), bench.picture(whole := n % 2 == 0))
        seen = made["inspect_part"].function(part="tray", ctx=bare_ctx)
        said[whole] += seen["good"] is whole
        assert seen["shift_px"] < 24
        if not seen["good"]:
            box, (x, y, size) = seen["defects"][0], bench.COIN
            assert abs(box["left"] + box["width"] / 2 - x) < size
            assert abs(box["top"] + box["height"] / 2 - y) < size
    assert said == {True: 20, False: 20}
    cv2.imwrite(str(tmp_path / "now.png"), cv2.resize(frame(1, 1, 1), (384, 303)))
    with pytest.raises(ToolError, match="there is no such part in the picture"):
        made["inspect_part"].function(part="tray", ctx=bare_ctx)
    cv2.imwrite(str(tmp_path / "now.png"), bench.good[:100])
    with pytest.raises(ToolError, match="is not whole in the picture"):
        made["inspect_part"].function(part="tray", ctx=bare_ctx)


def test_structural_similarity_is_the_published_one() -> None:
    from skimage.metrics import structural_similarity

    one = skimage.data.camera().astype(np.float32)
    other = cv2.GaussianBlur(one, (0, 0), 2)
    theirs = structural_similarity(
        one, other, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert abs(float(golden.ssim(one, other).mean()) - theirs) < 0.005


def test_a_film_plays_by_the_clock_and_a_picture_is_kept(
    tmp_path: Path, bare_ctx: EngineContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    film(tmp_path / "film.mp4", [np.full((64, 64, 3), 40 * (n // 10), np.uint8) for n in range(50)])
    camera = Camera(str(tmp_path / "film.mp4"))
    levels = [round(float(grab("film", camera, second).mean()) / 40) for second in (0.5, 1.5, 2.5, 4.5, 5.5)]
    assert levels == [0, 1, 2, 4, 0]
    monkeypatch.setattr("tools.vision.pack.MAX_KEPT", 2)
    made = tools(tmp_path, f'[cameras.film]\nsource = "{tmp_path}/film.mp4"\n')
    assert made["keep_picture"].spec.risk == "act"
    for _ in range(3):
        bare_ctx.time += 1
        said = made["keep_picture"].function(camera="film", ctx=bare_ctx)
    assert said == f"kept film-{bare_ctx.time:.0f}.png, 64x64 pixels"
    assert len(list((tmp_path / "pictures").iterdir())) == 2


def test_a_camera_that_is_not_there_is_told_in_time_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8torn")
    (tmp_path / "text.mp4").write_text("no film")
    monkeypatch.setenv("TOOL_DOOR", "s3cret")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        url = "rtsp://admin:{secret}@127.0.0.1:%d/x"
        for camera, told in (
            (Camera(url % port, secret="TOOL_DOOR", timeout_s=1), "cannot be opened: is it on"),
            (Camera(url % 1, secret="TOOL_DOOR", timeout_s=1), "cannot be opened: is it on"),
            (Camera(url % 1, secret="TOOL_GONE"), "needs the secret TOOL_GONE"),
            (Camera("/dev/video99"), "is not there: no /dev/video99"),
            (Camera("/dev/null"), "may the agent use it"),
            (Camera(str(tmp_path / "gone.png")), "has no picture at"),
            (Camera(str(tmp_path / "torn.jpg")), "is no whole picture"),
            (Camera(str(tmp_path / "text.mp4")), "is no picture, no video and no folder"),
        ):
            began = time.monotonic()
            with pytest.raises(ToolError, match=told) as error:
                grab("door", camera, 0.0)
            assert time.monotonic() - began < 12, camera
            assert "s3cret" not in str(error.value)


def test_a_picture_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cameras, "MAX_SIDE", 100)
    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((10, 101, 3), np.uint8))
    with pytest.raises(ToolError, match="gives 101x10 pixels, at most 100 a side"):
        grab("a", Camera(str(tmp_path / "a.png")), 0.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "missing required field `cameras`"),
        ('[cameras.a]\nsource = "x"\n[parts.p]\ncamera = "b"\ngolden = "g.png"', "camera b, which is not there"),
        ('[cameras.a]\nsource = "x"\n[parts.p]\ncamera = "a"\ngolden = "/g.png"', "golden picture of p cannot be read"),
        ('[cameras.a]\nsource = "x"\n[fields]\nlot = "LOT("', "no regular expression"),
        ('[cameras.a]\nsource = "x"\n[fields]\nlot = "LOT"', "has 0 groups"),
        ('[cameras.a]\nurl = "x"', "unknown field `url`|missing required field `source`"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(Fatal, match=told):
        tools(tmp_path, text)
