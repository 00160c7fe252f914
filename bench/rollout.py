"""A rollout over ten thousand devices, each with its own MQTT session, key and signatures, of which a wave fails.

The hub is a process with the embedded broker; devices live in a few others, take the signed directives and report
what became of them. What is faked is the installation: it takes seconds and its end is given. They are enrolled
by their public keys in the hub's database, as ten thousand enrolments measure something else.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import resource
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from bench import virtual
from bench.fleet import Hub, running
from edge_agent import enrol
from edge_agent.errors import Refused, Retry
from edge_agent.wire.bundle import Sealed, open_directive
from edge_agent.wire.messages import Desired
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.topics import TopicKind

MOST, EACH = 10_000, 2500
BUNDLE, FAILING_WAVE, FAILING = "reader", 4, 0.03
WAVES = (1, 9, 20, 30, 40)  # percent
LIMIT, SAMPLE = 0.01, 300  # more than 1 % failing pauses, as soon as 300 have a result
INSTALL_S = (0.5, 3.0)
CONNECT_S, PAUSE_S = 900.0, 1200.0
REASON = "golden probe: 3 of 8 answers differ"
TICK_GOAL_MS, MEMORY_GOAL_MIB = 200, 512


def run(devices: int = MOST, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Rows `paused_after`, `tick`, `memory`; `devices`: at most what the embedded broker takes. Raises Refused."""
    if not 100 <= devices <= MOST:
        raise Refused(f"{devices} devices", f"100 to {MOST}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two a device in each process; those below inherit it
    with tempfile.TemporaryDirectory(prefix="outrider-rollout-") as folder:
        yield from asyncio.run(_run(Path(folder), devices, seed))


async def _run(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    async with running(folder) as hub:
        for version in ("1", "2"):
            await _publish(hub, version)
        one = (await virtual.enrol(hub, folder / "one", "one")).enrolled
        names = [f"v{n:05}" for n in range(count)]
        await asyncio.to_thread(_enrol, hub.data / "hub.db", names)
        parts = [names[at : at + EACH] for at in range(0, count, EACH)]
        files = [folder / f"part-{n}" for n in range(len(parts))]
        for file, part in zip(files, parts, strict=True):
            file.write_bytes(msgspec.json.encode({"names": part, "enrolled": one, "seed": seed}))
        began = time.monotonic()
        processes = [virtual.start(_part, file) for file in files]
        try:
            await _within(CONNECT_S, "all devices online", _online, hub, count, processes)
            connected = time.monotonic() - began
            waves = [{"percent": percent} for percent in WAVES]
            plan = {
                "bundle": BUNDLE,
                "version": "2",
                "waves": waves,
                "failure": LIMIT,
                "min_sample": SAMPLE,
                "success": 0.9,
            }
            plan["select"] = {"devices": names} if count < 1000 else {"facts": {"agent.machine": "virtual"}}
            began = time.monotonic()
            id = (await hub.post("/v1/rollouts", {"plan": plan}))["id"]
            bad = await _choose(hub, id, seed)
            (folder / "bad.partial").write_bytes(msgspec.json.encode(bad))
            (folder / "bad.partial").rename(folder / "bad")
            shown = await _within(PAUSE_S, "the pause", _ended, hub, id, processes)
            return _rows(shown, count, time.monotonic() - began, connected, _peak_mib(hub.process.pid))
        finally:
            for process in processes:
                process.kill()


def _rows(shown: dict[str, Any], count: int, seconds: float, connected: float, peak: float) -> list[dict[str, Any]]:
    steps = [wave["steps"] for wave in shown["waves"]]
    failed, good = (steps[FAILING_WAVE - 1].get(step, 0) for step in ("failed", "succeeded"))
    paused = shown["status"] == "paused" and shown["wave"] == FAILING_WAVE
    told = shown["waves"][FAILING_WAVE - 1]["devices"] - steps[FAILING_WAVE - 1].get("pending", 0)
    sample, tick = min(SAMPLE, shown["waves"][FAILING_WAVE - 1]["devices"]), shown["tick_ms"]
    bound = {"goal": sample, "n": count}
    given = {"paused": paused, "wave": shown["wave"], "failed": failed, "told": told, "reason": shown["reason"]}
    times = {"seconds": round(seconds, 1), "connect_s": round(connected, 1), "waves": steps}
    return [
        {"name": "paused_after", "value": failed + good, "unit": "results", **bound, **given, **times},
        {
            "name": "tick",
            "value": tick["max"],
            "unit": "ms",
            "goal": TICK_GOAL_MS,
            "n": tick["ticks"],
            "p50": tick["p50"],
        },
        {"name": "memory", "value": round(peak, 1), "unit": "MiB", "goal": MEMORY_GOAL_MIB, "n": count},
    ]


async def _publish(hub: Hub, version: str) -> None:
    content = f"weights {version}".encode()
    digest = hashlib.sha256(content).hexdigest()
    (await hub.client.put(f"/v1/blobs/{digest}", content=content)).raise_for_status()
    entry = {"path": "model.bin", "size": len(content), "sha256": digest}
    await hub.post("/v1/bundles", {"manifest": {"name": BUNDLE, "version": version, "kind": "onnx", "files": [entry]}})


def _enrol(database: Path, names: list[str]) -> None:
    report = {"version": "1", "target": "1", "state": "committed", "error": ""}
    reported = msgspec.json.encode({"agent": {"machine": "virtual"}, "bundles": {BUNDLE: report}}).decode()
    rows = [(name, _key(name).public.text, time.time(), "{}", reported) for name in names]
    db = sqlite3.connect(database, timeout=60)
    with db:
        db.executemany(
            "INSERT INTO devices (name, public_key, enrolled, desired, reported) VALUES (?, ?, ?, ?, ?)", rows
        )
    db.close()


def _key(name: str) -> SigningKey:
    return SigningKey.from_seed(hashlib.sha256(name.encode()).digest())


async def _within(seconds: float, what: str, check: Any, *args: Any) -> Any:
    end = time.monotonic() + seconds
    while (answer := await check(*args)) is None:
        if time.monotonic() > end:
            raise Retry(f"{what}: not within {seconds:g} s", "fewer devices: --devices 2000")
        await asyncio.sleep(1.0)
    return answer


async def _online(hub: Hub, count: int, processes: list[Any]) -> bool | None:
    await virtual.until(lambda: True, processes)
    there = sum(device["presence"]["online"] for device in await hub.get("/v1/devices"))
    logging.getLogger("outrider.bench").info("%d of %d are online", there, count)
    await asyncio.sleep(4.0)
    return True if there >= count else None


async def _choose(hub: Hub, id: str, seed: int) -> list[str]:
    """3 % of the wave that is to fail, once it is known who is in it."""
    found: list[dict[str, Any]] = []

    async def joined() -> bool | None:
        return True if (await hub.get(f"/v1/rollouts/{id}"))["wave"] > 0 else None

    await _within(PAUSE_S, "the first wave", joined)
    while page := await hub.get(f"/v1/rollouts/{id}/devices", after=found[-1]["device"] if found else "", limit=1000):
        found += page
    wave = [place["device"] for place in found if place["wave"] == FAILING_WAVE - 1]
    return random.Random(seed).sample(wave, max(1, round(FAILING * len(wave))))


async def _ended(hub: Hub, id: str, processes: list[Any]) -> dict[str, Any] | None:
    await virtual.until(lambda: True, processes)
    shown: dict[str, Any] = await hub.get(f"/v1/rollouts/{id}")
    logging.getLogger("outrider.bench").info("%s", [wave["steps"] for wave in shown["waves"]])
    return shown if shown["status"] not in ("scheduled", "running") else None


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


# What follows runs in the processes of the devices.


class Obedient(virtual.Light):
    """Installs what it is directed to, in a while, and reports it; fails where its name is in the file `bad`."""

    DOWN = (TopicKind.ACK, TopicKind.DESIRED)

    def __init__(self, enrolled: enrol.Enrolled, key: SigningKey, bad: Path, chance: random.Random) -> None:
        super().__init__(enrolled, key)
        self._bad, self._chance, self._counter, self._has = bad, chance, 0, "1"
        self._report("1", "committed")  # as any device does, and it makes itself known with it

    def desire(self, desired: Desired) -> None:
        directive = open_directive(self.hub_key, msgspec.convert(desired.doc["director"], Sealed))
        if directive.counter > self._counter and directive.device == self.name:
            self._counter, target = directive.counter, directive.bundles[BUNDLE].version
            self._report(target, "downloading")
            asyncio.get_running_loop().call_later(self._chance.uniform(*INSTALL_S), self._end, target)

    def _end(self, target: str) -> None:
        if target == "2" and self._bad.exists() and self.name in _names(self._bad):
            self._report(target, "quarantined", REASON)
        else:
            self._has = target
            self._report(target, "committed")

    def _report(self, target: str, state: str, error: str = "") -> None:
        report = {"version": self._has, "target": target, "state": state, "error": error}
        doc = {"agent": {"machine": "virtual"}, "bundles": {BUNDLE: report}}
        self.record("reported", {"version": self.made + 1, "doc": doc}, 1)


_read: dict[Path, frozenset[str]] = {}


def _names(path: Path) -> frozenset[str]:
    if path not in _read:
        _read[path] = frozenset(msgspec.json.decode(path.read_bytes()))
    return _read[path]


def _part(file: Path) -> None:
    logging.disable(logging.WARNING)
    asyncio.run(_live(file, msgspec.json.decode(file.read_bytes())))


async def _live(file: Path, given: dict[str, Any]) -> None:
    one, chance = msgspec.convert(given["enrolled"], enrol.Enrolled), random.Random(f"{given['seed']} {file.name}")
    tasks = []
    for name in given["names"]:
        enrolled = msgspec.structs.replace(one, device=name)
        tasks.append(asyncio.create_task(Obedient(enrolled, _key(name), file.parent / "bad", chance).run()))
        await asyncio.sleep(0.005)  # or their hands are shaken all at once, and time out
    await asyncio.gather(*tasks)
