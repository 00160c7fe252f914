"""Inspecting ONNX files: what they are, what runtimes say, and clear errors for what is no model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from models.cli import app
from models.errors import ModelError
from models.inspect import inspect


def _model(
    path: Path, op: str = "Relu", opset: int = 20, domain: str = "", dims: list[int | str] | None = None
) -> Path:
    dims = dims or ["batch", 4]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("x", "y")]
    node = helper.make_node(op, ["x"], ["y"], op.lower(), domain=domain)
    graph = helper.make_graph([node], "g", values[:1], values[1:])
    sets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    path.write_bytes(helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString())
    return path


def test_the_reader_is_described_and_both_runtimes_take_it(ppocr_models: dict[str, Path]) -> None:
    facts = inspect(ppocr_models["rec"])
    assert facts["opset"] == {"ai.onnx": 11}
    assert facts["inputs"] == [
        {"name": "x", "dtype": "float32", "shape": ["DynamicDimension.0", 3, 48, "DynamicDimension.1"]}
    ]
    assert facts["dynamic"] == ["DynamicDimension.0", "DynamicDimension.1"]
    assert facts["bytes"] == ppocr_models["rec"].stat().st_size
    assert facts["ops"]["Conv"] == 57
    assert 5_000_000 < facts["parameters"] < 5_500_000
    assert all(answer["takes"] and not answer["refused"] for answer in facts["runtimes"].values())


def test_op_that_no_runtime_knows_is_named_with_the_reason(tmp_path: Path) -> None:
    facts = inspect(_model(tmp_path / "m.onnx", op="Sparkle", domain="com.example"))
    ours, tensorrt = facts["runtimes"]["onnxruntime"], facts["runtimes"]["tensorrt"]
    assert not ours["takes"]
    assert ours["refused"][0]["op"] == "com.example.Sparkle"
    assert "com.example" in ours["refused"][0]["why"]
    assert tensorrt["refused"] == [{"op": "com.example.Sparkle", "nodes": 1, "why": "not a standard op"}]


def test_op_that_only_tensorrt_refuses_is_named(tmp_path: Path) -> None:
    facts = inspect(_model(tmp_path / "m.onnx", op="Det", dims=["batch", 4, 4]))
    assert facts["runtimes"]["tensorrt"]["refused"][0]["op"] == "Det"


def test_op_decomposed_by_the_runtime_is_taken(tmp_path: Path) -> None:
    assert inspect(_model(tmp_path / "m.onnx", op="Mish"))["runtimes"]["onnxruntime"]["takes"]


def test_ops_inside_control_flow_are_counted(tmp_path: Path) -> None:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    branches = [helper.make_graph([helper.make_node(op, ["x"], ["y"])], op, [], [y]) for op in ("Relu", "Neg")]
    node = helper.make_node("If", ["flag"], ["z"], then_branch=branches[0], else_branch=branches[1])
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [4]),
        helper.make_tensor_value_info("flag", TensorProto.BOOL, []),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [4])
    graph = helper.make_graph([node], "g", inputs, [z])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    assert inspect(tmp_path / "m.onnx")["ops"] == {"If": 1, "Relu": 1, "Neg": 1}


def test_uint8_activations_are_named_as_no_form_for_tensorrt(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    points = [numpy_helper.from_array(np.array(v), n) for v, n in ((np.float32(0.1), "scale"), (np.uint8(128), "zero"))]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], points)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "m.onnx")
    facts = inspect(tmp_path / "m.onnx")["runtimes"]
    assert facts["onnxruntime"]["takes"]
    assert {row["op"] for row in facts["tensorrt"]["refused"]} == {"QuantizeLinear", "DequantizeLinear"}


def test_what_is_no_model_is_a_clear_error(tmp_path: Path, ppocr_models: dict[str, Path]) -> None:
    whole = ppocr_models["det"].read_bytes()
    cases = {"text.onnx": b"hello, this is no model", "empty.onnx": b"", "cut.onnx": whole[: len(whole) // 2]}
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError) as caught:
            inspect(tmp_path / name)
        assert name in caught.value.message
        assert "again" in caught.value.hint
    with pytest.raises(ModelError, match="cannot be read"):
        inspect(tmp_path / "nowhere.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        inspect(tmp_path)


def test_opset_of_the_future_names_the_newest_that_is_known(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has opset 999") as caught:
        inspect(_model(tmp_path / "m.onnx", opset=999))
    assert str(onnx.defs.onnx_opset_version()) in caught.value.hint


def test_command_prints_json_and_text(tmp_path: Path) -> None:
    path = _model(tmp_path / "m.onnx")
    run = CliRunner()
    facts = json.loads(run.invoke(app, ["inspect", str(path), "--json"]).stdout)
    assert facts["ops"] == {"Relu": 1}
    text = run.invoke(app, ["inspect", str(path)]).stdout
    assert "x: float32['batch', 4]" in text
    assert "takes it" in text
    failed = run.invoke(app, ["inspect", str(tmp_path / "none.onnx"), "--json"])
    assert failed.exit_code == 1
    assert json.loads(failed.stdout)["hint"]
