"""A hub small enough to read: verifies, commits by the watermark rule into memory, answers. For the device's tests."""

import asyncio
import contextlib
import time
from types import TracebackType

import msgspec

from edge_agent.errors import Retry
from edge_agent.sync.transport import MqttSession
from edge_agent.wire.batch import decode_records, verify_batch
from edge_agent.wire.messages import Ack, Presence, PresenceState, Record
from edge_agent.wire.signed import seal, unseal
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import Topic, TopicKind
from tests.sync.brokers import Embedded, Mosquitto

FLEET, DEVICE = "f1", "d1"


def topic(kind: TopicKind) -> str:
    return str(Topic(FLEET, kind, None if kind is TopicKind.GRANTS else DEVICE))


class Hub:
    """`deaf` makes it commit nothing; `forget` batches are swallowed as if lost on the way."""

    def __init__(self, broker: Embedded | Mosquitto, device_key: VerifyKey) -> None:
        self.key, self._device_key = SigningKey.generate(), device_key
        self.records: list[Record] = []
        self.presence: list[Presence] = []
        self.epoch = self.watermark = self.batches = self.gaps = 0
        self.nonce, self.forget, self.deaf = "n1", 0, False
        filters = [Topic.filter(TopicKind.UP, FLEET), Topic.filter(TopicKind.PRESENCE, FLEET)]
        access = {"username": broker.username, "password": broker.password}
        self.mqtt = MqttSession(broker.url, "hub", subscriptions=filters, backoff=(0.05, 0.5), **access)

    async def __aenter__(self) -> "Hub":
        await self.mqtt.__aenter__()
        await self.mqtt.wait_connected()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        await self.mqtt.__aexit__(kind, error, trace)

    async def send(self, kind: TopicKind, message: msgspec.Struct, key: SigningKey | None = None) -> None:
        payload, properties = seal(key or self.key, topic(kind), message)
        await self.mqtt.publish(topic(kind), payload, properties=properties, retain=kind is TopicKind.DESIRED)

    async def ack(self) -> None:
        await self.send(TopicKind.ACK, Ack(self.epoch, self.watermark, time.time(), self.nonce))

    async def _run(self) -> None:
        async for message in self.mqtt.messages():
            if message.topic.endswith("presence"):
                opened = unseal(self._device_key, message.topic, message.payload, message.properties, Presence)
                self.presence.append(opened)
                if opened.state is PresenceState.ONLINE and opened.nonce != self.nonce:
                    with contextlib.suppress(Retry):
                        await self.ack()
            elif self.forget:
                self.forget -= 1
            elif not self.deaf:
                self._commit(message.topic, message.payload, message.properties)
                with contextlib.suppress(Retry):  # a broker may redeliver before SUBACK; the device sends again
                    await self.ack()
            message.ack()

    def _commit(self, at: str, payload: bytes, properties: dict[str, str]) -> None:
        header = verify_batch(at, payload, properties, self._device_key)
        self.batches += 1
        if header.epoch > self.epoch:
            self.epoch, self.watermark = header.epoch, 0
        if header.first > self.watermark + 1:
            self.gaps += 1
            return
        self.records += [r for r in decode_records(header, payload) if r.seq > self.watermark]
        self.watermark = max(self.watermark, header.last)
