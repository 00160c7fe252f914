"""From a fetched model to a bundle: a folder of files that is ready to serve, and its manifest.

    <cache>/built/<name>-<key>/                       the model folder, with its license texts and golden probe
    <bundle>/bundle.json, <bundle>/files/…            the manifest, and the same files

Invariants: a built folder is found by its input's hash and its converter's own source, so it is built once and never
stale; it appears whole or not at all; the files of a bundle are the built folder's, so both have one content digest.
Golden probes are answers of the engine that serves the model (see edge_agent/update/probe.py for their form).
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.engines.base import Generate
from edge_agent.errors import OutriderError
from edge_agent.wire.bundle import BundleKind, Manifest, content_digest, scan, sha256_file
from models.errors import ModelError
from models.fetch import Progress, Source, atomic_file, fetch, quiet, sources

KEEP_BUILDS = 3
PROBE = "probe.msgpack"
PROBE_PROMPT = "The capital of France is"
PROBE_TOKENS = 2

Convert = Callable[[Path, Path, Progress], None]
"""(fetched file, empty folder to fill, progress)."""


class Recipe(msgspec.Struct, frozen=True):
    """How a fetched file becomes a model folder: the conversion, the modules whose source it depends on."""

    convert: Convert
    modules: tuple[str, ...]
    precision: str
    probe_shape: tuple[int, int, int, int] | None = None
    probe: Callable[[], dict[str, Any]] | None = None


def _genai(source: Path, out: Path, progress: Progress) -> None:
    from models.genai_build import build_genai_folder

    build_genai_folder(source, out, lambda what, done: progress(what, round(done * 100), 100))


def _as_it_is(source: Path, out: Path, progress: Progress) -> None:
    shutil.copy(source, out / "model.onnx")


def _ppocr_recognition(source: Path, out: Path, progress: Progress) -> None:
    from models.ppocr import finish

    finish(source, out / "model.onnx")


def _digits(source: Path, out: Path, progress: Progress) -> None:
    from models.digits import make

    make(out / "model.onnx", progress)


def _digits_probe() -> dict[str, Any]:
    from models.tasks import digits

    return {"x": digits("evaluation")[0][:1]}


def _silero(source: Path, out: Path, progress: Progress) -> None:
    from models.silero import finish

    finish(source, out / "model.onnx")


def _silero_probe() -> dict[str, Any]:
    from models.silero import probe

    return probe()


def _efficientnet(source: Path, out: Path, progress: Progress) -> None:
    from models.efficientnet import make

    make(source, out / "model.onnx")


_GENAI = ("models.genai_build", "models.genai_graph", "models.gguf_weights", "models.tokenizer_files")
RECIPES = {
    "smollm2": Recipe(_genai, _GENAI, "int4"),
    "ppocr-det": Recipe(_as_it_is, ("models.golden",), "float32", (1, 3, 64, 160)),
    "ppocr-rec": Recipe(_ppocr_recognition, ("models.ppocr", "models.golden"), "float32", (1, 3, 48, 128)),
    "digits": Recipe(_digits, ("models.digits", "models.tasks"), "float32", probe=_digits_probe),
    "silero-vad": Recipe(_silero, ("models.silero",), "float32", probe=_silero_probe),
    "efficientnet-lite0": Recipe(_efficientnet, ("models.efficientnet", "models.golden"), "float32", (1, 3, 224, 224)),
}


def build(name: str, cache: Path, progress: Progress = quiet) -> Path:
    """The model folder of a source, fetched and converted if the cache does not have it. Raises ModelError."""
    model = fetch(name, cache, progress)
    recipe, source = RECIPES[name], sources()[name]
    folder = cache / "built" / f"{name}-{_key(recipe, source)}"
    if folder.is_dir():
        folder.touch()
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            work = scratch / "model"
            work.mkdir()
            recipe.convert(model, work, progress)
            if recipe.probe_shape:
                from models.golden import golden

                (work / PROBE).write_bytes(golden(work / "model.onnx", recipe.probe_shape))
            if recipe.probe:
                from models.golden import answered, tensors

                (work / PROBE).write_bytes(answered(work / "model.onnx", tensors(recipe.probe())))
            for text in source.files[1:]:
                shutil.copy(model.parent / text.name, work / text.name)
            _publish_folder(work, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ModelError(f"the disk is full: {name} was not built", f"free space at {folder.parent}") from error
    except (ValueError, OutriderError) as error:
        raise ModelError(f"{name} cannot be built: {error}", "is this the file that sources.toml pins?") from error
    for old in sorted(folder.parent.glob(f"{name}-*"), key=lambda p: p.stat().st_mtime)[:-KEEP_BUILDS]:
        shutil.rmtree(old)
    return folder


def package(
    name: str, cache: Path, out: Path | None = None, version: str = "", progress: Progress = quiet
) -> tuple[Path, Manifest]:
    """Make the bundle of a source, or of an adapter that ships, at `out` (default: in the cache). Raises ModelError.

    The default version is the source's with the content digest's first digits, so other content is another version.
    """
    from models.adapter import package_adapter, shipped

    if name in shipped():
        return package_adapter(name, shipped()[name], cache, out, version, progress)
    folder = build(name, cache, progress)
    recipe, source = RECIPES[name], sources()[name]
    digest = content_digest(scan(folder))
    manifest = _manifest(name, version or f"{source.version}+{digest[:8]}", folder, recipe, source, progress)
    return write_bundle(out or cache / "bundles" / f"{name}-{manifest.version}", folder, manifest), manifest


def write_bundle(bundle: Path, folder: Path, manifest: Manifest) -> Path:
    """The bundle folder of a manifest whose files lie in `folder`. Raises ModelError when it would overwrite others."""
    if bundle.exists() and not (bundle / "bundle.json").is_file():
        raise ModelError(f"{bundle} exists and is no bundle", "choose another --out")
    shutil.rmtree(bundle, ignore_errors=True)
    for entry in manifest.files:
        target = bundle / "files" / entry.path
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(folder / entry.path)
        except OSError:  # another file system
            shutil.copy(folder / entry.path, target)
    with atomic_file(bundle / "bundle.json") as (stream, keep):
        stream.write(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
        keep()
    return bundle


def open_bundle(bundle: Path) -> Manifest:
    """The manifest of a bundle whose files are as it says. Raises ModelError."""
    try:
        manifest = msgspec.json.decode((bundle / "bundle.json").read_bytes(), type=Manifest)
    except (OSError, ValueError) as error:
        raise ModelError(f"{bundle} is no bundle: {error}", "make one: outrider models package NAME") from error
    for entry in manifest.files:
        path = bundle / "files" / entry.path
        if not path.is_file() or sha256_file(path) != entry.sha256:
            raise ModelError(f"{entry.path} of {bundle} is not what its manifest says", "package it again")
    return manifest


def _manifest(name: str, version: str, folder: Path, recipe: Recipe, source: Source, progress: Progress) -> Manifest:
    files, kind = scan(folder), BundleKind(source.kind)
    inputs: list[dict[str, object]] = []
    outputs: list[dict[str, object]] = []
    if kind is BundleKind.ONNX:
        from models.golden import signature

        inputs, outputs = signature(folder / "model.onnx")
        probe: dict[str, Any] = {"file": PROBE, "rtol": 1e-2, "atol": 1e-2}
    else:
        progress("asking the golden probe", 0, 0)
        probe = _language_probe(folder)
    size = sum(entry.size for entry in files)
    meta = {
        "source": f"{source.package}=={source.version}",
        "source_file": source.files[0].name,
        "source_sha256": source.files[0].sha256,
        "origin": source.origin,
        "content_digest": content_digest(files),
    }
    return Manifest(
        name,
        version,
        kind,
        files,
        source.license,
        inputs,
        outputs,
        {recipe.precision: {"bytes": size}},
        probe,
        "",
        meta,
    )


def _key(recipe: Recipe, source: Source) -> str:
    """Names the input, the converter's source and the shape of the probe."""
    digest = hashlib.sha256(source.files[0].sha256.encode())
    digest.update(repr((recipe.probe_shape, [text.sha256 for text in source.files[1:]])).encode())
    for module in (*recipe.modules, "onnx"):
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ModelError(f"{module} is not installed", "pip install 'outrider[models]'")
        digest.update(Path(spec.origin).read_bytes() if module != "onnx" else _version("onnx"))
    return digest.hexdigest()[:16]


def _version(distribution: str) -> bytes:
    from importlib.metadata import version

    return version(distribution).encode()


def _publish_folder(work: Path, folder: Path) -> None:
    """Give a whole folder its name; when another process was first, that one stands."""
    try:
        work.rename(folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise


def _language_probe(folder: Path) -> dict[str, Any]:
    """The first greedy tokens of the engine that serves language models."""
    from edge_agent.engines.genai import GenaiModel

    try:
        model = GenaiModel(folder)
        try:
            request = Generate(prefix="", prompt=PROBE_PROMPT, max_tokens=PROBE_TOKENS)
            text = "".join(piece.text for piece in model.generate(request, lambda: False))
        finally:
            model.close()
    except OutriderError as error:
        raise ModelError(f"the built model does not run: {error}") from error
    return {"prompt": PROBE_PROMPT, "text": text, "max_tokens": PROBE_TOKENS}
