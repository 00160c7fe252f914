"""What every engine of networks keeps. TensorRT takes part where a GPU proves itself; elsewhere its real builds do."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.engines.base import Network
from edge_agent.engines.engine_cache import EngineCache
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.engines.tensorrt import Gpu, TensorrtNetwork, engine_for
from edge_agent.errors import Refused
from edge_agent.wire.tensor import Tensor
from tests.engines.contents import contents

PROFILE = {"x": ((1, 4), (2, 4), (8, 4))}
WEIGHTS = np.arange(12, dtype=np.float32).reshape(4, 3) / 4


def gpu() -> bool:
    try:
        Gpu()
    except Refused:
        return False
    return True


def affine(path: Path) -> Path:
    """y = x W over float32[rows, 4]; z = x over the same."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product"), helper.make_node("Relu", ["x"], ["z"], "relu")]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", k]) for n, k in (("x", 4), ("y", 3), ("z", 4))
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(WEIGHTS, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def onnxruntime(model: Path, cache: Path) -> Network:
    return OnnxNetwork(model)


def tensorrt(model: Path, cache: Path) -> Network:
    engine = engine_for(model, "d" * 64, "graph", PROFILE, EngineCache(cache), lambda *_: None)
    return TensorrtNetwork(engine, model.stem, "d" * 64)


ENGINES: list[Callable[[Path, Path], Network]] = [onnxruntime, *([tensorrt] if gpu() else [])]


@pytest.fixture(scope="module", params=ENGINES, ids=lambda made: made.__name__)
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("network")
    made = request.param(affine(folder / "affine.onnx"), folder / "engines")
    yield made
    made.close()


def floats(*shape: int) -> Tensor:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) - 2
    return Tensor("float32", list(shape), values.tobytes())


def values(tensor: Tensor) -> Any:
    return np.frombuffer(tensor.data, tensor.dtype).reshape(tensor.shape)


def test_every_output_is_right_by_name_for_every_size(network: Network) -> None:
    for rows in (1, 8, 2, 1, 3):
        x = floats(rows, 4)
        out = network.infer({"x": x})
        assert sorted(out) == ["y", "z"]
        assert out["y"].dtype == "float32"
        assert out["y"].shape == [rows, 3]
        np.testing.assert_allclose(values(out["y"]), values(x) @ WEIGHTS, rtol=1e-2, atol=1e-2)
        np.testing.assert_allclose(values(out["z"]), np.maximum(values(x), 0), rtol=1e-2)


def test_an_answer_is_not_changed_by_the_next_one(network: Network) -> None:
    first = network.infer({"x": floats(2, 4)})
    kept = bytes(first["z"].data)
    network.infer({"x": Tensor("float32", [2, 4], bytes(32))})
    assert bytes(first["z"].data) == kept


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({}, r"inputs are \[\]"),
        ({"x": floats(1, 4), "u": floats(1, 4)}, "inputs are"),
        ({"u": floats(1, 4)}, r"inputs are \['u'\].*x: float32\[\?, 4\]"),
        ({"x": Tensor("float64", [1, 4], bytes(32))}, r"x is float64\[1, 4\], the model takes x: float32"),
        ({"x": floats(1, 5)}, r"x is float32\[1, 5\]"),
        ({"x": floats(4)}, r"x is float32\[4\]"),
        ({"x": Tensor("float32", [0, 4], b"")}, "x is float32"),
        ({"x": Tensor("float32", [-1, 4], b"")}, "x is float32"),
        ({"x": Tensor("float32", [1, 4], bytes(15))}, "15 bytes of data, its shape needs 16"),
    ],
)
def test_wrong_inputs_are_refused_with_what_it_takes_and_the_next_run_works(
    network: Network, inputs: dict[str, Tensor], why: str
) -> None:
    with pytest.raises(Refused, match=why):
        network.infer(inputs)
    assert network.infer({"x": floats(1, 4)})["y"].shape == [1, 3]


def test_numbers_that_are_none_pass_through(network: Network) -> None:
    x = np.array([[np.nan, np.inf, 1, 0]], np.float32)
    out = network.infer({"x": Tensor("float32", [1, 4], x.tobytes())})
    assert not np.isfinite(values(out["y"])).any()


def test_what_is_loaded_says_what_it_is(network: Network) -> None:
    info = network.info
    assert info.engine.split()[0] in ("onnxruntime", "tensorrt", "tensorrt_rtx_bindings")
    assert info.provider
    assert info.model == "affine"
    assert len(info.digest) == 64
    assert "x: float32[?, 4]" in info.extra["inputs"]["x"]
    assert json.dumps(info.extra)


@pytest.mark.skipif(gpu(), reason="TensorRT runs the suite itself here")
@pytest.mark.skipif(find_spec("tensorrt_rtx_bindings") is None, reason="pip install '.[tensorrt]'")
def test_with_no_gpu_tensorrt_builds_the_suites_network_and_does_not_pretend_to_run_it(tmp_path: Path) -> None:
    model, cache = affine(tmp_path / "affine.onnx"), EngineCache(tmp_path / "engines")
    for target in ("sm86", "sm120"):
        engine = engine_for(model, "d" * 64, "graph", PROFILE, cache, lambda *_: None, target)
        found = contents(engine)
        assert found.targets == [target]
        assert found.layers == ["product", "relu"]
        assert found.weights["float"] >= WEIGHTS.nbytes
        with pytest.raises(Refused, match="there is no GPU to run on"):
            TensorrtNetwork(engine, "affine", "d" * 64)
