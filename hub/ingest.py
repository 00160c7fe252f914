"""The loop that takes what devices send: messages in, one transaction for as many as wait, then the acks.

Invariants: a message is acknowledged to the broker only after its transaction; a database that cannot commit now is
tried again with the same messages and a bounded number waiting; a batch that makes a transaction fail is found by
committing one at a time, and dead-lettered. The loop lives.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import sqlalchemy as sa

from edge_agent.sync.broker import Message
from edge_agent.sync.transport import MqttSession
from edge_agent.wire.errors import WireError
from edge_agent.wire.messages import Presence
from edge_agent.wire.signed import unseal
from edge_agent.wire.signing import VerifyKey
from edge_agent.wire.topics import Topic, TopicKind
from hub.committer import Ackable, Committed, Committer, device_of
from hub.db import Database
from hub.devices import Devices
from hub.downlink import Downlink
from hub.errors import Refused
from hub.liveness import HEARTBEAT_S, Heard

log = logging.getLogger(__name__)
GROUP = 64  # messages in one transaction; as many again may wait
RETRY_S = (0.2, 10.0)


class Ingest:
    """Reads the hub's session; `on_online(device)` is called when a device has proven that it is there (again)."""

    def __init__(
        self,
        db: Database,
        session: MqttSession,
        devices: Devices,
        downlink: Downlink,
        on_online: Callable[[str], Awaitable[object]],
    ) -> None:
        self._db = db
        self._session = session
        self._devices = devices
        self._downlink = downlink
        self._on_online = on_online
        self._committer = Committer(devices.fleet)
        self._waiting: asyncio.Queue[Message] = asyncio.Queue(GROUP)
        self.records = 0

    @staticmethod
    def filters(fleet: str) -> list[str]:
        """What the session must subscribe to."""
        return [Topic.filter(kind, fleet) for kind in (TopicKind.UP, TopicKind.PRESENCE)]

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._receive(), name="ingest-receive")
            tasks.create_task(self._heartbeat(), name="ingest-heartbeat")
            while True:
                group = [await self._waiting.get()]
                while len(group) < GROUP and not self._waiting.empty():
                    group.append(self._waiting.get_nowait())
                await self.take(group)

    async def _receive(self) -> None:
        async for message in self._session.messages():
            await self._waiting.put(message)

    async def take(self, group: list[Message]) -> None:
        """Commit, acknowledge to the broker, answer the devices."""
        ups = [message for message in group if message.topic.endswith(f"/{TopicKind.UP}")]
        others = [message for message in group if not message.topic.endswith(f"/{TopicKind.UP}")]
        try:
            committed = await self._commit(ups) if ups else Committed()
            if others:
                await self._presences(others)
        except Exception:  # whatever it is, the loop lives: a device sends again what no ack of ours covers
            log.exception("%d messages were set aside", len(group))
            return
        finally:
            for message in group:
                message.ack()
        self.records += committed.records
        self._devices.doubled += committed.doubled
        for device, ack in committed.acks.items():
            await self._ack(device, ack)

    async def _commit(self, ups: list[Message]) -> Committed:
        try:
            return await self._persist(ups)
        except (sa.exc.SQLAlchemyError, ValueError, OverflowError) as error:
            log.warning("a transaction of %d batches failed, committing them one at a time: %s", len(ups), error)
        whole = Committed(acks={})
        for message in ups:
            try:
                one = await self._persist([message])
            except (sa.exc.SQLAlchemyError, ValueError, OverflowError) as error:
                one = await self._persist([message], condemn=f"it cannot be stored: {error}")
            whole.records += one.records
            whole.doubled += one.doubled
            whole.acks |= one.acks
        return whole

    async def _persist(self, ups: list[Message], condemn: str = "") -> Committed:
        delay = RETRY_S[0]
        while True:
            try:
                return await self._db.write(lambda c: self._committer.commit(c, ups, condemn))
            except (sa.exc.OperationalError, sa.exc.InterfaceError) as error:
                log.error("the database cannot commit, trying again in %.1f s: %s", delay, error.orig)
                await asyncio.sleep(delay)
                delay = min(delay * 2, RETRY_S[1])

    async def _ack(self, device: str, ack: Ackable) -> None:
        nonce = self._devices.liveness.nonce(device, time.monotonic())
        await self._downlink.ack(device, ack.epoch, ack.seq, nonce)

    async def _presences(self, messages: list[Message]) -> None:
        """Of a group at once: one read, and one write of what they told."""
        named = [(message, device_of(message.topic, self._devices.fleet)) for message in messages]
        rows = await self._devices.rows({device for _, device in named})
        heard = list[tuple[str, Presence]]()
        for message, device in named:
            try:
                if (row := rows.get(device)) is None:
                    raise Refused(404, f"no device {device}", "see GET /v1/devices")
                opening = (message.topic, message.payload, message.properties)
                heard.append((device, unseal(VerifyKey.from_text(row.public_key), *opening, Presence)))
            except (Refused, WireError) as error:
                await self._refused(device, str(error))
        for device, what in await self._devices.heard(heard, time.time()):
            if what is Heard.STALE:
                await self._ack(device, Ackable(rows[device].epoch, rows[device].watermark))
            elif what is Heard.BACK:
                await self._on_online(device)

    async def _refused(self, device: str, reason: str) -> None:
        await self._db.write(lambda c: self._committer.tell(c, device or "unknown", "refuse:presence", reason))

    async def _heartbeat(self) -> None:
        """Challenge every device that says it is online with a new nonce, and repeat its watermark."""
        while True:
            claiming = self._devices.liveness.claiming()
            for at in range(0, len(claiming), GROUP):
                for device, row in (await self._devices.rows(set(claiming[at : at + GROUP]))).items():
                    await self._ack(device, Ackable(row.epoch, row.watermark))
                await asyncio.sleep(self._devices.liveness.beat_s * min(GROUP, len(claiming) - at) / len(claiming))
            if not claiming:
                await asyncio.sleep(HEARTBEAT_S)
