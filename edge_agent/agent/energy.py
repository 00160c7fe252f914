"""What the device has drawn, in joules: by RAPL or hwmon where they can be read, else by time and declared watts.

Invariants: it is the whole device's draw, so what runs beside a task is in it; a counter that began anew adds nothing
less than nothing. Linux: Documentation/power/powercap/powercap.rst, Documentation/hwmon/sysfs-interface.rst.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

SYS = Path("/sys/class")


class Meter:
    """`watts` is asked for what the device draws where nothing measures it."""

    def __init__(self, watts: Callable[[], float], root: Path = SYS) -> None:
        self._watts, self._at = watts, time.monotonic()
        rapl = [path / "energy_uj" for path in sorted(root.glob("powercap/*:*")) if path.name.count(":") == 1]
        found = rapl or sorted(root.glob("hwmon/hwmon*/energy*_input"))
        self._counters = {path: value for path in found if (value := _read(path)) is not None}

    def since(self) -> float:
        """Joules since it was asked last."""
        now = time.monotonic()
        passed, self._at = now - self._at, now
        if not self._counters:
            return passed * self._watts()
        joules = 0.0
        for path, before in self._counters.items():
            if (value := _read(path)) is not None:
                span = _read(path.with_name("max_energy_range_uj")) or 0
                joules += max(0, value - before + (span if value < before else 0)) / 1e6
                self._counters[path] = value
        return joules


def _read(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
