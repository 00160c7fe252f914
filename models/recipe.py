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

from edge_agent.engines.artifact import add
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.engines.tensorrt_build import Profile
from edge_agent.wire import durable
from edge_agent.wire.bundle import Manifest
from edge_agent.wire.tensor import Tensor
from models.errors import ModelError
from models.fetch import Progress, fetch, quiet, sources
from models.gguf_weights import GgufWeights
from models.golden import answered, arrays, signature, tensors, write_profile
from models.inspect import network
from models.package import PROBE, build, manifest_of, open_bundle, pin, write_bundle
from models.quantize import MAX_FEEDS, OPS, Feeds, layer_errors, simplify, to_fp16, to_int8
from models.tasks import TASKS, Array, Task

PROSE, PERPLEXITY = "prose", "perplexity"
PRECISIONS = {"onnx": ("fp32", "fp16", "int8"), "llm": ("fp32", "int8", "int4")}
ROUNDS, SPEED_S, BLAMED = 300, 10.0, 5
MARKS = ("<!-- recipe table -->", "<!-- end of recipe table -->")
FOLDER = Path(__file__).with_name("recipes")
RECORDED = FOLDER / "results.json"
_SHOWN = ("bytes", "metric", "value", "ms", "of_fp32", "refused")


class Fp16(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How FP16 is made: nodes or ops that stay in FP32."""

    keep: list[str] = []


class Int8(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How INT8 is made: see models.quantize.to_int8."""

    method: str = "minmax"
    ops: tuple[str, ...] = OPS
    keep: list[str] = []
    activations: str = "uint8"


class Compile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Engines that the bundles bring along: GPUs such as sm86, of which of the packaged precisions."""

    targets: list[str] = []
    precisions: tuple[str, ...] = ("fp16", "int8")


class Recipe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model from source to bundle. `budget`: points (hundredths) of the metric, or per cent of perplexity, that a
    precision may lose to FP32; `max_size`: share of the FP32 file; `speed`: input shapes of a timed run, or words
    read and tokens written; `profile`: smallest, usual and largest shape of each input with free dimensions;
    `serving`: how the device serves it (docs/serving.md); other counts are in the task's own units.
    """

    name: str
    source: str
    task: str
    evaluation: int
    budget: dict[str, float]
    speed: dict[str, list[int]]
    calibration: int = 0
    max_size: dict[str, float] = {}
    profile: Profile = {}
    fp16: Fp16 = Fp16()
    int8: Int8 = Int8()
    compile: Compile = Compile()
    serving: dict[str, Any] = {}


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
    kind = sources()[recipe.source].kind if recipe.source in sources() else ""
    if recipe.task not in {"onnx": list(TASKS), "llm": [PROSE]}.get(kind, []):
        hint = f"tasks: {', '.join(TASKS)}, {PROSE} for language models; sources: {', '.join(sources())}"
        raise ModelError(f"{path.name}: task {recipe.task!r} with source {recipe.source!r} is not known", hint)
    counts = [recipe.evaluation] + [recipe.calibration] * (kind == "onnx")
    if not all(0 < count <= 100_000 for count in counts):
        raise ModelError(f"{path.name}: calibration and evaluation are 1 to 100000 samples")
    if kind == "llm" and not all(recipe.speed.get(n, [0])[0] > 1 for n in ("prompt", "decode")):
        raise ModelError(f"{path.name}: speed lacks the counts of tokens", "prompt = [256] and decode = [64]")
    if recipe.compile.targets and kind != "onnx":
        raise ModelError(f"{path.name}: TensorRT takes networks alone", "leave [compile] out")
    if unknown := (recipe.budget.keys() | recipe.max_size.keys()) - set(PRECISIONS[kind]):
        raise ModelError(f"{path.name}: no precision {', '.join(sorted(unknown))}", f"precisions: {PRECISIONS[kind]}")
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
    source = build(recipe.source, cache, progress)
    limit = samples or max(recipe.calibration, recipe.evaluation)
    calibration, evaluation = min(recipe.calibration, limit), min(recipe.evaluation, limit)
    data: list[Feeds] = []
    if sources()[recipe.source].kind == "llm":
        from models.language import measured

        weights = GgufWeights(fetch(recipe.source, cache, progress))
        made, rows = measured(weights, out / "work", evaluation, recipe.speed, progress)
    else:
        made, rows, data = _networks(recipe, source, out / "work", calibration, evaluation, progress)
    for name, row in rows.items():
        row["of_fp32"] = row["bytes"] / rows["fp32"]["bytes"]
        if reasons := judge(recipe, name, row, rows["fp32"]):
            progress("finding the layers to blame", 0, 0)
            worst = layer_errors(made["fp32"], made[name], data)[:BLAMED] if data else []
            row |= {"refused": reasons, "blame": worst}
    result = {
        "name": recipe.name,
        "source": pin(sources()[recipe.source]),
        "task": recipe.task,
        "evaluation": evaluation,
    }
    result |= {"calibration": calibration, "trial": bool(samples), "speed": recipe.speed, "precisions": rows}
    _bundle(recipe, result, source, out, made, progress)
    shutil.rmtree(out / "work")
    durable.write(out / "result.json", msgspec.json.format(msgspec.json.encode(result), indent=1))
    return result | {"path": str(out)}


def judge(recipe: Recipe, name: str, row: dict[str, Any], fp32: dict[str, Any]) -> list[str]:
    """Why a precision is not packaged; empty when it passes. A precision with no budget may lose nothing."""
    reasons, lost = [], loss(row, fp32)
    budget, size = recipe.budget.get(name, 0.0), recipe.max_size.get(name)
    if not lost <= budget + 1e-9:
        than = f"{lost:.2f} % above" if row["metric"] == PERPLEXITY else f"{lost:.2f} points below"
        reasons.append(f"{row['metric']} is {than} fp32, the budget is {budget:g}")
    if size is not None and row["of_fp32"] > size:
        reasons.append(f"its size is {row['of_fp32']:.3f} of fp32, at most {size:g} is allowed")
    return reasons


def loss(row: dict[str, Any], fp32: dict[str, Any]) -> float:
    """What a precision loses to FP32: per cent of perplexity, points of any other metric."""
    if row["metric"] == PERPLEXITY:
        return float(100 * (row["value"] / fp32["value"] - 1))
    return float(100 * (fp32["value"] - row["value"]))


def results(cache: Path) -> list[dict[str, Any]]:
    """Saved results of full runs of the shipped recipes, in their order."""
    files = [cache / "recipes" / name / "result.json" for name in shipped()]
    found = [msgspec.json.decode(file.read_bytes()) for file in files if file.is_file()]
    return [result for result in found if not result["trial"]]


def known(cache: Path) -> list[dict[str, Any]]:
    """The result of each shipped recipe that has one: the cache's, else the one that is recorded with the recipes."""
    recorded = msgspec.json.decode(RECORDED.read_bytes()) if RECORDED.is_file() else []
    newest = {result["name"]: result for result in [*recorded, *results(cache)]}
    return [newest[name] for name in shipped() if name in newest]


def record(found: list[dict[str, Any]]) -> None:
    """Keep what a table shows of results with the recipes, one a line."""
    lines = []
    for result in found:
        rows = {name: {k: row[k] for k in _SHOWN if k in row} for name, row in result["precisions"].items()}
        facts = {k: result[k] for k in ("name", "task", "evaluation", "calibration", "trial")}
        lines.append(msgspec.json.encode(facts | {"precisions": rows}).decode())
    durable.write(RECORDED, ("[\n" + ",\n".join(lines) + "\n]\n").encode())


def table(found: list[dict[str, Any]]) -> str:
    """A Markdown table of results."""
    head = "| Recipe | Precision | Metric | Value | Loss | Size, MB | Of FP32 | ms | Speed | Packaged |"
    lines = [head, "|---|---|---|---:|---:|---:|---:|---:|---:|---|"]
    for result in found:
        fp32 = result["precisions"]["fp32"]
        for name, row in result["precisions"].items():
            value = f"{row['value']:.3f}" if row["metric"] == PERPLEXITY else f"{100 * row['value']:.2f} %"
            numbers = f"{value} | {loss(row, fp32):.2f} | {row['bytes'] / 1e6:.2f} | {row['of_fp32']:.3f}"
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
    durable.write(page, f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}".encode())


def packaged(
    name: str, precision: str, cache: Path, out: Path | None = None, version: str = ""
) -> tuple[Path, Manifest]:
    """The bundle of a precision that a full run left, or a copy of it at `out` or under another version.

    Raises ModelError: not run, or refused by its gate.
    """
    folder = cache / "recipes" / name
    kind = sources()[read(name).source].kind if name in shipped() else ""
    if precision not in PRECISIONS.get(kind, ()):
        hint = f"recipes: {', '.join(shipped())}; precisions: {', '.join(PRECISIONS.get(kind, PRECISIONS['onnx']))}"
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
        return arrays(self.engine.infer(tensors(feed)))


def _networks(
    recipe: Recipe, source: Path, work: Path, calibration: int, evaluation: int, progress: Progress
) -> tuple[dict[str, Path], dict[str, dict[str, Any]], list[Feeds]]:
    """The files of all precisions of a network, what was measured of them, and the calibration data."""
    made = {name: work / f"{name}.onnx" for name in PRECISIONS["onnx"]}
    progress("simplifying", 0, 0)
    simplify(source / "model.onnx", made["fp32"])
    task, data = TASKS[recipe.task], list[Feeds]()
    engine = network(made["fp32"], probe=tensors(_shaped(made["fp32"], recipe.speed)))
    for done, (sample, _) in enumerate(task.samples("calibration", calibration)):
        progress("gathering calibration data", done, 0)
        task.answers(_Asked(engine, data, keep=True), sample)
    engine.close()
    progress("converting to FP16", 0, 0)
    reports: dict[str, Any] = {"fp32": {}, "fp16": to_fp16(made["fp32"], made["fp16"], data[:8], recipe.fp16.keep)}
    progress("calibrating INT8", 0, 0)
    how = recipe.int8
    reports["int8"] = to_int8(made["fp32"], made["int8"], data, how.method, how.keep, how.ops, how.activations)
    values = _evaluate(task, made, evaluation, data[0], progress)
    speeds = _speeds(made, recipe.speed, progress)
    for name, file in made.items():
        facts = {"bytes": file.stat().st_size, "metric": task.metric, "value": values[name], "ms": speeds[name]}
        reports[name] = facts | reports[name]
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


def _bundle(
    recipe: Recipe, result: dict[str, Any], source: Path, out: Path, made: dict[str, Path], progress: Progress
) -> None:
    """Folder and bundle of every precision that passed."""
    origin = sources()[recipe.source]
    passed = {n: row for n, row in result["precisions"].items() if "refused" not in row}
    told = ("bytes", "metric", "value", "ms", "prefill", "decode")
    precisions = {n: {k: row[k] for k in told if k in row} for n, row in passed.items()}
    for name, whole in made.items():
        folder = out / name
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(out / "bundles" / name, ignore_errors=True)
        if name not in passed:
            continue
        if whole.is_dir():
            whole.rename(folder)
            for text in origin.files[1:]:
                shutil.copy(source / text.name, folder / text.name)
        else:
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.onnx", PROBE))
            shutil.copy(whole, folder / "model.onnx")
            golden = msgspec.msgpack.decode((source / PROBE).read_bytes())
            inputs = msgspec.convert(golden["inputs"], dict[str, Tensor])
            (folder / PROBE).write_bytes(answered(folder / "model.onnx", inputs))
            write_profile(folder, recipe.profile)
            for target in recipe.compile.targets if name in recipe.compile.precisions else []:
                add(folder, folder / "model.onnx", target, recipe.profile, progress)
        more = {"precision": name, "recipe": recipe.name} | ({"serving": recipe.serving} if recipe.serving else {})
        manifest = manifest_of(
            recipe.name, f"+{name}.", folder, origin, precisions, more, 1e-2 if name == "fp32" else 5e-2
        )
        write_bundle(out / "bundles" / name, folder, manifest)
