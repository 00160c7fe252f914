"""`outrider models toolcaller`: the default model's training, step by step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Train and measure the tool caller.")


@app.callback()
def toolcaller() -> None:
    """Train and measure the tool caller."""


@app.command()
def data(
    out: Annotated[Path, typer.Option(help="The file to write, a JSON object on each line.")],
    seed: Annotated[int, typer.Option(help="The same seed gives the same examples.")] = 1,
    n: Annotated[int, typer.Option(min=1, help="How many examples.")] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Write training examples: prompt, completion, kind, request and the names of the tools."""
    from collections import Counter
    from itertools import chain, islice

    from models.toolcaller.data.bunches import bunches

    kinds: Counter[str] = Counter()
    try:
        with out.open("w", encoding="utf-8") as file:
            for example in islice(chain.from_iterable(bunches(seed)), n):
                kinds[example.kind] += 1
                file.write(json.dumps(example.row(), ensure_ascii=False) + "\n")
    except OSError as error:
        typer.echo(
            f"error: cannot write {out}: {error.strerror}\nhint: is the folder there, with space left?", err=True
        )
        raise typer.Exit(1) from error
    facts = {"examples": n, "seed": seed, "path": str(out), "kinds": dict(kinds)}
    typer.echo(json.dumps(facts, indent=1) if as_json else f"{n} examples of seed {seed} are in {out}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="The run's folder; a run that was stopped goes on from there.")],
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the data and of the adapter's first weights.")] = 1,
    rank: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    average: Annotated[float, typer.Option(min=0, max=0.9999, help="Ship a moving mean of the steps: 0.98.")] = 0.0,
    rows: Annotated[int, typer.Option(min=1, help="Rows of 1,280 tokens a step.")] = 3,
    calls: Annotated[Path | None, typer.Option(help="A file of a site's own tools, requests and calls.")] = None,
    focus: Annotated[list[str], typer.Option(help="A file of `data/written` that half of what it reads is of.")] = [],  # noqa: B006
    start: Annotated[str, typer.Option(help="An adapter to start from: a folder, or one that ships by name.")] = "",
    full: Annotated[bool, typer.Option(help="Train every weight but the embeddings, for comparison.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: CUDA where there is one.")] = "",
    cache: Annotated[Path | None, typer.Option(envvar="OUTRIDER_CACHE")] = None,
) -> None:
    """Train an adapter of the tool caller (needs the extra `train`); RUN/adapter is then what `publish` takes.

    With `--calls FILE` half of what it reads are the site's own requests, the other half keeps what it knew.
    """
    from edge_agent.engines.adapters import DAMAGED, read_arrays
    from edge_agent.wire.bundle import content_digest, scan
    from models.adapter import describe, shipped
    from models.errors import ModelError
    from models.fetch import default_cache, fetch
    from models.package import build
    from models.toolcaller.adapter import write_adapter
    from models.toolcaller.data.written import groups, of_site
    from models.toolcaller.packing import bunches

    try:
        from models.toolcaller.train import Plan, Run
    except ImportError as error:
        typer.echo("error: PyTorch is not installed\nhint: pip install 'outrider[train]'", err=True)
        raise typer.Exit(69) from error
    where = cache or default_cache()
    try:
        site = of_site(calls) if calls else ()
        if unknown := set(focus) - {group.domain for group in groups()}:
            raise ValueError(f"{', '.join(sorted(unknown))}: no such file in models/toolcaller/data/written")
        begun = shipped().get(start, Path(start)) if start else None
        first = read_arrays(begun / "adapter.npz") if begun else None
        bias = describe(begun).logit_bias if begun else {}
        base = build("smollm2", where)
        plan = Plan(seed=seed, steps=steps, rank=rank, rate=rate, average=average, rows_per_step=rows, full=full)
        run = Run(fetch("smollm2", where), out, plan, bunches(base, site, focus), device, first)
    except (*DAMAGED, ModelError) as error:
        typer.echo(f"error: {error}\nhint: docs/toolcaller.md says how a file of calls is written", err=True)
        raise typer.Exit(1) from error
    run.run(lambda entry: typer.echo(json.dumps(entry)))
    if not full:
        digest = write_adapter(out, out / "adapter", content_digest(scan(base)), bias)
        typer.echo(f"{digest}  {out / 'adapter'}", err=True)


def _bias(option: str) -> tuple[str, float]:
    word, _, by = option.partition("=")
    try:
        return word, float(by)
    except ValueError as error:
        raise typer.BadParameter(f"{option!r} is not like none=1.5", param_hint="--bias") from error


@app.command()
def adapter(
    run: Annotated[list[Path], typer.Argument(help="The folder of a training run; of several, or adapters, the mean.")],
    out: Annotated[Path, typer.Option(help="The adapter folder to make.")],
    bias: Annotated[list[str], typer.Option(help="WORD=NUMBER: added to the logit of a decision's first word.")] = [],  # noqa: B006
    cache: Annotated[Path | None, typer.Option(envvar="OUTRIDER_CACHE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Make what ships of a run: its adapter in 8 bits, for the base model as it is built here; needs no PyTorch."""
    from edge_agent.wire.bundle import content_digest, scan
    from models.adapter import shipped
    from models.errors import ModelError
    from models.fetch import default_cache
    from models.package import build
    from models.toolcaller.adapter import write_adapter

    words, (first, *more) = dict(_bias(each) for each in bias), (shipped().get(str(each), each) for each in run)
    try:
        base = content_digest(scan(build("smollm2", cache or default_cache())))
        digest = write_adapter(first, out, base, words, *more)
    except (ModelError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps({"path": str(out), "digest": digest}) if as_json else f"{digest}  {out}")


@app.command()
def merge(
    run: Annotated[Path, typer.Argument(help="The folder of a training run, or an adapter (one that ships by name).")],
    out: Annotated[Path, typer.Option(help="The model folder to make.")],
    bits: Annotated[int, typer.Option(help="4 (the base's form, the most is lost), 8, or 32 to compare with.")] = 4,
    cache: Annotated[Path | None, typer.Option(envvar="OUTRIDER_CACHE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Add an adapter to the base model and convert that; needs no PyTorch."""
    from models.adapter import shipped
    from models.errors import ModelError
    from models.fetch import default_cache, fetch
    from models.genai_build import write_genai_folder
    from models.toolcaller.merge import MergedWeights

    try:
        weights = MergedWeights(fetch("smollm2", cache or default_cache()), shipped().get(str(run), run))
        if bits not in (4, 8, 32):
            raise ValueError(f"{bits} bits: 4, 8 or 32")
        digest = write_genai_folder(weights, out, bits=bits)
    except (ModelError, OSError, ValueError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    typer.echo(json.dumps({"path": str(out), "digest": digest}) if as_json else f"{digest}  {out}")
