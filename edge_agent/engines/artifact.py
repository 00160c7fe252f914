"""Engines that a bundle brings along, built ahead of time with no GPU (TensorRT for RTX).

    <bundle>/engines/<target>-<runtime>-<version>.engine, .json      an engine, and what it was built of and by

Invariants: an engine is taken only by the runtime and version, the compute capability and the ranges it was built for,
from the very ONNX file beside it, and whole by its hash; else the device builds its own, as if none had come.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec

from edge_agent.engines import tensorrt_build as building
from edge_agent.engines.engine_cache import publish
from edge_agent.engines.qdq import for_tensorrt
from edge_agent.engines.tensorrt_build import Profile, Progress, Report, Runtime
from edge_agent.wire.bundle import sha256_file

FOLDER = "engines"


class Artifact(msgspec.Struct, frozen=True):
    """The JSON beside an engine: the hash of its ONNX file, what its build reported."""

    model: str
    report: Report


def add(bundle: Path, model: Path, target: str, profile: Profile, progress: Progress) -> Path:
    """Build the engine of `model` for a target into the folder that will be a bundle. Raises Refused, Retry."""
    runtime = building.find_runtime(target)
    engine = bundle / FOLDER / f"{target}-{runtime.name}-{runtime.version}.engine"
    engine.parent.mkdir(exist_ok=True)
    form, part = engine.with_suffix(".onnx.part"), engine.with_suffix(".part")
    try:
        form.write_bytes(for_tensorrt(model.read_bytes()))
        report = building.build(form, part, target, profile, progress)
        publish(part, engine, msgspec.json.encode(Artifact(sha256_file(model), report)))
    finally:
        form.unlink(missing_ok=True)
        part.unlink(missing_ok=True)
    return engine


def take(bundle: Path, model: Path, runtime: Runtime, device: str, profile: Profile, out: Path) -> Report | None:
    """Copy the engine that fits to `out`; None when the bundle has none for a device like `NVIDIA L4 sm89`."""
    target = device.rpartition(" ")[2]
    for facts in sorted((bundle / FOLDER).glob(f"{target}-*.json")) if bundle.is_dir() else []:
        try:
            found = msgspec.json.decode(facts.read_bytes(), type=Artifact)
            engine = facts.with_suffix(".engine")
            made = found.report
            asked = (runtime.name, runtime.version, target, profile, sha256_file(model), sha256_file(engine))
        except (OSError, msgspec.MsgspecError):
            continue
        if asked == (made.runtime, made.version, made.target, made.profile, found.model, made.sha256):
            shutil.copyfile(engine, out)
            return made
    return None
