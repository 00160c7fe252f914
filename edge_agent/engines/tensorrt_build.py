"""Builds TensorRT engines from ONNX files: one code path for TensorRT 10, TensorRT 11 and TensorRT for RTX.

Invariants: a build runs in a process of its own, so a crash, a hang or a lack of memory there costs the build alone,
and the peak memory is the build's. Networks are strongly typed: the graph decides the precision, no builder flag does.
What TensorRT only tells its log is raised as Refused. `out` is a whole engine when `build` returns, and absent when it
raises; engine_cache.py gives it its name.

Targets: `sm86` and the like (TensorRT for RTX, needs no GPU), or `current`, the GPU of this machine.

What is read of an engine is the head of those of TensorRT for RTX 1.7, which NVIDIA does not document: its magic, then
at 16 its size. Only a GPU shows that an engine loads, runs and answers right.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import msgspec

from edge_agent.engines.binding import Shape
from edge_agent.errors import Refused, Retry
from edge_agent.wire.bundle import sha256_file

Profile = dict[str, tuple[Shape, Shape, Shape]]
"""The smallest, the usual and the largest shape of each input that has free dimensions."""
Progress = Callable[[str, int, int], None]
"""(what is being done, steps done, steps in all)."""

CURRENT = "current"
_MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx_bindings"}
_HINT = "pip install 'outrider[tensorrt]', or 'outrider[tensorrt-full]'; on a Jetson JetPack brings its own"
_TARGET = re.compile(r"sm[0-9]{2,3}|current")
MAGIC = b"vtrt"
CAPABILITIES = ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121")


class Runtime(NamedTuple):
    """An installed TensorRT: `tensorrt` or `tensorrt-rtx`, and its version."""

    name: str
    version: str
    module: Any


class Report(msgspec.Struct, frozen=True):
    """A build: what made which file for what, in how many seconds, with how many MiB of memory at most."""

    runtime: str
    version: str
    target: str
    profile: Profile
    bytes: int
    sha256: str
    seconds: float
    peak_mb: float
    warnings: list[str] = []


def find_runtime(target: str) -> Runtime:
    """The installed TensorRT that builds for `target`. Raises Refused with the command that installs one."""
    if not _TARGET.fullmatch(target):
        raise Refused(f"no target {target!r}", f"one of {', '.join(CAPABILITIES)}, or {CURRENT}: this machine's GPU")
    names = ["tensorrt", "tensorrt-rtx"] if target == CURRENT else ["tensorrt-rtx"]
    name = next((name for name in names if find_spec(_MODULES[name])), "")
    if not name:
        raise Refused(f"no TensorRT for {target} is installed", _HINT)
    try:
        module = import_module(_MODULES[name])
    except (ImportError, OSError, RuntimeError) as error:
        raise Refused(f"{name} is installed but does not load: {error}", _HINT) from error
    return Runtime(name, str(module.__version__), module)


def runtime_of(engine: bytes) -> Runtime:
    """The installed TensorRT that an engine is for. Raises Refused: none, or the engine is damaged."""
    if not engine.startswith(MAGIC):
        return find_runtime(CURRENT)
    if (size := int.from_bytes(engine[16:24], "little")) != len(engine):
        raise Refused(f"the engine is damaged: it has {len(engine)} of {size} bytes", "build it again")
    return find_runtime(CAPABILITIES[0])


def parse_profile(text: str) -> Profile:
    """`x=1x3x48x32:1x3x48x320:8x3x48x1280`, more inputs after commas. Raises Refused."""
    profile: Profile = {}
    for part in filter(None, text.split(",")):
        name, _, ranges = part.rpartition("=")
        try:
            low, usual, high = (tuple(int(d) for d in s.split("x")) for s in ranges.split(":"))
        except ValueError:
            low = usual = high = ()
        if not name or name in profile or not low or min(low + usual + high) < 1:
            hint = "INPUT=smallest:usual:largest, each like 1x3x48x320, inputs parted by commas"
            raise Refused(f"profile {part!r} makes no sense", hint)
        profile[name] = (low, usual, high)
    return profile


def build(
    model: Path,
    out: Path,
    target: str,
    profile: Profile,
    progress: Progress = lambda *_: None,
    timeout_s: float = 1800.0,
) -> Report:
    """Build an engine into `out` in a process of its own. Raises Refused with TensorRT's reason, Retry when killed."""
    find_runtime(target)
    if not model.is_file():
        raise Refused(f"there is no file {model}", "name an ONNX file")
    order = json.dumps({"model": str(model), "out": str(out), "target": target, "profile": profile})
    try:
        return _run(order, f"{model.name} for {target}", progress, timeout_s)
    except BaseException:
        out.unlink(missing_ok=True)
        raise


def _run(order: str, what: str, progress: Progress, timeout_s: float) -> Report:
    command = [sys.executable, "-m", __name__, order]
    last: dict[str, Any] = {}
    with tempfile.TemporaryFile() as noise, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=noise) as child:
        assert child.stdout is not None
        clock = threading.Timer(timeout_s, child.kill)
        clock.start()
        try:
            for line in child.stdout:
                last = json.loads(line) if line.endswith(b"\n") else {}
                if "step" in last:
                    progress(*last["step"])
            child.wait()
        finally:
            over = not clock.is_alive()
            clock.cancel()
            child.kill()
        noise.seek(max(0, noise.seek(0, os.SEEK_END) - 500))
        said = noise.read().decode(errors="replace").split("\n")
    if "report" in last and child.returncode == 0:
        return msgspec.convert(last["report"], Report)
    if "error" in last:
        raise Refused(f"{what}: {last['error']}", last["hint"])
    if over:
        raise Refused(f"{what}: no engine within {timeout_s:g} s", "a narrower profile builds faster")
    if child.returncode == -9:
        raise Retry(f"{what}: the build was killed", "was memory short? a smaller largest shape needs less")
    raise Refused(f"{what}: the build ended with status {child.returncode} {' '.join(said[-2:])}".strip())


