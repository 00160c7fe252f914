"""Bundles of adapters: for the very base model, with a probe that its base alone would not pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from edge_agent.engines.base import Generate
from edge_agent.engines.genai import GenaiModel
from edge_agent.errors import Refused
from edge_agent.update import probe
from edge_agent.wire.bundle import Base, BundleKind, Manifest, content_digest, scan
from models import adapter as adapters
from models.cli import app
from models.errors import ModelError
from models.package import open_bundle, package
from tests.adapters import adapter


@pytest.fixture(scope="module")
def made(
    model_cache: Path, smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Manifest]:
    folder = adapter(tmp_path_factory.mktemp("adapter") / "site", smollm2_folder, 1, license="MIT")
    (folder / "train.log").write_text("not for devices")
    bundle, manifest = adapters.package_adapter("site", folder, model_cache, folder.parent / "bundle")
    return folder, bundle, manifest


def test_the_bundle_is_the_adapter_alone_and_names_its_base(
    made: tuple[Path, Path, Manifest], smollm2_folder: Path
) -> None:
    _, bundle, manifest = made
    assert open_bundle(bundle) == manifest
    assert manifest.kind is BundleKind.ADAPTER
    assert manifest.base == Base("smollm2", content_digest(scan(smollm2_folder)))
    assert (manifest.meta["task"], manifest.meta["prompt"], manifest.license) == ("tools", "signatures", "MIT")
    assert manifest.version == f"1+{manifest.meta['content_digest'][:8]}"
    assert [entry.path for entry in manifest.files] == ["adapter.json", "adapter.npz"]
    assert manifest.size < 100_000


def test_the_probe_passes_with_the_adapter_and_not_with_the_base_or_another(
    made: tuple[Path, Path, Manifest], smollm2_folder: Path, tmp_path: Path
) -> None:
    folder, _, manifest = made
    model = GenaiModel(smollm2_folder)
    model.load_adapter("good", folder)
    model.load_adapter("other", adapter(tmp_path / "other", smollm2_folder, 2))

    def say(name: str) -> str:
        asked = Generate("", manifest.probe["prompt"], max_tokens=manifest.probe["max_tokens"], adapter=name)
        return "".join(piece.text for piece in model.generate(asked, lambda: False))

    probe.compare_text(manifest.probe, say("good"))
    for name in ("", "other"):
        with pytest.raises(Refused, match="a good one"):
            probe.compare_text(manifest.probe, say(name))
    model.close()


@pytest.mark.parametrize(
    ("about", "says"),
    [
        ({"base": "0" * 64}, "for a base model of digest 000000000000, there is smollm2"),
        ({"base": 3}, "no adapter folder"),
    ],
)
def test_an_adapter_for_another_base_is_not_packaged(
    model_cache: Path, smollm2_folder: Path, tmp_path: Path, about: dict[str, Any], says: str
) -> None:
    folder = adapter(tmp_path / "a", smollm2_folder, 1, **about)
    with pytest.raises(ModelError, match=says):
        adapters.package_adapter("site", folder, model_cache)
    (folder / "adapter.npz").unlink()
    with pytest.raises(ModelError, match="no adapter folder"):
        adapters.package_adapter("site", folder, model_cache)


def test_a_shipped_adapter_is_packaged_by_its_name(
    model_cache: Path, smollm2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "FOLDERS", tmp_path)
    adapter(tmp_path / "toolcaller", smollm2_folder, 1, version="3", task="chat")
    _, manifest = package("toolcaller", model_cache, tmp_path / "bundle")
    assert manifest.version.startswith("3+")
    assert manifest.meta["task"] == "chat"
    run, environment = CliRunner(), {"OUTRIDER_CACHE": str(model_cache)}
    listed = json.loads(run.invoke(app, ["list", "--json"], env=environment).stdout)
    assert {"toolcaller": "adapter"}.items() <= {row["name"]: row["kind"] for row in listed}.items()


def test_the_commands_take_a_folder_and_a_name(
    made: tuple[Path, Path, Manifest], model_cache: Path, tmp_path: Path
) -> None:
    folder, _, manifest = made
    options = ["--adapter", str(folder), "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, ["package", "site", *options], env={"OUTRIDER_CACHE": str(model_cache)})
    assert json.loads(done.stdout)["digest"] == manifest.meta["content_digest"]


def test_a_run_becomes_an_adapter_with_the_bias_that_is_asked_for(
    model_cache: Path, smollm2_folder: Path, tmp_path: Path
) -> None:
    (run := tmp_path / "run").mkdir()
    (run / "plan.json").write_text('{"alpha": 8, "rank": 4}')
    np.savez(
        run / "adapter.npz",
        **{"layers.0.attn_output.a": np.ones((4, 576)), "layers.0.attn_output.b": np.ones((576, 4))},
    )
    command = ["toolcaller", "adapter", str(run), "--out", str(tmp_path / "site"), "--bias"]
    done = CliRunner().invoke(app, [*command, "none=1.5", "--json"], env={"OUTRIDER_CACHE": str(model_cache)})
    assert json.loads(done.stdout)["digest"] == content_digest(scan(tmp_path / "site"))
    assert adapters.describe(tmp_path / "site").logit_bias == {"none": 1.5}
    GenaiModel(smollm2_folder, threads=1, context=64).load_adapter("site", tmp_path / "site")
    assert "'much' is not like none=1.5" in CliRunner().invoke(app, [*command, "much"]).stderr
