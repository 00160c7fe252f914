"""What this machine has, as the kernel tells it (Linux: proc(5), cgroups(7) version 2).

Invariants: free memory is what neither the machine nor a cgroup of this process, or one above it, would have to swap or
kill for, the cache of files that can be dropped included; CPUs are those that this process may use. Where nothing is
known there is no bound and no verdict.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

CGROUPS, OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
UNBOUND = 2**63


def memory() -> dict[str, int]:
    """KiB by name (proc_meminfo(5))."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) for parts in lines if len(parts) > 1}


def available_memory(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """Bytes that new processes may take before anything is swapped out or killed."""
    try:
        free = memory()["MemAvailable"] * 1024
    except (OSError, KeyError, ValueError):
        free = UNBOUND
    for folder in _groups(cgroups, own):
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            if limit != "max":
                cache = _facts(folder / "memory.stat").get("inactive_file", 0)
                free = min(free, max(0, int(limit) - int(used) + cache))
        except (OSError, ValueError):
            continue
    return free


def cpu_count(cgroups: Path = CGROUPS, own: Path = OWN) -> int:
    """CPUs this process may use: its affinity, and the smallest quota of its cgroup and those above, rounded up."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _groups(cgroups, own):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            count = count if quota == "max" else max(1, min(count, math.ceil(int(quota) / int(period))))
        except (OSError, ValueError):
            continue
    return count


def cpu_times() -> tuple[int, int]:
    """Busy and total jiffies since boot (proc_stat(5))."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return sum(fields) - fields[3] - fields[4], sum(fields)


def oom_kills(cgroups: Path = CGROUPS, own: Path = OWN) -> int | None:
    """How many processes of this one's cgroup the kernel killed for lack of memory; None where it does not say."""
    for folder in _groups(cgroups, own):
        try:
            return _facts(folder / "memory.events")["oom_kill"]
        except (OSError, KeyError, ValueError):
            break
    return None


def ending(status: int | None, before: int | None, after: int | None) -> str:
    """How a process ended, by its status and the kernel's counter before and after."""
    killed = status in (-9, 137)
    if killed and before is not None and after is not None and after > before:
        return "the kernel killed it for lack of memory"
    if killed and before is None:
        return "it was killed (signal 9), as the kernel does when memory is short"
    return "it was killed (signal 9)" if killed else f"it ended with status {status}"


def _groups(cgroups: Path = CGROUPS, own: Path = OWN) -> Iterator[Path]:
    """The folders of this process's cgroup and of those above it."""
    try:
        group = cgroups / own.read_text().rpartition("::")[2].strip().lstrip("/")
    except OSError:
        return
    yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(cgroups))


def _facts(path: Path) -> dict[str, int]:
    return {name: int(value) for name, _, value in (line.partition(" ") for line in path.read_text().splitlines())}
