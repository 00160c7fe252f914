"""Engines that come with a bundle: taken where all fits, else as if none had come."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edge_agent.engines import artifact
from edge_agent.engines.artifact import Artifact, take
from edge_agent.engines.tensorrt_build import Profile, Report, Runtime
from edge_agent.wire.bundle import sha256_file

RTX = Runtime("tensorrt-rtx", "1.7.1.116", None)
RANGES: Profile = {"x": ((1, 4), (2, 4), (8, 4))}


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A bundle's folder with a model, and an engine for sm86 beside it."""
    (tmp_path / "b" / "engines").mkdir(parents=True)
    (tmp_path / "b" / "model.onnx").write_bytes(b"a network")
    (tmp_path / "b" / "engines" / "sm86-x.engine").write_bytes(b"an engine")
    digest = sha256_file(tmp_path / "b" / "engines" / "sm86-x.engine")
    report = Report("tensorrt-rtx", "1.7.1.116", "sm86", RANGES, 9, digest, 1.0, 100.0)
    facts = Artifact(sha256_file(tmp_path / "b" / "model.onnx"), report)
    (tmp_path / "b" / "engines" / "sm86-x.json").write_bytes(msgspec.json.encode(facts))
    return tmp_path / "b"


def taken(bundle: Path, runtime: Runtime = RTX, device: str = "NVIDIA A10 sm86", ranges: Profile = RANGES) -> bool:
    out = bundle.parent / "out"
    out.unlink(missing_ok=True)
    found = take(bundle, bundle / "model.onnx", runtime, device, ranges, out)
    assert (found is not None) == out.exists()
    return found is not None and out.read_bytes() == b"an engine"


def test_an_engine_is_taken_where_all_fits(bundle: Path) -> None:
    assert taken(bundle)
    assert taken(bundle, device="sm86")
    assert artifact.FOLDER == "engines"


def test_an_engine_of_another_gpu_runtime_or_profile_is_not_taken(bundle: Path) -> None:
    assert not taken(bundle, device="NVIDIA L4 sm89")
    assert not taken(bundle, RTX._replace(version="1.8"))
    assert not taken(bundle, RTX._replace(name="tensorrt"))
    assert not taken(bundle, ranges={"x": ((1, 4), (2, 4), (9, 4))})


@pytest.mark.parametrize("file", ["model.onnx", "engines/sm86-x.engine", "engines/sm86-x.json"])
def test_an_engine_of_other_bytes_is_not_taken(bundle: Path, file: str) -> None:
    (bundle / file).write_bytes(b"other bytes")
    assert not taken(bundle)


def test_a_bundle_without_engines_has_none(bundle: Path) -> None:
    (bundle / "engines" / "sm86-x.json").unlink()
    assert not taken(bundle)
