"""The versions of every bundle on this device, and the pointer to the one that runs.

    <root>/<bundle>/versions/<id>/{manifest.json, index, files/…}    whole and fsynced, or not there
    <root>/<bundle>/incoming/<id>/{manifest.json, index, files/…, parts/<sha256>}
    <root>/<bundle>/{current, previous} -> versions/<id>

Invariants: `id` is the SHA-256 of the manifest's bytes. A version folder appears by one rename, when every file in it
is whole; `current` changes by one rename; `previous` is set before `current` moves away from it, so whatever instant
the power fails at, `current` names a whole version. Only versions that nothing names and nobody wants are collected;
those that stay are what the next one is made of.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from edge_agent.errors import Refused, Retry
from edge_agent.update.assembly import Assembly, Seed
from edge_agent.wire import durable
from edge_agent.wire.bundle import FileEntry, Manifest, content_digest, decode_manifest, sha256, sha256_file
from edge_agent.wire.chunks import decode_index
from edge_agent.wire.errors import WireError


class Offer(msgspec.Struct, frozen=True):
    """A version's manifest and chunk index, as they were signed."""

    manifest: bytes
    index: bytes


class Installed(msgspec.Struct, frozen=True):
    """A whole version: its id (manifest SHA-256), the folder with the model's files, the manifest."""

    id: str
    folder: Path
    manifest: Manifest

    @property
    def digest(self) -> str:
        """The content digest of the model folder."""
        return content_digest(self.manifest.files)


