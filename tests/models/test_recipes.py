"""Recipes: data that parts do not share, a gate that holds worse precisions back, bundles that serve."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from edge_agent.engines.choose import profile_of
from edge_agent.engines.engine_cache import EngineCache
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.engines.tensorrt import engine_for
from edge_agent.serving.schedule import Serving
from edge_agent.update import probe
from edge_agent.update.slots import Installed
from models import recipe as recipes
from models import tasks
from models.cli import app
from models.efficientnet import make as make_efficientnet
from models.errors import ModelError
from models.golden import tensors
from models.package import open_bundle
from models.recipe import Recipe
from tests.engines.contents import contents

SHIPPED = {"digits", "efficientnet-lite0", "objects", "ppocr-det", "ppocr-rec", "silero-vad", "smollm2"}

TARGETS = ["sm86"] if find_spec("tensorrt_rtx_bindings") else []


@pytest.fixture(scope="module")
def ran(model_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A trial of the digits recipe."""
    out = tmp_path_factory.mktemp("recipe") / "digits"
    more = {"compile": recipes.Compile(TARGETS, ("int8",)), "serving": {"concurrency": 1, "queue": 8}}
    recipe = msgspec.structs.replace(recipes.read("digits"), **more)
    return recipes.run(recipe, model_cache, out, samples=200)


def test_shipped_recipes_are_whole() -> None:
    assert set(recipes.shipped()) == SHIPPED
    for name in SHIPPED:
        recipe = recipes.read(name)
        assert recipe.name == name
        assert recipe.budget.keys() == {"int8", "int4" if name == "smollm2" else "fp16"}
    reader = recipes.read("ppocr-rec")
    assert (reader.evaluation, reader.budget["int8"], reader.max_size["int8"]) == (1000, 1.0, 0.30)


def test_precisions_are_measured_and_bundled(ran: dict[str, Any]) -> None:
    rows = ran["precisions"]
    assert list(rows) == ["fp32", "fp16", "int8"]
    assert rows["fp32"]["value"] > 0.9
    assert rows["int8"]["of_fp32"] < 0.35
    assert all(row["ms"] > 0 and "refused" not in row for row in rows.values())
    for name, row in rows.items():
        manifest = open_bundle(Path(ran["path"]) / "bundles" / name)
        assert manifest.meta["precision"] == name
        assert msgspec.convert(manifest.meta["serving"], Serving) == Serving(concurrency=1, queue=8)
        assert manifest.precisions[name] == {k: row[k] for k in ("bytes", "metric", "value", "ms")}
        assert set(manifest.precisions) == {"fp32", "fp16", "int8"}
    assert not (Path(ran["path"]) / "work").exists()


