"""FP16 and INT8 forms of real small networks: what they promise, what they keep, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from models import tasks
from models.cli import app
from models.errors import ModelError
from models.inspect import inspect
from models.package import build
from models.quantize import Feeds, feeds, layer_errors, shifted, simplify, to_fp16, to_int8

Array = NDArray[Any]


@pytest.fixture(scope="module")
def network(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits network, simplified."""
    return simplify(build("digits", model_cache) / "model.onnx", tmp_path_factory.mktemp("digits") / "fp32.onnx")


@pytest.fixture(scope="module")
def data() -> list[Feeds]:
    """Calibration data of the digits network."""
    return [{"x": batch} for batch, _ in tasks.TASKS["digits"].samples("calibration", 128)]


def _scores(model: Path) -> Array:
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": tasks.digits("evaluation")[0]})[0])


def _weights(path: Path, values: Array) -> Path:
    """y = x @ values, with `values` (4, 4)."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 4]) for n in "xy")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], "first"),
        helper.make_node("MatMul", ["h", "v"], ["y"], "last"),
    ]
    weights = [numpy_helper.from_array(v, n) for n, v in (("w", values), ("v", np.eye(4, dtype=np.float32)))]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile"])
def test_int8_is_a_third_of_the_size_and_answers_alike(
    network: Path, data: list[Feeds], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    report = to_int8(network, tmp_path / "int8.onnx", data, method)
    assert report["samples"] == len(data)
    assert not capsys.readouterr().out  # with --json the tools' own remarks would spoil it
    assert (tmp_path / "int8.onnx").stat().st_size < 0.35 * network.stat().st_size
    assert (_scores(tmp_path / "int8.onnx").argmax(1) == _scores(network).argmax(1)).mean() > 0.97


def test_int8_is_symmetric_and_per_channel(network: Path, data: list[Feeds], tmp_path: Path) -> None:
    to_int8(network, tmp_path / "int8.onnx", data)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    weights = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert not weights[node.input[2]].any()
    scales = [weights[n.input[1]].size for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    assert {48, 96, 10} <= set(scales)
    assert inspect(tmp_path / "int8.onnx")["runtimes"]["tensorrt"]["takes"]


def test_activations_as_int8_or_uint8_are_the_same_numbers(network: Path, data: list[Feeds], tmp_path: Path) -> None:
    for kind in ("int8", "uint8"):
        to_int8(network, tmp_path / f"{kind}.onnx", data, activations=kind)
    np.testing.assert_allclose(_scores(tmp_path / "int8.onnx"), _scores(tmp_path / "uint8.onnx"), atol=1e-4)
    back, straight = shifted(onnx.load(tmp_path / "uint8.onnx"), "int8"), onnx.load(tmp_path / "int8.onnx")
    for one, other in zip(back.graph.initializer, straight.graph.initializer, strict=True):
        np.testing.assert_array_equal(numpy_helper.to_array(one), numpy_helper.to_array(other), strict=True)
    assert not inspect(tmp_path / "uint8.onnx")["runtimes"]["tensorrt"]["takes"]


def test_range_before_a_relu_is_that_of_what_passes_it(network: Path, data: list[Feeds], tmp_path: Path) -> None:
    to_int8(network, tmp_path / "int8.onnx", data)
    graph = onnx.load(tmp_path / "int8.onnx").graph
    weights = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    scales = {n.input[0]: float(weights[n.input[1]]) for n in graph.node if n.op_type == "QuantizeLinear"}
    relus = [node for node in graph.node if node.op_type == "Relu" and node.output[0] in scales]
    assert relus
    for node in relus:
        before = scales[node.input[0].removesuffix("_DequantizeLinear_Output")]
        assert before == pytest.approx(scales[node.output[0]], rel=1e-4)


def test_int8_without_calibration_data_is_refused(network: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="needs calibration data") as caught:
        to_int8(network, tmp_path / "int8.onnx", [])
    assert "--calibration" in caught.value.hint
    assert not (tmp_path / "int8.onnx").exists()


def test_kept_ops_and_nodes_stay_in_fp32(network: Path, data: list[Feeds], tmp_path: Path) -> None:
    report = to_int8(network, tmp_path / "int8.onnx", data, keep=["Gemm", "conv0"])
    assert report["kept"] == {"conv0": "asked for", "classes": "asked for"}
    graph = onnx.load(tmp_path / "int8.onnx").graph
    floats = {w.name for w in graph.initializer if w.data_type == TensorProto.FLOAT and len(w.dims) > 1}
    assert len(floats) == 2
    with pytest.raises(ModelError, match="no node or op Softmax"):
        to_int8(network, tmp_path / "int8.onnx", data, keep=["Softmax"])
    with pytest.raises(ModelError, match="nothing to quantize"):
        to_int8(network, tmp_path / "none.onnx", data, ops=["MatMul"])


def test_fp16_is_half_the_size_with_the_same_types_outside(network: Path, data: list[Feeds], tmp_path: Path) -> None:
    report = to_fp16(network, tmp_path / "fp16.onnx", data)
    assert report == {"kept": {}, "checked": "weights and activations"}
    assert (tmp_path / "fp16.onnx").stat().st_size < 0.52 * network.stat().st_size
    assert inspect(tmp_path / "fp16.onnx")["inputs"] == inspect(network)["inputs"]
    np.testing.assert_allclose(_scores(tmp_path / "fp16.onnx"), _scores(network), atol=0.05)


def test_weight_past_the_fp16_range_keeps_its_node_in_fp32(tmp_path: Path) -> None:
    source = _weights(tmp_path / "m.onnx", np.full((4, 4), 1e5, np.float32))
    kept = to_fp16(source, tmp_path / "fp16.onnx")["kept"]
    assert "w reaches 1e+05" in kept["first"]
    assert "last" not in kept


def test_activation_past_the_fp16_range_is_found_with_data_only(tmp_path: Path) -> None:
    source = _weights(tmp_path / "m.onnx", np.full((4, 4), 1000, np.float32))
    large: Feeds = {"x": np.full((1, 4), 100, np.float32)}
    assert to_fp16(source, tmp_path / "a.onnx") == {"kept": {}, "checked": "weights"}
    kept = to_fp16(source, tmp_path / "b.onnx", [large])["kept"]
    assert set(kept) == {"first", "last"}
    answers = [ort.InferenceSession(str(tmp_path / name)).run(None, large)[0] for name in ("m.onnx", "b.onnx")]
    np.testing.assert_allclose(answers[0], answers[1])


def test_layer_that_hurts_most_is_named_first(network: Path, data: list[Feeds], tmp_path: Path) -> None:
    model = onnx.load(network)
    dice = np.random.default_rng(0)
    for weight in model.graph.initializer:
        if weight.name == model.graph.node[2].input[1]:
            value = numpy_helper.to_array(weight)
            weight.CopyFrom(
                numpy_helper.from_array(value + dice.normal(0, 0.05, value.shape).astype(np.float32), weight.name)
            )
    onnx.save(model, tmp_path / "hurt.onnx")
    worst = layer_errors(network, tmp_path / "hurt.onnx", data)
    assert worst[0]["node"] == "conv1"
    assert worst[0]["added"] > 3 * worst[1]["added"]
    assert next(row for row in worst if row["node"] == "conv0")["error"] == 0


def test_old_opset_is_raised_and_constants_are_folded(ppocr_models: dict[str, Path], tmp_path: Path) -> None:
    facts = inspect(simplify(ppocr_models["det"], tmp_path / "simple.onnx"))
    assert facts["opset"] == {"ai.onnx": 20}
    assert "Identity" not in facts["ops"]
    with pytest.raises(ModelError, match="opset 11"):
        to_int8(ppocr_models["det"], tmp_path / "int8.onnx", [{"x": np.zeros((1, 3, 64, 64), np.float32)}])


def test_calibration_files_are_read_and_checked(network: Path, data: list[Feeds], tmp_path: Path) -> None:
    np.savez(tmp_path / "all.npz", x=data[0]["x"])
    folder = tmp_path / "feeds"
    folder.mkdir()
    for index, feed in enumerate(data):
        np.savez(folder / f"{index}.npz", **feed)  # type: ignore[arg-type,unused-ignore]
    assert [feed["x"].shape for feed in feeds(tmp_path / "all.npz", network)] == [(1, 1, 8, 8)] * 64
    assert len(feeds(folder, network)) == len(data)
    bad = {
        "name": ({"y": data[0]["x"]}, "has .'y'."),
        "shape": ({"x": data[0]["x"][:, :, :4]}, "x is float32"),
        "dtype": ({"x": data[0]["x"].astype(float)}, "x is float64"),
        "nan": ({"x": data[0]["x"] * np.nan}, "NaN"),
    }
    for name, (arrays, message) in bad.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)  # type: ignore[arg-type,unused-ignore]
        with pytest.raises(ModelError, match=message):
            feeds(tmp_path / f"{name}.npz", network)
    (tmp_path / "text.npz").write_text("no arrays")
    (tmp_path / "empty").mkdir()
    for nothing in ("text.npz", "nowhere.npz", "empty"):
        with pytest.raises(ModelError, match="no calibration data"):
            feeds(tmp_path / nothing, network)


def test_command_writes_int8_and_names_the_layers(network: Path, data: list[Feeds], tmp_path: Path) -> None:
    run, out = CliRunner(), tmp_path / "int8.onnx"
    np.savez(tmp_path / "data.npz", x=data[0]["x"][:16])
    command = ["quantize", str(network), "--to", "int8", "--out", str(out)]
    missing = run.invoke(app, [*command, "--json"])
    assert missing.exit_code == 1
    assert "calibration data" in json.loads(missing.stdout)["error"]
    said = json.loads(run.invoke(app, [*command, "--calibration", str(tmp_path / "data.npz"), "--json"]).stdout)
    assert said["bytes"] == out.stat().st_size
    assert len(said["layers"]) == 5
    text = run.invoke(app, ["quantize", str(network), "--to", "fp16", "--out", str(out), "--keep", "Gemm"]).stdout
    assert "in FP32: classes: asked for" in text
    assert run.invoke(app, ["quantize", str(network), "--to", "int4", "--out", str(out)]).exit_code == 1
