"""Room on the disk for an update, and what a full one looks like."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from edge_agent.errors import Retry

RESERVE = 64 << 20
"""Bytes left free for the outbox and the system, however large an update is."""


def require(folder: Path, size: int, reserve: int = RESERVE, budget: int | None = None) -> None:
    """Raises Retry when the disk cannot take `size` more bytes and keep `reserve` free, or `budget` is less."""
    if budget is not None and budget < size:
        need = f"{size / 2**20:.1f} MiB more, {max(0, budget) / 2**20:.1f} MiB are left"
        raise Retry(f"the bundles' share of the disk is used up: the update needs {need}", "raise `bundles_mb`")
    free = shutil.disk_usage(folder).free
    if free - reserve < size:
        need = f"needs {size / 2**20:.1f} MiB and {reserve / 2**20:.1f} MiB reserve, {free / 2**20:.1f} MiB are free"
        raise Retry(f"the disk is full: the update {need}", "free space on the device; the update is tried again")


def is_full(error: OSError) -> bool:
    """True for the errors that mean that no more can be written."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
