"""Bundles: a manifest, the files it names, and the hub's signature over the manifest's own bytes.

Invariants: a file's path is relative, plain and inside the bundle; the signed bytes are kept as they came, so
fields this version does not know survive; the content digest depends on paths and contents alone.
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
from edge_agent.wire.messages import decode
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import VERSION, check_name

_SIGNED_AS = "outrider/1/bundle"
_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
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
        if not _SHA256.fullmatch(self.sha256) or not 0 <= self.size <= MAX_FILE:
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
        if (base := self.base) and (not base.name or not _SHA256.fullmatch(base.digest)):
            raise ValueError(f"adapter {self.name}: meta names no base and base_digest")

    @property
    def base(self) -> Base | None:
        """The model an adapter is for; None for every other kind."""
        if self.kind is not BundleKind.ADAPTER:
            return None
        return Base(str(self.meta.get("base", "")), str(self.meta.get("base_digest", "")))

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.files)


class SignedManifest(msgspec.Struct, frozen=True):
    """A manifest's bytes as text, and the hub's signature over exactly these."""

    manifest: str
    signature: str
    key_id: str

    @property
    def sha256(self) -> str:
        """Names this manifest in a desired document."""
        return hashlib.sha256(self.manifest.encode()).hexdigest()


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


def sign_manifest(key: SigningKey, manifest: bytes) -> SignedManifest:
    """Sign manifest bytes as they are. Raises Undecodable when they are not a manifest."""
    decode(Manifest, manifest)
    return SignedManifest(manifest.decode(), key.sign(_SIGNED_AS, manifest), key.public.key_id)


def verify_manifest(key: VerifyKey, signed: SignedManifest) -> Manifest:
    """Raises BadSignature before the manifest is parsed, then Undecodable or VersionRefused."""
    raw = signed.manifest.encode()
    key.verify(_SIGNED_AS, raw, signed.signature)
    manifest = decode(Manifest, raw)
    if manifest.kind is BundleKind.UNKNOWN:
        raise Undecodable(f"bundle {manifest.name} is of a kind this version does not know")
    return manifest
