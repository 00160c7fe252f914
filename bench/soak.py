"""Random faults for minutes, and then the books: what was promised is committed, once, in order, with no seq left out.

Each device is a process with the real store, outbox and session behind a link of its own; hub and embedded broker are
real processes. A seeded generator cuts links, kills devices, the broker (which forgets its sessions) and the hub with
SIGKILL. The first device is never killed and the hub not in the last half, so that memory and descriptors of a long
life can be compared: the median of its last third with that of the third before.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from bench import virtual
from bench.fleet import Hub, running
from bench.link import Link
from edge_agent.errors import Retry

FAULTS = {"cut": 10, "kill-device": 6, "kill-broker": 2, "kill-hub": 1}  # and their weights
EVERY_S = (1.0, 4.0)  # between faults
CUT_S = (0.5, 15.0)
CATCH_UP_S = 180.0
FLAT = {"rss": (1.1, 4.0), "fds": (1.1, 4.0)}  # the last third is at most this factor and so much more (MiB, count)
Say = Callable[[str], None]


class Soak:
    """One run in `folder`."""

    def __init__(self, folder: Path, devices: int, seed: int, say: Say) -> None:
        self.names = [f"device-{n}" for n in range(devices)]
        self._folder, self._random, self._say, self._seed = folder, random.Random(seed), say, seed
        self._links: dict[str, Link] = {}
        self._processes: dict[str, BaseProcess] = {}
        self._mending: set[asyncio.Task[None]] = set()
        self._samples: dict[str, list[tuple[float, int]]] = defaultdict(list)
        self.faults: Counter[str] = Counter()

    async def run(self, minutes: float) -> dict[str, Any]:
        """The report."""
        async with running(self._folder) as hub, contextlib.AsyncExitStack() as stack:
            try:
                for name in self.names:
                    broker = urlsplit((await virtual.enrol(hub, self._folder / name, name)).enrolled.broker.url)
                    link = Link(broker.hostname or "", broker.port or 0)
                    self._links[name] = await stack.enter_async_context(link)
                    self._start(name)
                began = time.monotonic()
                while (past := time.monotonic() - began) < minutes * 60:
                    await asyncio.sleep(self._random.uniform(*EVERY_S))
                    self._sample(hub)
                    await self._fault(hub, past > minutes * 30)
                caught_up = await self._catch_up(began + minutes * 60)
            finally:
                for process in self._processes.values():
                    process.kill()
        books = {name: self._books(hub, name) for name in self.names}
        return self._report(minutes, caught_up, books)

    def _start(self, name: str) -> None:
        broker = f"mqtt://127.0.0.1:{self._links[name].port}"
        self._processes[name] = virtual.start(_device, self._folder / name, broker, self._random.randrange(2**32))

    async def _fault(self, hub: Hub, late: bool) -> None:
        fault = self._random.choices(list(FAULTS), list(FAULTS.values()))[0]
        name = self._random.choice(self.names)
        if (fault == "kill-hub" and late) or (fault == "kill-device" and name == self.names[0]):
            fault = "cut"
        if fault == "kill-device" and not self._processes[name].is_alive():
            return
        self.faults[fault] += 1
        self._say(f"{fault} {name if fault in ('cut', 'kill-device') else ''}")
        match fault:
            case "cut":
                self._links[name].cut()
                self._later(self._random.uniform(*CUT_S), self._links[name].mend)
            case "kill-device":
                self._processes[name].kill()
                self._processes[name].join()
                self._later(self._random.uniform(0, 3), lambda: self._start(name))
            case "kill-broker":
                for pid in _children(hub.process.pid):
                    os.kill(pid, signal.SIGKILL)
            case "kill-hub":
                await hub.process.kill()
                await asyncio.sleep(self._random.uniform(0, 3))
                await hub.start()

    def _later(self, seconds: float, work: Callable[[], None]) -> None:
        async def wait() -> None:
            await asyncio.sleep(seconds)
            work()

        task = asyncio.create_task(wait())
        self._mending.add(task)
        task.add_done_callback(self._mending.discard)

    def _sample(self, hub: Hub) -> None:
        for who, pid in (("hub", hub.process.pid), (self.names[0], self._processes[self.names[0]].pid or 0)):
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/status").read_text()
                rss = int(text.split("VmRSS:")[1].split()[0]) / 1024
                if self._samples[who] and self._samples[f"{who} pid"] != [(pid, 0)]:
                    self._samples[who].clear()  # another life
                self._samples[f"{who} pid"] = [(pid, 0)]
                self._samples[who].append((rss, len(list(Path(f"/proc/{pid}/fd").iterdir()))))

    async def _catch_up(self, since: float) -> float:
        """Everything is mended and nothing more is made: seconds until each device says that all is committed."""
        await asyncio.gather(*self._mending)
        for link in self._links.values():
            link.mend()
        (self._folder / "stop").touch()
        deadline = time.monotonic() + CATCH_UP_S
        while any(process.is_alive() for process in self._processes.values()):
            if time.monotonic() > deadline:
                self._say("not all devices have caught up")
                return -1.0
            await asyncio.sleep(0.2)
        return round(time.monotonic() - since, 1)

    def _books(self, hub: Hub, name: str) -> dict[str, Any]:
        database = hub.data / "hub.db"
        books = virtual.books(self._folder / name / "ledger", database, name)
        with contextlib.closing(sqlite3.connect(self._folder / name / "outrider.db")) as db:
            (known, stored) = db.execute("SELECT last_seq, (SELECT max(last) FROM outbox) FROM outbox_state").fetchone()
            made = max(known, stored or 0)
        query = "SELECT count(*), count(DISTINCT seq), coalesce(max(seq), 0) FROM telemetry WHERE device = ?"
        with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
            rows, distinct, newest = db.execute(query, [name]).fetchone()
        whole = rows == distinct == newest == made  # every seq from 1 to the last, each once
        return {"made": made, "rows": rows, "whole": whole, "lost": books.lost, "doubled": books.doubled,
                "ordered": books.ordered, "promised": books.promised}  # fmt: skip

    def _report(self, minutes: float, caught_up: float, books: dict[str, dict[str, Any]]) -> dict[str, Any]:
        total = {
            key: sum(each[key] for each in books.values()) for key in ("made", "rows", "promised", "lost", "doubled")
        }
        long_lives = {who: self._samples[who] for who in ("hub", self.names[0])}
        lives = {who: _flat(samples) for who, samples in long_lives.items()}
        exact = all(each["whole"] and each["ordered"] for each in books.values()) and not total["lost"]
        flat = all(life["flat"] for life in lives.values())
        return {
            "minutes": minutes, "devices": len(self.names), "seed": self._seed, "faults": dict(self.faults),
            **total, "caught_up_s": caught_up, "exact": exact and caught_up >= 0, "flat": flat, "lives": lives,
            "wrong": {name: each for name, each in books.items() if not each["whole"] or each["lost"]},
            "held": exact and flat and caught_up >= 0,
        }  # fmt: skip


def _flat(samples: list[tuple[float, int]]) -> dict[str, Any]:
    third = max(1, len(samples) // 3)
    before, last = samples[-2 * third : -third] or samples, samples[-third:]
    found: dict[str, Any] = {"samples": len(samples), "flat": True}
    for n, (name, (factor, more)) in enumerate(FLAT.items()):
        first, then = median(each[n] for each in before), median(each[n] for each in last)
        found[name] = [round(first, 1), round(then, 1)]
        found["flat"] = found["flat"] and then <= first * factor + more
    return found


def _children(pid: int) -> list[int]:
    """Of the hub: its broker."""
    with contextlib.suppress(OSError):
        return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def _device(state: Path, broker: str, seed: int) -> None:
    asyncio.run(_live(state, broker, random.Random(seed)))


async def _live(state: Path, broker: str, chance: random.Random) -> None:
    stop = state.parent / "stop"
    with (state / "ledger").open("a", buffering=1) as ledger:
        async with virtual.attached(state, broker) as (outbox, _):
            while not stop.exists():
                for priority in chance.choices(range(10), k=chance.randrange(1, 30)):
                    content = virtual.body(outbox.last_seq + 1)
                    ledger.write(virtual.line(await outbox.append("telemetry", content, priority), content))
                await asyncio.sleep(chance.uniform(0.05, 1.0))
            await virtual.until(lambda: outbox.depth == 0)


def run(folder: Path, minutes: float, devices: int, seed: int, say: Say) -> dict[str, Any]:
    """The report; `held` says whether all is exact and flat. Raises Retry when hub or broker do not come up."""
    try:
        return asyncio.run(Soak(folder, devices, seed, say).run(minutes))
    except TimeoutError as error:
        raise Retry(f"the soak did not get on: {error}", "is the machine overloaded?") from error
