"""From a file of the user's own to a bundle: an ONNX network, a GGUF file, or a Hugging Face checkpoint's folder.

Invariants: nothing in the file is run but the graph, by the engine that will serve it; a network keeps its graph as it
is and its golden probe is what the engine answers to fixed random numbers; what is imported is named by its hash.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np

from edge_agent.errors import OutriderError
from edge_agent.wire.bundle import Manifest, content_digest, scan, sha256_file
from models.errors import ModelError
from models.fetch import Progress, Source, SourceFile, quiet
from models.package import PROBE, manifest_of, write_bundle
from models.weights import Weights

FORMS = "an .onnx file, a .gguf file, or the folder of a Hugging Face checkpoint with .safetensors files"
LICENSES = ("LICENSE*", "NOTICE*", "COPYING*")


def import_model(
    path: Path,
    name: str,
    out: Path,
    *,
    version: str = "",
    license_: str = "",
    precision: str = "",
    shapes: str = "",
    profile: str = "",
    progress: Progress = quiet,
) -> Manifest:
    """Make a bundle at `out`. Raises ModelError.

    `precision` of a language model: int4, int8 or fp32; by default int4 where the file has 4 bits, else int8. `shapes`:
    of a network's free inputs for its probe, `x=1x3x48x320,…`; `profile`: their ranges, see `parse_profile`.
    """
    kind = "onnx" if path.suffix == ".onnx" else "llm"
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{name}-") as scratch:
        work = Path(scratch) / "model"
        if kind == "onnx":
            work.mkdir()
            precision = _network(path, work, shapes, profile)
        else:
            precision = convert(path, work, precision, progress)
        beside = path if path.is_dir() else path.parent
        for text in [text for pattern in LICENSES for text in sorted(beside.glob(pattern)) if text.is_file()]:
            shutil.copy(text, work / text.name)
        size = sum(entry.size for entry in scan(work))
        digest = content_digest(scan(path)) if path.is_dir() else sha256_file(path)
        origin = SourceFile(path.name, path.stat().st_size, digest)
        source = Source(kind, path.name, "1", "", license_, f"imported from {path.name}", [origin])
        progress("asking the golden probe", 0, 0)
        manifest = manifest_of(name, version or "+", work, source, {precision: {"bytes": size}})
        write_bundle(out, work, manifest)
    return manifest


def convert(path: Path, out: Path, precision: str = "", progress: Progress = quiet) -> str:
    """Write a checkpoint as the folder that is served, replacing it; returns its precision. Raises ModelError."""
    from models.genai_build import write_genai_folder
    from models.language import BITS

    weights = _weights(path)
    precision = precision or weights.stored
    if precision not in BITS:
        raise ModelError(f"no precision {precision!r} of a language model", f"one of {', '.join(BITS)}")
    if out.exists() and not (out / "genai_config.json").is_file():
        raise ModelError(f"{out} exists and is no language model", "choose another --out")
    write_genai_folder(weights, out, progress, BITS[precision])
    return precision


def _network(path: Path, work: Path, shapes: str, profile: str) -> str:
    """Check a network, copy it and write its golden probe; returns the name of its precision."""
    from edge_agent.engines.tensorrt_build import parse_profile
    from models.golden import answered, signature, tensors, write_profile
    from models.inspect import inspect

    facts = inspect(path)
    refused = facts["runtimes"]["onnxruntime"]["refused"]
    if refused:
        reasons = "; ".join(f"{row['op'] or 'the graph'}: {row['why']}" for row in refused)
        raise ModelError(f"ONNX Runtime does not take {path.name}: {reasons}", "export it with other ops or opset")
    shutil.copy(path, work / "model.onnx")
    try:
        pairs = [part.partition("=") for part in shapes.split(",") if part]
        ranges = parse_profile(profile)
        write_profile(work, ranges)
        given = {name: list(usual) for name, (_, usual, _) in ranges.items()}
        given |= {name: [int(size) for size in sizes.split("x")] for name, _, sizes in pairs}
    except ValueError as error:
        raise ModelError(f"--shape {shapes} makes no sense", "INPUT=1x3x48x320, more inputs after commas") from error
    dice, feed = np.random.default_rng(0), {}
    for value in signature(path)[0]:
        shape = given.pop(value["name"], value["shape"])
        fits = len(shape) == len(value["shape"])
        if -1 in shape or not fits or any(a not in (b, -1) for a, b in zip(value["shape"], shape, strict=True)):
            raise ModelError(f"input {value['name']} is {value['shape']}", f"--shape {value['name']}=1x3x48x320")
        feed[value["name"]] = dice.uniform(0, 1, shape).astype(value["dtype"])
    if given:
        raise ModelError(f"{path.name} has no input {', '.join(given)}", f"inputs: {', '.join(feed)}")
    try:
        (work / PROBE).write_bytes(answered(work / "model.onnx", tensors(feed)))
    except OutriderError as error:
        raise ModelError(f"{path.name} does not run: {error.message}", error.hint) from error
    if "QuantizeLinear" in facts["ops"]:
        return "int8"
    return next(iter(facts["weights"]), "float32")


def _weights(path: Path) -> Weights:
    if path.suffix == ".gguf":
        from models.gguf_weights import GgufWeights

        return GgufWeights(path)
    folder = path.parent if path.suffix == ".safetensors" else path
    if not folder.is_dir():
        raise ModelError(f"{path} is no model that can be imported", FORMS)
    from models.safetensors_weights import SafetensorsWeights

    return SafetensorsWeights(folder)
