"""`outrider models evaluate`: figures worked out by hand, on files and on made data; what does not fit says so."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

from models import metrics
from models.cli import app
from models.genai_build import write_genai_folder
from models.quantize import to_fp16, to_int8
from models.safetensors_weights import SafetensorsWeights
from models.tasks import digits
from tests.models import test_import as small

PROTO = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}


def passing(path: Path, **values: tuple[str, list[Any]]) -> Path:
    """A network whose outputs `NAME` are its inputs `in_NAME`."""
    nodes = [helper.make_node("Identity", [f"in_{name}"], [name], name) for name in values]
    sides = [
        [helper.make_tensor_value_info(prefix + name, PROTO[dtype], dims) for name, (dtype, dims) in values.items()]
        for prefix in ("in_", "")
    ]
    graph = helper.make_graph(nodes, "g", *sides)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


def said(*command: object) -> dict[str, Any]:
    answer = CliRunner().invoke(app, ["evaluate", *map(str, command), "--json"])
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)  # type: ignore[no-any-return]


def refused(*command: object) -> str:
    answer = CliRunner().invoke(app, ["evaluate", *map(str, command), "--json"])
    assert answer.exit_code == 1, answer.output
    error = json.loads(answer.stdout)
    assert error["hint"]
    return str(error["error"])


def test_classes_are_measured_as_by_hand(tmp_path: Path) -> None:
    net = passing(tmp_path / "n.onnx", y=("float32", ["n", 3]))
    scores = np.eye(3, dtype=np.float32)[[0, 0, 1, 2]]
    np.savez(tmp_path / "d.npz", in_y=scores, truth=np.array([0, 1, 1, 2]))
    rows = said(net, "--data", tmp_path / "d.npz", "--beta", 2)["metrics"]
    assert rows["top-1"]["value"] == 0.75
    assert rows["precision"]["value"] == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert rows["recall"]["value"] == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert rows["f-beta"]["value"] == pytest.approx((5 / 6 + 5 / 9 + 1) / 3)
    text = CliRunner().invoke(app, ["evaluate", str(net), "--data", str(tmp_path / "d.npz")]).stdout
    assert "top-1        0.7500" in text
    assert "4 samples" in text


def test_yes_or_no_is_measured_by_auc_and_at_a_threshold(tmp_path: Path) -> None:
    net = passing(tmp_path / "n.onnx", y=("float32", ["n"]))
    np.savez(tmp_path / "d.npz", in_y=np.float32([0.9, 0.6, 0.4, 0.1]), truth=np.array([True, False, True, False]))
    command = (net, "--data", tmp_path / "d.npz", "--metric", "auc", "--metric", "recall", "--metric", "f-beta")
    rows = {name: row["value"] for name, row in said(*command)["metrics"].items()}
    assert rows == {"auc": 0.75, "recall": 0.5, "f-beta": 0.5}
    assert said(*command, "--threshold", 0.3)["metrics"]["recall"]["value"] == 1


def test_texts_are_measured_by_character_errors(tmp_path: Path) -> None:
    net = passing(tmp_path / "n.onnx", codepoint=("int64", ["n", 6]))
    points = np.array([[ord(c) if c != "-" else 0 for c in text] for text in ("aa-ab-", "cccd--")])
    np.savez(tmp_path / "d.npz", in_codepoint=points, truth=np.array(["aab", "cx"]))
    report = said(net, "--data", tmp_path / "d.npz")
    assert report["answers"] == "texts"
    assert report["metrics"] == {"cer": {"value": pytest.approx(1 / 5)}}


def test_objects_are_measured_at_one_overlap_and_over_ten(tmp_path: Path) -> None:
    net = passing(tmp_path / "n.onnx", boxes=("float32", [1, "n", 4]), scores=("float32", [1, "n", 2]))
    (tmp_path / "d").mkdir()
    boxes = np.float32([[[0, 0, 10, 10], [20, 0, 30, 6]]])
    scores = np.float32([[[0.9, 0], [0, 0.8]]])
    truth = np.array([[0, 0, 10, 10], [20, 0, 30, 10]])  # overlaps of 1 and of 0.6
    file = tmp_path / "d" / "0.npz"
    np.savez(file, in_boxes=boxes, in_scores=scores, truth_boxes=truth, truth_classes=[0, 1])
    rows = {name: row["value"] for name, row in said(net, "--data", tmp_path / "d")["metrics"].items()}
    assert rows["map-50"] == rows["recall"] == 1
    assert rows["map-50-95"] == pytest.approx((1 + 3 / 10) / 2)
    np.savez(file, in_boxes=boxes, in_scores=scores, truth_boxes=truth, truth_classes=[1, 0])
    assert said(net, "--data", tmp_path / "d", "--metric", "recall")["metrics"]["recall"]["value"] == 0


def test_int8_beside_fp32_names_the_layers(model_cache: Path, tmp_path: Path) -> None:
    from models.package import build

    exact = build("digits", model_cache) / "model.onnx"
    pictures, classes = digits("evaluation")
    np.savez(tmp_path / "d.npz", x=pictures[:100], truth=classes[:100])
    to_int8(exact, tmp_path / "int8.onnx", [{"x": digits("calibration")[0]}])
    report = said(tmp_path / "int8.onnx", "--data", tmp_path / "d.npz", "--fp32", exact, "--per-layer")
    whole = said(exact, "--data", "digits", "--metric", "top-1", "--samples", 100)
    assert report["metrics"]["top-1"]["fp32"] == whole["metrics"]["top-1"]["value"] > 0.95
    assert report["metrics"]["top-1"]["value"] > 0.93
    assert report["layers"][0]["added"] > 0
    assert {row["node"] for row in report["layers"]} >= {"conv0", "conv1", "classes"}
    to_fp16(exact, tmp_path / "fp16.onnx")
    half = said(tmp_path / "fp16.onnx", "--data", tmp_path / "d.npz", "--fp32", exact, "--per-layer")
    assert half["layers"][0]["added"] < report["layers"][0]["added"]


def test_perplexity_of_a_bundle_and_of_a_text(tmp_path: Path) -> None:
    small.write_checkpoint(tmp_path / "m", small.random("llama"), "llama", np.float32)
    write_genai_folder(SafetensorsWeights(tmp_path / "m"), tmp_path / "genai", bits=32)
    report = said(tmp_path / "genai", "--data", "prose", "--samples", 40)
    assert report["samples"] == 39
    held = report["metrics"]["perplexity"]["value"]
    assert held > 1
    beside = said(tmp_path / "genai", "--data", "prose", "--samples", 40, "--fp32", tmp_path / "genai")
    assert beside["metrics"]["perplexity"] == {"value": held, "fp32": held}
    (tmp_path / "t.txt").write_text("hello world")
    assert said(tmp_path / "genai", "--data", tmp_path / "t.txt")["metrics"]["perplexity"]["value"] > 1
    assert "top-1 cannot be measured" in refused(tmp_path / "genai", "--data", "prose", "--metric", "top-1")
    assert "no text" in refused(tmp_path / "genai", "--data", tmp_path / "nowhere.txt")
    assert metrics.perplexity([np.log(2.0)] * 3) == pytest.approx(2)


def test_weights_of_a_language_model_are_quantized_and_measured(tmp_path: Path) -> None:
    held = small.write_checkpoint(tmp_path / "m", small.random("llama"), "llama", np.float32)
    wanted, run, off = small.forward(held, 16), CliRunner(), {}
    for to in ("int8", "int4"):
        command = ["quantize", str(tmp_path / "m"), "--to", to, "--out", str(tmp_path / to / "files"), "--json"]
        facts = json.loads(run.invoke(app, command).stdout)
        assert facts["bits"] == int(to[3:])
        assert facts["bytes"] == sum(f.stat().st_size for f in (tmp_path / to / "files").iterdir())
        off[to] = np.linalg.norm(small.answers(tmp_path / to) - wanted) / np.linalg.norm(wanted)
    assert off["int8"] < 0.05
    assert off["int8"] < off["int4"] < 0.5
    for flags, why in ((["--to", "fp16"], "no precision 'fp16'"), (["--to", "int4", "--keep", "x"], "weights alone")):
        answer = run.invoke(app, ["quantize", str(tmp_path / "m"), *flags, "--out", str(tmp_path / "o"), "--json"])
        assert (answer.exit_code, why in json.loads(answer.stdout)["error"]) == (1, True)
    (tmp_path / "taken").mkdir()
    command = ["quantize", str(tmp_path / "m"), "--to", "int4", "--out", str(tmp_path / "taken"), "--json"]
    assert "is no language model" in json.loads(run.invoke(app, command).stdout)["error"]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    net = passing(tmp_path / "n.onnx", y=("float32", ["n", 3]))
    two = passing(tmp_path / "two.onnx", y=("float32", ["n", 3]), z=("float32", ["n", 3]))
    data, good = tmp_path / "d.npz", {"in_y": np.zeros((2, 3), np.float32)}
    for more, why in (
        ({}, "nothing of what is true"),
        ({"truth": np.array([0.5, 1])}, "truth is float64"),
        ({"truth": np.array(["a", "b"])}, "for 1 truths"),
        ({"truth": np.array([0, 1]), "in_y": np.full((2, 3), np.nan, np.float32)}, "NaN"),
        ({"truth": np.array([0, 1]), "x": np.zeros(2)}, "has .'in_y', 'x'."),
        ({"truth": np.array([True, True])}, "for 1 truths"),
    ):
        np.savez(data, **(good | more))  # type: ignore[arg-type,unused-ignore]
        assert re.search(why, refused(net, "--data", data)), why
    np.savez(data, **good, truth=np.array([0, 1]))  # type: ignore[arg-type,unused-ignore]
    assert "auc cannot be measured" in refused(net, "--data", data, "--metric", "auc")
    assert "layers are compared" in refused(net, "--data", data, "--per-layer")
    assert "beta is -1" in refused(net, "--data", data, "--beta", -1)
    assert "has ['x']" in refused(net, "--data", "digits")
    assert "no language model" in refused(net, "--data", "prose")
    assert "no evaluation data" in refused(net, "--data", tmp_path / "nowhere.npz")
    assert "holds no .onnx" in refused(tmp_path / "nowhere", "--data", data)
    np.savez(data, in_y=good["in_y"], in_z=good["in_y"], truth=np.array([0, 1]))
    assert "outputs are ['y', 'z']" in refused(two, "--data", data)
    assert said(two, "--data", data, "--output", "z")["metrics"]["top-1"]["value"] == 0.5
