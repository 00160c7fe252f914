"""ONNX Runtime behind the `Network` Protocol.

Invariants: inputs are checked against the model's own declaration before a byte reaches the runtime. The first provider
asked for must run nodes of a real inference at load, or the load is Refused with what would make it run; nodes may run
on the CPU beside it only when the CPU provider is named too. Inputs and outputs of a GPU are bound. Runs that go at the
same time on CPUs have a session with a thread each, where the model is small enough to be held twice: threads that many
runs share wait for each other. Nothing is sent anywhere (the runtime's telemetry is off).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from edge_agent.engines.base import EngineInfo
from edge_agent.engines.binding import Binding
from edge_agent.engines.providers import CPU, CUDA, RTX, TENSORRT, fix, give
from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.machine import cpu_count
from edge_agent.wire.bundle import FileEntry, content_digest, scan, sha256_file
from edge_agent.wire.tensor import Tensor

_DTYPES = {
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    "tensor(int8)": "int8", "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64",
    "tensor(uint8)": "uint8", "tensor(uint16)": "uint16", "tensor(uint32)": "uint32", "tensor(uint64)": "uint64",
}  # fmt: skip
_PROBE_SIZES = (1, 32, 64, 512)
_ON_GPU = (CUDA, TENSORRT, RTX)
_TWICE = 64 * 1024 * 1024  # bytes of a model's file that is held for runs alone and for runs beside others
# as onnxruntime words it: its arena, CUDA's codes ("CUDA failure 700: …"; below 100 the context lives), its libraries
_NO_MEMORY = re.compile(r"CUDA (?:failure|error) ?2\b|Failed to allocate memory|_STATUS_ALLOC_FAILED")
_LOST = re.compile(r"CUDA (?:failure|error) ?\d{3}\b|_STATUS_(?:EXECUTION_FAILED|INTERNAL_ERROR|NOT_INITIALIZED)")

ort.disable_telemetry_events()


class OnnxNetwork:
    """An ONNX model in an InferenceSession. `lanes` threads may use it at a time."""

    info: EngineInfo
    lanes: int

    def __init__(
        self,
        path: Path,
        providers: Sequence[str] = (CPU,),
        threads: int = 0,
        probe: Mapping[str, Tensor] | None = None,
        cache: Path | None = None,
    ) -> None:
        """Load `path` (a file, or a folder with one .onnx) and run `probe`, or zeros, once; engines go into `cache`.

        Raises Refused: not a model, a provider that is missing or did not run, inputs no `Tensor` can carry.
        """
        started = time.perf_counter()
        file = model_file(path)
        threads = threads or cpu_count()
        self.lanes = threads if list(providers) == [CPU] else 1
        with tempfile.TemporaryDirectory(prefix="outrider-onnx-") as scratch:
            self._session = _session(file, list(providers), threads, Path(scratch), cache)
            self._on_gpu = providers[0] in _ON_GPU
            self._bound = "cuda" if self._on_gpu else ""
            self.inputs = {i.name: _binding(i) for i in self._session.get_inputs()}
            self._outputs = [o.name for o in self._session.get_outputs()]
            self._prove(probe)
            nodes = _nodes_by_provider(Path(self._session.end_profiling()))
            self._single = self._session
            if self.lanes > 1 and file.stat().st_size <= _TWICE:
                self._single = _session(file, [CPU], 1, Path(scratch), None)
                self._single.end_profiling()
        if not nodes.get(providers[0]):
            raise Refused(f"{file.name}: {providers[0]} ran no node of the probe, {dict(nodes)} did", fix(providers))
        entries = scan(path) if path.is_dir() else [FileEntry(file.name, file.stat().st_size, sha256_file(file))]
        self.info = EngineInfo(
            engine=f"onnxruntime {ort.__version__}",
            provider=providers[0],
            model=path.stem if path.is_file() else path.name,
            digest=content_digest(entries),
            load_s=round(time.perf_counter() - started, 4),
            extra={"threads": threads, "nodes": dict(nodes), "inputs": {n: str(b) for n, b in self.inputs.items()}},
        )

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once. Raises Refused for a wrong name, dtype, shape or length, naming what the model takes.

        On a GPU also Retry: its memory is full, Fatal: it is lost.
        """
        return self._infer(inputs, self._session)

    def beside(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`infer` while other threads do: on one thread, so that each run has its own."""
        return self._infer(inputs, self._single)

    def close(self) -> None:
        del self._session, self._single

    def _infer(self, inputs: Mapping[str, Tensor], session: ort.InferenceSession) -> dict[str, Tensor]:
        if set(inputs) != set(self.inputs):
            raise Refused(f"inputs are {sorted(inputs)}, the model takes {self._takes()}")
        feeds = {name: self.inputs[name].array(tensor) for name, tensor in inputs.items()}
        return {
            name: _tensor(name, value) for name, value in zip(self._outputs, self._run(feeds, session), strict=True)
        }

    def _run(self, feeds: dict[str, np.ndarray], session: ort.InferenceSession) -> list[Any]:
        try:
            return self._run_bound(feeds) if self._bound else list(session.run(None, feeds))
        except Exception as error:  # the runtime's exceptions share no base but Exception
            if self._on_gpu and _NO_MEMORY.search(str(error)):
                raise Retry("the GPU's memory is full", "a smaller shape, or unload another model") from error
            if self._on_gpu and _LOST.search(str(error)):
                raise Fatal(f"the GPU is lost: {_reason(error)}", "the worker must be started again") from error
            shapes = {name: list(array.shape) for name, array in feeds.items()}
            raise Refused(f"the model cannot run {shapes}: {_reason(error)}", f"it takes {self._takes()}") from error

    def _run_bound(self, feeds: dict[str, np.ndarray]) -> list[Any]:
        """One copy to the device and one back, and no other in between."""
        bound = self._session.io_binding()
        for name, array in feeds.items():
            bound.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array, self._bound, 0))
        for name in self._outputs:
            bound.bind_output(name, self._bound)
        self._session.run_with_iobinding(bound)
        return list(bound.copy_outputs_to_cpu())

    def _prove(self, probe: Mapping[str, Tensor] | None) -> None:
        if probe is not None:
            self.infer(probe)
            return
        refused = Refused("not probed")
        for size in _PROBE_SIZES:
            try:
                self._run({name: binding.zeros(size) for name, binding in self.inputs.items()}, self._session)
                return
            except Refused as error:
                refused = error
            except Fatal as error:
                raise Refused(error.message, "is the GPU there, and its driver? nvidia-smi tells") from error
        raise Refused(f"no guessed size runs: {refused.message}", "give the bundle a probe with inputs of a real size")

    def _takes(self) -> str:
        return ", ".join(map(str, self.inputs.values()))


def model_file(path: Path) -> Path:
    """The one .onnx of a folder, or the file itself. Raises Refused."""
    files = sorted(path.rglob("*.onnx")) if path.is_dir() else [path]
    if len(files) != 1 or not files[0].is_file():
        raise Refused(f"{path} holds {len(files) if path.is_dir() else 'no'} .onnx files", "a bundle has exactly one")
    return files[0]


def _session(file: Path, providers: list[str], threads: int, scratch: Path, cache: Path | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    given = give(options, providers, cache)
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(scratch / "probe")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the language model needs the cores too
    if CPU not in providers:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = _precise(file, options, given)
    except Exception as error:  # the runtime's exceptions share no base but Exception
        hint = "not an ONNX model, or cut short" if CPU in providers else f"name {CPU} too where nodes may run on it"
        raise Refused(f"{file.name} does not load: {_reason(error)}", hint) from error
    session.disable_fallback()
    if session.get_providers()[0] != providers[0]:
        raise Refused(f"{providers[0]} could not be started, {session.get_providers()} could", fix(providers))
    return session


def _precise(file: Path, options: ort.SessionOptions, given: list[Any]) -> ort.InferenceSession:
    """Without VNNI, INT8 products saturate unless the runtime is asked to widen them, which not every graph stands."""
    with contextlib.suppress(Exception):
        options.add_session_config_entry("session.x64quantprecision", "1")
        return ort.InferenceSession(str(file), options, providers=given or None)
    options.add_session_config_entry("session.x64quantprecision", "0")
    return ort.InferenceSession(str(file), options, providers=given or None)


def _binding(node: ort.NodeArg) -> Binding:
    dtype = _DTYPES.get(node.type)
    if dtype is None:
        raise Refused(f"input {node.name} is {node.type}", f"supported: {', '.join(_DTYPES)}")
    return Binding(node.name, dtype, tuple(dim if isinstance(dim, int) else -1 for dim in node.shape))


def _nodes_by_provider(profile: Path) -> Counter[str]:
    events = json.loads(profile.read_text())
    return Counter(e["args"]["provider"] for e in events if e.get("args", {}).get("provider"))


def _tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, np.ndarray) or value.dtype.name not in _DTYPES.values():
        raise Refused(f"output {name} is no numeric tensor")
    data = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data  # no copy: it may be large
    return Tensor(value.dtype.name, list(value.shape), cast(bytes, data))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
