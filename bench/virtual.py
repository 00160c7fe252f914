"""A device without its daemon, and the books kept outside of it.

`attached`: real identity, store, outbox and session; the ledger is a file with a line for each record promised, its seq
and its content's hash, and is compared with what the hub's database holds, read past the hub. `Light`: thousands in a
process; true identity, MQTT session, batches and signatures, but its outbox is in memory, and ends with the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import multiprocessing
import sqlite3
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import msgspec

from bench.fleet import Hub
from edge_agent import enrol as enrolment
from edge_agent.audit import Audit
from edge_agent.errors import Fatal, Retry
from edge_agent.store import Store
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.sync.session import Session
from edge_agent.sync.transport import MqttSession
from edge_agent.sync.twin import GrantsCache, Twin
from edge_agent.wire.batch import Batch, Header, encode_batch
from edge_agent.wire.messages import Ack, Job, JobReport, JobState, Presence, PresenceState, Record, encode
from edge_agent.wire.signed import seal, unseal
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import Topic, TopicKind
from hub.db import Database, devices

SENSORS = 256  # callers that each wait until their record is on disk
CHUNK = 1800  # records made at once in bulk: about a batch
KINDS = ("vibration", "temperature", "speed")
_sorted = msgspec.json.Encoder(order="sorted")


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
            ca=enrolment.tls(state, identity),
            outbox=outbox,
            inbox=Inbox(store, outbox),
            twin=await Twin.open(store, outbox),
            grants=await GrantsCache.open(store, identity.hub_key),
            audit=Audit(store, outbox),
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


class Light:
    """A device of a few kilobytes. `jobs` says how it treats them (`succeed`, `fail`, `ignore`), `doubles` sends each
    batch twice; while `mute` it answers nothing. Sends at most `MOST` records a batch and one batch at a time."""

    MOST, PATIENCE_S = 500, 15.0

    def __init__(self, enrolled: enrolment.Enrolled, key: SigningKey, jobs: str = "succeed") -> None:
        self.name, self.fleet, self.key, self.jobs = enrolled.device, enrolled.fleet, key, jobs
        self.hub_key, self.epoch = VerifyKey.from_text(enrolled.hub_key), int(time.time() * 1000)
        self.made = self.acked = self.forged = self.done = 0
        self.waits: list[float] = []  # seconds from a record to the ack that covers it, one a batch
        self.doubles = self.mute = False
        self._pending: deque[tuple[float, bytes]] = deque()  # of the seqs past `acked`
        self._sent, self._nonce, self._again = 0, "", 0.0
        self._known: set[str] = set()
        self._wake = asyncio.Event()
        self.connections, self._broker = 0, enrolled.broker
        self.session = self._dial()

    def _dial(self) -> MqttSession:
        return MqttSession(
            self._broker.url,
            f"{self.fleet}.{self.name}",
            username=self._broker.username or None,
            password=self._broker.password or None,
            subscriptions=[str(Topic(self.fleet, kind, self.name)) for kind in (TopicKind.ACK, TopicKind.JOBS)],
            on_connect=self._on_connect,
        )

    def record(self, kind: str, content: dict[str, Any], priority: int = 5) -> None:
        self.made += 1
        now = time.time()
        self._pending.append((now, encode(Record(self.made, now, kind, priority, content))))
        self._wake.set()

    async def run(self) -> None:
        """Serves until it is cancelled; may be run again, and goes on from the hub's last ack."""
        self.session = self._dial()
        async with self.session as session, asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive())
            while True:
                self._wake.clear()
                late = time.monotonic() > self._again
                if session.connected and not self.mute and self._pending and (late or self._sent <= self.acked):
                    with contextlib.suppress(Retry):
                        await self._send(session)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self.PATIENCE_S):
                        await self._wake.wait()

    async def forge(self) -> None:
        """A batch that this device did not sign, under its next seq."""
        await self._publish(self._pack([encode(Record(self.made + 1, 0.0, "telemetry", 5, {}))], SigningKey.generate()))
        self.forged += 1

    def _on_connect(self, _present: bool) -> None:
        self.connections += 1
        self._again, self._nonce = 0.0, "?"
        self._wake.set()

    async def _send(self, session: MqttSession) -> None:
        if self._nonce == "?":
            self._nonce = ""
            await self._present()
        lines = [line for _, line in itertools.islice(self._pending, self.MOST)]
        self._sent, self._again = self.acked + len(lines), time.monotonic() + self.PATIENCE_S
        for _ in range(1 + self.doubles):
            await self._publish(self._pack(lines, self.key))

    def _pack(self, lines: list[bytes], key: SigningKey) -> Batch:
        topic = str(Topic(self.fleet, TopicKind.UP, self.name))
        return encode_batch(lines, key, topic, Header(self.epoch, self.acked + 1, self.acked + len(lines)))

    async def _publish(self, batch: Batch) -> None:
        topic = str(Topic(self.fleet, TopicKind.UP, self.name))
        await self.session.publish(topic, batch.payload, properties=batch.properties, wait=False)

    async def _present(self) -> None:
        topic = str(Topic(self.fleet, TopicKind.PRESENCE, self.name))
        said = Presence(PresenceState.ONLINE, time.time(), self.epoch, self.made, self._nonce, "virtual")
        payload, properties = seal(self.key, topic, said)
        await self.session.publish(topic, payload, properties=properties, retain=True, wait=False)

    async def _receive(self) -> None:
        async for message in self.session.messages():
            message.ack()
            opening = (self.hub_key, message.topic, message.payload, message.properties)
            if self.mute:
                continue
            if message.topic.endswith(TopicKind.JOBS):
                self._work(unseal(*opening, Job))
                continue
            came = unseal(*opening, Ack)
            if came.epoch == self.epoch and came.seq > self.acked:
                gone = [self._pending.popleft()[0] for _ in range(came.seq - self.acked)]
                self.waits.append(time.time() - gone[0])
                self.acked = came.seq
                self._wake.set()
            if came.nonce != self._nonce:
                self._nonce = came.nonce
                with contextlib.suppress(Retry):
                    await self._present()

    def _work(self, job: Job) -> None:
        if self.jobs != "ignore" and job.id not in self._known:
            self._known.add(job.id)
            end = JobState.SUCCEEDED if self.jobs == "succeed" else JobState.FAILED
            for state in (JobState.DELIVERED, JobState.RUNNING, end):
                self.record("job", msgspec.to_builtins(JobReport(job.id, state, time.time(), {}, "")), 1)
            self.done += 1


