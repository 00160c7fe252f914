"""Recipes: from a source to measured precisions, the gate that holds worse ones back, and their bundles.

    <out>/<precision>/         a model folder that passed: model.onnx, its golden probe, its license texts
    <out>/bundles/<precision>/ its bundle
    <out>/result.json          what was measured; written last, so a result names folders that are whole

Invariants: every precision is judged by the same samples, none of them used in calibration, through the engine that
serves; speed is measured in turns, so that other work on the machine slows all precisions alike. A precision that
loses more than its budget, or is larger than allowed, gets no folder and no bundle, and its layers to blame are named.
"""

from __future__ import annotations

import shutil
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.wire.bundle import BundleKind, Manifest, content_digest, scan
from edge_agent.wire.tensor import Tensor
from models.errors import ModelError
from models.fetch import Progress, atomic_file, quiet, sources
from models.golden import answered, signature, tensors
from models.inspect import network
from models.package import PROBE, build, open_bundle, write_bundle
from models.quantize import MAX_FEEDS, OPS, Feeds, layer_errors, simplify, to_fp16, to_int8
from models.tasks import TASKS, Array, Task

PRECISIONS = ("fp32", "fp16", "int8")
ROUNDS, SPEED_S, BLAMED = 300, 10.0, 5
MARKS = ("<!-- recipe table -->", "<!-- end of recipe table -->")
FOLDER = Path(__file__).with_name("recipes")


