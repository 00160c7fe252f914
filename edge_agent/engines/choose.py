"""Which engine runs a network here: the first accelerator that proves itself, and TensorRT once its engine is built.

Invariants: an accelerator that was asked for and did not run is passed over only when another follows it in the
setting, and `info.extra` says why; when none is left, that is Refused. ONNX Runtime serves while TensorRT builds; the
switch is between two inferences, after both gave the same answer, and what TensorRT refuses afterwards (a shape outside
its profile) or loses (a GPU that is gone) ONNX Runtime answers.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_agent.engines.base import ACCELERATOR, BUILD, ENGINES, EngineInfo, Network
from edge_agent.engines.engine_cache import EngineCache
from edge_agent.engines.onnxruntime import OnnxNetwork, model_file
from edge_agent.engines.providers import PROVIDERS
from edge_agent.engines.tensorrt_build import Profile, Progress, Report
from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.wire.tensor import Tensor

ORDER = ("tensorrt", "cpu")
PROFILE = "profile.json"
_TOLERANCE = 0.05

Make = Callable[[Progress, Callable[[Report], None]], Network]


def network(path: Path) -> Network:
    """The engine for a bundle's folder, as the daemon's settings (in the environment) ask. Raises Refused."""
    order = (os.environ.get(ACCELERATOR) or ",".join(ORDER)).split(",")
    folder = os.environ.get(ENGINES, "")
    return choose(path, order, Path(folder) if folder else None)


def choose(path: Path, order: Sequence[str], cache: Path | None) -> Network:
    """The first of `order` that runs the network here. Raises Refused with the reason of each."""
    passed: dict[str, str] = {}
    for name in order:
        try:
            if name == "tensorrt":
                made: Network = _tensorrt(path, cache)
            elif name in PROVIDERS:
                made = OnnxNetwork(path, PROVIDERS[name], cache=cache)
            else:
                raise Refused(f"there is no accelerator {name!r}", f"one of tensorrt, {', '.join(PROVIDERS)}")
        except Refused as error:
            passed[name] = str(error)
            if name == order[-1]:
                raise Refused("; ".join(passed.values()) if len(passed) > 1 else error.message, error.hint) from error
            continue
        if passed:
            made.info = msgspec.structs.replace(made.info, extra=made.info.extra | {"passed_over": passed})
        return made
    raise Refused("no accelerator is named", f"some of tensorrt, {', '.join(PROVIDERS)}")


def _tensorrt(path: Path, cache: Path | None) -> Network:
    """ONNX Runtime, and TensorRT in its place when it is built. Raises Refused: no GPU, no runtime, no profile."""
    from edge_agent.engines.tensorrt import Gpu, TensorrtNetwork, engine_for
    from edge_agent.engines.tensorrt_build import CURRENT, find_runtime

    Gpu()
    find_runtime(CURRENT)
    if cache is None:
        raise Refused("engines have no place to be kept", f"{ENGINES} names a folder")
    first = OnnxNetwork(path)
    profile, digest = profile_of(path, first), first.info.digest

    def make(progress: Progress, built: Callable[[Report], None]) -> Network:
        kept = EngineCache(cache)
        engine = engine_for(model_file(path), digest, "graph", profile, kept, progress, built=built)
        return TensorrtNetwork(engine, first.info.model, digest)

    return Upgrade(first, make, profile)


def profile_of(path: Path, network: OnnxNetwork) -> Profile:
    """The ranges in the bundle's profile.json. Raises Refused when free dimensions have none, or it cannot be read."""
    free = [name for name, binding in network.inputs.items() if -1 in binding.shape]
    try:
        profile = msgspec.json.decode((path / PROFILE).read_bytes(), type=Profile) if free else {}
    except (OSError, msgspec.MsgspecError) as error:
        hint = f'{PROFILE} beside the model: {{"{free[0]}": [smallest, usual, largest shape]}}'
        raise Refused(f"TensorRT needs the ranges of {', '.join(free)}: {error}", hint) from error
    if missing := [name for name in free if name not in profile]:
        raise Refused(f"{PROFILE} has no range for {', '.join(missing)}", "name every input with free dimensions")
    return profile


