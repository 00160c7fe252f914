"""What every verb that talks to a hub shares: its options, its errors, how it prints.

Invariant: a verb prints a line for each thing, or one JSON document with `--json`; an error is a sentence with a hint
on stderr and exit status 1.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from hub.errors import HubError

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[str | None, typer.Option("--hub", help="The hub's URL; else OUTRIDER_HUB, else the last login's.")]


@contextmanager
def talking(url: str | None) -> Iterator[Any]:
    from hub.client import HubClient

    with errors(), HubClient(url) as client:
        yield client


def tell(answer: Any, as_json: bool, line: Callable[[dict[str, Any]], str]) -> None:
    if as_json:
        typer.echo(json.dumps(answer, indent=2))
    else:
        for one in answer if isinstance(answer, list) else [answer]:
            typer.echo(line(one))


@contextmanager
def errors() -> Iterator[None]:
    try:
        yield
    except HubError as error:
        typer.echo(f"outrider hub: {error}", err=True)
        raise typer.Exit(1) from None
