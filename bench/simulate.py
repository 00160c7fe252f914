"""Thousands of virtual devices against a real hub: each its own MQTT session, on the true wire, from a few processes.

A script (TOML) says who they are and what befalls them; shares are of all devices, chosen by the seed:

    [[behaviour]]                   # the first that a device's number falls into
    name = "steady"; share = 0.9; per_minute = 6.0; jobs = "succeed"    # or "fail", "ignore"; doubles = true
    [[fault]]
    at_s = 20.0; kind = "cut"; share = 0.3; for_s = 10.0    # or "mute", "forge", "kill-hub" (these two: no duration)

Invariants: what is compared at the end is what each device made with what the hub's database holds of it, read past the
hub; time, memory and the queue of each device are bounded, and a device that was not acked in time is counted.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import heapq
import itertools
import logging
import random
import resource
import sqlite3
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

import msgspec

from bench import virtual
from bench.fleet import Hub, running
from bench.footprint import cpu_s, rollup
from edge_agent import enrol
from edge_agent.errors import Refused, Retry
from edge_agent.wire.signing import SigningKey

MOST = 10_000  # what the embedded broker takes
EACH = 1000  # devices a process
DRAIN_S, RAMP_S = 180.0, 600.0
QUEUE = 5000  # records of a device that may wait
AT_ONCE = 8  # enrolments


class Behaviour(msgspec.Struct, forbid_unknown_fields=True):
    name: str = "steady"
    share: float = 1.0
    per_minute: float = 6.0
    jobs: Literal["succeed", "fail", "ignore"] = "succeed"
    doubles: bool = False


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    at_s: float
    kind: Literal["cut", "mute", "forge", "kill-hub"]
    share: float = 1.0
    for_s: float = 5.0


class Script(msgspec.Struct, forbid_unknown_fields=True):
    behaviour: list[Behaviour] = msgspec.field(default_factory=lambda: [Behaviour()])
    fault: list[Fault] = []
    jobs: int = 0  # given to devices at random, half way
    seed: int = 1


class Seat(msgspec.Struct):
    """A device's place in the simulation."""

    enrolled: enrol.Enrolled
    key: str
    behaviour: Behaviour


TOLD = ("behind", "not_made", "forged", "jobs_done", "connections")  # of each process