def body(n: int) -> dict[str, Any]:
    """The body of record n: about 60 bytes of JSON."""
    return {"sensor": KINDS[n % 3], "line": n % 7, "value": round((n * 2654435761 % 100_003) / 997, 4), "n": n}


def digest(content: Any) -> str:
    """Of the content, whatever the order of its fields."""
    return hashlib.blake2b(_sorted.encode(content), digest_size=8).hexdigest()


def line(seq: int, content: dict[str, Any]) -> str:
    """One line of a ledger."""
    return f"{seq} {digest(content)}\n"


def tell(ledger: Path, promised: int, began: float) -> None:
    """How many records a producer promised in this run and how long that took, beside its ledger."""
    ledger.with_suffix(".took").write_text(f"{promised} {time.monotonic() - began}")


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
        if promised.get(seq) == digest(msgspec.json.decode(text)):
            times[seq] += 1
    return Books(len(promised), len(times), sum(n - 1 for n in times.values()), ordered)


def books(ledger: Path, database: Path, device: str) -> Books:
    """A ledger against what a database holds of a device, in the order of its commits."""
    query = "SELECT seq, CAST(body AS BLOB) FROM telemetry WHERE device = ? AND kind = 'telemetry' ORDER BY epoch, id"
    with ledger.open() as lines, contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        return judge(lines, db.execute(query, [device]))


def held(database: Path, device: str) -> int:
    """The highest seq there is of a device."""
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True)) as db:
        (seq,) = db.execute("SELECT max(seq) FROM telemetry WHERE device = ? AND epoch = (SELECT max(epoch) FROM "
                            "telemetry WHERE device = ?)", [device, device]).fetchone()  # fmt: skip
    return int(seq or 0)


def receiver(path: Path, device: str) -> sqlite3.Connection:
    """A peer's database: the hub's own tables and SQLite settings."""
    made = Database(f"sqlite:///{path}")
    with made.engine.begin() as connection:
        row = {"name": device, "public_key": "", "enrolled": 0.0, "desired": {}, "reported": {}}
        connection.execute(devices.insert().values(**row))
    made.close()
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
        db.execute(f"PRAGMA {pragma}")
    return db


def commit(db: sqlite3.Connection, rows: Iterable[tuple[Any, ...]]) -> None:
    """A peer's commit of (device, epoch, seq, ts, received, kind, priority, body)."""
    columns = "device, epoch, seq, ts, received, kind, priority, body"
    encoded = ((*row, msgspec.json.encode(content).decode()) for *row, content in rows)
    db.execute("BEGIN IMMEDIATE")
    db.executemany(f"INSERT INTO telemetry ({columns}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", encoded)
    db.execute("COMMIT")


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


async def until(condition: Callable[[], bool], processes: Iterable[BaseProcess] = (), every_s: float = 0.01) -> None:
    """Of something that another process or thread does. Raises Fatal when one of `processes` has ended."""
    while not condition():
        for process in processes:
            if not process.is_alive():
                raise Fatal(f"a process of the benchmark ended with status {process.exitcode}", "see above")
        await asyncio.sleep(every_s)
