"""`outrider models compile`: TensorRT engines for the GPUs of other machines, made with no GPU."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from models.console import Cache, Json, say, work
from models.errors import ModelError
from models.fetch import Progress, default_cache, sources

if TYPE_CHECKING:
    from edge_agent.engines.tensorrt_build import Profile

app = typer.Typer()


@app.command(name="compile")
def compile_(
    model: Annotated[str, typer.Argument(help="An ONNX file, FP16 or INT8 by its graph; or a model's name.")],
    out: Annotated[Path, typer.Option(help="The folder to write NAME.TARGET.engine and .json into.")],
    target: Annotated[
        str, typer.Option(help="sm86,sm89,… for TensorRT for RTX; current: this machine's GPU.")
    ] = "current",
    profile: Annotated[
        str, typer.Option(help="INPUT=smallest:usual:largest, each like 1x3x48x320; default: profile.json beside it.")
    ] = "",
    precision: Annotated[str, typer.Option(help="fp16 or int8, as the recipe of that name made it.")] = "",
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Build TensorRT engines of a network, one a target."""
    rows: list[dict[str, Any]] = []
    with work(as_json) as progress:
        try:
            where, targets = cache or default_cache(), target.split(",")
            rows += _compiled(model, precision, out, targets, profile, where, progress)
        except OSError as error:
            raise ModelError(f"the engine cannot be written: {error}", "another --out?") from error
    line = "{target:<8} {bytes:>12,} bytes {seconds:7.1f} s  peak {peak_mb:6.0f} MiB  {path}"
    say(as_json, rows, "\n".join(line.format(**row) for row in rows))


def _compiled(
    model: str, precision: str, out: Path, targets: list[str], profile: str, cache: Path, progress: Progress
) -> Iterator[dict[str, Any]]:
    """Build and publish each target's engine; yields what its JSON file holds, and `path`."""
    from edge_agent.engines.engine_cache import publish
    from edge_agent.engines.tensorrt_build import build, find_runtime, parse_profile

    given = parse_profile(profile)
    for target in targets:
        find_runtime(target)
    with tempfile.TemporaryDirectory(prefix="outrider-compile-") as scratch:
        name, file, ranges = _source(model, precision, cache, Path(scratch), progress)
        out.mkdir(parents=True, exist_ok=True)
        for target in dict.fromkeys(targets):
            path = out / f"{name}.{target}.engine"
            part = out / f".{path.name}.part"
            report = build(file, part, target, given or ranges, lambda what, *n, t=target: progress(f"{t}: {what}", *n))
            publish(part, path, msgspec.json.format(msgspec.json.encode(report), indent=1))
            yield {"path": str(path), **msgspec.to_builtins(report)}


def _source(model: str, precision: str, cache: Path, scratch: Path, progress: Progress) -> tuple[str, Path, Profile]:
    """Name, ONNX file (INT8 as TensorRT takes it) and kept profile of a path, or of a model that can be fetched."""
    from edge_agent.engines.choose import PROFILE
    from edge_agent.engines.tensorrt_build import Profile as Ranges

    name, file = Path(model).stem, Path(model)
    if precision:
        from models.recipe import packaged

        name, file = f"{model}-{precision}", packaged(model, precision, cache)[0] / "files" / "model.onnx"
    elif model in sources():
        if sources()[model].kind != "onnx":
            raise ModelError(f"{model} is no network: TensorRT takes ONNX networks", "outrider models list: the kinds")
        from models.package import build as fetched

        name, file = model, fetched(model, cache, progress) / "model.onnx"
    kept = file.with_name(PROFILE)
    ranges: Profile = msgspec.json.decode(kept.read_bytes(), type=Ranges) if kept.is_file() else {}
    if file.is_file() and b"QuantizeLinear" in file.read_bytes():
        from edge_agent.engines.qdq import for_tensorrt
        from models.inspect import load

        (scratch / file.name).write_bytes(for_tensorrt(load(file).SerializeToString()))
        file = scratch / file.name
    return name, file, ranges