def load(path: Path | None) -> Script:
    """Raises Refused, naming what is wrong."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Script) if path else Script()
    except (OSError, msgspec.DecodeError) as error:
        raise Refused(f"{path} is no script: {error}", "docs/operations.md shows one") from error


def run(folder: Path, devices: int, minutes: float, script: Script, say: Callable[[str], None]) -> dict[str, Any]:
    """The report; `held` says whether all was committed, once, and nothing forged got in."""
    if not 1 <= devices <= MOST:
        raise Refused(f"{devices} devices", f"1 to {MOST}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # three a device; those started here inherit it
    return asyncio.run(_run(folder, devices, minutes, script, say))


async def _run(folder: Path, count: int, minutes: float, script: Script, say: Callable[[str], None]) -> dict[str, Any]:
    chance = random.Random(script.seed)
    async with running(folder) as hub:
        seats = await _enrol(hub, folder, count, script)
        say(f"{count} devices are enrolled")
        files = [folder / f"part-{at}" for at in range(0, count, EACH)]
        for n, file in enumerate(files):
            file.write_bytes(msgspec.json.encode(seats[n * EACH : (n + 1) * EACH]))
        began = time.monotonic()
        processes = [virtual.start(_part, file, script, minutes * 60) for file in files]
        try:
            await _all(files, ".connected", RAMP_S, processes)
            say(f"all are connected after {(ramp := time.monotonic() - began):.1f} s")
            (folder / "go").touch()
            pid, busy, began = hub.process.pid, cpu_s(hub.process.pid), time.monotonic()
            await _befall(hub, script, minutes * 60, seats, chance, say)
            await _all(files, ".report", minutes * 60 + DRAIN_S + 60, processes)
            seconds = time.monotonic() - began
            spent = cpu_s(pid) - busy if pid == hub.process.pid else None  # None: it was killed
            used = {"hub_cpu_s": spent and round(spent, 1), "hub_rss_mib": rollup(hub.process.pid)["Rss"]}
        finally:
            for process in processes:
                process.kill()
        parts = [msgspec.json.decode(file.with_suffix(".report").read_bytes()) for file in files]
        return _report(hub.data / "hub.db", parts) | {"connect_s": round(ramp, 1), "seconds": round(seconds, 1), **used}


async def _enrol(hub: Hub, folder: Path, count: int, script: Script) -> list[Seat]:
    free, kinds = asyncio.Semaphore(AT_ONCE), script.behaviour
    (folder / "keys").mkdir()
    bounds = list(itertools.accumulate(each.share * count for each in kinds))

    async def one(n: int) -> Seat:
        name, key = f"v{n:05}", SigningKey.generate()
        file = folder / "keys" / name
        async with free:
            key.save(file)
            token = (await hub.post("/v1/enrolments", {"name": name, "ttl_s": 3600}))["token"]
            answer = await hub.post("/v1/enrol", {"token": token, "name": name, "public_key": key.public.text})
        kind = kinds[min(bisect.bisect_right(bounds, n), len(kinds) - 1)]
        return Seat(msgspec.convert(answer, enrol.Enrolled), str(file), kind)

    return list(await asyncio.gather(*(one(n) for n in range(count))))


async def _all(files: list[Path], suffix: str, within: float, processes: list[BaseProcess]) -> None:
    """Raises Retry when a process does not get there in time, Fatal when one ended before."""
    try:
        async with asyncio.timeout(within):
            missing = [file.with_suffix(suffix) for file in files]
            await virtual.until(lambda: all(file.exists() for file in missing), processes, every_s=0.2)
    except TimeoutError:
        raise Retry(
            f"the devices did not come to {suffix[1:]} in {within:g} s",
            "this machine is too slow for so many devices or records",
        ) from None


async def _befall(
    hub: Hub, script: Script, seconds: float, seats: list[Seat], chance: random.Random, say: Callable[[str], None]
) -> None:
    """Jobs half way, and the faults of the hub."""
    plan = [(fault.at_s, "kill-hub") for fault in script.fault if fault.kind == "kill-hub"] + [(seconds / 2, "jobs")]
    began = time.monotonic()
    for at, what in sorted(plan):
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        if what == "kill-hub":
            say("kill -9 of the hub")
            await hub.process.kill()
            await hub.start()
            continue
        for _ in range(script.jobs):
            name = chance.choice(seats).enrolled.device
            await hub.post(f"/v1/devices/{name}/jobs", {"kind": "tool", "body": {"tool": "stamp", "args": {}}})


def _report(database: Path, parts: list[dict[str, Any]]) -> dict[str, Any]:
    made = {name: n for part in parts for name, n in part["made"].items()}
    query = "SELECT device, count(*), count(DISTINCT seq), total(ts = 0) FROM telemetry GROUP BY device"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        seen = {name: rest for name, *rest in db.execute(query)}
        jobs = dict(db.execute("SELECT state, count(*) FROM jobs GROUP BY state"))
        (refused,) = db.execute("SELECT count(*) FROM audit WHERE action = 'refuse:batch'").fetchone()
    waits = sorted(wait for part in parts for wait in part["waits"]) or [0.0]
    found: dict[str, Any] = {
        "devices": len(made),
        "made": sum(made.values()),
        "committed": sum(rows for rows, *_ in seen.values()),
        "lost": sum(n - seen.get(name, [0, 0])[1] for name, n in made.items()),
        "doubled": sum(rows - distinct for rows, distinct, *_ in seen.values()),
        "forged_let_in": int(sum(forged for *_, forged in seen.values())),
        "audited_refusals": refused,
        "jobs": jobs,
        **{key: sum(part[key] for part in parts) for key in TOLD},
        "ack_s": {"p50": round(waits[len(waits) // 2], 3), "p99": round(waits[len(waits) * 99 // 100], 3)},
    }
    wrong = ("lost", "doubled", "forged_let_in", "behind")
    return found | {"held": not any(found[name] for name in wrong)}


# What follows runs in the processes of the devices.


def _part(file: Path, script: Script, seconds: float) -> None:
    logging.disable(logging.WARNING)
    seats = msgspec.json.decode(file.read_bytes(), type=list[Seat])
    asyncio.run(_live(file, seats, script, seconds))


async def _live(file: Path, seats: list[Seat], script: Script, seconds: float) -> None:
    chance = random.Random(f"{script.seed} {file.name}")
    made = [
        (virtual.Light(seat.enrolled, SigningKey.load(Path(seat.key)), seat.behaviour.jobs), seat) for seat in seats
    ]
    devices = [device for device, _ in made]
    tasks = {device: asyncio.create_task(device.run()) for device in devices}
    await virtual.until(lambda: all(device.session.connected for device in devices), every_s=0.1)
    file.with_suffix(".connected").touch()
    await virtual.until((file.parent / "go").exists, every_s=0.05)
    dropped = 0
    began = time.monotonic()
    faults = [asyncio.create_task(_fault(each, tasks, began, chance)) for each in script.fault]
    due = [(began + chance.uniform(0, 60 / seat.behaviour.per_minute), n) for n, (_, seat) in enumerate(made)]
    heapq.heapify(due)
    while due and due[0][0] < began + seconds:
        at, n = heapq.heappop(due)
        if (now := time.monotonic()) < began + seconds:
            await asyncio.sleep(max(0.0, at - now))
        device, seat = made[n]
        device.doubles = seat.behaviour.doubles
        if now < began + seconds and device.made - device.acked < QUEUE:
            device.record("telemetry", virtual.body(device.made + 1))
        else:
            dropped += 1
        heapq.heappush(due, (at + 60 / seat.behaviour.per_minute, n))
    await asyncio.gather(*faults)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            await virtual.until(lambda: all(device.acked == device.made for device in devices), every_s=0.1)
    for task in tasks.values():
        task.cancel()
    waits = [wait for device in devices for wait in device.waits]
    behind = sum(device.acked < device.made for device in devices)
    told = (behind, dropped, *(sum(getattr(d, name) for d in devices) for name in ("forged", "done", "connections")))
    found: dict[str, Any] = {"made": {device.name: device.made for device in devices}}
    part = found | dict(zip(TOLD, told, strict=True)) | {"waits": chance.sample(waits, min(len(waits), 10_000))}
    partial = file.with_suffix(".part")
    partial.write_bytes(msgspec.json.encode(part))
    partial.replace(file.with_suffix(".report"))
    await asyncio.wait(tasks.values())


async def _fault(
    fault: Fault, tasks: dict[virtual.Light, asyncio.Task[None]], began: float, chance: random.Random
) -> None:
    if fault.kind == "kill-hub":
        return
    hit = chance.sample(list(tasks), round(fault.share * len(tasks)))
    await asyncio.sleep(max(0.0, began + fault.at_s - time.monotonic()))
    for device in hit:
        if fault.kind == "forge":
            with contextlib.suppress(Retry):
                await device.session.wait_connected(60)
                await device.forge()
        elif fault.kind == "mute":
            device.mute = True
        else:
            tasks[device].cancel()
    if fault.kind == "forge":
        return
    await asyncio.sleep(fault.for_s)
    for device in hit:
        device.mute = False
        if fault.kind == "cut":
            await asyncio.wait([tasks[device]])
            tasks[device] = asyncio.create_task(device.run())
