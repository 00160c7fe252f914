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
import tomllib
from fnmatch import fnmatch
from importlib.metadata import version as installed
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import msgspec

from edge_agent.engines.base import Generate
from edge_agent.engines.tensorrt_build import Profile
from edge_agent.errors import OutriderError
from edge_agent.wire import durable
from edge_agent.wire.bundle import BundleKind, Manifest, content_digest, scan, sha256_file
from models.errors import ModelError
from models.fetch import Progress, Source, fetch, quiet, sources

KEEP_BUILDS = 3
PROBE = "probe.msgpack"
PROBE_PROMPT = "The capital of France is"
PROBE_TOKENS = 2


class Conversion(msgspec.Struct, frozen=True):
    """How a fetched file becomes a model folder. `convert` names a function of (file, target, progress) whose module,
    with `modules`, is the source that the result depends on; `probe` is the picture's shape, or names a function."""

    convert: str
    modules: tuple[str, ...]
    probe: tuple[int, int, int, int] | str = ""
    precision: str = "float32"


CONVERSIONS = {
    "smollm2": Conversion(
        "models.genai_build:build_genai_folder",
        ("models.genai_graph", "models.gguf_weights", "models.tokenizer_files", "models.weights"),
        precision="int4",
    ),
    "ppocr-det": Conversion("models.package:copy", ("models.golden",), (1, 3, 64, 160)),
    "ppocr-rec": Conversion("models.ppocr:finish", ("models.golden",), (1, 3, 48, 128)),
    "objects": Conversion("models.objects:make", (), "models.objects:probe"),
    "digits": Conversion("models.digits:make", ("models.tasks",), "models.digits:probe"),
    "silero-vad": Conversion("models.silero:finish", (), "models.silero:probe"),
    "efficientnet-lite0": Conversion("models.efficientnet:make", ("models.golden",), (1, 3, 224, 224)),
    "minilm": Conversion("models.minilm:make", (), "models.minilm:probe"),
}


def copy(source: Path, target: Path, _: Progress) -> None:
    """Take a network as it is."""
    shutil.copy(source, target)


def build(name: str, cache: Path, progress: Progress = quiet) -> Path:
    """The model folder of a source, fetched and converted if the cache does not have it. Raises ModelError."""
    model = fetch(name, cache, progress)
    how, source = CONVERSIONS[name], sources()[name]
    folder = cache / "built" / f"{name}-{_key(how, source, _ranges(name))}"
    if folder.is_dir():
        folder.touch()
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
        try:
            work = scratch / "model"
            work.mkdir()
            resolve_name(how.convert)(model, work if source.kind == "llm" else work / "model.onnx", progress)
            if how.probe:
                from models.golden import answered, picture, tensors, write_profile

                inputs = resolve_name(how.probe)() if isinstance(how.probe, str) else {"x": picture(*how.probe)}
                (work / PROBE).write_bytes(answered(work / "model.onnx", tensors(inputs)))
                if ranges := _ranges(name):
                    write_profile(work, ranges)
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
    how, source = CONVERSIONS[name], sources()[name]
    progress("asking the golden probe", 0, 0)
    size = sum(entry.size for entry in scan(folder))
    manifest = manifest_of(name, version or "+", folder, source, {how.precision: {"bytes": size}})
    return write_bundle(out or cache / "bundles" / f"{name}-{manifest.version}", folder, manifest), manifest


def package_workflows(folder: Path, cache: Path, out: Path | None = None, version: str = "") -> tuple[Path, Manifest]:
    """Make the bundle of the definitions and interlocks in a folder, named as it. Raises ModelError."""
    name, files = folder.resolve().name.lower(), scan(folder)
    known = ("*.yaml", "policy.toml", "documents/*")
    if not files or not all(any(fnmatch(entry.path, each) for each in known) for entry in files):
        hint = "*.yaml files, policy.toml for interlocks, a folder documents for the memory, alone"
        raise ModelError(f"{folder} is no folder of workflows", hint)
    digest = content_digest(files)
    meta = {"content_digest": digest}
    manifest = Manifest(name, version or f"1+{digest[:8]}", BundleKind.WORKFLOW, files, meta=meta)
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
    durable.write(bundle / "bundle.json", msgspec.json.format(msgspec.json.encode(manifest), indent=1))
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


def manifest_of(
    name: str,
    version: str,
    folder: Path,
    source: Source,
    precisions: dict[str, Any],
    more: dict[str, Any] | None = None,
    atol: float = 1e-2,
) -> Manifest:
    """The manifest of a folder that is ready to serve; to a version with `+` source's version and digest are added.

    A language model is asked for its golden probe, a network has it in the folder.
    """
    files, kind = scan(folder), BundleKind(source.kind)
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    if kind is BundleKind.ONNX:
        from models.golden import signature

        inputs, outputs = signature(folder / "model.onnx")
        probe: dict[str, Any] = {"file": PROBE, "rtol": 1e-2, "atol": atol}
    else:
        probe = _language_probe(folder)
    digest = content_digest(files)
    if version.startswith("+"):
        version = f"{source.version}{version}{digest[:8]}"
    meta = {"source": pin(source), "source_file": source.files[0].name, "source_sha256": source.files[0].sha256}
    meta |= {"origin": source.origin, "content_digest": digest, **(more or {})}
    return Manifest(name, version, kind, files, source.license, inputs, outputs, precisions, probe, "", meta)


def pin(source: Source) -> str:
    """A source as pip names it."""
    return f"{source.package}=={source.version}"


def _ranges(name: str) -> Profile:
    """Of its recipe that ships, if one does."""
    path = Path(__file__).with_name("recipes") / f"{name}.toml"
    found = tomllib.loads(path.read_text()).get("profile", {}) if path.is_file() else {}
    return msgspec.convert(found, Profile)


def _key(how: Conversion, source: Source, ranges: Profile) -> str:
    """Names the input, the converter's source, the shape of the probe and the ranges of free dimensions."""
    digest = hashlib.sha256(source.files[0].sha256.encode())
    digest.update(repr((installed("onnx"), how.probe, [text.sha256 for text in source.files[1:]])).encode())
    digest.update(repr(sorted(ranges.items())).encode() if ranges else b"")
    for module in (how.convert.partition(":")[0], *how.modules):
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise ModelError(f"{module} is not installed", "pip install 'outrider[models]'")
        digest.update(Path(spec.origin).read_bytes())
    return digest.hexdigest()[:16]


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
