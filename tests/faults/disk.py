"""A small disk of its own for a folder: an ext4 image, loop-mounted; and what can happen to it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import subprocess
from pathlib import Path

_EXT4_IOC_SHUTDOWN, _NO_LOG_FLUSH = 0x8004587D, 2  # linux/fs/ext4/ext4.h


class Disk:
    """Mounted at `folder` when made. Raises OSError where that is not allowed."""

    def __init__(self, folder: Path, mib: int = 48) -> None:
        self.folder, self._image = folder, folder.with_name(f"{folder.name}.img")
        folder.mkdir(parents=True)
        with self._image.open("wb") as file:
            file.truncate(mib << 20)
        _run("mkfs.ext4", "-q", "-m", "0", str(self._image))
        self.mount()

    def mount(self) -> None:
        _run("mount", "-o", "loop", str(self._image), str(self.folder))

    def unmount(self) -> None:
        _run("umount", "-l", str(self.folder))

    def fill(self) -> None:
        """To the last block, with `filler`."""
        with contextlib.suppress(OSError), (self.folder / "filler").open("ab", buffering=0) as file:
            for size in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)) == size:
                        pass

    def free(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def turn_read_only(self) -> None:
        """As after an error of the device: the journal is given up under whoever writes."""
        subprocess.run(["mount", "-o", "remount,abort", str(self.folder)], capture_output=True, check=False)

    def lose_power(self) -> None:
        """From now on nothing is read or written, and what was not flushed is gone; `mount` replays the journal."""
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _EXT4_IOC_SHUTDOWN, struct.pack("I", _NO_LOG_FLUSH))
        finally:
            os.close(descriptor)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
