"""What the daemon costs a device that runs no model: memory and processor time after minutes of 10 records a second.

A real `outrider agent` with its tool runner, connected to a real hub: each second it measures itself and reads nine
sensors of the simulated plant. `pss` (proportional set size, proc_pid_smaps(5)) and `cpu` are the daemon's process
alone; `rss` stands beside because what it shares with the hub's Python on this machine counts only in
part in `pss`.
"""

from __future__ import annotations

import asyncio
import compileall
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.fleet import Device, Hub, running, until

SAMPLES = [
    f'read_sensor(sensor="{kind}", line={line})' for kind in ("vibration", "temperature", "speed") for line in (1, 2, 3)
]
SETTLE_S = 20.0  # before processor time is counted
GOALS = {"pss": 45.0, "cpu": 1.0}


def run(minutes: float = 10.0) -> Iterator[dict[str, Any]]:
    """Rows `pss` (MiB), `cpu` (percent of a core), `records` (a second, committed at the hub)."""
    with tempfile.TemporaryDirectory(prefix="outrider-footprint-") as folder:
        yield from asyncio.run(_measure(Path(folder), minutes))


async def _measure(folder: Path, minutes: float) -> list[dict[str, Any]]:
    for package in ("edge_agent", "tools"):  # as an installation does
        compileall.compile_dir(Path(__file__).parents[1] / package, quiet=1)
    async with running(folder) as hub:
        device = Device("probe", folder, hub)
        try:
            token = (await hub.post("/v1/enrolments", {"name": "probe", "ttl_s": 600}))["token"]
            sampled = [part for call in SAMPLES for part in ("--sample", call)]
            await device.start("--hub", hub.url, "--token", token, "--telemetry-s", "1", *sampled)
            await until("the first samples", 120, _committed, hub, 20)
            await asyncio.sleep(SETTLE_S)
            began, busy, before = time.monotonic(), cpu_s(device.process.pid), await _committed(hub)
            await asyncio.sleep(max(1.0, minutes * 60 - SETTLE_S))
            device.process.check()
            seconds = time.monotonic() - began
            cpu = 100 * (cpu_s(device.process.pid) - busy) / seconds
            rate = ((await _committed(hub) or 0) - (before or 0)) / seconds
            memory = rollup(device.process.pid)
            tools = rollup((await device.status())["workers"]["tools"]["pid"])
        finally:
            await device.stop()
    shared: dict[str, Any] = {"peer": None, "peer_value": None, "ratio": None, "n": round(rate * seconds)}
    pss = {"name": "pss", "value": memory["Pss"], "unit": "MiB", **shared, "goal": GOALS["pss"], "rss": memory["Rss"]}
    pss |= {"private": round(memory["Private_Dirty"] + memory["Private_Clean"], 1), "tool_runner_pss": tools["Pss"]}
    return [
        pss,
        {"name": "cpu", "value": round(cpu, 2), "unit": "percent", **shared, "goal": GOALS["cpu"]},
        {"name": "records", "value": round(rate, 2), "unit": "records/s", **shared, "minutes": minutes},
    ]


async def _committed(hub: Hub, at_least: int = 0) -> int | None:
    """The watermark of the device at the hub."""
    seqs = [device["watermark"] for device in await hub.get("/v1/devices")]
    return max(seqs, default=0) if max(seqs, default=0) >= at_least else None


def cpu_s(pid: int) -> float:
    """Processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rollup(pid: int) -> dict[str, float]:
    """MiB by name (proc_pid_smaps(5))."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {parts[0].rstrip(":"): round(int(parts[1]) / 1024, 1) for parts in lines}
