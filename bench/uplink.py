"""Durable records a second, from an append on a device to the hub's commit, against plain MQTT.

Ours: a producer process with the real store, outbox and session (256 sensors that each wait until their record is on
disk), the embedded broker, a real `outrider hub`. Peer: paho publishes each record with QoS 1 to the same broker; its
consumer commits to SQLite (WAL, synchronous=FULL, one commit for all that has come) and acknowledges then.
Both keep a ledger outside the system under test: a line for each record promised, its number and its content's hash;
it is compared with what the receiving database holds. Time runs from the first append until all is committed.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import queue
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec

from bench.fleet import Hub, running
from edge_agent.errors import Fatal
from edge_agent.wire.signing import SigningKey, VerifyKey

SENSORS = 256
BACKLOG = 50_000  # records not committed at which a producer waits
PEER_WINDOW = 1000  # PUBACKs the peer's publisher waits for at most
KINDS = ("vibration", "temperature", "speed")


class Access(msgspec.Struct):
    """How a producer gets in."""

    fleet: str
    device: str
    key: Path
    hub_key: str
    url: str
    username: str
    password: str


def run(seconds: float = 30.0) -> Iterator[dict[str, Any]]:
    """Rows `records` (with the peer), `lost`, `doubled`."""
    with tempfile.TemporaryDirectory(prefix="outrider-uplink-") as folder:
        yield from asyncio.run(_race(Path(folder), seconds))


async def _race(folder: Path, seconds: float) -> list[dict[str, Any]]:
    async with running(folder) as hub:
        access = await _enrol(folder, hub)
        elapsed = await _wait(_start(_produce, access, folder, seconds), folder / "took")
        seen = _hub_rows(hub.data / "hub.db", access.device)
        lost, doubled, count = _judge(folder / "ledger", seen)
        worst = _worst_window(hub.data / "hub.db", access.device)
        peer = await _peer(folder, access, min(seconds, 10.0))
    rate = count / elapsed
    shared = {"n": count, "seconds": round(elapsed, 2)}
    return [
        {
            "name": "records",
            "value": round(rate, 1),
            "unit": "records/s",
            "peer": "paho-qos1",
            "peer_value": round(peer["rate"], 1),
            "ratio": round(rate / peer["rate"], 2),
            **shared,
            "worst_5s": round(worst, 1),
        },
        {"name": "lost", "value": lost, "unit": "records", "peer": "paho-qos1", "peer_value": peer["lost"], **shared},
        {"name": "doubled", "value": doubled, "unit": "records", "peer": "paho-qos1", "peer_value": peer["doubled"]}
        | shared,
    ]


async def _enrol(folder: Path, hub: Hub) -> Access:
    key = SigningKey.generate()
    key.save(folder / "device.key")
    token = (await hub.post("/v1/enrolments", {"name": "uplink", "ttl_s": 300}))["token"]
    answer = await hub.post("/v1/enrol", {"token": token, "name": "uplink", "public_key": key.public.text})
    broker = answer["broker"]
    return Access(
        answer["fleet"],
        answer["device"],
        folder / "device.key",
        answer["hub_key"],
        broker["url"],
        broker["username"],
        broker["password"],
    )


def _body(n: int) -> dict[str, Any]:
    return {"sensor": KINDS[n % 3], "line": n % 7, "value": round((n * 2654435761 % 100_003) / 997, 4), "n": n}


def _digest(text: bytes) -> str:
    canonical = msgspec.json.encode(msgspec.json.decode(text), order="sorted")
    return hashlib.blake2b(canonical, digest_size=8).hexdigest()


def _judge(ledger: Path, seen: Iterator[tuple[int, bytes]]) -> tuple[int, int, int]:
    """Lost or changed, doubled, and committed records."""
    promised = dict(line.split() for line in ledger.read_text().splitlines())
    times: Counter[str] = Counter()
    for number, text in seen:
        if promised.get(str(number)) == _digest(text):
            times[str(number)] += 1
    return len(promised) - len(times), sum(n - 1 for n in times.values()), len(times)


def _hub_rows(path: Path, device: str) -> Iterator[tuple[int, bytes]]:
    """What the hub holds; one row more than once if it was committed more than once."""
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        yield from db.execute("SELECT seq, CAST(body AS BLOB) FROM telemetry WHERE device = ?", [device])
    db.close()


def _worst_window(path: Path, device: str) -> float:
    """The slowest 5 s at the hub between the first and the last, in records/s."""
    windows = "SELECT count(*) / 5.0 FROM telemetry WHERE device = ? GROUP BY CAST(received / 5 AS INTEGER) ORDER BY id"
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        rates = [rate for (rate,) in db.execute(windows, [device])]
    db.close()
    return float(min(rates[1:-1] or rates))


def _start(work: Callable[..., None], *args: Any) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=work, args=args, daemon=True)
    process.start()
    return process


async def _wait(process: BaseProcess, told: Path) -> float:
    await asyncio.to_thread(process.join)
    if process.exitcode:
        raise Fatal(f"a process of the benchmark ended with status {process.exitcode}", "its reason stands above")
    return float(await asyncio.to_thread(told.read_text))


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - what is waited for is in another process or thread
        await asyncio.sleep(0.01)


def _produce(access: Access, folder: Path, seconds: float) -> None:
    asyncio.run(_produce_ours(access, folder, seconds))


async def _produce_ours(access: Access, folder: Path, seconds: float) -> None:
    from edge_agent.store import Store
    from edge_agent.sync.inbox import Inbox
    from edge_agent.sync.outbox import Outbox
    from edge_agent.sync.session import Session
    from edge_agent.sync.twin import GrantsCache, Twin

    store, hub_key = Store(folder / "device" / "state.db"), VerifyKey.from_text(access.hub_key)
    outbox = await Outbox.open(store)
    session = Session(
        fleet=access.fleet,
        device=access.device,
        key=SigningKey.load(access.key),
        hub_key=hub_key,
        broker=access.url,
        username=access.username,
        password=access.password,
        outbox=outbox,
        inbox=Inbox(store, outbox),
        twin=await Twin.open(store, outbox),
        grants=await GrantsCache.open(store, hub_key),
        agent="bench",
    )
    running = asyncio.create_task(session.run())
    await _until(lambda: session.connected)
    numbers = iter(range(1 << 62))
    began = time.monotonic()
    with (folder / "ledger").open("w") as ledger:

        async def sensor() -> None:
            while time.monotonic() - began < seconds:
                body = _body(next(numbers))
                seq = await outbox.append("telemetry", body)
                ledger.write(f"{seq} {_digest(msgspec.json.encode(body))}\n")
                if outbox.depth > BACKLOG:
                    await _until(lambda: outbox.depth <= BACKLOG)

        await asyncio.gather(*(sensor() for _ in range(SENSORS)))
        await _until(lambda: outbox.depth == 0)
    (folder / "took").write_text(str(time.monotonic() - began))
    running.cancel()
    await asyncio.wait([running])
    store.close()


# The peer: what one writes with paho and SQLite alone.


async def _peer(folder: Path, access: Access, seconds: float) -> dict[str, float]:
    consumer = _start(_consume, access, folder)
    await _until((folder / "ready").exists)
    elapsed = await _wait(_start(_publish, access, folder, seconds), folder / "peer-took")
    promised = len((folder / "peer-ledger").read_text().splitlines())
    path = folder / "peer.db"
    deadline, began = time.monotonic() + 60, time.monotonic()
    await _until(lambda: _peer_count(path) >= promised or time.monotonic() > deadline)
    elapsed += time.monotonic() - began
    consumer.terminate()
    consumer.join()
    with sqlite3.connect(path) as db:
        lost, doubled, count = _judge(folder / "peer-ledger", iter(db.execute("SELECT n, body FROM records")))
    db.close()
    return {"rate": count / elapsed, "lost": lost, "doubled": doubled}


def _peer_count(path: Path) -> int:
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as db:
        (count,) = db.execute("SELECT count(*) FROM records").fetchone()
    db.close()
    return int(count)


def _paho(access: Access, name: str) -> Any:
    from urllib.parse import urlsplit

    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5, manual_ack=True)
    client.username_pw_set(access.username, access.password)
    client.max_inflight_messages_set(100)
    at = urlsplit(access.url)
    client.connect(at.hostname or "", at.port or 1883)
    return client


def _publish(access: Access, folder: Path, seconds: float) -> None:
    client, slots = _paho(access, "peer-publisher"), threading.Semaphore(PEER_WINDOW)
    client.on_publish = lambda *_: slots.release()
    client.loop_start()
    began, n = time.monotonic(), 0
    with (folder / "peer-ledger").open("w") as ledger:
        while time.monotonic() - began < seconds:
            n += 1
            body = _body(n)
            slots.acquire()
            client.publish("peer/records", msgspec.json.encode({"seq": n, "ts": time.time(), "body": body}), qos=1)
            ledger.write(f"{n} {_digest(msgspec.json.encode(body))}\n")
        for _ in range(PEER_WINDOW):
            slots.acquire()
    (folder / "peer-took").write_text(str(time.monotonic() - began))
    client.loop_stop()


def _consume(access: Access, folder: Path) -> None:
    db = sqlite3.connect(folder / "peer.db", isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE records (id INTEGER PRIMARY KEY, n INTEGER, ts REAL, body BLOB)")
    client, came = _paho(access, "peer-consumer"), queue.Queue[Any]()
    client.on_message = lambda _client, _userdata, message: came.put(message)
    client.on_subscribe = lambda *_: (folder / "ready").touch()
    client.subscribe("peer/records", qos=1)
    client.loop_start()
    while True:
        group = [came.get()]
        while not came.empty():
            group.append(came.get_nowait())
        records = [msgspec.json.decode(message.payload) for message in group]
        rows = [(record["seq"], record["ts"], msgspec.json.encode(record["body"])) for record in records]
        db.execute("BEGIN")
        db.executemany("INSERT INTO records (n, ts, body) VALUES (?, ?, ?)", rows)
        db.execute("COMMIT")
        for message in group:
            client.ack(message.mid, 1)
