"""TensorRT execution as far as it goes with no GPU: the checks, and an inference on a stand-in for CUDA."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from edge_agent.engines.binding import Binding
from edge_agent.engines.engine_cache import EngineCache
from edge_agent.engines.tensorrt import Gpu, TensorrtNetwork, bindings, choose_profile, engine_for
from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.wire.tensor import Tensor

X = Binding("x", "float16", (-1, 3), [((1, 3), (4, 3)), ((5, 3), (9, 3))])


def halves(*shape: int) -> Tensor:
    return Tensor("float16", list(shape), np.arange(np.prod(shape), dtype=np.float16).tobytes())


class FakeCuda:
    """GPU memory is host memory; a graph is what was enqueued while it was captured."""

    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self, devices: int = 1) -> None:
        self.devices, self.memory, self.calls = devices, dict[int, Any](), list[str]()
        self.fail: dict[str, int] = {}
        self.capturing: list[Callable[[], None]] | None = None

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.fail:
                return (self.fail[name], None)
            return (0, *getattr(self, "_" + name, lambda *_: ())(*arguments))

        return call

    def _cudaGetDeviceCount(self) -> tuple[int]:
        return (self.devices,)

    def _cudaGetDeviceProperties(self, device: int) -> tuple[Any]:
        return (SimpleNamespace(name=b"Fake Orin", major=8, minor=7),)

    def _cudaStreamCreate(self) -> tuple[int]:
        return (77,)

    def _cudaMalloc(self, size: int) -> tuple[int]:
        buffer = ctypes.create_string_buffer(size)
        self.memory[ctypes.addressof(buffer)] = buffer
        return (ctypes.addressof(buffer),)

    def _cudaFree(self, address: int) -> tuple[()]:
        del self.memory[address]
        return ()

    def _cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[()]:
        device = to if kind == 1 else source
        assert ctypes.sizeof(self.memory[device]) >= size
        ctypes.memmove(to, source, size)
        return ()

    def _cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[()]:
        self.capturing = []
        return ()

    def _cudaStreamEndCapture(self, stream: int) -> tuple[Any]:
        captured, self.capturing = self.capturing, None
        return (captured,)

    def _cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any]:
        return (graph,)

    def _cudaGraphLaunch(self, graph: Any, stream: int) -> tuple[()]:
        for run in graph:
            run()
        return ()


class FakeEngine:
    """y = 2 x, over float16[rows, 3]; also its own execution context."""

    num_io_tensors = 2

    def __init__(self, cuda: FakeCuda, rows: int = -1, kind: str = "HALF", out_rows: int | None = None) -> None:
        self.cuda, self.rows, self.kind, self.out_rows = cuda, rows, kind, out_rows
        self.num_optimization_profiles = 2
        self.given: tuple[int, int] = (rows, 3)
        self.addresses: dict[str, int] = {}
        self.profiles: list[int] = []

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name == "x" else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.kind)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, int]]:
        assert name == "x"
        if self.rows > 0:
            return [(self.rows, 3)] * 3
        return [(1, 3), (2, 3), (4, 3)] if profile == 0 else [(5, 3), (6, 3), (9, 3)]

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        return self.given if name == "x" or self.out_rows is None else (self.out_rows, 3)

    def create_execution_context(self) -> FakeEngine:
        return self

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profiles.append(profile)
        return True

    def set_input_shape(self, name: str, shape: tuple[int, int]) -> bool:
        self.given = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        if self.cuda.capturing is not None:
            self.cuda.capturing.append(self.run)
        else:
            self.run()
        return True

    def run(self) -> None:
        count = self.given[0] * 3
        x, y = (
            np.frombuffer(self.cuda.memory[self.addresses[name]], np.float16, count=count).reshape(-1) for name in "xy"
        )
        y[:] = 2 * x


def network(engine: FakeEngine | None, cuda: FakeCuda) -> TensorrtNetwork:
    trt = SimpleNamespace(ILogger=object, __name__="tensorrt", __version__="10.16.0")
    trt.ILogger = type("ILogger", (), {"__init__": lambda self: None})
    trt.Runtime = lambda log: SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    return TensorrtNetwork(b"engine", "doubler", "d" * 64, trt, cuda)


def answer(loaded: TensorrtNetwork, *shape: int) -> list[float]:
    out = loaded.infer({"x": halves(*shape)})["y"]
    assert (out.dtype, out.shape) == ("float16", list(shape))
    return list(np.frombuffer(out.data, np.float16))


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (
            Tensor("float32", [1, 3], bytes(12)),
            r"x is float32\[1, 3\], the model takes x: float16\[\?, 3\] from \[1, 3\]",
        ),
        (halves(1, 4), "x is float16"),
        (halves(3), "x is float16"),
        (Tensor("float16", [0, 3], b""), "x is float16"),
        (Tensor("float16", [-1, 3], b""), "x is float16"),
        (Tensor("float16", [1, 3], bytes(5)), "its shape needs 6"),
    ],
)
def test_inputs_are_checked_against_the_binding(tensor: Tensor, why: str) -> None:
    assert X.array(halves(2, 3)).tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(Refused, match=why):
        X.array(tensor)


def test_the_profile_is_the_first_that_holds_every_shape() -> None:
    fixed = Binding("k", "int32", (2,), [])
    second = Binding("z", "float16", (-1,), [((1,), (9,)), ((1,), (2,))])
    assert choose_profile([], {}) == 0
    assert choose_profile([fixed], {"k": (2,)}) == 0
    assert choose_profile([X, fixed], {"x": (4, 3), "k": (2,)}) == 0
    assert choose_profile([X, second], {"x": (5, 3), "z": (2,)}) == 1
    for shapes in ({"x": (10, 3), "z": (1,)}, {"x": (5, 3), "z": (3,)}):
        with pytest.raises(Refused, match=r"no profile of the engine holds x \[.*\[1, 3\] to \[4, 3\] or \[5, 3\]"):
            choose_profile([X, second], shapes)


def test_bindings_tell_types_shapes_and_ranges() -> None:
    inputs, outputs = bindings(FakeEngine(FakeCuda()))
    assert inputs == [X]
    assert outputs == [Binding("y", "float16", (-1, 3))]
    with pytest.raises(Refused, match="x is BF16"):
        bindings(FakeEngine(FakeCuda(), kind="BF16"))


def test_shapes_that_vary_choose_their_profile_and_share_growing_buffers() -> None:
    cuda = FakeCuda()
    engine = FakeEngine(cuda)
    loaded = network(engine, cuda)
    for rows in (2, 4, 1, 9, 3):
        assert answer(loaded, rows, 3) == [2.0 * n for n in range(rows * 3)]
    assert engine.profiles == [1, 0]
    assert len(cuda.memory) == 2
    assert cuda.calls.count("cudaMalloc") == 6
    assert "cudaGraphLaunch" not in cuda.calls
    loaded.close()
    assert cuda.memory == {}


def test_static_shapes_run_as_a_graph_from_the_second_run_on() -> None:
    cuda = FakeCuda()
    loaded = network(FakeEngine(cuda, rows=2), cuda)
    for _ in range(3):
        assert answer(loaded, 2, 3) == [0, 2, 4, 6, 8, 10]
    assert cuda.calls.count("cudaStreamBeginCapture") == 1
    assert cuda.calls.count("cudaGraphLaunch") == 2
    loaded.close()
    assert "cudaGraphExecDestroy" in cuda.calls


def test_info_names_the_gpu_and_what_it_takes() -> None:
    cuda = FakeCuda()
    info = network(FakeEngine(cuda), cuda).info
    assert (info.engine, info.provider, info.model) == ("tensorrt 10.16.0", "Fake Orin sm87", "doubler")
    assert info.extra["inputs"] == {"x": "x: float16[?, 3] from [1, 3] to [4, 3] or [5, 3] to [9, 3]"}


def test_wrong_inputs_touch_nothing_and_the_next_run_works() -> None:
    cuda = FakeCuda()
    loaded = network(FakeEngine(cuda), cuda)
    for inputs in ({}, {"z": halves(1, 3)}, {"x": halves(1, 4)}, {"x": halves(10, 3)}):
        with pytest.raises(Refused):
            loaded.infer(inputs)
    assert "cudaMalloc" not in cuda.calls
    assert answer(loaded, 1, 3) == [0, 2, 4]


def test_an_output_whose_size_depends_on_the_data_is_refused() -> None:
    cuda = FakeCuda()
    with pytest.raises(Refused, match="y depends on the data"):
        network(FakeEngine(cuda, out_rows=-1), cuda).infer({"x": halves(1, 3)})


def test_short_memory_may_be_tried_again_and_a_lost_gpu_ends_the_worker() -> None:
    cuda = FakeCuda()
    loaded = network(FakeEngine(cuda), cuda)
    cuda.fail = {"cudaMalloc": 2}
    with pytest.raises(Retry, match="memory is full"):
        loaded.infer({"x": halves(1, 3)})
    cuda.fail = {}
    assert answer(loaded, 1, 3) == [0, 2, 4]
    cuda.fail = {"cudaStreamSynchronize": 700}
    with pytest.raises(Fatal, match="cudaStreamSynchronize failed: 700"):
        loaded.infer({"x": halves(1, 3)})


def test_an_engine_of_another_gpu_or_version_is_refused() -> None:
    with pytest.raises(Refused, match="doubler is no engine for Fake Orin sm87"):
        network(None, FakeCuda())


def test_without_a_gpu_the_reason_is_told() -> None:
    class Reason(IntEnum):
        cudaErrorInsufficientDriver = 35

    with pytest.raises(Refused, match="there is no GPU to run on"):
        Gpu(FakeCuda(devices=0))
    cuda = FakeCuda()
    cuda.fail = {"cudaGetDeviceCount": Reason.cudaErrorInsufficientDriver}
    with pytest.raises(Refused, match="no GPU to run on: cudaErrorInsufficientDriver"):
        Gpu(cuda)


def test_without_cuda_bindings_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "cuda.bindings.runtime", None)
    with pytest.raises(Refused, match=r"outrider\[cuda\]"):
        Gpu()


installed = pytest.mark.skipif(
    find_spec("tensorrt_rtx_bindings") is None or find_spec("cuda") is None,
    reason="TensorRT for RTX and cuda-bindings are not installed: pip install '.[tensorrt]'",
)


@installed
def test_the_real_interfaces_have_what_is_called() -> None:
    import tensorrt_rtx_bindings as trt
    from cuda.bindings import runtime

    cuda = FakeCuda()
    engine = FakeEngine(cuda, rows=2)
    loaded = network(engine, cuda)
    loaded.infer({"x": halves(2, 3)})
    loaded.infer({"x": halves(2, 3)})
    loaded.close()
    assert {name for name in cuda.calls if not hasattr(runtime, name)} == set()
    assert int(runtime.cudaError_t.cudaErrorMemoryAllocation) == 2
    assert runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    assert runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    public = [name for name in dir(FakeEngine) if name.startswith(("get_", "num_", "create_", "set_", "execute_"))]
    missing = [
        name for name in public if not hasattr(trt.ICudaEngine, name) and not hasattr(trt.IExecutionContext, name)
    ]
    assert missing == []
    assert {"FLOAT", "HALF", "INT8", "UINT8", "INT32", "INT64", "BOOL"} <= set(trt.DataType.__members__)


@installed
@pytest.mark.skipif(Path("/dev/nvidiactl").exists() or Path("/dev/nvgpu").exists(), reason="there is a GPU")
def test_on_a_machine_with_no_gpu_nothing_is_loaded_or_built(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="there is no GPU to run on: cudaError"):
        TensorrtNetwork(b"vtrt", "m", "d")
    with pytest.raises(Refused, match="there is no GPU to run on"):
        engine_for(tmp_path / "m.onnx", "d", "fp16", {}, EngineCache(tmp_path / "engines"), lambda *_: None)
    assert not (tmp_path / "engines").exists()
