"""`outrider models inspect | quantize | recipe`: networks, their precisions, and the recipes that measure them."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from models.console import Cache, Json, say, work
from models.errors import ModelError
from models.fetch import default_cache

app = typer.Typer()
recipes = typer.Typer(no_args_is_help=True, help="From a source to measured, judged and bundled precisions.")
app.add_typer(recipes, name="recipe")
File = Annotated[Path, typer.Argument(help="An ONNX file.", show_default=False)]


@app.command(name="inspect")
def inspect_(file: File, as_json: Json = False) -> None:
    """Opset, inputs, outputs, ops and size of an ONNX file, and which runtime takes it and why not."""
    from models.inspect import inspect

    with work(as_json):
        facts = inspect(file)
    say(as_json, facts, _described(facts))


@app.command()
def quantize(
    file: Annotated[Path, typer.Argument(help="An ONNX file; a .gguf file or a folder with .safetensors.")],
    to: Annotated[str, typer.Option(help="fp16 or int8; int8 or int4 of a language model's weights.")],
    out: Annotated[Path, typer.Option(help="The file to write; a language model's folder.")],
    calibration: Annotated[
        Path | None, typer.Option(help="A folder of .npz feeds, or one .npz with samples along the first axis.")
    ] = None,
    method: Annotated[str, typer.Option(help="int8: minmax, entropy or percentile.")] = "minmax",
    keep: Annotated[list[str] | None, typer.Option(help="An op or node that stays in FP32; repeat it.")] = None,
    op: Annotated[list[str] | None, typer.Option(help="int8: an op to quantize; repeat it.")] = None,
    activations: Annotated[str, typer.Option(help="int8 (TensorRT) or uint8 (fast on CPUs): same numbers.")] = "int8",
    as_json: Json = False,
) -> None:
    """Write the FP16 or INT8 form of a network, and say which layers it alters most; or a language model's weights."""
    from models.quantize import OPS, feeds, layer_errors, simplify, to_fp16, to_int8

    if file.is_dir() or file.suffix in (".gguf", ".safetensors"):
        _quantize_language(file, to, out, bool(calibration or keep or op), as_json)
        return
    with work(as_json) as progress, tempfile.TemporaryDirectory() as scratch:
        if to not in ("fp16", "int8"):
            raise ModelError(f"no precision {to!r} of a network", "--to fp16 or --to int8; int4 is for language models")
        data = feeds(calibration, file) if calibration or to == "int8" else []
        progress("simplifying", 0, 0)
        simple = simplify(file, Path(scratch) / "fp32.onnx")
        progress(f"converting to {to}", 0, 0)
        if to == "fp16":
            report = to_fp16(simple, out, data, keep or [])
        else:
            report = to_int8(simple, out, data, method, keep or [], op or OPS, activations)
        progress("comparing layers", 0, 0)
        worst = layer_errors(simple, out, data)[:5] if data else []
    sizes = {"bytes": out.stat().st_size, "fp32_bytes": file.stat().st_size}
    lines = [f"{out}  {sizes['bytes'] / 1e6:.2f} MB, {sizes['bytes'] / sizes['fp32_bytes']:.3f} of {file.name}"]
    lines += [f"in FP32: {node}: {why}" for node, why in report["kept"].items()] + _blamed(worst)
    say(as_json, {"path": str(out), **sizes, **report, "layers": worst}, "\n".join(lines))


def _quantize_language(file: Path, to: str, out: Path, told: bool, as_json: bool) -> None:
    from edge_agent.wire.bundle import scan
    from models.importing import convert

    with work(as_json) as progress:
        if to not in ("int8", "int4"):
            raise ModelError(f"no precision {to!r} of a language model's weights", "--to int8 or --to int4")
        if told:
            raise ModelError("weights alone are rounded", "leave --calibration, --keep and --op out")
        convert(file, out, to, progress)
    before = sum(entry.size for entry in scan(file)) if file.is_dir() else file.stat().st_size
    size = sum(entry.size for entry in scan(out))
    facts = {"path": str(out), "bytes": size, "source_bytes": before, "bits": int(to[3:])}
    next_ = f"outrider models evaluate {out} --data prose"
    say(as_json, facts, f"{out}  {size / 1e6:.2f} MB, {file.name} has {before / 1e6:.2f}; measure it: {next_}")


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="A bundle, an ONNX file, or a language model's folder.")],
    data: Annotated[str, typer.Option(help="Files with inputs and truths, a text, or a recipe's task: labels, prose…")],
    metric: Annotated[list[str] | None, typer.Option(help="One of those that fit the data; repeat it.")] = None,
    beta: Annotated[float, typer.Option(help="F-beta: recall counts so many times as much as precision.")] = 1.0,
    threshold: Annotated[float, typer.Option(help="The score from which an answer counts.")] = 0.5,
    output: Annotated[str, typer.Option(help="The output to read, where there are several.")] = "",
    fp32: Annotated[Path | None, typer.Option(help="The FP32 model to measure beside it.")] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Each layer's error against --fp32's.")] = False,
    samples: Annotated[int, typer.Option(min=0, help="At most so many; 0: all, of what is made 1000.")] = 0,
    as_json: Json = False,
) -> None:
    """Measure how well a model answers: top-1, mAP, F-beta, precision, recall, AUC, CER or perplexity."""
    from models.evaluate import How
    from models.evaluate import evaluate as measured

    with work(as_json) as progress:
        how = How(beta, threshold, output)
        report = measured(model, data, metric or [], how, fp32, per_layer, samples, progress)
    lines = [f"{'':<12} {model.name}" + (f"  {fp32.name}" if fp32 else "")]
    for name, row in report["metrics"].items():
        lines.append(f"{name:<12} " + "  ".join(f"{value:.4f}" for value in row.values()))
    lines += [f"{report['samples']} samples of {data}", *_blamed(report.get("layers", []))]
    say(as_json, report, "\n".join(lines))


