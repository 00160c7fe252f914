"""INT8 as it ships for CPUs becomes INT8 as TensorRT takes it: the same numbers, and a real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.engines.engine_cache import EngineCache
from edge_agent.engines.qdq import for_tensorrt
from edge_agent.engines.tensorrt import engine_for
from edge_agent.errors import Refused
from tests.engines.contents import contents
from tests.engines.test_tensorrt import installed


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution with a bias and a Relu, quantized as the recipes do: uint8 activations, INT32 biases."""
    from models.quantize import to_int8

    folder, rng = tmp_path_factory.mktemp("int8"), np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.normal(0, 0.2, (8, 3, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(rng.normal(0, 0.5, 8).astype(np.float32), "b"),
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], "conv", pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["y"], "pool"),
    ]
    sizes = (("x", ["n", 3, 16, 16]), ("y", ["n", 8, 1, 1]))
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in sizes]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    source, target = folder / "fp32.onnx", folder / "int8.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(source))
    data = [{"x": rng.normal(size=(1, 3, 16, 16)).astype(np.float32)} for _ in range(4)]
    to_int8(source, target, data, activations="uint8")
    return target


def kinds(model: bytes) -> set[tuple[str, int]]:
    """Which ops read initializers of which type."""
    graph = onnx.load_from_string(model).graph
    types = {weight.name: weight.data_type for weight in graph.initializer}
    return {(node.op_type, types[name]) for node in graph.node for name in node.input if name in types}


def test_the_numbers_stay_and_only_their_form_changes(int8: Path) -> None:
    before, after = int8.read_bytes(), for_tensorrt(int8.read_bytes())
    assert ("QuantizeLinear", TensorProto.UINT8) in kinds(before)
    assert ("DequantizeLinear", TensorProto.INT32) in kinds(before)
    assert not {kind for _, kind in kinds(after)} & {TensorProto.UINT8, TensorProto.INT32}
    onnx.checker.check_model(onnx.load_from_string(after), full_check=True)
    assert onnx.load_from_string(after).graph.name == "g"
    x = np.random.default_rng(1).normal(size=(2, 3, 16, 16)).astype(np.float32)
    answers = [
        ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for model in (before, after)
    ]
    np.testing.assert_allclose(answers[1], answers[0], rtol=2e-2, atol=2e-2)
    assert for_tensorrt(after) == after


def test_what_has_no_quantized_values_comes_back_as_it_is_and_what_is_cut_short_is_refused(int8: Path) -> None:
    assert for_tensorrt(b"anything") == b"anything"
    with pytest.raises(Refused, match="no ONNX model"):
        for_tensorrt(int8.read_bytes()[:-7])


@installed
def test_a_device_builds_an_int8_engine_from_what_ships_for_cpus(int8: Path, tmp_path: Path) -> None:
    profile = {"x": ((1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16))}
    cache = EngineCache(tmp_path / "engines")
    engine = engine_for(int8, "d" * 64, "int8", profile, cache, lambda *_: None, "sm86")
    assert contents(engine).weights["int8"] >= 8 * 3 * 3 * 3
    assert sorted(path.suffix for path in (tmp_path / "engines").iterdir()) == ["", ".engine", ".json"]
