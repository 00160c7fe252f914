"""TensorRT engines: real ones for three GPU generations, built with no GPU, and the reasons when none is made."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edge_agent.engines import tensorrt_build
from edge_agent.engines.tensorrt_build import build, find_runtime, parse_profile, runtime_of
from edge_agent.errors import Refused, Retry
from edge_agent.wire.bundle import sha256_file
from tests.engines.contents import contents

REC = "x=1x3x48x32:1x3x48x320:8x3x48x1280"
SHAPES = {"w1": (16, 3, 3, 3), "w2": (16, 16, 3, 3), "w3": (16, 10)}
TARGETS = ("sm86", "sm89", "sm120")
real = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None, reason="TensorRT for RTX is not installed: pip install '.[tensorrt]'"
)


def relu(path: Path, op: str = "Relu", domain: str = "", dims: tuple[int | str, ...] = ("rows", 4)) -> Path:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], "first", domain=domain)], "g", values[:1], values[1:])
    sets = [helper.make_opsetid("", 20)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), str(path))
    return path


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small classifier in FP32, and its FP16 and INT8 Q/DQ forms."""
    from models.quantize import to_fp16, to_int8

    folder, rng = tmp_path_factory.mktemp("forms"), np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.normal(0, 0.2, s).astype(np.float32), n) for n, s in SHAPES.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"], "conv1", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"], "relu1"),
        helper.make_node("Conv", ["b", "w2"], ["c"], "conv2", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], "pool"),
        helper.make_node("Flatten", ["d"], ["e"], "flat"),
        helper.make_node("MatMul", ["e", "w3"], ["y"], "head"),
    ]
    values = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 32, 32]),
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 10]),
    ]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], weights)
    found = {form: folder / f"{form}.onnx" for form in ("fp32", "fp16", "int8")}
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(found["fp32"]))
    to_fp16(found["fp32"], found["fp16"])
    data = [{"x": rng.normal(size=(1, 3, 32, 32)).astype(np.float32)} for _ in range(4)]
    to_int8(found["fp32"], found["int8"], data)
    return found


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory, ppocr_models: dict[str, Path]) -> Path:
    """PP-OCR's recognition network in FP16."""
    from models.quantize import to_fp16

    path = tmp_path_factory.mktemp("reader") / "rec-fp16.onnx"
    to_fp16(ppocr_models["rec"], path)
    return path


