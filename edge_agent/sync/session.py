"""The device's side of the contract: batches up, acks, desired documents, jobs and grants down, presence beside.

Invariants: nothing that comes down is parsed before the pinned hub key has verified it, and what fails is audited and
dropped; it is PUBACKed only when it is on disk; a batch is sent again from the acked watermark after every connection,
every stall and every gap, and a record leaves the outbox only by the hub's ack; at most `window` batches are unacked.
A process sends nothing before the hub has told where it stands: a device that was restored or flashed anew would write
other records under seqs the hub knows. It begins a new epoch instead, with what it made since.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections import deque
from pathlib import Path

import msgspec

from edge_agent.audit import Audit
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.rhythm import wait_up_to
from edge_agent.sync.broker import Message, Publication
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox, Slice
from edge_agent.sync.transport import MqttSession
from edge_agent.sync.twin import GrantsCache, Twin
from edge_agent.trouble import Trouble
from edge_agent.wire.batch import Batch, Header, encode_batch
from edge_agent.wire.errors import TooBig, WireError
from edge_agent.wire.messages import MAX_MESSAGE, Ack, Desired, Job, Presence, PresenceState
from edge_agent.wire.signed import seal, unseal
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import Topic, TopicKind

log = logging.getLogger(__name__)
HEARTBEAT_S = 15.0
WILL_DELAY_S = 5  # a cut that is shorter says nothing
PATIENCE_S = (5.0, 60.0)  # without an ack before the window is sent again: first and longest
GAP_S = 1.0  # an ack that moves nothing, so long after the last that did, tells of a gap
AT_ONCE = 8192  # bytes packed in less time than another thread takes to wake
AHEAD = 4  # batches read and packed at once while a backlog waits
LINGER_S, LINGER_ROWS = 0.02, 500  # while a batch is on its way, a small one waits a little for company


class Counters(msgspec.Struct):
    """Since the process started."""

    batches: int = 0
    records: int = 0
    resent: int = 0
    acks: int = 0
    jobs: int = 0
    refused: int = 0
    connections: int = 0


class Session:
    """`run()` serves until it is cancelled; offline or not makes no difference to its callers.

    Raises Refused at once for a broker address or CA file that cannot be.
    """

    def __init__(
        self,
        *,
        fleet: str,
        device: str,
        key: SigningKey,
        hub_key: VerifyKey,
        broker: str,
        outbox: Outbox,
        inbox: Inbox,
        twin: Twin,
        grants: GrantsCache,
        audit: Audit,
        username: str | None = None,
        password: str | None = None,
        ca: Path | None = None,
        proxy: str = "",
        agent: str = "",
        heartbeat: float = HEARTBEAT_S,
        window: int = 16,
        will_delay_s: int = WILL_DELAY_S,
    ) -> None:
        self._key, self._hub_key, self._agent = key, hub_key, agent
        self._outbox, self._inbox, self._twin, self._grants, self._audit = outbox, inbox, twin, grants, audit
        self._heartbeat, self._window = heartbeat, window
        kinds = (TopicKind.ACK, TopicKind.DESIRED, TopicKind.JOBS)
        self._down = [str(Topic(fleet, TopicKind.GRANTS)), *(str(Topic(fleet, kind, device)) for kind in kinds)]
        self._acks = self._down[1]
        self._up = str(Topic(fleet, TopicKind.UP, device))
        self._presence_topic = str(Topic(fleet, TopicKind.PRESENCE, device))
        self._mqtt = MqttSession(
            broker,
            f"{fleet}.{device}",
            username=username,
            password=password,
            ca=ca,
            proxy=proxy,
            subscriptions=self._down,
            will=lambda: self._presence(PresenceState.OFFLINE, "lost", will_delay_s),
            on_connect=self._on_connect,
        )
        self.counters = Counters()
        self._halted: Refused | None = None
        self._heard = False  # where the hub stands
        self._since = 0  # the last seq when this connection began: an ack past it was made after that
        self._nonce = ""
        self._beat_now = asyncio.Event()
        self._cursor = self._furthest = outbox.acked  # sent since the last rewind, and ever
        self._inflight: deque[int] = deque()  # last seqs of the batches not acked
        self._turn = 0  # rewinds
        self._later: dict[tuple[str, bytes], Message] = {}  # what the disk had no room for
        self._progress, self._patience = time.monotonic(), PATIENCE_S[0]
        self._storing = Trouble(log, "what came is tried again")
        self._sending = Trouble(log, "sending waits")

    @property
    def connected(self) -> bool:
        return self._mqtt.connected

    @property
    def error(self) -> OutriderError | None:
        """Why nothing flows, when nothing flows."""
        return self._halted or self._mqtt.error

    async def run(self) -> None:
        async with self._mqtt as mqtt:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._receive(mqtt, tasks), name="sync-receive")
                    tasks.create_task(self._send(mqtt), name="sync-send")
                    tasks.create_task(self._beat(mqtt), name="sync-beat")
            finally:
                with contextlib.suppress(OutriderError, TimeoutError):
                    async with asyncio.timeout(2.0):
                        await self._publish(mqtt, self._presence(PresenceState.OFFLINE, "shutdown"))

    def _on_connect(self, _session_present: bool) -> None:
        self.counters.connections += 1
        self._since = self._outbox.last_seq
        self._rewind()
        self._patience = PATIENCE_S[0]
        self._beat_now.set()

    # up

    async def _send(self, mqtt: MqttSession) -> None:
        wake = self._outbox.changed
        while True:
            wake.clear()
            patience = self._heartbeat
            try:
                if await self._send_next(mqtt):
                    self._sending.over()
                    continue
            except Retry as error:
                patience = 1.0
                if mqtt.connected:
                    self._sending.tell(error)
            await wait_up_to(1.0 if self._inflight else patience, wake)

    async def _send_next(self, mqtt: MqttSession) -> bool:
        if self._inflight and time.monotonic() - self._progress > self._patience:
            log.info("no ack for %.0f s: sending again from seq %d", self._patience, self._outbox.acked + 1)
            self._patience = min(self._patience * 2, PATIENCE_S[1])
            self._rewind()
        backlog = self._outbox.last_seq - self._cursor
        if not mqtt.connected or not self._heard or self._halted or backlog <= 0 or len(self._inflight) >= self._window:
            return False
        if self._inflight and backlog < LINGER_ROWS:
            await asyncio.sleep(LINGER_S)
        turn, epoch = self._turn, self._outbox.epoch
        parts = await self._outbox.batches(self._cursor, min(AHEAD, self._window - len(self._inflight)))
        if not parts or turn != self._turn:
            return bool(parts)
        small = sum(len(block) for part in parts for block in part.blocks) <= AT_ONCE
        packed = self._pack(epoch, parts) if small else await asyncio.to_thread(self._pack, epoch, parts)
        for part, batch in zip(parts, packed, strict=True):
            if turn == self._turn:
                await mqtt.publish(self._up, batch.payload, properties=batch.properties, wait=False)
            if turn == self._turn:
                if not self._inflight:
                    self._progress = time.monotonic()
                self._cursor = part.last
                self._inflight.append(part.last)
                self.counters.batches += 1
                self.counters.records += part.records
                self.counters.resent += part.last <= self._furthest
                self._furthest = max(self._furthest, part.last)
        return True

    def _pack(self, epoch: int, parts: list[Slice]) -> list[Batch]:
        return [encode_batch(each.blocks, self._key, self._up, Header(epoch, each.first, each.last)) for each in parts]

    def _rewind(self, hub_at: float = math.inf) -> None:
        self._turn += 1
        self._cursor = int(min(self._outbox.acked, hub_at))
        self._inflight.clear()
        self._progress = time.monotonic()
        self._outbox.changed.set()

    async def _beat(self, mqtt: MqttSession) -> None:
        while True:
            self._beat_now.clear()
            if mqtt.connected:
                with contextlib.suppress(Retry):  # the next connection beats again
                    await self._publish(mqtt, self._presence(PresenceState.ONLINE))
            await wait_up_to(self._heartbeat, self._beat_now)

    def _presence(self, state: PresenceState, reason: str = "", delay_s: int = 0) -> Publication:
        said = Presence(state, time.time(), self._outbox.epoch, self._outbox.last_seq, self._nonce, self._agent)
        if reason:
            said = msgspec.structs.replace(said, reason=reason)
        sealed = seal(self._key, self._presence_topic, said)
        return Publication(self._presence_topic, *sealed, retain=True, delay_s=delay_s)

    async def _publish(self, mqtt: MqttSession, out: Publication) -> None:
        await mqtt.publish(out.topic, out.payload, qos=out.qos, retain=out.retain, properties=out.properties)

    # down

    async def _receive(self, mqtt: MqttSession, tasks: asyncio.TaskGroup) -> None:
        async for message in mqtt.messages():
            try:
                await self._take(message)
            except Retry as error:
                self._storing.tell(f"{message.topic}: {error}")
                if message.topic == self._acks:  # the next says the same and more
                    message.ack()
                    continue
                key = message.topic, message.payload
                if key not in self._later:
                    tasks.create_task(self._take_later(key), name="sync-retry")
                self._later[key] = message
            else:
                message.ack()
                self._storing.over()

    async def _take_later(self, key: tuple[str, bytes]) -> None:
        """The disk was full. Others go on; how many wait here is bounded by what the broker may leave unacked.

        One that comes again, as after each cut, takes the place of what it was.
        """
        while True:
            await asyncio.sleep(1.0)
            with contextlib.suppress(Retry):
                await self._take(self._later[key])
                self._later.pop(key).ack()
                self._storing.over()
                return

    async def _take(self, message: Message) -> None:
        """Raises Retry when it could not be stored."""
        try:
            await self._dispatch(message)
        except (WireError, Refused) as error:
            self.counters.refused += 1
            told = {"topic": message.topic[:200], "reason": str(error)[:400]}
            if await self._audit.refused("refuse:message", "unknown", **told):
                log.warning("refused a message on %s: %s", message.topic, error)

    async def _dispatch(self, message: Message) -> None:
        if len(message.payload) > MAX_MESSAGE:
            raise TooBig(f"{len(message.payload)} bytes came; at most {MAX_MESSAGE}")
        opening = (self._hub_key, message.topic, message.payload, message.properties)
        match Topic.parse(message.topic).kind:
            case TopicKind.ACK:
                await self._on_ack(unseal(*opening, Ack))
            case TopicKind.DESIRED:
                await self._twin.accept(unseal(*opening, Desired))
            case TopicKind.JOBS:
                self.counters.jobs += await self._inbox.accept(unseal(*opening, Job)) is not None
            case TopicKind.GRANTS:
                await self._grants.accept(message.payload.decode(errors="replace"))

    async def _on_ack(self, ack: Ack) -> None:
        self.counters.acks += 1
        if ack.nonce != self._nonce:
            self._nonce = ack.nonce
            self._beat_now.set()
        box = self._outbox
        try:
            renewed = await box.settle(ack.epoch, ack.seq)
        except Refused as error:
            return self._halt(error)
        if renewed:
            log.error("the hub knows what was not made here: %s", renewed)
            self._furthest = self._since = 0
            self._rewind()
            await self._audit.append("epoch:renewed", "hub", reason=renewed)
        if not self._heard:
            self._heard = True
            box.changed.set()
        if ack.epoch != box.epoch:
            return
        if self._since < ack.seq <= box.last_seq:
            self._inbox.hear(ack.ts)
            await box.hear(ack.ts)
        now = time.monotonic()
        if ack.seq > box.acked:
            if ack.seq <= box.last_seq:  # the next may go while the records are let go
                while self._inflight and self._inflight[0] <= ack.seq:
                    self._inflight.popleft()
                self._progress, self._patience = now, PATIENCE_S[0]
                self._cursor = max(self._cursor, ack.seq)
                box.changed.set()
            try:
                await box.ack(ack.seq)
            except Refused as error:
                return self._halt(error)
        elif self._inflight and now - self._progress > GAP_S:  # the hub stands at a gap
            if ack.seq < self._outbox.acked:  # it was restored: what it had acked is gone there and here
                log.error("the hub went back from seq %d to %d", self._outbox.acked, ack.seq)
                await self._audit.append("hub:went-back", "hub", acked=self._outbox.acked, now=ack.seq)
            self._rewind(ack.seq)

    def _halt(self, error: Refused) -> None:
        if self._halted is None:
            log.error("nothing more is sent: %s", error)
        self._halted = error
