"""Durable records a second, from an append on a device to the hub's commit, against plain MQTT and NATS JetStream.

Ours: a producer process with the real store, outbox and session, the embedded broker, a real `outrider hub`. One by
one, 256 sensors each wait until their record is on disk; in bulk, four callers append 1,800 at a time. Peers: paho
publishes each record with QoS 1 to the same broker, and its consumer commits to SQLite (WAL, synchronous=FULL, one
commit for all that has come) before it acknowledges; JetStream, see `bench.jetstream`, in rounds that alternate with
ours. All keep a ledger outside the system under test, which is compared with what the receiving database holds. Time
runs from the first append until all is committed; that a process starts is not counted.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from bench import jetstream, virtual
from bench.fleet import running
from edge_agent.enrol import Broker
from edge_agent.wire.signing import SigningKey

BACKLOG = 50_000  # records not committed at which a producer waits
PIPELINE = 4  # appends that wait for the disk
PEER_WINDOW = 1000  # PUBACKs the peer's publisher waits for at most
ROUNDS = 3
HOW = {"single": 1.0, "bulk": 0.8}  # and the goal against JetStream in the same way


def run(seconds: float = 8.0) -> Iterator[dict[str, Any]]:
    """Rows `records`, `lost`, `doubled` (peer: paho), `jetstream.single`, `jetstream.batched`.

    `seconds` of each of three rounds. Raises Refused when JetStream is not there.
    """
    jetstream.binary()
    with tempfile.TemporaryDirectory(prefix="outrider-uplink-") as folder:
        yield from asyncio.run(_race(Path(folder), seconds))


async def _race(folder: Path, seconds: float) -> list[dict[str, Any]]:
    key = folder / "peer.key"
    SigningKey.generate().save(key)
    rates: dict[str, list[float]] = {}
    async with running(folder) as hub:
        places = {how: (folder / how / "ledger", hub.data / "hub.db", how) for how in HOW}
        for how in HOW:
            await virtual.enrol(hub, folder / how, how)
            places[f"js-{how}"] = (folder / f"js-{how}", folder / f"js-{how}.db", jetstream.DEVICE)
        broker = (await virtual.enrol(hub, folder / "paho", "paho")).enrolled.broker
        with jetstream.server(folder) as url:
            consumers = [virtual.start(jetstream.consume, url, folder, key, how) for how in HOW]
            await virtual.until(lambda: all((folder / f"js-{how}.ready").exists() for how in HOW), consumers)
            for _, how in itertools.product(range(ROUNDS), HOW):
                rates.setdefault(how, []).append(await _leg(places[how], _produce, folder / how, how, seconds))
                leg = await _leg(places[f"js-{how}"], jetstream.produce, url, folder, key, how, seconds)
                rates.setdefault(f"js-{how}", []).append(leg)
            for consumer in consumers:
                consumer.kill()
        places["paho"] = (folder / "paho.ledger", folder / "paho.db", "paho")
        consumers = [virtual.start(_consume, broker, folder)]
        await virtual.until((folder / "ready").exists, consumers)
        rates["paho"] = [await _leg(places["paho"], _publish, broker, folder, min(seconds, 10.0))]
        consumers[0].kill()
        books = {name: virtual.books(*place) for name, place in places.items()}
    return _rows(rates, books)


async def _leg(place: tuple[Path, Path, str], work: Any, *args: Any) -> float:
    """Records/s of one producer's run, until the receiving database holds all that the ledger promises."""
    ledger, database, device = place
    before = virtual.held(database, device)
    await virtual.wait(virtual.start(work, *args))
    promised, took = (await asyncio.to_thread(ledger.with_suffix(".took").read_text)).split()
    began = time.monotonic()
    await virtual.until(lambda: virtual.held(database, device) >= before + int(promised))
    return int(promised) / (float(took) + time.monotonic() - began)


def _rows(rates: dict[str, list[float]], books: dict[str, virtual.Books]) -> list[dict[str, Any]]:
    ours, paho, shared = books["single"], books["paho"], {"peer": "paho-qos1", "n": books["single"].promised}
    rows = [
        {"name": "records", **_against(rates["single"], rates["paho"], "paho-qos1"), "n": ours.promised},
        {"name": "lost", "value": ours.lost, "unit": "records", **shared, "peer_value": paho.lost},
        {"name": "doubled", "value": ours.doubled, "unit": "records", **shared, "peer_value": paho.doubled},
    ]
    for (how, goal), name in zip(HOW.items(), ("jetstream.single", "jetstream.batched"), strict=True):
        mine, theirs = books[how], books[f"js-{how}"]
        wrong = {"lost": mine.lost, "doubled": mine.doubled, "peer_lost": theirs.lost, "peer_doubled": theirs.doubled}
        row = {"name": name, **_against(rates[how], rates[f"js-{how}"], "jetstream"), "n": mine.promised}
        rows.append(row | {"goal": goal} | wrong)
    return rows