@real
@pytest.mark.parametrize("target", TARGETS)
def test_the_fp16_reader_becomes_an_engine_for_each_gpu_generation(tmp_path: Path, reader: Path, target: str) -> None:
    steps: list[tuple[str, int, int]] = []
    report = build(reader, tmp_path / "e", target, parse_profile(REC), lambda *step: steps.append(step))
    engine = (tmp_path / "e").read_bytes()
    found = contents(engine)
    assert (report.runtime, report.target, report.bytes) == ("tensorrt-rtx", target, len(engine))
    assert report.version == found.version
    assert report.sha256 == sha256_file(tmp_path / "e")
    assert report.profile == parse_profile(REC)
    assert found.targets == [target]
    assert 10_000_000 < found.weights["half"] < 11_000_000
    assert found.weights.get("float", 0) < 1000
    convolutions = [node.name for node in onnx.load(str(reader)).graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 57
    assert set(convolutions) <= set(found.layers)
    assert 10_000_000 < len(engine) < 25_000_000
    assert 0 < report.seconds < 170
    assert 100 < report.peak_mb < 1500
    assert any(what == "Building engine from subgraph" for what, _, _ in steps)
    assert all(0 < done <= total for _, done, total in steps)


@real
@pytest.mark.parametrize("target", TARGETS)
def test_the_weights_in_an_engine_are_of_the_type_that_the_graph_decides(
    tmp_path: Path, forms: dict[str, Path], target: str
) -> None:
    profile = parse_profile("x=1x3x32x32:4x3x32x32:8x3x32x32")
    found = {}
    for form, model in forms.items():
        build(model, tmp_path / form, target, profile)
        found[form] = contents((tmp_path / form).read_bytes())
        assert found[form].targets == [target]
        assert {"conv1", "conv2", "head"} <= set(found[form].layers)
    parameters = sum(np.prod(shape) for shape in SHAPES.values())
    assert set(found["fp32"].weights) == {"float"}
    assert parameters * 4 <= found["fp32"].weights["float"] < parameters * 4.1
    assert parameters * 2 <= found["fp16"].weights["half"] < parameters * 2.2
    assert parameters <= found["int8"].weights["int8"] < parameters * 1.1
    assert found["fp16"].weights.get("float", 0) + found["int8"].weights["float"] < parameters
    assert {"x_QuantizeLinear", "w1_DequantizeLinear"} <= set(found["int8"].layers)
    assert not any("Quantize" in layer for layer in found["fp16"].layers)


@real
def test_damaged_engines_are_told_from_whole_ones(tmp_path: Path) -> None:
    build(relu(tmp_path / "m.onnx"), tmp_path / "e", "sm86", parse_profile("x=1x4:2x4:8x4"))
    engine = (tmp_path / "e").read_bytes()
    assert runtime_of(engine).name == "tensorrt-rtx"
    for damaged in (engine[:-1], engine[:39], engine + b"x"):
        with pytest.raises(Refused, match="damaged"):
            runtime_of(damaged)


@real
@pytest.mark.parametrize(
    ("profile", "why"),
    [
        ("", "no optimization profile has been defined"),
        ("x=1x5:2x5:8x5", r"At dimension axis 1, profile has min=5, opt=5, max=5 but tensor has 4"),
        ("x=4x4:2x4:8x4", "MIN<=OPT<=MAX"),
        ("x=1x4x1:1x4x1:1x4x1", "has 2 dimensions but profile 0 has 3"),
        ("z=1x4:2x4:8x4", r"the profile names z \(the inputs are x\)"),
    ],
)
def test_a_bad_profile_is_refused_with_the_reason_of_the_log(tmp_path: Path, profile: str, why: str) -> None:
    with pytest.raises(Refused, match=why):
        build(relu(tmp_path / "m.onnx"), tmp_path / "e", "sm86", parse_profile(profile))
    assert not (tmp_path / "e").exists()


@real
@pytest.mark.parametrize(
    ("op", "domain", "why"),
    [
        ("Sparkle", "com.example", r"Sparkle \(node first\).*Plugin not found"),
        ("Det", "", r"Det \(node first\).*no such op"),
    ],
)
def test_an_unsupported_op_is_named(tmp_path: Path, op: str, domain: str, why: str) -> None:
    model = relu(tmp_path / "m.onnx", op, domain, ("rows", 4, 4))
    with pytest.raises(Refused, match=why):
        build(model, tmp_path / "e", "sm86", {})


@real
@pytest.mark.parametrize("size", [None, 0, 40])
def test_what_is_no_model_is_refused(tmp_path: Path, size: int | None) -> None:
    model = relu(tmp_path / "m.onnx")
    model.write_bytes(b"not a model\n" * 100 if size is None else model.read_bytes()[:size])
    with pytest.raises(Refused, match=r"m\.onnx for sm86: .*(Failed to parse|no outputs)"):
        build(model, tmp_path / "e", "sm86", {})
    with pytest.raises(Refused, match="no file"):
        build(tmp_path / "absent.onnx", tmp_path / "e", "sm86", {})


@real
def test_targets_that_cannot_be_built_say_which_can(tmp_path: Path) -> None:
    model = relu(tmp_path / "m.onnx")
    with pytest.raises(Refused, match=r"no target sm87 \(.*sm86, sm89"):
        build(model, tmp_path / "e", "sm87", {})
    with pytest.raises(Refused, match="no target 'ampere'"):
        build(model, tmp_path / "e", "ampere", {})


@real
def test_without_a_gpu_the_current_one_cannot_be_built_for(tmp_path: Path) -> None:
    if Path("/dev/nvidiactl").exists() or Path("/dev/nvgpu").exists():
        pytest.skip("there is a GPU")
    with pytest.raises(Refused, match="targets like sm86 need none"):
        build(relu(tmp_path / "m.onnx"), tmp_path / "e", "current", parse_profile("x=1x4:2x4:8x4"))


def test_without_tensorrt_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_build, "_MODULES", {"tensorrt": "no_such_trt", "tensorrt-rtx": "no_such_trt_rtx"})
    for target in ("sm86", "current"):
        with pytest.raises(Refused, match=r"no TensorRT .*\(pip install 'outrider\[tensorrt\]'"):
            find_runtime(target)


