"""TensorRT behind the `Network` Protocol: an engine, a stream, buffers on the GPU, a CUDA graph for static shapes.

Invariants: inputs are checked against the engine's bindings and profiles before a byte reaches the GPU, and nothing
runs anywhere but there. Buffers grow to the largest shape that was asked for, which the profiles bound.

What has not been run: the tests have no GPU. They run the checks, and the steps of an inference on a stand-in for CUDA
and TensorRT; that engines load, run and answer right on a GPU is not shown by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from edge_agent.engines import artifact
from edge_agent.engines import tensorrt_build as building
from edge_agent.engines.base import EngineInfo
from edge_agent.engines.binding import Binding, Shape
from edge_agent.engines.engine_cache import EngineCache, Key
from edge_agent.engines.qdq import for_tensorrt
from edge_agent.engines.tensorrt_build import CURRENT, Profile, Progress, Report
from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.wire.tensor import Tensor

_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64",
    "BOOL": "bool",
}  # fmt: skip
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation


def bindings(engine: Any) -> tuple[list[Binding], list[Binding]]:
    """Inputs and outputs of an ICudaEngine. Raises Refused for a type that no `Tensor` carries."""
    found: dict[str, list[Binding]] = {"INPUT": [], "OUTPUT": []}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        mode, kind = engine.get_tensor_mode(name).name, engine.get_tensor_dtype(name).name
        if kind not in _DTYPES:
            raise Refused(f"{name} is {kind}", f"inputs and outputs are one of {', '.join(_DTYPES.values())}")
        profiles = range(engine.num_optimization_profiles if mode == "INPUT" else 0)
        shapes = [[tuple(shape) for shape in engine.get_tensor_profile_shape(name, p)] for p in profiles]
        ranges = [(shape[0], shape[2]) for shape in shapes if shape]
        found[mode].append(Binding(name, _DTYPES[kind], tuple(engine.get_tensor_shape(name)), ranges))
    return found["INPUT"], found["OUTPUT"]


def choose_profile(inputs: list[Binding], shapes: Mapping[str, Shape]) -> int:
    """The first profile whose ranges hold every shape. Raises Refused when none does."""
    for profile in range(max((len(binding.ranges) for binding in inputs), default=0) or 1):
        ranges = {b.name: b.ranges[profile] for b in inputs if profile < len(b.ranges)}
        if all(
            all(a <= dim <= z for a, dim, z in zip(low, shapes[name], high, strict=True))
            for name, (low, high) in ranges.items()
        ):
            return profile
    asked = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
    raise Refused(f"no profile of the engine holds {asked}", f"it takes {', '.join(map(str, inputs))}")


class Gpu:
    """The first GPU, through cuda-bindings."""

    def __init__(self, cuda: Any = None) -> None:
        """Raises Refused when there is no GPU, no driver or no cuda-bindings."""
        try:
            self.cuda = cuda or import_module("cuda.bindings.runtime")
        except ImportError as error:
            raise Refused(f"TensorRT engines run through cuda-bindings: {error}", "outrider[cuda] has it") from error
        status, count = self.cuda.cudaGetDeviceCount()
        if int(status) or not count:
            reason = getattr(status, "name", str(status))
            raise Refused(f"there is no GPU to run on: {reason}", "is its driver there? ONNX Runtime runs on the CPU")
        found = self.call("cudaGetDeviceProperties", 0)
        name = found.name.decode() if isinstance(found.name, bytes) else str(found.name)
        self.name = f"{name} sm{found.major}{found.minor}"

    def call(self, name: str, *arguments: Any) -> Any:
        """What a CUDA function returns. Raises Retry when memory is short, else Fatal: CUDA is lost after an error."""
        error, *found = getattr(self.cuda, name)(*arguments)
        if int(error) == _OUT_OF_MEMORY:
            raise Retry("the GPU's memory is full", "a smaller shape, or unload another model")
        if int(error):
            raise Fatal(f"{name} failed: {getattr(error, 'name', error)}", "the worker must be started again")
        return found[0] if found else None


def engine_for(
    model: Path,
    digest: str,
    precision: str,
    profile: Profile,
    cache: EngineCache,
    progress: Progress,
    device: str = "",
    built: Callable[[Report], None] = lambda _: None,
) -> bytes:
    """The engine of a bundle's ONNX file: the cache's, else the one that lies beside it (artifact.py), else built; for
    this machine's GPU, or for a `device` like sm86. `built` is told of a build. Raises Refused, Retry.
    """
    runtime = building.find_runtime(device or CURRENT)
    key = Key(digest, precision, runtime.name, runtime.version, device or Gpu().name, profile)

    def build(out: Path) -> Report:
        if (brought := artifact.take(model.parent, model, runtime, key.device, profile, out)) is not None:
            progress("taken from the bundle", 1, 1)
            return brought
        form = out.with_suffix(".onnx.part")
        try:
            form.write_bytes(for_tensorrt(model.read_bytes()))
            report = building.build(form, out, device or CURRENT, profile, progress)
        finally:
            form.unlink(missing_ok=True)
        progress(f"built in {report.seconds:g} s, {report.peak_mb:g} MiB at most", 1, 1)
        built(report)
        return report

    return cache.get(key, build)


class TensorrtNetwork:
    """An engine on the first GPU. One thread at a time."""

    info: EngineInfo

    def __init__(self, engine: bytes, name: str, digest: str, trt: Any = None, cuda: Any = None) -> None:
        """Load an engine. Raises Refused: no GPU, no TensorRT, or an engine of another version or GPU."""
        started = time.perf_counter()
        self._gpu = gpu = Gpu(cuda)
        trt = trt or building.runtime_of(engine).module
        log = building.logger(trt)
        loaded = trt.Runtime(log).deserialize_cuda_engine(engine)
        self._engine = building.made(loaded, log, f"{name} is no engine for {gpu.name} and this TensorRT")
        self._context = building.made(loaded.create_execution_context(), log, f"{name} does not fit on {gpu.name}")
        self.inputs, self.outputs = bindings(self._engine)
        self._static = not any(-1 in binding.shape for binding in [*self.inputs, *self.outputs])
        self._stream, self._profile = gpu.call("cudaStreamCreate"), 0
        self._graph: Any = None
        self._rooms: dict[str, tuple[int, int]] = {}  # by name: address on the GPU, bytes
        extra = {"inputs": {b.name: str(b) for b in self.inputs}, "graph": self._static}
        load_s = round(time.perf_counter() - started, 4)
        self.info = EngineInfo(f"{trt.__name__} {trt.__version__}", gpu.name, name, digest, load_s, extra)

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once. Raises Refused for a wrong name, dtype or shape, Retry: no memory, Fatal: CUDA is lost."""
        if set(inputs) != {binding.name for binding in self.inputs}:
            raise Refused(f"inputs are {sorted(inputs)}, the engine takes {', '.join(map(str, self.inputs))}")
        arrays = {binding.name: binding.array(inputs[binding.name]) for binding in self.inputs}
        profile = choose_profile(self.inputs, {name: array.shape for name, array in arrays.items()})
        if profile != self._profile and self._context.set_optimization_profile_async(profile, int(self._stream)):
            self._profile = profile
        kinds = self._gpu.cuda.cudaMemcpyKind
        for name, array in arrays.items():
            self._context.set_input_shape(name, array.shape)
            self._copy(self._room(name, array.nbytes), array.ctypes.data, array.nbytes, kinds.cudaMemcpyHostToDevice)
        answers = {}
        for binding in self.outputs:
            shape = tuple(self._context.get_tensor_shape(binding.name))
            if -1 in shape:
                raise Refused(f"the size of {binding.name} depends on the data", "such a network runs on ONNX Runtime")
            answers[binding.name] = np.empty(shape, binding.dtype)
            self._room(binding.name, answers[binding.name].nbytes)
        self._run()
        for name, array in answers.items():
            self._copy(array.ctypes.data, self._rooms[name][0], array.nbytes, kinds.cudaMemcpyDeviceToHost)
        self._gpu.call("cudaStreamSynchronize", self._stream)
        return {name: Tensor(array.dtype.name, list(array.shape), array.tobytes()) for name, array in answers.items()}

    def close(self) -> None:
        for address, _ in self._rooms.values():
            self._gpu.call("cudaFree", address)
        if self._graph is not None:
            self._gpu.call("cudaGraphExecDestroy", self._graph)
        self._gpu.call("cudaStreamDestroy", self._stream)
        self._rooms, self._graph = {}, None
        del self._context, self._engine

    def _run(self) -> None:
        if self._graph is not None:
            self._gpu.call("cudaGraphLaunch", self._graph, self._stream)
            return
        self._enqueue()
        if self._static:  # the next run is a launch of what this one was
            mode = self._gpu.cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
            self._gpu.call("cudaStreamBeginCapture", self._stream, mode)
            self._enqueue()
            graph = self._gpu.call("cudaStreamEndCapture", self._stream)
            self._graph = self._gpu.call("cudaGraphInstantiate", graph, 0)
            self._gpu.call("cudaGraphDestroy", graph)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream)):
            raise Refused(f"{self.info.model} does not run on {self.info.provider}", "the worker's log says why")

    def _room(self, name: str, size: int) -> int:
        """The address of at least `size` bytes on the GPU for a binding."""
        size, (address, had) = max(size, 1), self._rooms.get(name, (0, 0))
        if had < size:
            if had:
                del self._rooms[name]
                self._gpu.call("cudaFree", address)
            address = int(self._gpu.call("cudaMalloc", size))
            self._rooms[name] = address, size
            self._context.set_tensor_address(name, address)
        return address

    def _copy(self, to: int, source: int, size: int, kind: Any) -> None:
        self._gpu.call("cudaMemcpyAsync", to, source, size, kind, self._stream)
