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

    from models.toolcaller.data.generate import generate

    kinds: Counter[str] = Counter()
    try:
        with out.open("w", encoding="utf-8") as file:
            for example in generate(seed, n):
                kinds[example.kind] += 1
                file.write(json.dumps(example.row(), ensure_ascii=False) + "\n")
    except OSError as error:
        typer.echo(
            f"error: cannot write {out}: {error.strerror}\nhint: is the folder there, with space left?", err=True
        )
        raise typer.Exit(1) from error
    facts = {"examples": n, "seed": seed, "path": str(out), "kinds": dict(kinds)}
    typer.echo(json.dumps(facts, indent=1) if as_json else f"{n} examples of seed {seed} are in {out}")