@pytest.mark.skipif(not TARGETS, reason="TensorRT for RTX is not installed: pip install '.[tensorrt]'")
def test_engines_that_a_recipe_asks_for_are_in_the_bundle_and_are_taken_from_there(
    ran: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_build(*_: object) -> None:
        raise AssertionError("it was built, not taken")

    monkeypatch.setattr("edge_agent.engines.tensorrt_build.build", no_build)
    files = Path(ran["path"]) / "bundles" / "int8" / "files"
    paths = [entry.path for entry in open_bundle(files.parent).files]
    assert [Path(path).suffix for path in paths if path.startswith("engines/sm86-tensorrt-rtx-")] == [
        ".engine",
        ".json",
    ]
    assert not list((Path(ran["path"]) / "bundles" / "fp16" / "files").glob("engines"))
    network, told = OnnxNetwork(files), list[str]()
    profile = profile_of(files, network)
    assert profile == recipes.read("digits").profile
    cache, model = EngineCache(tmp_path), files / "model.onnx"
    engine = engine_for(model, "d", "graph", profile, cache, lambda what, *_: told.append(what), "sm86")
    assert contents(engine).targets == ["sm86"]
    assert told == ["taken from the bundle"]


def test_bundle_of_each_precision_passes_its_own_probe(ran: dict[str, Any]) -> None:
    for name in ran["precisions"]:
        bundle = Path(ran["path"]) / "bundles" / name
        golden = probe.golden(Installed("0" * 64, bundle / "files", open_bundle(bundle)))
        assert golden is not None
        network = OnnxNetwork(bundle / "files", probe=golden.inputs)
        probe.compare(open_bundle(bundle).probe, golden.outputs, network.infer(golden.inputs))
        network.close()


def test_precision_below_its_budget_is_not_packaged_and_layers_are_named(
    ran: dict[str, Any], model_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "_evaluate", lambda *_: {"fp32": 0.98, "fp16": 0.98, "int8": 0.96})
    result = recipes.run(recipes.read("digits"), model_cache, tmp_path / "out", samples=64)
    row = result["precisions"]["int8"]
    assert row["refused"] == ["top_1 is 2.00 points below fp32, the budget is 1"]
    assert {"node", "op", "error", "added"} == row["blame"][0].keys()
    assert not (tmp_path / "out" / "int8").exists()
    assert not (tmp_path / "out" / "bundles" / "int8").exists()
    assert set(open_bundle(tmp_path / "out" / "bundles" / "fp16").precisions) == {"fp32", "fp16"}
    assert "no: top_1 is 2.00 points" in recipes.table([result])


def test_gate_judges_loss_and_size() -> None:
    recipe = recipes.read("ppocr-rec")
    fp32 = {"value": 0.98, "metric": "character_accuracy", "of_fp32": 1.0}

    def judged(value: float, size: float) -> list[str]:
        return recipes.judge(recipe, "int8", {**fp32, "value": value, "of_fp32": size}, fp32)

    assert judged(0.97, 0.30) == []
    assert judged(0.99, 0.25) == []
    assert "1.01 points below" in judged(0.9699, 0.25)[0]
    assert "0.310 of fp32" in judged(0.98, 0.31)[0]
    assert len(judged(float("nan"), 0.25)) == 1


def test_parts_share_no_text() -> None:
    texts = {part: {tasks.label(part, i)[1] for i in range(60)} for part in tasks.PARTS}
    assert not texts["calibration"] & texts["evaluation"]
    first, second = tasks.digits("calibration")[0], tasks.digits("evaluation")[0]
    assert len(tasks.digits("training")[0]) + len(first) + len(second) == 1797


@pytest.mark.parametrize("name", sorted(tasks.TASKS))
def test_samples_are_the_same_each_time(name: str) -> None:
    task = tasks.TASKS[name]
    one, other = (next(task.samples("evaluation", 4)) for _ in range(2))
    np.testing.assert_array_equal(one[0], other[0])
    assert len(one[1]) == len(other[1]) > 0
    parts = [next(task.samples(part, 4))[0] for part in tasks.PARTS]
    assert parts[0].shape != parts[1].shape or not np.array_equal(*parts)


def test_reader_reads_rendered_labels(model_cache: Path, tmp_path: Path) -> None:
    from models.package import build

    engine = OnnxNetwork(build("ppocr-rec", model_cache), probe=tensors({"x": np.zeros((1, 3, 48, 320), "f4")}))
    task, found, truth = tasks.TASKS["labels"], list[str](), list[str]()
    for sample, texts in task.samples("evaluation", 8):
        found += task.answers(recipes._Asked(engine, []), sample)
        truth += texts
    engine.close()
    assert task.score(found, truth) > 0.85


def test_results_of_trials_are_not_packaged(model_cache: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ModelError, match="not measured") as caught:
        recipes.packaged("digits", "int8", cache)
    assert "recipe run digits" in caught.value.hint
    (cache / "recipes" / "digits").mkdir(parents=True)
    (cache / "recipes" / "digits" / "result.json").write_text('{"trial": true}')
    with pytest.raises(ModelError, match="trial"):
        recipes.packaged("digits", "int8", cache)
    assert recipes.results(cache) == []
    for name, precision in (("smollm2", "fp16"), ("digits", "int4"), ("nobody", "int8")):
        with pytest.raises(ModelError, match=f"no recipe makes {name}"):
            recipes.packaged(name, precision, cache)


def test_chosen_precision_is_packaged_from_the_saved_result(ran: dict[str, Any], tmp_path: Path) -> None:
    saved = tmp_path / "recipes" / "digits"
    saved.parent.mkdir()
    saved.symlink_to(Path(ran["path"]))
    full = {k: v for k, v in ran.items() if k != "path"} | {"trial": False}
    (saved / "result.json").write_bytes(msgspec.json.encode(full))
    run, env = CliRunner(), {"OUTRIDER_CACHE": str(tmp_path)}
    said = json.loads(run.invoke(app, ["package", "digits", "--precision", "int8", "--json"], env=env).stdout)
    assert open_bundle(Path(said["path"])).meta["precision"] == "int8"
    command = ["package", "digits", "--precision", "fp16", "--version", "7", "--out", str(tmp_path / "b"), "--json"]
    assert json.loads(run.invoke(app, command, env=env).stdout)["version"] == "7"
    assert open_bundle(tmp_path / "b").meta["precision"] == "fp16"
    listed = json.loads(run.invoke(app, ["recipe", "list", "--json"], env=env).stdout)
    assert {row["name"]: row["measured"] for row in listed} == {name: name == "digits" for name in SHIPPED}
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- recipe table -->\nold\n<!-- end of recipe table -->\nafter\n")
    text = run.invoke(app, ["recipe", "table", "--write", str(page)], env=env).stdout
    assert "| digits | int8 | top_1, n=200 |" in text
    assert page.read_text() == f"before\n<!-- recipe table -->\n{text}<!-- end of recipe table -->\nafter\n"
    page.write_text("no marks")
    assert run.invoke(app, ["recipe", "table", "--write", str(page)], env=env).exit_code == 1


def test_table_of_the_documentation_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).parents[2] / "docs" / "models.md"
    copy, env = tmp_path / "page.md", {"OUTRIDER_CACHE": str(tmp_path)}
    copy.write_text(page.read_text())
    kept = tmp_path / "results.json"
    kept.write_bytes(recipes.RECORDED.read_bytes())
    monkeypatch.setattr(recipes, "RECORDED", kept)
    assert CliRunner().invoke(app, ["recipe", "table", "--record", "--write", str(copy)], env=env).exit_code == 0
    assert copy.read_text() == page.read_text()
    assert recipes.known(tmp_path) == json.loads(kept.read_text())
    assert {row["name"] for row in recipes.known(tmp_path)} <= SHIPPED


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = ", "is no recipe"),
        ("surprise = 1", "is no recipe"),
        ("source = 'nowhere'", "is not known"),
        ("task = 'nothing'", "is not known"),
        ("calibration = 0", "1 to 100000"),
        ("budget = {fp8 = 1.0}", "no precision fp8"),
    ],
)
def test_wrong_recipe_is_a_clear_error(tmp_path: Path, text: str, message: str) -> None:
    lines = recipes.shipped()["digits"].read_text().split("[int8]")[0].replace("[budget]\n", "").splitlines()
    lines = [
        line for line in lines if "=" in line and not line.startswith(("fp16", "int8", "x", "[", text.split(" ")[0]))
    ]
    tables = ([] if text.startswith("budget") else ["budget = {int8 = 1.0}"]) + ["speed = {x = [1, 1, 8, 8]}"]
    (tmp_path / "r.toml").write_text("\n".join([*lines, *tables, text]))
    with pytest.raises(ModelError, match=message):
        recipes.read(str(tmp_path / "r.toml"))
    with pytest.raises(ModelError, match="no recipe 'nope'"):
        recipes.read("nope")


def test_shapes_of_the_timed_run_must_be_the_models(model_cache: Path, tmp_path: Path) -> None:
    wrong = msgspec.structs.replace(recipes.read("digits"), speed={"y": [1]})
    with pytest.raises(ModelError, match="speed has shapes of"):
        recipes.run(wrong, model_cache, tmp_path / "out", samples=8)


def test_folder_of_something_else_is_left_alone(model_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ModelError, match="not the folder of a recipe"):
        recipes.run(recipes.read("digits"), model_cache, tmp_path, samples=8)


def test_weight_file_that_names_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ModelError, match=r"names os\.system"):
        make_efficientnet(tmp_path / "evil.pth", tmp_path / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SHIPPED - {"digits", "smollm2"}))
def test_shipped_recipe_runs(model_cache: Path, tmp_path: Path, name: str) -> None:
    result = recipes.run(recipes.read(name), model_cache, tmp_path / "out", samples=16)
    assert set(result["precisions"]) == set(recipes.PRECISIONS["onnx"])
    assert "refused" not in result["precisions"]["fp16"]
    assert isinstance(recipes.read(name), Recipe)
