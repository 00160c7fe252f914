"""`outrider knowledge`: the documents a device knows, at the device, with no daemon and no network needed.

Invariants: it works on the file that the tools of the pack work on, at the same time if need be; what is added is found
by its words at once, and by its meaning when the tools have been over it. It writes as the user whose the state is, so
that the daemon can still write there.
"""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from edge_agent import config
from edge_agent.agent.memory import Memory
from edge_agent.errors import Refused
from tools.knowledge import limits

app = typer.Typer(no_args_is_help=True, help="The documents a device knows: add, list, search, forget.")
State = Annotated[
    Path | None, typer.Option(envvar="OUTRIDER_STATE", help="The device's state directory.", show_default=False)
]
Config = Annotated[
    Path | None,
    typer.Option(envvar="OUTRIDER_CONFIG", help="Its settings file, for quota and age.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Machine-readable.")]


def _open(state: Path | None, file: Path | None) -> Memory:
    """The memory of the pack `knowledge`. Raises Refused."""
    settings = config.load({"state": state}, file)
    if not settings.state.is_dir():
        raise Refused(f"there is no state directory {settings.state}", "give --state, the folder of `outrider agent`")
    if (owner := settings.state.stat().st_uid) != os.geteuid():
        raise Refused(
            f"{settings.state} belongs to user {owner}", f"run it as that user: sudo -u '#{owner}' outrider …"
        )
    options = dict(each.partition("=")[::2] for each in settings.option)
    given = {key.removeprefix("knowledge."): value for key, value in options.items() if key.startswith("knowledge.")}
    (settings.state / "tools").mkdir(exist_ok=True)
    return Memory(settings.state / "tools" / "knowledge.db", *limits(given))


@app.command()
def add(
    files: Annotated[list[Path], typer.Argument(help="Text: Markdown, reStructuredText, plain.")],
    name: Annotated[str, typer.Option(help="The source's name, for one file; else the file's own.")] = "",
    state: State = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Keep documents, each in place of the one of its name."""
    if name and len(files) > 1:
        raise Refused("--name is for one file", "without it each has the name of its file")
    kept = {}
    with closing(_open(state, config)) as memory:
        for file in files:
            try:
                kept[name or file.name] = memory.add(name or file.name, file.read_text())
            except (OSError, UnicodeDecodeError) as error:
                raise Refused(f"{file} cannot be read: {error}", "a file of UTF-8 text") from error
    if as_json:
        typer.echo(msgspec.json.encode(kept))
    for source, count in {} if as_json else kept.items():
        typer.echo(f"kept {source} in {count} parts")


@app.command("list")
def list_(state: State = None, config: Config = None, as_json: Json = False) -> None:
    """What is kept, the newest first."""
    with closing(_open(state, config)) as memory:
        sources = memory.sources()
    if as_json:
        typer.echo(msgspec.json.encode(sources))
    for each in [] if as_json else sources:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(each.added))
        typer.echo(f"{when}  {each.pieces:>5} parts  {each.bytes / 1024:>8.1f} KiB  {each.name}")


@app.command()
def search(
    question: Annotated[str, typer.Argument(help="In words that stand in the documents.")],
    count: Annotated[int, typer.Option(min=1, max=50, help="How many passages.")] = 5,
    state: State = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """The passages that fit best by their words, each with its source; exits 1 when there are none."""
    with closing(_open(state, config)) as memory:
        found = memory.search(question, limit=count)
    if as_json:
        typer.echo(msgspec.json.encode(found))
    for each in [] if as_json else found:
        typer.secho(f"{each.source}, part {each.n}" + (f": {each.title}" if each.title else ""), fg="cyan")
        typer.echo(f"  {each.text.strip()}")
    raise typer.Exit(not found)


@app.command()
def forget(
    sources: Annotated[list[str], typer.Argument(help="Names as `list` shows them.")],
    state: State = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Take documents or notes out; exits 1 when one was not there."""
    with closing(_open(state, config)) as memory:
        gone = {source: memory.forget(source) for source in sources}
    if as_json:
        typer.echo(msgspec.json.encode(gone))
    for source, was in {} if as_json else gone.items():
        typer.echo(f"forgot {source}" if was else f"there is no source {source!r}")
    raise typer.Exit(not all(gone.values()))