def test_a_tensorrt_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_trt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(tensorrt_build, "_MODULES", {"tensorrt": "broken_trt", "tensorrt-rtx": "no_such_trt_rtx"})
    with pytest.raises(Refused, match=r"does not load: libnvinfer\.so\.10"):
        find_runtime("current")


TENSORRT_10 = """
import enum, pathlib
__version__ = "10.16.0"
class ILogger:
    pass
class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1
class Network:
    num_inputs = num_outputs = 1
    name = "x"
    def get_input(self, index):
        return self
class Config:
    def add_optimization_profile(self, profile):
        return 0
class Profile:
    def set_shape(self, name, *shapes):
        pass
class OnnxParser:
    def __init__(self, network, log):
        pass
    def parse_from_file(self, path):
        return pathlib.Path(path).is_file()
class Builder:
    def __init__(self, log):
        if not GPU:
            log.log(1, "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
    def create_network(self, flags):
        self.flags = flags
        return Network()
    def create_builder_config(self):
        return Config()
    def create_optimization_profile(self):
        return Profile()
    def build_serialized_network(self, network, config):
        assert not hasattr(config, "num_compute_capabilities")
        return b"ftrt flags %d" % self.flags
"""


@pytest.mark.parametrize("gpu", [True, False])
def test_tensorrt_10_is_asked_for_strong_types_and_builds_for_the_gpu_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool
) -> None:
    (tmp_path / "tensorrt.py").write_text(f"GPU = {gpu}\n{TENSORRT_10}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    model, profile = relu(tmp_path / "m.onnx"), parse_profile("x=1x4:2x4:8x4")
    try:
        if gpu:
            report = build(model, tmp_path / "e", "current", profile)
            assert (report.runtime, report.version, report.target) == ("tensorrt", "10.16.0", "current")
            assert (tmp_path / "e").read_bytes() == b"ftrt flags 2"
        else:
            with pytest.raises(Refused, match="TensorRT cannot start: CUDA initialization failure"):
                build(model, tmp_path / "e", "current", profile)
    finally:
        del sys.modules["tensorrt"]


@pytest.mark.parametrize(
    "text", ["x", "x=", "x=1x3", "x=1:2", "x=1:2:a", "x=0:1:2", "=1:2:3", "x=1:2:3,x=1:2:3", "x=1:2:3:4"]
)
def test_profiles_that_make_no_sense_are_refused_with_the_form(text: str) -> None:
    with pytest.raises(Refused, match="smallest:usual:largest"):
        parse_profile(text)


def test_a_profile_has_a_range_an_input() -> None:
    assert parse_profile("") == {}
    assert parse_profile("a=1x2:3x2:4x2,b:0=1:1:1") == {"a": ((1, 2), (3, 2), (4, 2)), "b:0": ((1,), (1,), (1,))}


@real
@pytest.mark.parametrize(
    ("timeout_s", "why"), [(0.05, "no engine within 0.05 s"), (60, r"was killed \(was memory short\?")]
)
def test_a_build_that_hangs_or_is_killed_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float, why: str
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Child(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[call-overload]
            started.append(self)
            if timeout_s > 1:
                os.kill(self.pid, signal.SIGKILL)

    monkeypatch.setattr(tensorrt_build.subprocess, "Popen", Child)
    (tmp_path / "e").write_bytes(b"half an engine")
    with pytest.raises(Retry if timeout_s > 1 else Refused, match=why):
        build(relu(tmp_path / "m.onnx"), tmp_path / "e", "sm86", {}, timeout_s=timeout_s)
    assert not (tmp_path / "e").exists()
    assert started[0].poll() is not None


@real
def test_a_build_ends_when_nobody_waits_for_it(tmp_path: Path, reader: Path) -> None:
    out = tmp_path / "e"
    program = (
        "import sys; from pathlib import Path; from edge_agent.engines.tensorrt_build import build, parse_profile\n"
        "step = lambda *a: print('step', flush=True)\n"
        f"build(Path(sys.argv[1]), Path(sys.argv[2]), 'sm86', parse_profile({REC!r}), step)"
    )
    command = [sys.executable, "-c", program, str(reader), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline()
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        parent.kill()
    assert len(children) == 1
    until = time.monotonic() + 60
    while Path(f"/proc/{children[0]}").exists() and time.monotonic() < until:
        threading.Event().wait(0.1)
    assert not Path(f"/proc/{children[0]}").exists()
    assert not out.exists()
