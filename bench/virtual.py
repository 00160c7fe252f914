"""A device without its daemon, and the books kept outside of it.

Real identity, store, outbox and session; the ledger is a file with a line for each record promised, its seq and its
content's hash, and is compared with what the hub's database holds, read past the hub.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import multiprocessing
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec

from bench.fleet import Hub
from edge_agent import enrol as enrolment
from edge_agent.errors import Fatal
from edge_agent.store import Store
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.sync.session import Session
from edge_agent.sync.twin import GrantsCache, Twin
from edge_agent.wire.signing import SigningKey

KINDS = ("vibration", "temperature", "speed")


async def enrol(hub: Hub, state: Path, name: str) -> enrolment.Identity:
    """Give a state directory an identity of the hub's fleet."""
    token = (await hub.post("/v1/enrolments", {"name": name, "ttl_s": 300}))["token"]
    return await asyncio.to_thread(enrolment.enrol, state, hub.url, token, name)


@contextlib.asynccontextmanager
async def attached(state: Path, broker: str = "") -> AsyncIterator[tuple[Outbox, Session]]:
    """The sync half of a daemon, running; `broker` overrides where the enrolment says it is."""
    identity = enrolment.load(state)
    if identity is None:
        raise Fatal(f"{state} is not enrolled")
    enrolled, store = identity.enrolled, Store(state / "outrider.db")
    try:
        outbox = await Outbox.open(store)
        session = Session(
            fleet=enrolled.fleet,
            device=enrolled.device,
            key=SigningKey.load(state / enrolment.KEY),
            hub_key=identity.hub_key,
            broker=broker or enrolled.broker.url,
            username=enrolled.broker.username,
            password=enrolled.broker.password,
            outbox=outbox,
            inbox=Inbox(store, outbox),
            twin=await Twin.open(store, outbox),
            grants=await GrantsCache.open(store, identity.hub_key),
            agent="bench",
        )
        running = asyncio.create_task(session.run())
        try:
            yield outbox, session
        finally:
            running.cancel()
            await asyncio.wait([running])
    finally:
        store.close()


def body(n: int) -> dict[str, Any]:
    """The body of record n: about 60 bytes of JSON."""
    return {"sensor": KINDS[n % 3], "line": n % 7, "value": round((n * 2654435761 % 100_003) / 997, 4), "n": n}


def digest(text: bytes) -> str:
    """Of the content, whatever the order of its fields."""
    canonical = msgspec.json.encode(msgspec.json.decode(text), order="sorted")
    return hashlib.blake2b(canonical, digest_size=8).hexdigest()


def line(seq: int, content: dict[str, Any]) -> str:
    """One line of a ledger."""
    return f"{seq} {digest(msgspec.json.encode(content))}\n"


class Books(msgspec.Struct):
    """Ledger against database."""

    promised: int
    committed: int  # of those promised, the same content
    doubled: int
    ordered: bool  # committed in the order of their seqs

    @property
    def lost(self) -> int:
        return self.promised - self.committed


def judge(ledger: Iterable[str], seen: Iterable[tuple[int, bytes]]) -> Books:
    """Compare a ledger's lines with (seq, content) in the order of their commits."""
    promised = {int(seq): content for seq, content in (each.split() for each in ledger)}
    times: Counter[int] = Counter()
    before, ordered = 0, True
    for seq, text in seen:
        ordered, before = ordered and seq > before, seq
        if promised.get(seq) == digest(text):
            times[seq] += 1
    return Books(len(promised), len(times), sum(n - 1 for n in times.values()), ordered)


def hub_rows(database: Path, device: str) -> Iterator[tuple[int, bytes]]:
    """What the hub holds of a device, in the order of its commits; one row twice if it was committed twice."""
    query = "SELECT seq, CAST(body AS BLOB) FROM telemetry WHERE device = ? AND kind = 'telemetry' ORDER BY epoch, id"
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        yield from db.execute(query, [device])


def start(work: Callable[..., None], *args: Any) -> BaseProcess:
    """A fresh process that ends with this one."""
    process = multiprocessing.get_context("spawn").Process(target=work, args=args, daemon=True)
    process.start()
    return process


async def wait(process: BaseProcess) -> None:
    """Raises Fatal when it failed."""
    await asyncio.to_thread(process.join)
    if process.exitcode:
        raise Fatal(f"a process of the benchmark ended with status {process.exitcode}", "its reason stands above")


async def until(condition: Callable[[], bool]) -> None:
    """Of something that another process or thread does."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