@recipes.command(name="list")
def list_(cache: Cache = None, as_json: Json = False) -> None:
    """The shipped recipes, and which of them have a saved result."""
    from models.recipe import read, results, shipped

    measured = {result["name"] for result in results(cache or default_cache())}
    rows = []
    for name in shipped():
        recipe = read(name)
        row = {"name": name, "source": recipe.source, "task": recipe.task, "measured": name in measured}
        rows.append(row | {"budget": recipe.budget, "calibration": recipe.calibration, "evaluation": recipe.evaluation})
    lines = [f"{r['name']:<20} {r['task']:<12} {'measured' if r['measured'] else '-'}" for r in rows]
    say(as_json, rows, "\n".join(lines))


@recipes.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file or a name: see `outrider models recipe list`.")],
    out: Annotated[Path | None, typer.Option(help="Default: in the cache, where package and table find it.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="A trial with at most so many samples; 0: all.")] = 0,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Make FP16 and INT8, measure accuracy, size and speed, hold back what fails, bundle what passes."""
    from models.recipe import read, table
    from models.recipe import run as ran

    with work(as_json) as progress:
        result = ran(read(recipe), cache or default_cache(), out, samples, progress)
    lines = [table([result])]
    for name, row in result["precisions"].items():
        lines += [f"{name} is not packaged: {why}" for why in row.get("refused", [])] + _blamed(row.get("blame", []))
    say(as_json, result, "\n".join([*lines, result["path"]]))


@recipes.command(name="table")
def table_(
    write: Annotated[Path | None, typer.Option(help="A Markdown file: its table is replaced.")] = None,
    keep: Annotated[bool, typer.Option("--record", help="Keep them with the recipes, for a table elsewhere.")] = False,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """The table of results, in Markdown: those of this cache, else those recorded with the recipes."""
    from models.recipe import known, record, replace_table, table

    with work(as_json):
        found = known(cache or default_cache())
        if not found:
            raise ModelError("no recipe has a result yet", "outrider models recipe run NAME")
        if keep:
            record(found)
        if write:
            replace_table(write, table(found))
    say(as_json, found, table(found))


def _blamed(worst: list[dict[str, Any]]) -> list[str]:
    return [f"  {r['op']:<20} {r['node']:<40} adds {r['added']:.4f}, error {r['error']:.4f}" for r in worst]


def _described(facts: dict[str, Any]) -> str:
    """The facts of a file as lines of text."""
    versions = ", ".join(f"{domain} {version}" for domain, version in facts["opset"].items())
    weights = ", ".join(f"{count} {dtype}" for dtype, count in facts["weights"].items())
    lines = [f"{facts['file']}  {facts['bytes'] / 1e6:.2f} MB, opset {versions}"]
    lines.append(f"parameters {facts['parameters']:,} in {weights or 'no'} tensors")
    for kind in ("inputs", "outputs"):
        lines += [f"{kind[:-1]:<7} {v['name']}: {v['dtype']}{v['shape']}" for v in facts[kind]]
    lines.append(f"dynamic {', '.join(facts['dynamic']) or 'none'}")
    lines.append("ops     " + ", ".join(f"{op} {count}" for op, count in facts["ops"].items()))
    for answer in facts["runtimes"].values():
        lines.append(f"{answer['runtime']}: {'takes it' if answer['takes'] else 'does not take it'}")
        lines += [f"  {r['op'] or 'the graph'} ({r['nodes']} nodes): {r['why']}" for r in answer["refused"]]
    return "\n".join(lines)
