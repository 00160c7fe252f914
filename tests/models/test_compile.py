"""`outrider models compile`: engines and their JSON in a folder, and errors that say what to do."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from edge_agent.engines.qdq import for_tensorrt
from edge_agent.engines.tensorrt_build import build
from edge_agent.errors import Refused
from edge_agent.wire.bundle import sha256_file
from models import recipe as recipes
from models.cli import app
from tests.engines.contents import contents

real = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed: pip install '.[tensorrt]'"
)
PROFILE = "x=1x4:2x4:8x4"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 4]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(tmp_path / "m.onnx")
    )
    return tmp_path / "m.onnx"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["compile", *map(str, arguments)])
    return result.exit_code, result.output


@real
def test_each_target_has_an_engine_and_the_facts_of_its_build(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "engines"
    status, said = run(model, "--target", "sm86,sm89,sm120,sm86", "--profile", PROFILE, "--out", out, "--json")
    assert status == 0, said
    rows = json.loads(said)
    assert [row["target"] for row in rows] == ["sm86", "sm89", "sm120"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"m.{target}.{end}" for target in ("sm86", "sm89", "sm120") for end in ("engine", "json")
    )
    for row in rows:
        engine, facts = Path(row["path"]), json.loads(Path(row["path"]).with_suffix(".json").read_text())
        assert facts == {name: value for name, value in row.items() if name != "path"}
        assert contents(engine.read_bytes()).targets == [row["target"]]
        assert (facts["sha256"], facts["bytes"]) == (sha256_file(engine), engine.stat().st_size)
        assert (facts["runtime"], facts["version"]) == ("tensorrt-rtx", contents(engine.read_bytes()).version)
        assert facts["profile"] == {"x": [[1, 4], [2, 4], [8, 4]]}
        assert facts["seconds"] > 0
        assert facts["peak_mb"] > 50


@real
def test_the_profile_beside_a_model_is_the_default(tmp_path: Path, model: Path) -> None:
    (tmp_path / "profile.json").write_text('{"x": [[1, 4], [2, 4], [6, 4]]}')
    status, said = run(model, "--target", "sm86", "--out", tmp_path / "e", "--json")
    assert status == 0, said
    assert json.loads(said)[0]["profile"] == {"x": [[1, 4], [2, 4], [6, 4]]}
    (tmp_path / "profile.json").write_text("{")
    assert run(model, "--target", "sm86", "--out", tmp_path / "e", "--json")[0] == 1


@real
def test_a_model_is_compiled_by_its_name(tmp_path: Path, model_cache: Path, ppocr_models: dict[str, Path]) -> None:
    shape = "1x3x64x64"
    arguments = ("--target", "sm89", "--profile", f"x={shape}:{shape}:{shape}", "--out", tmp_path)
    status, said = run("ppocr-det", *arguments, "--cache", model_cache)
    assert status == 0, said
    assert (tmp_path / "ppocr-det.sm89.engine").is_file()
    assert "peak" in said


@real
def test_int8_as_recipes_make_it_for_cpus_is_turned_into_the_form_of_tensorrt(tmp_path: Path) -> None:
    given = {"s": np.float32(0.1), "z": np.uint8(128), "w": np.eye(4, dtype=np.int8), "ws": np.float32(0.5)}
    given |= {"b": np.arange(4, dtype=np.int32), "bs": np.float32(0.05)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "points"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "input"),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["weight"], "weights"),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["bias"], "biases"),
        helper.make_node("Gemm", ["d", "weight", "bias"], ["y"], "product"),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 4]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(np.array(value), name) for name, value in given.items()]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(tmp_path / "u8.onnx"))
    with pytest.raises(Refused, match=r"Non-zero zero point.*outrider models compile brings other forms to it"):
        build(tmp_path / "u8.onnx", tmp_path / "e", "sm86", {})
    x = {"x": np.arange(8, dtype=np.float32).reshape(2, 4)}
    answers = [
        onnxruntime.InferenceSession(raw).run(None, x)[0]
        for raw in (model.SerializeToString(), for_tensorrt((tmp_path / "u8.onnx").read_bytes()))
    ]
    np.testing.assert_array_equal(*answers)
    status, said = run(tmp_path / "u8.onnx", "--target", "sm86", "--out", tmp_path)
    assert status == 0, said
    layers = contents((tmp_path / "u8.sm86.engine").read_bytes()).layers
    assert {"points", "weights", "product"} <= set(layers)
    assert "biases" not in layers


@real
def test_precisions_of_a_recipe_are_compiled_from_its_bundles(tmp_path: Path) -> None:
    result = recipes.run(recipes.read("digits"), tmp_path)
    assert not [row for row in result["precisions"].values() if "refused" in row]
    profile, found = "x=1x1x8x8:64x1x8x8:64x1x8x8", {}
    for precision in ("fp32", "fp16", "int8"):
        arguments = ("--precision", precision, "--target", "sm86", "--profile", profile, "--out", tmp_path / "engines")
        status, said = run("digits", *arguments, "--cache", tmp_path, "--json")
        assert status == 0, said
        [row] = json.loads(said)
        assert Path(row["path"]).name == f"digits-{precision}.sm86.engine"
        found[precision] = contents(Path(row["path"]).read_bytes())
        assert found[precision].targets == ["sm86"]
        assert {"conv0", "conv1"} <= set(found[precision].layers)
        assert row["profile"] == {"x": [[1, 1, 8, 8], [64, 1, 8, 8], [64, 1, 8, 8]]}
    weights = 10 * 1536 + 96 * 48 * 9  # of the last layer and the second convolution
    assert found["fp32"].weights["float"] >= 4 * weights
    assert found["fp16"].weights["half"] >= 2 * weights
    assert found["int8"].weights["int8"] >= weights


@real
def test_a_precision_that_no_recipe_made_is_told(tmp_path: Path) -> None:
    status, said = run("digits", "--precision", "fp16", "--target", "sm86", "--out", tmp_path, "--cache", tmp_path)
    assert status == 1
    assert "outrider models recipe run digits" in said


@real
def test_a_target_that_fails_leaves_those_before_it_and_no_half_file(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "engines"
    status, said = run(model, "--target", "sm86,sm87", "--profile", PROFILE, "--out", out, "--json")
    assert status == 1
    assert "sm87" in json.loads(said)["error"]
    assert sorted(path.name for path in out.iterdir()) == ["m.sm86.engine", "m.sm86.json"]


@real
@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (["--target", "sm86"], "no optimization profile", "--profile"),
        (["--target", "sm86", "--profile", "x=1x5:1x5:1x5"], "tensor has 4", "--profile"),
        (["--target", "ampere"], "no target 'ampere'", "sm86"),
        (["--target", ""], "no target ''", "sm86"),
    ],
)
def test_what_cannot_be_compiled_says_what_to_do(
    tmp_path: Path, model: Path, arguments: list[str], error: str, hint: str
) -> None:
    status, said = run(model, *arguments, "--out", tmp_path / "engines", "--json")
    assert status == 1
    told = json.loads(said)
    assert error in told["error"]
    assert hint in told["hint"]


@real
def test_what_is_no_network_is_refused(tmp_path: Path, model_cache: Path) -> None:
    for name, why in [("smollm2", "is no network"), (tmp_path / "absent.onnx", "no file")]:
        status, said = run(name, "--target", "sm86", "--out", tmp_path, "--cache", model_cache)
        assert status == 1
        assert why in said


def test_a_profile_is_read_before_anything_is_built(tmp_path: Path, model: Path) -> None:
    status, said = run(model, "--target", "sm86", "--profile", "x=1x4", "--out", tmp_path / "engines")
    assert status == 1
    assert "INPUT=smallest:usual:largest" in said
    assert not (tmp_path / "engines").exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path, model: Path) -> None:
    if find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("TensorRT for RTX is not installed")
    status, said = run(model, "--target", "sm86", "--profile", PROFILE, "--out", model / "engines")
    assert status == 1
    assert "another --out?" in said
