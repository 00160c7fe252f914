"""Bundles: a manifest, the files it names, and which of them a device is to have.

Invariants: a file's path is relative, plain and inside the bundle; signed bytes are kept as they came, so fields this
version does not know survive; the content digest depends on paths and contents alone. A manifest and its chunk index
are targets of the TUF repository; the directive is the second signature, without which nothing is installed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from edge_agent.wire.errors import Undecodable
from edge_agent.wire.messages import decode, encode
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import VERSION, check_name

_DIRECTED_AS, _ROOT_AS = "outrider/1/director", "outrider/1/root"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_FILES = 1000
MAX_FILE = 64 << 30


class BundleKind(StrEnum):
    ONNX = "onnx"
    LLM = "llm"
    ADAPTER = "adapter"
    WORKFLOW = "workflow"
    TOOLPACK = "toolpack"
    UNKNOWN = "unknown"

    @classmethod
    def _missing_(cls, value: object) -> BundleKind:
        return cls.UNKNOWN


class FileEntry(msgspec.Struct, frozen=True):
    """A file of a bundle: path with `/`, size in bytes, SHA-256 in hex."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        if not all(_PART.fullmatch(part) for part in self.path.split("/")) or self.path.count("/") > 8:
            raise ValueError(f"path {self.path!r} is not a plain relative path")
        if not SHA256.fullmatch(self.sha256) or not 0 <= self.size <= MAX_FILE:
            raise ValueError(f"{self.path}: size or SHA-256 makes no sense")


class Base(NamedTuple):
    """The model that an adapter is for: its bundle's name, the content digest of its files."""

    name: str
    digest: str


class Manifest(msgspec.Struct, frozen=True):
    """What a bundle is. `inputs`, `outputs`, `precisions` and `probe` are read by the engine of its kind.

    An adapter's `meta` has `base` and `base_digest`, `task` (`tools` for the agent's work), `prompt` (its form).
    """

    name: str
    version: str
    kind: BundleKind
    files: list[FileEntry]
    license: str = ""
    inputs: list[dict[str, Any]] = []
    outputs: list[dict[str, Any]] = []
    precisions: dict[str, dict[str, Any]] = {}
    probe: dict[str, Any] = {}
    min_agent_version: str = ""
    meta: dict[str, Any] = {}
    v: int = VERSION

    def __post_init__(self) -> None:
        check_name(self.name, "bundle")
        if not _VERSION.fullmatch(self.version):
            raise ValueError(f"version {self.version!r}: use 1 to 64 of letters, digits and '.+_-'")
        paths = [entry.path for entry in self.files]
        if not paths or len(paths) > MAX_FILES or len(set(paths)) != len(paths):
            raise ValueError(f"bundle {self.name}: {len(paths)} files; 1 to {MAX_FILES}, no path twice")
        if (base := self.base) and (not base.name or not SHA256.fullmatch(base.digest)):
            raise ValueError(f"adapter {self.name}: meta names no base and base_digest")

    @property
    def base(self) -> Base | None:
        """The model an adapter is for; None for every other kind."""
        if self.kind is not BundleKind.ADAPTER:
            return None
        return Base(str(self.meta.get("base", "")), str(self.meta.get("base_digest", "")))

    @property
    def hardware(self) -> list[str]:
        """The machines it is for (`meta.hardware`, such as aarch64); none: any."""
        named = self.meta.get("hardware", [])
        return [str(machine) for machine in named] if isinstance(named, list) else [str(named)]

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)


class Target(msgspec.Struct, frozen=True):
    """A version of a bundle, and the SHA-256 of its manifest's bytes."""

    version: str
    manifest_sha256: str


class Directive(msgspec.Struct, frozen=True):
    """What one device is to have installed, by name.

    `hardware` is the machine it was decided for (empty: not yet known); `counter` only rises; `issued` is in seconds
    since the Unix epoch.
    """

    fleet: str
    device: str
    hardware: str
    counter: int
    issued: float
    bundles: dict[str, Target]
    v: int = VERSION


class Sealed(msgspec.Struct, frozen=True):
    """Bytes as text, and the hub's signature over exactly these."""

    text: str
    signature: str


def seal_directive(key: SigningKey, directive: Directive) -> Sealed:
    """What stands under `director` in a desired document."""
    return _seal(key, _DIRECTED_AS, encode(directive))


def open_directive(key: VerifyKey, sealed: Sealed) -> Directive:
    """Raises BadSignature before anything is parsed, then Undecodable or VersionRefused."""
    return decode(Directive, _open(key, _DIRECTED_AS, sealed))


def seal_root(key: SigningKey, root: bytes) -> Sealed:
    """The TUF root a new device starts from, vouched for by the key it enrolled with."""
    return _seal(key, _ROOT_AS, root)


def open_root(key: VerifyKey, sealed: Sealed) -> bytes:
    """Raises BadSignature."""
    return _open(key, _ROOT_AS, sealed)


def _seal(key: SigningKey, topic: str, raw: bytes) -> Sealed:
    return Sealed(raw.decode(), key.sign(topic, raw))


def _open(key: VerifyKey, topic: str, sealed: Sealed) -> bytes:
    raw = sealed.text.encode()
    key.verify(topic, raw, sealed.signature)
    return raw


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def scan(folder: Path) -> list[FileEntry]:
    """Every file below a folder, sorted by path. Raises ValueError for a name a bundle cannot carry."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return [FileEntry(p.relative_to(folder).as_posix(), p.stat().st_size, sha256_file(p)) for p in files]


def content_digest(files: Iterable[FileEntry]) -> str:
    """Hex SHA-256 over the lines `sha256  path`, sorted by path: the hash a model folder is known by."""
    lines = sorted((entry.path, entry.sha256) for entry in files)
    return hashlib.sha256("".join(f"{sha}  {path}\n" for path, sha in lines).encode()).hexdigest()


def sha256(data: bytes) -> str:
    """Hex SHA-256: of a manifest's bytes, it names the version."""
    return hashlib.sha256(data).hexdigest()


def target_paths(name: str, version: str) -> tuple[str, str]:
    """What a version's manifest and chunk index are called in the trusted metadata."""
    return f"bundles/{name}/{version}/manifest.json", f"bundles/{name}/{version}/index"


def decode_manifest(raw: bytes) -> Manifest:
    """Raises Undecodable or VersionRefused."""
    manifest = decode(Manifest, raw)
    if manifest.kind is BundleKind.UNKNOWN:
        raise Undecodable(f"bundle {manifest.name} is of a kind this version does not know")
    return manifest
