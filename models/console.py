"""How the commands of `outrider models` take options, show progress, print and report errors."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from edge_agent.errors import OutriderError
from models.fetch import Progress

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Cache = Annotated[Path | None, typer.Option(envvar="OUTRIDER_CACHE", help="Where models are kept between runs.")]
Version = Annotated[str, typer.Option(help="Default: the source's version and the digest's first digits.")]


def say(as_json: bool, facts: object, text: str) -> None:
    """Print facts as JSON, or the text."""
    typer.echo(json.dumps(facts, indent=1) if as_json else text)


@contextmanager
def work(as_json: bool) -> Iterator[Progress]:
    """A progress bar on stderr, nothing when it is no terminal; Outrider's errors are told and exit with 1."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, quiet=as_json and not sys.stderr.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    try:
        with Bars(*columns, console=console, transient=True) as bars:
            task = bars.add_task("", total=None)
            yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total or None)
    except (OutriderError, ValueError) as error:
        message, hint = getattr(error, "message", str(error)), getattr(error, "hint", "")
        if as_json:
            typer.echo(json.dumps({"error": message, "hint": hint}))
        else:
            typer.echo(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), err=True)
        raise typer.Exit(1) from error
