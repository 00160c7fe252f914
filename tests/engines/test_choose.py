"""Which engine a network gets: what does not prove itself is named, TensorRT takes over when it answers alike."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.engines import choose as choosing
from edge_agent.engines.base import ACCELERATOR, BUILD, ENGINES
from edge_agent.engines.choose import PROFILE, Upgrade, choose, profile_of
from edge_agent.engines.engine_cache import EngineCache
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.engines.providers import CPU, CUDA, PROVIDERS, RTX, TENSORRT
from edge_agent.engines.tensorrt import engine_for
from edge_agent.engines.tensorrt_build import Report
from edge_agent.errors import Fatal, OutriderError, Refused
from edge_agent.machine import cpu_count
from edge_agent.serving.frames import Served
from edge_agent.wire.tensor import Tensor
from tests.conformance.test_networks import affine, floats, gpu, values
from tests.engines.contents import contents
from tests.engines.test_tensorrt import installed

RANGES = {"x": [[1, 4], [2, 4], [8, 4]]}
nogpu = pytest.mark.skipif(gpu(), reason="there is a GPU")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "affine"
    made.mkdir()
    affine(made / "model.onnx")
    (made / PROFILE).write_bytes(msgspec.json.encode(RANGES))
    return made


class Other:
    """Stands in for a network on a GPU: the same answers, times `factor`; fails as told; takes at most two rows."""

    def __init__(self, folder: Path, factor: float = 1.0) -> None:
        self.inner, self.factor, self.closed = OnnxNetwork(folder), factor, False
        self.info = msgspec.structs.replace(self.inner.info, engine="tensorrt 11", provider="Fake Orin")
        self.fail: OutriderError | None = None
        self.served = 0

    def infer(self, inputs: Any) -> dict[str, Tensor]:
        if self.fail:
            raise self.fail
        if inputs["x"].shape[0] > 2:
            raise Refused("no profile of the engine holds it")
        self.served += 1
        out = self.inner.infer(inputs)
        return {n: Tensor(t.dtype, t.shape, (values(t) * np.float32(self.factor)).tobytes()) for n, t in out.items()}

    def close(self) -> None:
        self.closed = True


def upgrade(folder: Path, other: Any, wait: bool = True) -> Upgrade:
    first = OnnxNetwork(folder)
    made = Upgrade(first, other if callable(other) else lambda *_: other, profile_of(folder, first))
    if wait:
        made.thread.join(60)
        assert not made.thread.is_alive()
    return made


@nogpu
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("cuda", rf"no {CUDA} \(.*onnxruntime-gpu.*list cpu after it in accelerator"),
        ("tensorrt-ep", rf"no {TENSORRT}, {CUDA} \(.*TensorRT's libraries"),
        ("tensorrt-rtx-ep", rf"{RTX}.*onnxruntime-ep-nv-tensorrt-rtx"),
        ("tensorrt", "no GPU to run on|no TensorRT for current|cuda-bindings"),
        ("gpu", "no accelerator 'gpu'.*one of tensorrt, cpu, cuda"),
    ],
)
def test_what_does_not_run_here_is_refused_with_the_fix_unless_another_may_follow(
    folder: Path, tmp_path: Path, name: str, why: str
) -> None:
    with pytest.raises(Refused, match=why):
        choose(folder, [name], tmp_path)
    made = choose(folder, [name, "cpu"], tmp_path)
    assert made.info.provider == CPU
    assert list(made.info.extra["passed_over"]) == [name]
    assert made.infer({"x": floats(1, 4)})["y"].shape == [1, 3]


def test_a_model_that_no_accelerator_runs_is_refused_with_each_reason(folder: Path, tmp_path: Path) -> None:
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(Refused, match=r"model\.onnx does not load"):
        choose(folder, ["cpu"], tmp_path)
    with pytest.raises(Refused, match=r"tensorrt|GPU.*; .*does not load"):
        choose(folder, ["tensorrt", "cpu"], tmp_path)


@nogpu
def test_the_worker_takes_the_order_from_its_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ACCELERATOR, "cuda")
    monkeypatch.setenv(ENGINES, str(folder.parent / "engines"))
    with pytest.raises(Refused, match=CUDA):
        choosing.network(folder)
    monkeypatch.delenv(ACCELERATOR)
    assert choosing.network(folder).info.provider == CPU


def test_bound_inputs_and_outputs_give_the_same_answers(folder: Path) -> None:
    network = OnnxNetwork(folder)
    plain = network.infer({"x": floats(3, 4)})
    network._bound = "cpu"  # what a GPU provider does with "cuda"
    bound = network.infer({"x": floats(3, 4)})
    assert {name: values(tensor).tolist() for name, tensor in bound.items()} == {
        name: values(tensor).tolist() for name, tensor in plain.items()
    }
    assert set(PROVIDERS) == {"cpu", "cuda", "tensorrt-ep", "tensorrt-rtx-ep"}


def test_onnxruntime_serves_while_tensorrt_builds_and_then_tensorrt_does(folder: Path) -> None:
    other, go, parsed = Other(folder), threading.Event(), threading.Event()

    def make(progress: Any, built: Any) -> Other:
        progress("parsing", 1, 2)
        parsed.set()
        assert go.wait(60)
        built(Report("tensorrt", "11", "sm86", {}, 9, "0", 2.0, 300.0))
        return other

    network = upgrade(folder, make, wait=False)
    assert network.infer({"x": floats(2, 4)})["y"].shape == [2, 3]
    assert network.info.engine.startswith("onnxruntime")
    assert parsed.wait(60)
    shown = {"engine_phase": "is being built: parsing of 2 steps", "engine_done": 1, "engine_of": 2}
    assert network.info.extra[BUILD] == shown
    go.set()
    network.thread.join(60)
    assert (network.info.engine, network.info.provider) == ("tensorrt 11", "Fake Orin")
    after = msgspec.convert(network.info.extra[BUILD], Served)
    assert (after.engine_build_s, after.engine_peak_mb) == (2.0, 300.0)
    assert after.engine_phase == "serves: tensorrt 11 on Fake Orin"
    served = other.served
    assert network.infer({"x": floats(2, 4)})["y"].shape == [2, 3]
    assert network.beside({"x": floats(2, 4)})["y"].shape == [2, 3]
    assert other.served == served + 2
    network.close()
    assert other.closed


def test_a_shape_outside_the_profile_goes_on_being_answered_and_wrong_inputs_are_named(folder: Path) -> None:
    network = upgrade(folder, Other(folder))
    assert network.infer({"x": floats(7, 4)}) == network.beside({"x": floats(7, 4)})
    with pytest.raises(Refused, match=r"the model takes x: float32\[\?, 4\]"):
        network.infer({"x": floats(1, 5)})


def test_a_gpu_that_is_gone_leaves_onnxruntime_serving(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = Other(folder)
    network = upgrade(folder, other)
    other.fail = Fatal("cudaStreamSynchronize failed", "the worker must be started again")
    for _ in range(2):
        assert network.infer({"x": floats(1, 4)})["y"].shape == [1, 3]
    assert network.info.engine.startswith("onnxruntime")
    assert "is lost" in capfd.readouterr().err


def test_an_engine_that_answers_otherwise_or_is_not_built_never_serves(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Other:
        raise Refused("TensorRT does not take this graph")

    for other, why in ((Other(folder, 1.1), "is 0.1 off"), (Other(folder, float("nan")), "is nan off")):
        assert upgrade(folder, other).info.engine.startswith("onnxruntime")
        assert why in capfd.readouterr().err
    assert upgrade(folder, broken).infer({"x": floats(1, 4)})["y"].shape == [1, 3]
    assert "does not take this graph" in capfd.readouterr().err


def test_a_version_that_is_replaced_while_it_builds_takes_its_engine_along(folder: Path) -> None:
    other, go = Other(folder), threading.Event()

    def make(progress: Any, built: Any) -> Other:
        assert go.wait(60)
        return other

    network = upgrade(folder, make, wait=False)
    network.close()
    go.set()
    network.thread.join(60)
    assert network.info.engine.startswith("onnxruntime")


@installed
def test_the_engine_is_really_built_in_the_background_and_kept(folder: Path, tmp_path: Path) -> None:
    """As far as it goes with no GPU: for sm86, by the same call, read and not run."""
    told, made = list[str](), list[bytes]()

    def make(progress: Any, built: Any) -> Other:
        def tell(what: str, done: int, of: int) -> None:
            told.append(what)
            progress(what, done, of)

        profile = profile_of(folder, OnnxNetwork(folder))
        made.append(engine_for(folder / "model.onnx", "d", "graph", profile, EngineCache(tmp_path / "e"), tell, "sm86"))
        return Other(folder)

    assert upgrade(folder, make).info.engine == "tensorrt 11"
    assert contents(made[0]).targets == ["sm86"]
    assert any("MiB at most" in what for what in told)
    told.clear()
    assert upgrade(folder, make).info.engine == "tensorrt 11"
    assert (told, made[0]) == ([], made[1])


def test_free_dimensions_need_a_profile_and_fixed_ones_none(folder: Path) -> None:
    network = OnnxNetwork(folder)
    for text, why in (
        (b"{}", "no range for x"),
        (b"{", r"ranges of x.*profile\.json beside the model"),
        (None, "No such"),
    ):
        (folder / PROFILE).unlink(missing_ok=True)
        if text is not None:
            (folder / PROFILE).write_bytes(text)
        with pytest.raises(Refused, match=why):
            profile_of(folder, network)


def test_threads_follow_the_smallest_quota_of_the_cgroups_above(tmp_path: Path) -> None:
    own, group = tmp_path / "own", tmp_path / "system.slice" / "outrider.service"
    group.mkdir(parents=True)
    own.write_text("0::/system.slice/outrider.service\n")
    free = cpu_count(tmp_path, own)
    (group / "cpu.max").write_text("max 100000\n")
    assert cpu_count(tmp_path, own) == free >= 1
    (group.parent / "cpu.max").write_text("50000 100000\n")
    assert cpu_count(tmp_path, own) == 1
    assert cpu_count(tmp_path, tmp_path / "absent") == free
