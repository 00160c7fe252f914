"""The ONNX Runtime engine: right answers, clear refusals, no silent provider."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.engines import onnxruntime as engine
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.engines.providers import CPU
from edge_agent.errors import Fatal, OutriderError, Refused, Retry
from edge_agent.wire.bundle import content_digest, scan
from edge_agent.wire.tensor import Tensor


def save(
    path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, tuple[int, list[int | str]]], **weights: np.ndarray
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(path))
    return path


@pytest.fixture
def adder(tmp_path: Path) -> Path:
    """out = a + b over float32[?, 3]."""
    inputs: dict[str, tuple[int, list[int | str]]] = dict.fromkeys("ab", (TensorProto.FLOAT, ["rows", 3]))
    return save(tmp_path / "adder.onnx", [helper.make_node("Add", ["a", "b"], ["out"])], inputs)


def floats(*shape: int) -> Tensor:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return Tensor("float32", list(shape), values.tobytes())


def test_the_answer_is_the_one_of_the_same_sum_in_numpy(adder: Path) -> None:
    network = OnnxNetwork(adder)
    out = network.infer({"a": floats(2, 3), "b": floats(2, 3)})["out"]
    assert (out.dtype, out.shape) == ("float32", [2, 3])
    assert np.frombuffer(out.data, np.float32).tolist() == [0, 2, 4, 6, 8, 10]
    network.close()


def test_runs_beside_others_have_a_thread_each_and_give_the_same_answers(
    adder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {"a": floats(2, 3), "b": floats(2, 3)}
    for most, twice in ((64 << 20, True), (0, False)):
        monkeypatch.setattr(engine, "_TWICE", most)
        network = OnnxNetwork(adder, threads=2)
        assert (network._single is not network._session) == twice
        assert network._single.get_session_options().intra_op_num_threads == (1 if twice else 2)
        with ThreadPoolExecutor(2) as threads:
            found = list(threads.map(network.beside, [inputs] * 20))
        assert found == [network.infer(inputs)] * 20
        with pytest.raises(Refused, match=r"inputs are \['a'\], the model takes a: "):
            network.beside({"a": floats(2, 3)})
        network.close()
    alone = OnnxNetwork(adder, threads=1)
    assert (alone.lanes, alone._single) == (1, alone._session)


def test_info_tells_what_ran_and_the_digest_of_the_folder(adder: Path) -> None:
    info = OnnxNetwork(adder.parent).info
    assert info.provider == CPU
    assert info.extra["nodes"] == {CPU: 1}
    assert info.extra["inputs"] == {"a": "a: float32[?, 3]", "b": "b: float32[?, 3]"}
    assert info.digest == content_digest(scan(adder.parent))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"c": floats(2, 3)}, "inputs are"),
        ({"b": Tensor("float64", [2, 3], bytes(48))}, "b is float64"),
        ({"b": floats(2, 4)}, r"b is float32\[2, 4\], the model takes b: float32\[\?, 3\]"),
        ({"b": floats(3)}, "b is float32"),
        ({"b": Tensor("float32", [0, 3], b"")}, "b is float32"),
        ({"b": Tensor("float32", [-1, 3], b"")}, "b is float32"),
        ({"b": Tensor("float32", [2, 3], bytes(23))}, "its shape needs 24"),
        ({"b": floats(3, 3)}, "cannot run"),
    ],
)
def test_wrong_inputs_are_refused_with_what_the_model_takes_and_the_next_run_works(
    adder: Path, change: dict[str, Tensor], why: str
) -> None:
    network = OnnxNetwork(adder)
    good = {"a": floats(2, 3), "b": floats(2, 3)}
    with pytest.raises(Refused, match=why):
        network.infer({**good, **change})
    assert network.infer(good)["out"].shape == [2, 3]


def test_every_truncation_of_a_model_is_refused(adder: Path) -> None:
    whole = adder.read_bytes()
    for length in range(len(whole)):
        adder.write_bytes(whole[:length])
        with pytest.raises(Refused, match=r"adder\.onnx does not load"):
            OnnxNetwork(adder)


def test_what_is_no_model_is_refused(tmp_path: Path, adder: Path) -> None:
    text = tmp_path / "text.onnx"
    text.write_text("not a model\n" * 100)
    for path, why in [(text, "does not load"), (tmp_path / "absent.onnx", "no .onnx"), (tmp_path, "holds 2")]:
        with pytest.raises(Refused, match=why):
            OnnxNetwork(path)


def test_a_model_whose_inputs_no_tensor_carries_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("StringNormalizer", ["s"], ["out"])
    with pytest.raises(Refused, match=r"input s is tensor\(string\)|does not load"):
        OnnxNetwork(save(tmp_path / "s.onnx", [node], {"s": (TensorProto.STRING, [1])}))


def test_a_provider_this_build_lacks_is_refused_by_name(adder: Path) -> None:
    with pytest.raises(Refused, match="has no NoSuchExecutionProvider"):
        OnnxNetwork(adder, ["NoSuchExecutionProvider", CPU])
    with pytest.raises(Refused, match="no provider"):
        OnnxNetwork(adder, [])


@pytest.mark.skipif("AzureExecutionProvider" not in ort.get_available_providers(), reason="no second provider here")
@pytest.mark.parametrize("others", [[], [CPU]])
def test_a_provider_that_is_there_but_runs_nothing_does_not_count(adder: Path, others: list[str]) -> None:
    with pytest.raises(Refused, match=r"ran no node|fallback"):
        OnnxNetwork(adder, ["AzureExecutionProvider", *others])


def test_a_model_that_no_guessed_size_fits_needs_a_probe(tmp_path: Path) -> None:
    product = helper.make_node("MatMul", ["x", "w"], ["out"])
    weights = np.ones((7, 2), np.float32)
    path = save(tmp_path / "m.onnx", [product], {"x": (TensorProto.FLOAT, ["rows", "columns"])}, w=weights)
    with pytest.raises(Refused, match="probe"):
        OnnxNetwork(path)
    assert OnnxNetwork(path, probe={"x": floats(1, 7)}).infer({"x": floats(4, 7)})["out"].shape == [4, 2]


def test_threads_follow_the_affinity_of_the_process() -> None:
    cpu = min(os.sched_getaffinity(0))
    program = (
        f"import os; os.sched_setaffinity(0, {{{cpu}}})\nfrom edge_agent.machine import cpu_count; print(cpu_count())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "1"


class Failing:
    """Stands in for a session on a GPU whose runs fail as onnxruntime words it."""

    def __init__(self, says: str) -> None:
        self.says = says

    def io_binding(self) -> None:
        raise RuntimeError(self.says)


@pytest.mark.parametrize(
    ("says", "kind"),
    [
        ("CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; expr=cudaStreamSynchronize", Fatal),
        ("CUDA error 719: unspecified launch failure", Fatal),
        ("CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR ; GPU=0", Fatal),
        ("CUDA failure 2: out of memory ; GPU=0", Retry),
        ("bfc_arena.cc:376 Failed to allocate memory for requested buffer of size 9", Retry),
        ("CUDNN failure 3000: CUDNN_STATUS_NOT_SUPPORTED", Refused),
        ("CUDA failure 1: invalid argument", Refused),
        ("Got invalid dimensions for input: a", Refused),
    ],
)
def test_an_error_of_the_gpu_is_told_from_one_of_the_inputs(adder: Path, says: str, kind: type[OutriderError]) -> None:
    network = OnnxNetwork(adder)
    network._on_gpu, network._bound = True, "cuda"
    network._session = Failing(says)
    with pytest.raises(kind) as caught:
        network.infer({"a": floats(2, 3), "b": floats(2, 3)})
    assert type(caught.value) is kind
    network._on_gpu = False
    with pytest.raises(Refused):
        network.infer({"a": floats(2, 3), "b": floats(2, 3)})