def main(order: str) -> None:
    """Entry of the build process: writes the engine, tells steps and the report as lines of JSON."""
    told = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else prints, prints there
    asked = json.loads(order)
    try:
        report = _build(Path(asked["model"]), Path(asked["out"]), asked["target"], asked["profile"], told)
        print(json.dumps({"report": msgspec.to_builtins(report)}), file=told)
    except Refused as error:
        print(json.dumps({"error": error.message, "hint": error.hint}), file=told)


def _build(model: Path, out: Path, target: str, profile: Profile, told: IO[str]) -> Report:
    began = time.perf_counter()
    runtime = find_runtime(target)
    trt = runtime.module
    log = logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError:  # how the bindings say that there is none, as without a GPU
        builder = made(None, log, "TensorRT cannot start")
    network, parser = _parsed(trt, builder, log, model)
    config = builder.create_builder_config()
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, told)
    if runtime.name == "tensorrt-rtx":
        capability = getattr(trt.ComputeCapability, target.upper(), None)
        config.num_compute_capabilities = 1
        if capability is None or not config.set_compute_capability(capability, 0):
            known = ", ".join(name.lower() for name in trt.ComputeCapability.__members__ if name != "NONE")
            raise Refused(f"{runtime.name} {runtime.version} has no target {target}", f"it has {known}")
    if profile:
        _add_profile(builder, config, network, profile, log)
    serialized = made(builder.build_serialized_network(network, config), log, "TensorRT built no engine")
    del parser  # it owns the weights until here
    with out.open("wb") as file:
        file.write(serialized)
    seconds = round(time.perf_counter() - began, 2)
    size, digest, warnings = out.stat().st_size, sha256_file(out), list(dict.fromkeys(log.warnings))[:20]
    return Report(runtime.name, runtime.version, target, profile, size, digest, seconds, _peak_mb(), warnings)


def _parsed(trt: Any, builder: Any, log: Any, model: Path) -> tuple[Any, Any]:
    """The network, and the parser that must live as long."""
    flag = getattr(
        trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None
    )  # TensorRT 10 asks, later ones know no else
    network = made(builder.create_network(0 if flag is None else 1 << int(flag)), log, "no network could be made")
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(model)) and network.num_outputs:
        return network, parser
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    faults = list({error.node_operator(): _fault(error) for error in reversed(errors)}.values())[:5]  # one an op
    hint = "outrider models inspect FILE shows its ops; what is cut short or no ONNX model cannot be built"
    if any("QuantizeLinear" in fault for fault in faults):
        hint = "TensorRT takes Q/DQ around 0, with biases as numbers: outrider models compile brings other forms to it"
    raise Refused(
        f"TensorRT does not take this graph: {'; '.join(faults) or 'it has no outputs, so it is no model'}", hint
    )


def _fault(error: Any) -> str:
    where = f"{error.node_operator()} (node {error.node_name()}): " if error.node_operator() else ""
    lines = [line for line in error.desc().splitlines() if not line.startswith("[checkMacros")]
    why = " ".join(lines) if lines != ["false"] else "TensorRT has no such op"
    return f"{where}{why} [{error.code().name}]"


def _add_profile(builder: Any, config: Any, network: Any, profile: Profile, log: Any) -> None:
    names = [network.get_input(i).name for i in range(network.num_inputs)]
    if unknown := sorted(profile.keys() - set(names)):  # TensorRT takes these in silence
        raise Refused(f"the profile names {', '.join(unknown)}", f"the inputs are {', '.join(names)}")
    ranges = builder.create_optimization_profile()
    for name, (low, usual, high) in profile.items():
        ranges.set_shape(name, low, usual, high)
    if config.add_optimization_profile(ranges) < 0:
        made(None, log, "the profile is refused")


def made(result: Any, log: Any, what: str) -> Any:
    """What TensorRT returned. Raises Refused with what it logged when that is None."""
    if result is None:
        reason = (
            "; ".join(line for line in log.errors[:5] if not line.startswith("[checkMacros")) or "it gave no reason"
        )
        hint = ""
        if "profile" in reason:
            hint = "--profile INPUT=smallest:usual:largest for every input with free dimensions, fixed ones as they are"
        elif "Cuda Runtime" in reason:
            hint = f"{CURRENT} needs this machine's GPU and driver; targets like sm86 need none"
        raise Refused(f"{what}: {reason}", hint)
    return result


def logger(trt: Any) -> Any:
    """An ILogger that keeps errors and warnings."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            kept = self.errors if int(severity) <= 1 else self.warnings if int(severity) == 2 else None
            if kept is not None and len(kept) < 100:
                kept.append(text[:500])

    return Log()


def _monitor(trt: Any, told: IO[str]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.next = 0.0

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            if (now := time.monotonic()) >= self.next or step + 1 == self.steps[phase]:
                self.next = now + 0.1
                try:
                    print(json.dumps({"step": [phase, step + 1, self.steps[phase]]}), file=told)
                except OSError:
                    return False  # nobody waits any more: end the build
            return True

        def phase_finish(self, phase: str) -> None:
            self.steps.pop(phase, None)

    return Monitor()


def _peak_mb() -> float:
    """Peak resident memory in MiB. Not getrusage: what that tells begins with the parent's memory."""
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return round(int(found[1]) / 1024, 1) if found else 0.0
    return 0.0


if __name__ == "__main__":
    main(sys.argv[1])
