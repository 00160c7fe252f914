"""A million records while cut off: how fast they are kept, how fast they come home, in what memory and order.

A device's real store, outbox and session in a process of their own, on the true wire (embedded broker, a real hub
process) through a link that is cut before the first record and mended after the last one is on the device's disk.
`memory` is the process's highest resident size (VmHWM) above that of the connected, idle process.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from bench import virtual
from bench.fleet import running
from bench.link import Link

COUNT = 1_000_000
CHUNK = 500  # records a commit
MEMORY_GOAL = 40.0  # MiB


def run(count: int = COUNT) -> Iterator[dict[str, Any]]:
    """Rows `queued`, `catchup`, `memory`, `order`."""
    with tempfile.TemporaryDirectory(prefix="outrider-offline-") as folder:
        yield from asyncio.run(_measure(Path(folder), count))


async def _measure(folder: Path, count: int) -> list[dict[str, Any]]:
    async with running(folder) as hub:
        broker = urlsplit((await virtual.enrol(hub, folder / "device", "offline")).enrolled.broker.url)
        async with Link(broker.hostname or "", broker.port or 0) as link:
            process = virtual.start(_device, folder, f"mqtt://127.0.0.1:{link.port}", count)
            steps = {"idle": link.cut, "queued": link.mend}
            for step, then in steps.items():
                await virtual.until((folder / step).exists, [process])
                then()
                (folder / f"{step}.done").touch()
            await virtual.wait(process)
        took: dict[str, float] = msgspec.json.decode((folder / "took").read_bytes())
        books = virtual.books(folder / "ledger", hub.data / "hub.db", "offline")
    shared = {"peer": None, "peer_value": None, "ratio": None, "n": books.promised}
    kept = books.ordered and books.promised == books.committed == count and not books.doubled
    queued, catchup = (round(count / took[name], 1) for name in ("queue_s", "catchup_s"))
    memory = round(took["peak_mib"] - took["idle_mib"], 1)
    return [
        {"name": "queued", "value": queued, "unit": "records/s", **shared, "disk_mib": took["disk_mib"]},
        {"name": "catchup", "value": catchup, "unit": "records/s", **shared, "seconds": round(took["catchup_s"], 2)},
        {"name": "memory", "value": memory, "unit": "MiB", **shared, "goal": MEMORY_GOAL, "idle_mib": took["idle_mib"]},
        {"name": "order", "value": int(kept), "unit": "", **shared, "lost": books.lost, "doubled": books.doubled},
    ]


def _device(folder: Path, broker: str, count: int) -> None:
    asyncio.run(_serve(folder, broker, count))


async def _serve(folder: Path, broker: str, count: int) -> None:
    async with virtual.attached(folder / "device", broker) as (outbox, session):

        async def tell(step: str) -> None:
            (folder / step).touch()
            await virtual.until((folder / f"{step}.done").exists)

        await virtual.until(lambda: session.connected and outbox.depth == 0)
        await asyncio.sleep(2.0)
        took = {"idle_mib": _peak(anew=True)}
        await tell("idle")
        await virtual.until(lambda: not session.connected)
        began = time.monotonic()
        with (folder / "ledger").open("w") as ledger:
            for at in range(0, count, CHUNK):
                bodies = [virtual.body(n) for n in range(at, min(at + CHUNK, count))]
                seqs = await outbox.append_many("telemetry", bodies)
                ledger.writelines(map(virtual.line, seqs, bodies))
        took["queue_s"] = time.monotonic() - began
        took["disk_mib"] = round(sum(f.stat().st_size for f in (folder / "device").glob("outrider.db*")) / 2**20, 1)
        began = time.monotonic()
        await tell("queued")
        await virtual.until(lambda: outbox.depth == 0)
        took |= {"catchup_s": time.monotonic() - began, "peak_mib": _peak()}
    (folder / "took").write_bytes(msgspec.json.encode(took))


def _peak(anew: bool = False) -> float:
    """The highest resident size in MiB, since the process began or was asked `anew` (proc(5))."""
    if anew:
        Path("/proc/self/clear_refs").write_text("5")
    text = Path("/proc/self/status").read_text()
    return round(int(text.split("VmHWM:")[1].split()[0]) / 1024, 1)