def _against(ours: list[float], theirs: list[float], peer: str) -> dict[str, Any]:
    """Medians of the rounds, and all of ours and theirs."""
    value, peer_value = median(ours), median(theirs)
    found = {"value": round(value, 1), "unit": "records/s", "peer": peer, "peer_value": round(peer_value, 1)}
    rounds = {"rounds": [round(rate) for rate in ours], "peer_rounds": [round(rate) for rate in theirs]}
    return {**found, "ratio": round(value / peer_value, 2), **rounds}


def _produce(state: Path, how: str, seconds: float) -> None:
    asyncio.run(_produce_ours(state, how, seconds))


async def _produce_ours(state: Path, how: str, seconds: float) -> None:
    async with virtual.attached(state) as (outbox, session):
        await virtual.until(lambda: session.connected and outbox.depth == 0)
        numbers, began, before = itertools.count(outbox.last_seq + 1), time.monotonic(), outbox.last_seq
        with (state / "ledger").open("a") as ledger:

            async def sensor() -> None:
                while time.monotonic() - began < seconds:
                    content = virtual.body(next(numbers))
                    seq = await outbox.append("telemetry", content)
                    ledger.write(virtual.line(seq, content))
                    if outbox.depth > BACKLOG:
                        await virtual.until(lambda: outbox.depth <= BACKLOG)

            async def bulk() -> None:
                while time.monotonic() - began < seconds:
                    contents = [virtual.body(n) for n in itertools.islice(numbers, virtual.CHUNK)]
                    seqs = await outbox.append_many("telemetry", contents)
                    ledger.writelines(map(virtual.line, seqs, contents))
                    if outbox.depth > BACKLOG:
                        await virtual.until(lambda: outbox.depth <= BACKLOG)

            callers = [bulk() for _ in range(PIPELINE)] if how == "bulk" else [sensor() for _ in range(virtual.SENSORS)]
            await asyncio.gather(*callers)
            await virtual.until(lambda: outbox.depth == 0)
        virtual.tell(state / "ledger", outbox.last_seq - before, began)


# The peer: what one writes with paho and SQLite alone.


def _paho(broker: Broker, name: str) -> Any:
    from urllib.parse import urlsplit

    from paho.mqtt import client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    client = paho.Client(CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5, manual_ack=True)
    client.username_pw_set(broker.username, broker.password)
    client.max_inflight_messages_set(100)
    at = urlsplit(broker.url)
    client.connect(at.hostname or "", at.port or 1883)
    return client


def _publish(broker: Broker, folder: Path, seconds: float) -> None:
    client, slots = _paho(broker, "peer-publisher"), threading.Semaphore(PEER_WINDOW)
    client.on_publish = lambda *_: slots.release()
    client.loop_start()
    began, n = time.monotonic(), 0
    with (folder / "paho.ledger").open("w") as ledger:
        while time.monotonic() - began < seconds:
            n += 1
            content = virtual.body(n)
            slots.acquire()
            client.publish("peer/records", msgspec.json.encode({"seq": n, "ts": time.time(), "body": content}), qos=1)
            ledger.write(virtual.line(n, content))
        for _ in range(PEER_WINDOW):
            slots.acquire()
    virtual.tell(folder / "paho.ledger", n, began)
    client.loop_stop()


def _consume(broker: Broker, folder: Path) -> None:
    db = virtual.receiver(folder / "paho.db", "paho")
    client, came = _paho(broker, "peer-consumer"), queue.Queue[Any]()
    client.on_message = lambda _client, _userdata, message: came.put(message)
    client.on_subscribe = lambda *_: (folder / "ready").touch()
    client.subscribe("peer/records", qos=1)
    client.loop_start()
    while True:
        group = [came.get()]
        while not came.empty():
            group.append(came.get_nowait())
        records = (msgspec.json.decode(message.payload) for message in group)
        now = time.time()
        virtual.commit(db, (("paho", 1, r["seq"], r["ts"], now, "telemetry", 5, r["body"]) for r in records))
        for message in group:
            client.ack(message.mid, 1)
