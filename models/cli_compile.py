"""`outrider models compile`: TensorRT engines for the GPUs of other machines, made with no GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from edge_agent.errors import Refused
from models.errors import ModelError
from models.fetch import Progress, default_cache, sources

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def mount(app: typer.Typer, say: Callable[[bool, object, str], None], errors: Any, shown: Any) -> None:
    """Add the command to `app`; the other arguments are its ways to print, to report errors and to show progress."""

    @app.command(name="compile")
    def compile_(
        model: Annotated[str, typer.Argument(help="An ONNX file, FP16 or INT8 by its graph; or a model's name.")],
        out: Annotated[Path, typer.Option(help="The folder to write NAME.TARGET.engine and .json into.")],
        target: Annotated[
            str, typer.Option(help="sm86,sm89,… for TensorRT for RTX; current: this machine's GPU.")
        ] = "current",
        profile: Annotated[
            str, typer.Option(help="INPUT=smallest:usual:largest, each like 1x3x48x320; more inputs after commas.")
        ] = "",
        cache: Annotated[
            Path | None, typer.Option(envvar="OUTRIDER_CACHE", help="Where models are kept between runs.")
        ] = None,
        as_json: Json = False,
    ) -> None:
        """Build TensorRT engines of a network, one a target."""
        with errors(as_json), shown(as_json) as progress:
            try:
                built = compiled(model, out, target, profile, cache or default_cache(), progress)
            except Refused as error:
                raise ModelError(error.message, error.hint) from error
            except OSError as error:
                raise ModelError(f"the engine cannot be written: {error}", "another --out?") from error
        lines = [
            f"{row['target']:<8} {row['bytes'] / 1e6:8.2f} MB {row['seconds']:6.1f} s  peak {row['peak_mb']:6.0f} MiB"
            f"  {row['path']}"
            for row in built
        ]
        say(as_json, built, "\n".join(lines))


def compiled(
    model: str, out: Path, targets: str, profile: str, cache: Path, progress: Progress
) -> list[dict[str, Any]]:
    """Build and publish each target's engine; returns what the JSON files hold, and `path`. Raises OutriderError."""
    from edge_agent.engines.engine_cache import publish
    from edge_agent.engines.tensorrt_build import build, find_runtime, parse_profile

    ranges, rows = parse_profile(profile), []
    wanted = list(dict.fromkeys(targets.split(",")))
    for target in wanted:
        find_runtime(target)
    name, file = _source(model, cache, progress)
    out.mkdir(parents=True, exist_ok=True)
    for target in wanted:
        path = out / f"{name}.{target}.engine"
        part = out / f".{path.name}.part"
        report = build(
            file, part, target, ranges, lambda what, done, total, t=target: progress(f"{t}: {what}", done, total)
        )
        facts: dict[str, Any] = msgspec.to_builtins(report)
        publish(part, path, msgspec.json.format(msgspec.json.encode(facts), indent=1))
        rows.append({"path": str(path), **facts})
    return rows


def _source(model: str, cache: Path, progress: Progress) -> tuple[str, Path]:
    """The name and the ONNX file of a path, or of a model that can be fetched."""
    if model not in sources():
        return Path(model).stem, Path(model)
    if sources()[model].kind != "onnx":
        raise ModelError(f"{model} is no network: TensorRT takes ONNX networks", "outrider models list shows the kinds")
    from models.package import build as fetched

    return model, fetched(model, cache, progress) / "model.onnx"
