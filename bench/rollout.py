"""A rollout over ten thousand devices, each with its own MQTT session, key and signatures, of which a wave fails.

The hub is a process, Mosquitto another; devices live in a few others, take the signed directives and report
what became of them. What is faked is the installation: it takes seconds and its end is given. They are enrolled
by their public keys in the hub's database, as ten thousand enrolments measure something else.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import hashlib
import logging
import os
import random
import resource
import shutil
import sqlite3
import struct
import sys
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties, VariableByteIntegers

from bench import virtual
from bench.fleet import Hub, free_port, running
from edge_agent import enrol
from edge_agent.errors import Refused, Retry
from edge_agent.wire.batch import Header, encode_batch
from edge_agent.wire.bundle import Sealed, open_directive
from edge_agent.wire.messages import Ack, Desired, Presence, PresenceState, Record, encode
from edge_agent.wire.signed import seal, unseal
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import Topic, TopicKind

MOST, EACH = 10_000, 2500
BUNDLE, FAILING_WAVE, FAILING = "reader", 4, 0.03
WAVES = (1, 9, 20, 30, 40)  # percent
LIMIT, SAMPLE = 0.01, 300  # more than 1 % failing pauses, as soon as 300 have a result
INSTALL_S = (0.5, 3.0)
CONNECT_S, PAUSE_S, LATELY_S = 900.0, 1200.0, 300.0
GREETING = 100  # devices of a process that may wait for the hub's first answer
REASON = "golden probe: 3 of 8 answers differ"
TICK_GOAL_MS, MEMORY_GOAL_MIB = 200, 512


def run(devices: int = MOST, seed: int = 1) -> Iterator[dict[str, Any]]:
    """Rows `paused_after`, `tick`, `memory`; `devices`: each its own MQTT session. Raises Refused."""
    if not 100 <= devices <= MOST:
        raise Refused(f"{devices} devices", f"100 to {MOST}")
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # two a device in each process; those below inherit it
    with tempfile.TemporaryDirectory(prefix="outrider-rollout-") as folder:
        yield from asyncio.run(_run(Path(folder), devices, seed))


async def _run(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    async with _mosquitto(folder) as broker, running(folder, "--broker", broker) as hub:
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


@contextlib.asynccontextmanager
async def _mosquitto(folder: Path) -> AsyncIterator[str]:
    """The broker of a site, without its files: the embedded one is not for thousands. Raises Refused."""
    if (found := shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin")) is None:
        raise Refused("there is no mosquitto here", "deploy/system-packages.sh")
    port, config = free_port(), folder / "mosquitto.conf"
    limits = "max_queued_messages 100000\nmax_inflight_messages 200\nset_tcp_nodelay true\n"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nuser {getpass.getuser()}\n{limits}")
    process = await asyncio.create_subprocess_exec(found, "-c", str(config), stderr=asyncio.subprocess.DEVNULL)
    try:
        await asyncio.sleep(1.0)
        yield f"mqtt://bench:bench@127.0.0.1:{port}"
    finally:
        process.terminate()
        await process.wait()


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
    """Whether all have proven lately that they are there, past the hub, which has enough to do."""
    await virtual.until(lambda: True, processes)
    there = await asyncio.to_thread(_seen, hub.data / "hub.db")
    print(f"{there} of {count} are online", file=sys.stderr, flush=True)
    await asyncio.sleep(2.0)
    return True if there >= count else None


def _seen(database: Path) -> int:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        (count,) = db.execute("SELECT count(*) FROM devices WHERE last_seen > ?", [time.time() - LATELY_S]).fetchone()
    return int(count)


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
    print([wave["steps"] for wave in shown["waves"]], file=sys.stderr, flush=True)
    return shown if shown["status"] not in ("scheduled", "running") else None


def _peak_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


# What follows runs in the processes of the devices.


class Device(asyncio.Protocol):
    """Installs what it is directed to, in a while, and reports it; fails where its name is in the file `bad`.

    MQTT 5 by hand (OASIS MQTT 5.0, chapter 3): a client of a few hundred bytes and no thread or timer of its own.
    """

    def __init__(self, one: enrol.Enrolled, name: str, bad: Path, chance: random.Random) -> None:
        self.name, self._one, self._key, self._bad, self._chance = name, one, _key(name), bad, chance
        self._hub_key, self._epoch = VerifyKey.from_text(one.hub_key), int(time.time() * 1000)
        self._topics = {kind: str(Topic(one.fleet, kind, name)) for kind in TopicKind if kind is not TopicKind.GRANTS}
        self._made = self._acked = self._mid = self._counter = 0
        self._pending: deque[bytes] = deque()
        self._has, self._nonce, self._buffer, self._sent = "1", "", b"", 0.0
        self._wire: asyncio.Transport

    @property
    def settled(self) -> bool:
        """Whether the hub has taken its first report and challenged it."""
        return self._acked > 0 and bool(self._nonce)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._wire, broker = transport, self._one.broker
        asks = _text("MQTT") + bytes([5, 0xC2]) + struct.pack("!H", 600) + b"\0"  # user, password, clean start
        self._send(0x10, asks + _text(self.name) + _text(broker.username) + _text(broker.password))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while len(self._buffer) > 1:
            length, size = _length(self._buffer[1:5])
            end = 1 + size + length
            if size == 0 or len(self._buffer) < end:
                return
            head, body, self._buffer = self._buffer[0], self._buffer[1 + size : end], self._buffer[end:]
            if head >> 4 == 2:
                self._subscribe()
            elif head >> 4 == 9:
                self._present()
                self._report("1", "committed")  # as any device does
            elif head >> 4 == 3:
                self._published(head, body)

    def _subscribe(self) -> None:
        wanted = b"".join(_text(self._topics[kind]) + b"\1" for kind in (TopicKind.ACK, TopicKind.DESIRED))
        self._send(0x82, b"\0\1\0" + wanted)

    def _published(self, head: int, body: bytes) -> None:
        at = 2 + struct.unpack("!H", body[:2])[0]
        topic = body[2:at].decode()
        if head & 6:
            self._send(0x40, body[at : at + 2])
            at += 2
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        _, length = properties.unpack(body[at:])  # type: ignore[no-untyped-call]
        payload, given = body[at + length :], dict(getattr(properties, "UserProperty", []))
        if topic == self._topics[TopicKind.DESIRED]:
            self._desire(unseal(self._hub_key, topic, payload, given, Desired))
            return
        ack = unseal(self._hub_key, topic, payload, given, Ack)
        while ack.epoch == self._epoch and self._acked < ack.seq:
            self._pending.popleft()
            self._acked += 1
        if ack.nonce != self._nonce:
            self._nonce = ack.nonce
            self._present()
        if self._pending and (self._acked or time.monotonic() > self._sent + 15):
            self._up()

    def _desire(self, desired: Desired) -> None:
        directive = open_directive(self._hub_key, msgspec.convert(desired.doc["director"], Sealed))
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
        self._made += 1
        self._pending.append(
            encode(Record(self._made, time.time(), "reported", 1, {"version": self._made, "doc": doc}))
        )
        self._up()

    def _up(self) -> None:
        """All that no ack covers, in one batch."""
        topic, lines = self._topics[TopicKind.UP], list(self._pending)
        batch = encode_batch(lines, self._key, topic, Header(self._epoch, self._acked + 1, self._made))
        self._sent = time.monotonic()
        self._publish(topic, batch.payload, batch.properties)

    def _present(self) -> None:
        topic = self._topics[TopicKind.PRESENCE]
        said = Presence(PresenceState.ONLINE, time.time(), self._epoch, self._made, self._nonce, "virtual")
        self._publish(topic, *seal(self._key, topic, said), retain=True)

    def _publish(self, topic: str, payload: bytes, given: Any, retain: bool = False) -> None:
        self._mid = self._mid % 65535 + 1
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.UserProperty = list(given.items())
        packed = properties.pack()  # type: ignore[no-untyped-call]
        self._send(0x32 | retain, _text(topic) + struct.pack("!H", self._mid) + packed + payload)

    def _send(self, head: int, body: bytes) -> None:
        self._wire.write(bytes([head]) + VariableByteIntegers.encode(len(body)) + body)  # type: ignore[no-untyped-call]


def _text(text: str) -> bytes:
    return struct.pack("!H", len(text.encode())) + text.encode()


def _length(data: bytes) -> tuple[int, int]:
    """A variable byte integer and its size, 0 when it is not whole."""
    value = 0
    for n, byte in enumerate(data):
        value |= (byte & 127) << 7 * n
        if byte < 128:
            return value, n + 1
    return 0, 0


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
    loop, at, devices = asyncio.get_running_loop(), urlsplit(one.broker.url), list[Device]()
    for name in given["names"]:
        make = partial(Device, one, name, file.parent / "bad", chance)
        _, made = await loop.create_connection(make, at.hostname or "", at.port or 1883)
        devices.append(made)
        while len(devices) >= GREETING:  # or the hub's queue grows longer than its challenges are good for
            devices = [device for device in devices if not device.settled]
            await asyncio.sleep(0.02)
    await asyncio.Event().wait()