class Upgrade:
    """A network that serves, and in its place another that a thread makes meanwhile. As many lanes as the first has."""

    info: EngineInfo

    def __init__(self, first: OnnxNetwork, make: Make, profile: Profile) -> None:
        self._first, self._make, self._profile = first, make, profile
        self._better: Network | None = None
        self._one, self._told, self._closed = threading.Lock(), "", False
        self._build: dict[str, Any] = {"engine_phase": "building"}
        self.lanes = first.lanes
        self.info = msgspec.structs.replace(first.info, extra=first.info.extra | {BUILD: self._build})
        self.thread = threading.Thread(target=self._upgrade, name="tensorrt", daemon=True)
        self.thread.start()

    def infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once. Raises Refused for a wrong name, dtype or shape."""
        answer = self._sooner(inputs) if self._better is not None else None
        return self._first.infer(inputs) if answer is None else answer

    def beside(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`infer` while other threads do."""
        answer = self._sooner(inputs) if self._better is not None else None
        return self._first.beside(inputs) if answer is None else answer

    def _sooner(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """TensorRT's answer; None where the first has to answer, or to say what is wrong with the inputs."""
        with self._one, contextlib.suppress(Refused, Retry):
            try:
                return self._better.infer(inputs) if self._better is not None else None
            except Fatal as error:
                self._better = None
                self._say(f"is lost, ONNX Runtime serves: {error}", self._first.info)
        return None

    def close(self) -> None:
        with self._one:
            if self._better is not None:
                self._better.close()
            self._better, self._closed = None, True
        self._first.close()

    def _upgrade(self) -> None:
        try:
            better = self._make(self._progress, self._built)
            self._compare(better)
        except Exception as error:  # noqa: BLE001 - whatever a build or a driver raises: what serves goes on
            self._say(f"is not used, ONNX Runtime serves: {error}", self._first.info)
            return
        with self._one:
            if self._closed:
                return better.close()
            self._better = better
        self._say(f"serves: {better.info.engine} on {better.info.provider}", better.info)

    def _progress(self, what: str, done: int, of: int) -> None:
        if self._closed:
            raise Refused("nobody waits for this engine any more")
        self._note(engine_done=done, engine_of=of)
        if what != self._told:
            self._told = what
            self._say(f"is being built: {what} of {of} steps", self.info)

    def _built(self, report: Report) -> None:
        self._note(engine_build_s=report.seconds, engine_peak_mb=report.peak_mb)

    def _say(self, what: str, info: EngineInfo) -> None:
        print(f"{info.model}: TensorRT {what}", file=sys.stderr)
        self.info = info
        self._note(engine_phase=what[:300])

    def _note(self, **more: Any) -> None:
        self._build = self._build | more
        self.info = msgspec.structs.replace(self.info, extra=self.info.extra | {BUILD: self._build})

    def _compare(self, better: Network) -> None:
        """Raises Refused when both do not answer alike to the same noise."""
        noise = np.random.default_rng(0)
        inputs = {}
        for name, binding in self._first.inputs.items():
            shape = self._profile[name][1] if name in self._profile else binding.shape
            values = noise.normal(size=shape).astype(binding.dtype)
            inputs[name] = Tensor(binding.dtype, list(shape), values.tobytes())
        expected, found = self._first.infer(inputs), better.infer(inputs)
        for name, tensor in expected.items():
            want, have = _floats(tensor), _floats(found[name])
            error = np.linalg.norm(have - want) / max(float(np.linalg.norm(want)), 1e-9)
            if not error <= _TOLERANCE:
                raise Refused(f"{name} is {error:.3g} off ONNX Runtime's, {_TOLERANCE} is allowed", "see the log")


def _floats(tensor: Tensor) -> np.ndarray:
    return np.frombuffer(tensor.data, tensor.dtype).astype(np.float64)
