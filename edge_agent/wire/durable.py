"""Small files that survive a power loss.

Invariant: a reader sees the old content or the new, whole; when `write` returns, the new one is on disk under its name,
and when it raises, nothing of it stays.
"""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """fsync a file, or a folder so that the names in it survive."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Replace a file: written beside, fsynced, renamed, the folder fsynced."""
    partial = path.with_name(f".{path.name}.part")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # a disk that is full needs the room
        raise
    sync(path.parent)