class Slots:
    """The folder of versions. All methods block: call them in a thread."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def names(self) -> list[str]:
        """Bundles with a current version."""
        return sorted(link.parent.name for link in self.root.glob("*/current"))

    def current(self, name: str) -> Installed | None:
        """The version that runs."""
        return self._follow(name, "current")

    def pointed(self, name: str) -> str | None:
        """The id that `current` names, whether or not that version can be read."""
        link = self.root / name / "current"
        return link.readlink().name if link.is_symlink() else None

    def previous(self, name: str) -> Installed | None:
        """The version that ran before."""
        return self._follow(name, "previous")

    def has(self, name: str, id: str) -> bool:
        """True when that version is whole on disk."""
        return (self._version(name, id) / "manifest.json").is_file()

    def manifest(self, name: str, id: str) -> bytes | None:
        """The manifest of a version that is coming in or on disk; None when it is not there as it was signed."""
        for folder in (self._version(name, id), self.incoming(name, id)):
            try:
                raw = _manifest(folder)
            except OSError:
                continue
            if sha256(raw) == id:
                return raw
        return None

    def receive(self, name: str, offer: Offer) -> None:
        """Open the incoming folder of a version; other incoming versions of the bundle are dropped."""
        folder = self.incoming(name, sha256(offer.manifest))
        if folder.parent.is_dir():
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other)
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        durable.write(folder / "index", offer.index)
        durable.write(folder / "manifest.json", offer.manifest)

    def incoming(self, name: str, id: str) -> Path:
        """Where a version is put together."""
        return self.root / name / "incoming" / id

    def assembly(self, name: str, id: str, manifest: Manifest) -> Assembly:
        """What is still to be made of the incoming version. Raises Retry when its index cannot be used."""
        folder = self.incoming(name, id)
        try:
            index = decode_index((folder / "index").read_bytes(), manifest.files)
        except (OSError, WireError) as error:
            self.discard(name, id)
            raise Retry(f"the chunk index of {name} {manifest.version} cannot be used: {error}") from error
        return Assembly(folder / "parts", manifest.files, index, self._missing(name, id, manifest))

    def complete(self, name: str, id: str, manifest: Manifest, assembly: Assembly) -> None:
        """Give every part its name."""
        files = self.incoming(name, id) / "files"
        made: dict[str, Path] = {}
        for entry in manifest.files:
            if entry.sha256 in made:
                self._place(files / entry.path, made[entry.sha256], keep=True)
            elif entry.sha256 in assembly.missing:
                self._place(files / entry.path, assembly.part(entry))
                made[entry.sha256] = files / entry.path

    def seeds(self, folders: Iterable[Path] | None = None) -> Iterator[Seed]:
        """The versions that are current or previous, of every bundle, or those of `folders`, and how they were cut."""
        if folders is None:
            slots = (slot for name in self.names() for slot in (self.current(name), self.previous(name)))
            folders = [slot.folder.parent for slot in slots if slot is not None]
        for folder in folders:
            try:
                files = decode_manifest(_manifest(folder)).files
                yield Seed(folder / "files", files, decode_index((folder / "index").read_bytes(), files))
            except (OSError, WireError):
                continue

    def whole(self) -> frozenset[Path]:
        """The folders of every version that is whole, of every bundle."""
        return frozenset(path.parent for path in self.root.glob("*/versions/*/manifest.json"))

    def size(self) -> int:
        """Bytes of disk that all versions take, whole or coming in."""
        files = {(s.st_dev, s.st_ino): s.st_blocks * 512 for s in (p.lstat() for p in self.root.rglob("*"))}
        return sum(files.values())

    def _missing(self, name: str, id: str, manifest: Manifest) -> list[FileEntry]:
        """Files still to make; those another version of the bundle has are linked from it."""
        files = self.incoming(name, id) / "files"
        held = self._held(name)
        missing = []
        for entry in manifest.files:
            target = files / entry.path
            if target.is_file() and target.stat().st_size == entry.size and _found(target) == entry.sha256:
                continue  # a power loss keeps a length without its bytes
            if target.is_file():
                target.unlink()
            source = held.get(entry.sha256)
            if source is not None and _found(source) == entry.sha256:
                self._place(target, source, keep=True)
            else:
                missing.append(entry)
        return missing

    def _place(self, target: Path, source: Path, *, keep: bool = False) -> None:
        """Give a whole file its name in the incoming version. Raises Refused when two paths collide."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if keep:
                target.hardlink_to(source)
            else:
                source.replace(target)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise Refused(f"the manifest has a file and a folder of the same name: {target}") from error

    def stage(self, name: str, id: str) -> None:
        """Turn the incoming version into a whole one, by one rename after everything in it is on disk."""
        incoming, version = self.incoming(name, id), self._version(name, id)
        shutil.rmtree(incoming / "parts", ignore_errors=True)
        for path in [*incoming.rglob("*"), incoming]:
            durable.sync(path)
        version.parent.mkdir(parents=True, exist_ok=True)
        if version.exists():
            shutil.rmtree(version)
        incoming.replace(version)
        durable.sync(version.parent)
        durable.sync(version.parent.parent)

    def open(self, name: str, id: str) -> Installed:
        """A version on disk. Raises Refused when its manifest cannot be read."""
        folder = self._version(name, id)
        try:
            return Installed(id, folder / "files", decode_manifest(_manifest(folder)))
        except (OSError, WireError) as error:
            raise Refused(f"version {id[:12]} of {name} cannot be read: {error}") from error

    def check(self, name: str, id: str) -> Installed:
        """Read every byte of a version again. Raises Refused when one is not as the manifest says."""
        installed = self.open(name, id)
        for entry in installed.manifest.files:
            found = _found(installed.folder / entry.path)
            if found != entry.sha256:
                reason = f"{name} {installed.manifest.version}: {entry.path} is damaged"
                raise Refused(f"{reason}: expected sha256 {entry.sha256}, found {found}", "it is downloaded again")
        return installed

    def commit(self, name: str, id: str) -> None:
        """Point `current` at a whole version; the one before becomes `previous`. Doing it twice changes nothing."""
        current = self.current(name)
        if current is not None and current.id == id:
            return
        if current is not None:
            self._point(name, "previous", current.id)
        self._point(name, "current", id)

    def roll_back(self, name: str) -> Installed | None:
        """Point `current` at the previous version, or at nothing when there is none that is whole."""
        current, previous = self.current(name), self.previous(name)
        if previous is None or (current is not None and previous.id == current.id):
            (self.root / name / "current").unlink(missing_ok=True)
            return None
        self._point(name, "current", previous.id)
        return previous

    def discard(self, name: str, id: str) -> None:
        """Remove a version that is not current, and what came in of it."""
        current = self.current(name)
        if current is None or current.id != id:
            shutil.rmtree(self._version(name, id), ignore_errors=True)
        shutil.rmtree(self.incoming(name, id), ignore_errors=True)

    def collect(self, name: str, wanted: str) -> None:
        """Remove what neither `current` nor `previous` names and nobody wants, whole or coming in."""
        links = (self.root / name / pointer for pointer in ("current", "previous"))
        kept = {wanted, *(link.readlink().name for link in links if link.is_symlink())}
        for folder in [*self.root.glob(f"{name}/versions/*"), *self.root.glob(f"{name}/incoming/*")]:
            if folder.name not in kept:
                shutil.rmtree(folder, ignore_errors=True)

    def _version(self, name: str, id: str) -> Path:
        return self.root / name / "versions" / id

    def _follow(self, name: str, pointer: str) -> Installed | None:
        link = self.root / name / pointer
        if not link.is_symlink():
            return None
        try:
            return self.open(name, link.readlink().name)
        except Refused:
            return None

    def _point(self, name: str, pointer: str, id: str) -> None:
        link = self.root / name / pointer
        fresh = link.with_name(f".{pointer}.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(Path("versions") / id)
        fresh.replace(link)
        durable.sync(link.parent)

    def _held(self, name: str) -> dict[str, Path]:
        slots = [slot for slot in (self.previous(name), self.current(name)) if slot is not None]
        return {entry.sha256: slot.folder / entry.path for slot in slots for entry in slot.manifest.files}


def _found(path: Path) -> str:
    """The SHA-256 of a file, or what is there instead: a bad block is the damage of one file, not the device's end."""
    try:
        return sha256_file(path) if path.is_file() else "nothing"
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EBADMSG, errno.EUCLEAN):
            raise
        return f"an error ({error.strerror})"


def _manifest(folder: Path) -> bytes:
    """The manifest's own bytes; up to version 0.1 they lay inside a signed envelope."""
    raw = (folder / "manifest.json").read_bytes()
    if not raw.startswith(b'{"manifest":'):
        return raw
    try:
        return str(json.loads(raw)["manifest"]).encode()
    except (ValueError, RecursionError):
        return raw
