"""The peer over NATS JetStream: a producer and a consumer as one writes them with nats-py.

Equal to ours are the records and their bytes, the Ed25519 signature (one a message), the batch form of `bulk` (NDJSON,
zstd, one of as many records as ours appends at once, sixteen on their way), the tables, SQLite's durability (one FULL
commit for all that has come, then the ack) and the threads: an event loop and a second one for packing or committing.
The stream is a file store with one acknowledgement a message; the server fsyncs it at an interval, not before that
acknowledgement, so the peer is the less durable one until the consumer's commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import socket
import subprocess
import time
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from bench import virtual
from bench.fleet import free_port
from edge_agent.errors import Fatal, Refused
from edge_agent.wire.batch import Batch, Header, decode_records, encode_batch, verify_batch
from edge_agent.wire.messages import Record
from edge_agent.wire.signing import SigningKey, VerifyKey

SUBJECT, DEVICE = "records", "peer"
WINDOW = 16  # batches on their way, as ours
GROUP = {"single": 4096, "bulk": 64}  # messages a commit at most


def binary() -> str:
    """Raises Refused with what to install."""
    found = shutil.which("nats-server") or shutil.which("nats-server", path="/usr/sbin:/usr/local/bin")
    if found is None or find_spec("nats") is None:
        raise Refused(
            "nats-server or nats-py is not there", "apt-get install nats-server; pip install 'outrider[bench]'"
        )
    return found


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A JetStream server with a file store: its URL."""
    port = free_port()
    command = [binary(), "-js", "-sd", str(folder / "jetstream"), "-a", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise Fatal("nats-server did not start", f"try {' '.join(command)}")
            time.sleep(0.05)
        yield f"nats://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


async def _stream(url: str, name: str) -> Any:
    import nats
    from nats.js.api import StorageType, StreamConfig

    js = (await nats.connect(url)).jetstream(publish_async_max_pending=4096)
    await js.add_stream(StreamConfig(name=name, subjects=[f"{SUBJECT}.{name}"], storage=StorageType.FILE))
    return js


def produce(url: str, folder: Path, key: Path, how: str, seconds: float) -> None:
    """Until `seconds` are over and all is acknowledged; appends to the ledger what was."""
    asyncio.run(_produce(url, folder, SigningKey.load(key), how, seconds))


async def _produce(url: str, folder: Path, key: SigningKey, how: str, seconds: float) -> None:
    js, topic, encoder = await _stream(url, how), f"{SUBJECT}.{how}", msgspec.json.Encoder()
    path, first = folder / f"js-{how}", virtual.held(folder / f"js-{how}.db", DEVICE) + 1
    numbers, began = itertools.count(first), time.monotonic()
    with path.open("a") as ledger:

        async def sensor() -> None:
            while time.monotonic() - began < seconds:
                n = next(numbers)
                content = virtual.body(n)
                line = encoder.encode(Record(n, time.time(), "telemetry", 5, content))
                done = await js.publish_async(topic, line, headers={"sig": key.sign(topic, line)})
                await done
                ledger.write(virtual.line(n, content))

        async def bulk() -> None:
            waiting: deque[tuple[Any, list[dict[str, Any]], int]] = deque()

            async def settle() -> None:
                done, contents, start = waiting.popleft()
                await done
                ledger.writelines(map(virtual.line, itertools.count(start), contents))

            def pack(contents: list[dict[str, Any]], start: int) -> Batch:
                now = time.time()
                records = [Record(n, now, "telemetry", 5, each) for n, each in enumerate(contents, start)]
                return encode_batch([encoder.encode_lines(records)[:-1]], key, topic, Header(1, start, records[-1].seq))

            while time.monotonic() - began < seconds:
                taken = list(itertools.islice(numbers, virtual.CHUNK))
                contents, start = [virtual.body(n) for n in taken], taken[0]
                batch = await asyncio.to_thread(pack, contents, start)
                done = await js.publish_async(topic, batch.payload, headers=batch.properties)
                waiting.append((done, contents, start))
                while len(waiting) >= WINDOW:
                    await settle()
            while waiting:
                await settle()

        await asyncio.gather(*([bulk()] if how == "bulk" else [sensor() for _ in range(virtual.SENSORS)]))
    virtual.tell(path, next(numbers) - first, began)


def consume(url: str, folder: Path, key: Path, how: str) -> None:
    """Verify, commit, acknowledge, until ended."""
    asyncio.run(_consume(url, folder, SigningKey.load(key).public, how))


async def _consume(url: str, folder: Path, key: VerifyKey, how: str) -> None:
    from nats.js.api import AckPolicy, ConsumerConfig

    js, db = await _stream(url, how), virtual.receiver(folder / f"js-{how}.db", DEVICE)

    def commit(group: list[Any]) -> None:
        records: list[Record] = []
        for message in group:
            topic, payload, headers = message.subject, message.data, message.headers
            if how == "bulk":
                records += decode_records(verify_batch(topic, payload, headers, key), payload)
            else:
                key.verify(topic, payload, headers["sig"])
                records.append(decoder.decode(payload))
        now = time.time()
        virtual.commit(db, ((DEVICE, 1, r.seq, r.ts, now, r.kind, r.priority, r.body) for r in records))

    decoder = msgspec.json.Decoder(Record)
    config = ConsumerConfig(ack_policy=AckPolicy.ALL, max_ack_pending=2 * GROUP[how])
    came = await js.subscribe(f"{SUBJECT}.{how}", durable="hub", manual_ack=True, config=config)
    (folder / f"js-{how}.ready").touch()
    while True:
        group = [await came.next_msg(timeout=None)]
        while len(group) < GROUP[how] and came.pending_msgs:
            group.append(await came.next_msg())
        await asyncio.to_thread(commit, group)
        await group[-1].ack()
