"""From an adapter folder to a bundle: a LoRA adapter beside the exact 4-bit weights of its base model.

    <folder>/adapter.npz, adapter.json       as `outrider models toolcaller adapter` writes them; LICENSE, README.md
    models/adapters/<name>/                  the folders that ship with the toolchain

Invariants: an adapter is packaged only with the very base model it names by content digest; its golden probe is text
of base and adapter together, as far as they are sure of it and where they can, other text than the base's alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.agent import prompt
from edge_agent.agent.tool import Param, ToolSpec
from edge_agent.engines.base import Generate, LanguageModel
from edge_agent.errors import OutriderError
from edge_agent.wire.bundle import BundleKind, Manifest, content_digest, scan
from models.errors import ModelError
from models.fetch import Progress, quiet, sources
from models.package import PROBE_PROMPT, build, write_bundle

FOLDERS = Path(__file__).with_name("adapters")
FILES = ("adapter.npz", "adapter.json", "LICENSE", "README.md")
TOOLS = "tools"
PROBE_TOKENS = 8
SURE = math.log(0.6)
_LINE = Param("line", "int", low=1, high=4)
_SPECS = [
    ToolSpec("read_meter", "Read the meter of a line.", [_LINE]),
    ToolSpec("open_valve", "Open the valve of a line.", [_LINE]),
]
_ASKED = prompt.suffix([prompt.Turn("user", "Open the valve of line 3.")])
PROBES = (prompt.preamble(_SPECS, shots=False) + _ASKED, PROBE_PROMPT)


class Description(msgspec.Struct, frozen=True):
    """What adapter.json says. `base`: content digest of the base model; `task`: by default `tools` for `signatures`.

    `calibration`: how sure a decision of so and so probability is (see toolcaller/evaluate/calibrate.py); `calls`:
    `several` where the agent may have all calls of a request at once; `logit_bias`: what the engine adds to the first
    word of a decision.
    """

    base: str
    rank: int = 0
    prompt: str = ""
    task: str | None = None
    version: str = "1"
    license: str = ""
    calibration: dict[str, Any] = {}
    calls: str = ""
    logit_bias: dict[str, float] = {}


def shipped() -> dict[str, Path]:
    """The folders of the adapters that ship with the toolchain, by name."""
    return {path.parent.name: path.parent for path in sorted(FOLDERS.glob("*/adapter.json"))}


def describe(folder: Path) -> Description:
    """What an adapter folder says of itself. Raises ModelError."""
    try:
        found = msgspec.json.decode((folder / "adapter.json").read_bytes(), type=Description)
        if not (folder / "adapter.npz").is_file():
            raise ValueError("adapter.npz is missing")
    except (OSError, ValueError) as error:
        hint = "outrider models toolcaller adapter RUN --out FOLDER makes one"
        raise ModelError(f"{folder} is no adapter folder: {error}", hint) from error
    return found


def package_adapter(
    name: str, folder: Path, cache: Path, out: Path | None = None, version: str = "", progress: Progress = quiet
) -> tuple[Path, Manifest]:
    """Make the bundle of an adapter folder at `out` (default: in the cache). Raises ModelError.

    The default version is adapter.json's with the content digest's first digits.
    """
    about = describe(folder)
    base, base_folder = _base(about.base, cache, progress)
    files = [entry for entry in scan(folder) if entry.path in FILES]
    progress("asking the golden probe", 0, 0)
    probe = _probe(base_folder, folder, name)
    digest = content_digest(files)
    task = about.task if about.task is not None else TOOLS if about.prompt == "signatures" else ""
    meta = {"base": base, "base_digest": about.base, "task": task, "prompt": about.prompt, "rank": about.rank}
    told = {"calibration": about.calibration, "calls": about.calls}
    meta |= {"content_digest": digest, **{key: value for key, value in told.items() if value}}
    precisions = {"float16": {"bytes": sum(entry.size for entry in files)}}
    version = version or f"{about.version}+{digest[:8]}"
    try:
        of = (BundleKind.ADAPTER, files, about.license)
        manifest = Manifest(name, version, *of, precisions=precisions, probe=probe, meta=meta)
    except ValueError as error:
        raise ModelError(f"the adapter cannot be packaged: {error}") from error
    return write_bundle(out or cache / "bundles" / f"{name}-{version}", folder, manifest), manifest


def _base(digest: str, cache: Path, progress: Progress) -> tuple[str, Path]:
    """Name and folder of the language model with a content digest."""
    built = {}
    for name in [name for name, source in sources().items() if source.kind == "llm"]:
        folder = build(name, cache, progress)
        found = content_digest(scan(folder))
        if found == digest:
            return name, folder
        built[name] = found[:12]
    there = ", ".join(f"{name} {found}" for name, found in built.items())
    raise ModelError(f"the adapter is for a base model of digest {digest[:12]}, there is {there}", "make it anew")


def _probe(base: Path, folder: Path, name: str) -> dict[str, Any]:
    from edge_agent.engines.genai import GenaiModel

    try:
        model = GenaiModel(base)
        try:
            model.load_adapter(name, folder)
            probes = [_sure(model, text, name) for text in PROBES]
            return next((probe for probe in probes if not _says(model, probe).startswith(probe["text"])), probes[0])
        finally:
            model.close()
    except OutriderError as error:
        raise ModelError(f"the adapter does not run: {error.message}", error.hint) from error


def _sure(model: LanguageModel, text: str, adapter: str) -> dict[str, Any]:
    """The probe with as many greedy tokens as are likelier than SURE, at least one."""
    best: dict[str, Any] = {}
    before = 0.0
    for count in range(1, PROBE_TOKENS + 1):
        request = Generate(prefix="", prompt=text, max_tokens=count, adapter=adapter)
        pieces = list(model.generate(request, lambda: False))
        logprob = pieces[-1].mean_logprob * count - before
        before += logprob
        if best and (pieces[-1].output_tokens < count or logprob < SURE):
            break
        best = {"prompt": text, "text": "".join(piece.text for piece in pieces), "max_tokens": count}
    return best


def _says(model: LanguageModel, probe: dict[str, Any]) -> str:
    request = Generate(prefix="", prompt=probe["prompt"], max_tokens=probe["max_tokens"])
    return "".join(piece.text for piece in model.generate(request, lambda: False))