class Fp16(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How FP16 is made: nodes or ops that stay in FP32."""

    keep: list[str] = []


class Int8(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How INT8 is made: see models.quantize.to_int8."""

    method: str = "minmax"
    ops: tuple[str, ...] = OPS
    keep: list[str] = []
    activations: str = "uint8"


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model from source to bundle. `budget`: points (hundredths) of the metric that a precision may lose to FP32;
    `max_size`: share of the FP32 file; `speed`: input shapes of a timed run; counts are in the task's own units.
    """

    name: str
    source: str
    task: str
    calibration: int
    evaluation: int
    budget: dict[str, float]
    speed: dict[str, list[int]]
    max_size: dict[str, float] = {}
    fp16: Fp16 = Fp16()
    int8: Int8 = Int8()


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}


def read(name: str) -> Recipe:
    """A shipped recipe or a file. Raises ModelError."""
    path = shipped().get(name, Path(name))
    try:
        recipe = msgspec.convert(tomllib.loads(path.read_text()), Recipe)
    except OSError as error:
        raise ModelError(f"no recipe {name!r}", f"a file, or one of {', '.join(shipped())}") from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ModelError(f"{path.name} is no recipe: {error}", "docs/models.md says what a recipe has") from error
    if recipe.task not in TASKS or recipe.source not in sources():
        hint = f"tasks: {', '.join(TASKS)}; sources: {', '.join(sources())}"
        raise ModelError(f"{path.name}: task {recipe.task!r} or source {recipe.source!r} is not known", hint)
    if not (0 < recipe.calibration <= 100_000 and 0 < recipe.evaluation <= 100_000):
        raise ModelError(f"{path.name}: calibration and evaluation are 1 to 100000 samples")
    if unknown := (recipe.budget.keys() | recipe.max_size.keys()) - set(PRECISIONS):
        raise ModelError(f"{path.name}: no precision {', '.join(sorted(unknown))}", f"precisions: {PRECISIONS}")
    return recipe


def run(
    recipe: Recipe, cache: Path, out: Path | None = None, samples: int = 0, progress: Progress = quiet
) -> dict[str, Any]:
    """Make, measure, judge and bundle every precision. `samples` bounds calibration and evaluation for a trial.

    Raises ModelError; a precision that fails is no error, its row says so.
    """
    out = out or cache / "recipes" / recipe.name
    if out.exists() and any(out.iterdir()) and not any((out / mark).exists() for mark in ("result.json", "work")):
        raise ModelError(f"{out} is not the folder of a recipe", "choose another --out")
    (out / "work").mkdir(parents=True, exist_ok=True)
    (out / "result.json").unlink(missing_ok=True)
    source, task = build(recipe.source, cache, progress), TASKS[recipe.task]
    limit = samples or max(recipe.calibration, recipe.evaluation)
    calibration, evaluation = min(recipe.calibration, limit), min(recipe.evaluation, limit)
    made, reports, data = _make(recipe, source, out / "work", calibration, progress)
    values = _evaluate(task, made, evaluation, data[0], progress)
    speeds = _speeds(made, recipe.speed, progress)
    rows: dict[str, dict[str, Any]] = {}
    for name, file in made.items():
        rows[name] = {"bytes": file.stat().st_size, "metric": task.metric, "value": values[name], "ms": speeds[name]}
        rows[name] |= {"of_fp32": rows[name]["bytes"] / rows["fp32"]["bytes"], **reports.get(name, {})}
        if reasons := judge(recipe, name, rows[name], rows["fp32"]):
            progress("finding the layers to blame", 0, 0)
            worst = layer_errors(made["fp32"], file, data)[:BLAMED]
            rows[name] |= {"refused": reasons, "blame": worst}
    result = {"name": recipe.name, "source": _pin(recipe.source), "task": recipe.task, "evaluation": evaluation}
    result |= {"calibration": calibration, "trial": bool(samples), "speed": recipe.speed, "precisions": rows}
    _bundle(recipe, result, source, out, made)
    shutil.rmtree(out / "work")
    with atomic_file(out / "result.json") as (stream, keep):
        stream.write(msgspec.json.format(msgspec.json.encode(result), indent=1))
        keep()
    return result | {"path": str(out)}


def judge(recipe: Recipe, name: str, row: dict[str, Any], fp32: dict[str, Any]) -> list[str]:
    """Why a precision is not packaged; empty when it passes. A precision with no budget may lose nothing."""
    reasons, lost = [], 100 * (fp32["value"] - row["value"])
    budget, size = recipe.budget.get(name, 0.0), recipe.max_size.get(name)
    if not lost <= budget + 1e-9:
        reasons.append(f"{row['metric']} is {lost:.2f} points below fp32, the budget is {budget:g}")
    if size is not None and row["of_fp32"] > size:
        reasons.append(f"its size is {row['of_fp32']:.3f} of fp32, at most {size:g} is allowed")
    return reasons


def results(cache: Path) -> list[dict[str, Any]]:
    """Saved results of full runs of the shipped recipes, in their order."""
    files = [cache / "recipes" / name / "result.json" for name in shipped()]
    found = [msgspec.json.decode(file.read_bytes()) for file in files if file.is_file()]
    return [result for result in found if not result["trial"]]


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table of results."""
    head = "| Recipe | Precision | Metric | Value | Loss, points | Size, MB | Of FP32 | ms | Speed | Packaged |"
    lines = [head, "|---|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for result in found:
        fp32 = result["precisions"]["fp32"]
        for name, row in result["precisions"].items():
            lost = 100 * (fp32["value"] - row["value"])
            numbers = f"{100 * row['value']:.2f} % | {lost:.2f} | {row['bytes'] / 1e6:.2f} | {row['of_fp32']:.3f}"
            speed = f"{row['ms']:.2f} | {fp32['ms'] / row['ms']:.2f}x"
            metric = f"{row['metric']}, n={result['evaluation']}"
            packaged = f"no: {'; '.join(row['refused'])}" if "refused" in row else "yes"
            lines.append(f"| {result['name']} | {name} | {metric} | {numbers} | {speed} | {packaged} |")
    return "\n".join(lines)


def replace_table(page: Path, text: str) -> None:
    """Put a table between the marks of a Markdown page. Raises ModelError: no such page or no marks."""
    try:
        before, _, rest = page.read_text().partition(MARKS[0])
    except OSError as error:
        raise ModelError(f"{page} cannot be read: {error.strerror}") from error
    _, mark, after = rest.partition(MARKS[1])
    if not mark:
        raise ModelError(f"{page} has no place for the table", f"put {MARKS[0]} and {MARKS[1]} on lines of their own")
    with atomic_file(page) as (stream, keep):
        stream.write(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}".encode())
        keep()


def packaged(
    name: str, precision: str, cache: Path, out: Path | None = None, version: str = ""
) -> tuple[Path, Manifest]:
    """The bundle of a precision that a full run left, or a copy of it at `out` or under another version.

    Raises ModelError: not run, or refused by its gate.
    """
    folder = cache / "recipes" / name
    if name not in shipped() or precision not in PRECISIONS:
        hint = f"recipes: {', '.join(shipped())}; precisions: {', '.join(PRECISIONS)}"
        raise ModelError(f"no recipe makes {name} in {precision}", hint)
    if not (folder / "result.json").is_file():
        raise ModelError(f"{name} is not measured in {precision} yet", f"outrider models recipe run {name}")
    result = msgspec.json.decode((folder / "result.json").read_bytes())
    if result["trial"]:
        raise ModelError(f"the last run of {name} was a trial", f"outrider models recipe run {name}")
    if reasons := result["precisions"][precision].get("refused"):
        raise ModelError(f"{name} in {precision} did not pass: {'; '.join(reasons)}", "change its recipe, run it again")
    bundle = folder / "bundles" / precision
    manifest = open_bundle(bundle)
    if out or version:
        manifest = msgspec.structs.replace(manifest, version=version or manifest.version)
        bundle = write_bundle(out or cache / "bundles" / f"{name}-{manifest.version}", bundle / "files", manifest)
    return bundle, manifest


@dataclass
class _Asked:
    """An engine as a task's `run`; keeps the first feeds that it was asked with, at most MAX_FEEDS."""

    engine: OnnxNetwork
    kept: list[Feeds]
    keep: bool = False

    def __call__(self, feed: dict[str, Array]) -> dict[str, Array]:
        if self.keep and len(self.kept) < MAX_FEEDS:
            self.kept.append(feed)
        answer = self.engine.infer(tensors(feed))
        return {n: np.frombuffer(t.data, t.dtype).reshape(t.shape) for n, t in answer.items()}


def _make(
    recipe: Recipe, source: Path, work: Path, count: int, progress: Progress
) -> tuple[dict[str, Path], dict[str, Any], list[Feeds]]:
    """The files of all precisions, what their making said, and the calibration data."""
    made = {name: work / f"{name}.onnx" for name in PRECISIONS}
    progress("simplifying", 0, 0)
    simplify(source / "model.onnx", made["fp32"])
    task, data = TASKS[recipe.task], list[Feeds]()
    engine = network(made["fp32"], probe=tensors(_shaped(made["fp32"], recipe.speed)))
    for done, (sample, _) in enumerate(task.samples("calibration", count)):
        progress("gathering calibration data", done, 0)
        task.answers(_Asked(engine, data, keep=True), sample)
    engine.close()
    progress("converting to FP16", 0, 0)
    reports = {"fp16": to_fp16(made["fp32"], made["fp16"], data[:8], recipe.fp16.keep)}
    progress("calibrating INT8", 0, 0)
    how = recipe.int8
    reports["int8"] = to_int8(made["fp32"], made["int8"], data, how.method, how.keep, how.ops, how.activations)
    return made, reports, data


def _evaluate(task: Task, made: dict[str, Path], count: int, probe: Feeds, progress: Progress) -> dict[str, float]:
    engines = {name: network(file, probe=tensors(probe)) for name, file in made.items()}
    answers: dict[str, list[Any]] = {name: [] for name in made}
    truths: list[Any] = []
    for sample, known in task.samples("evaluation", count):
        progress("evaluating", len(truths), count)
        for name, engine in engines.items():
            answers[name] += task.answers(_Asked(engine, []), sample)
        truths += known
    for engine in engines.values():
        engine.close()
    return {n: float(task.score(a, answers["fp32"] if task.truth == "fp32" else truths)) for n, a in answers.items()}


def _speeds(made: dict[str, Path], shapes: dict[str, list[int]], progress: Progress) -> dict[str, float]:
    """Milliseconds of one run of each precision, in turns; the lower quartile, as other work only ever adds time."""
    feed = tensors(_shaped(made["fp32"], shapes))
    engines = {name: network(file, probe=feed) for name, file in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    end = time.perf_counter() + SPEED_S * len(made)
    for turn in range(ROUNDS):
        progress("measuring speed", turn, ROUNDS)
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.infer(feed)
            times[name].append(1000 * (time.perf_counter() - start))
        if time.perf_counter() > end:
            break
    for engine in engines.values():
        engine.close()
    return {name: round(float(np.quantile(some, 0.25)), 3) for name, some in times.items()}


def _shaped(model: Path, shapes: dict[str, list[int]]) -> Feeds:
    """Numbers of these shapes: a timed run does not depend on what they are."""
    dtypes = {str(i["name"]): str(i["dtype"]) for i in signature(model)[0]}
    if dtypes.keys() != shapes.keys():
        raise ModelError(f"the recipe's speed has shapes of {sorted(shapes)}", f"the model takes {sorted(dtypes)}")
    return {n: np.random.default_rng(0).uniform(-1, 1, s).astype(dtypes[n]) for n, s in shapes.items()}


def _bundle(recipe: Recipe, result: dict[str, Any], source: Path, out: Path, made: dict[str, Path]) -> None:
    """Folder and bundle of every precision that passed."""
    pin = sources()[recipe.source]
    passed = {n: row for n, row in result["precisions"].items() if "refused" not in row}
    precisions = {n: {k: row[k] for k in ("bytes", "metric", "value", "ms")} for n, row in passed.items()}
    for name in PRECISIONS:
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out / "bundles" / name, ignore_errors=True)
        if name not in passed:
            continue
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.onnx", PROBE))
        shutil.copy(made[name], folder / "model.onnx")
        golden = msgspec.msgpack.decode((source / PROBE).read_bytes())
        inputs = msgspec.convert(golden["inputs"], dict[str, Tensor])
        (folder / PROBE).write_bytes(answered(folder / "model.onnx", inputs))
        files, (takes, gives) = scan(folder), signature(folder / "model.onnx")
        digest = content_digest(files)
        meta = {"source": result["source"], "source_sha256": pin.files[0].sha256, "origin": pin.origin}
        meta |= {"precision": name, "recipe": recipe.name, "content_digest": digest}
        probe = {"file": PROBE, "rtol": 1e-2, "atol": 1e-2 if name == "fp32" else 5e-2}
        version, kind = f"{pin.version}+{name}.{digest[:8]}", BundleKind(pin.kind)
        manifest = Manifest(recipe.name, version, kind, files, pin.license, takes, gives, precisions, probe, "", meta)
        write_bundle(out / "bundles" / name, folder, manifest)


def _pin(source: str) -> str:
    pin = sources()[source]
    return f"{pin.package}=={pin.version}"
