"""What the hub says to devices: acks, desired documents, jobs and grants, each signed over topic and payload.

Invariant: nothing here needs to arrive. Acks come again with the next batch or heartbeat, desired documents and grants
are retained and published again at every connection, jobs are sent again while they are queued. So a message that
cannot go out now is logged, not queued, and `False` says so.
"""

import asyncio
import logging
import time

import msgspec

from edge_agent.errors import OutriderError
from edge_agent.sync.transport import MqttSession
from edge_agent.wire.messages import Ack, Desired, Job
from edge_agent.wire.signed import seal
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.topics import Topic, TopicKind

log = logging.getLogger(__name__)
PATIENCE_S = 5.0  # how long a stalled broker may hold up whoever publishes


class Downlink:
    """Signs and publishes over the hub's MQTT session."""

    def __init__(self, session: MqttSession, key: SigningKey, fleet: str) -> None:
        self._session = session
        self._key = key
        self._fleet = fleet

    async def ack(self, device: str, epoch: int, seq: int, nonce: str) -> bool:
        message = Ack(epoch=epoch, seq=seq, ts=time.time(), nonce=nonce)
        return await self._publish(device, TopicKind.ACK, message, qos=0)

    async def desired(self, device: str, desired: Desired) -> bool:
        return await self._publish(device, TopicKind.DESIRED, desired, retain=True)

    async def job(self, device: str, job: Job) -> bool:
        """The broker drops it at the job's expiry."""
        return await self._publish(device, TopicKind.JOBS, job, expiry=max(1, int(job.expires - time.time())))

    async def grants(self, text: str) -> bool:
        """`text` is signed already."""
        return await self._send(str(Topic(self._fleet, TopicKind.GRANTS)), text.encode(), {}, 1, True, None)

    async def _publish(
        self,
        device: str,
        kind: TopicKind,
        message: msgspec.Struct,
        *,
        qos: int = 1,
        retain: bool = False,
        expiry: int | None = None,
    ) -> bool:
        topic = str(Topic(self._fleet, kind, device))
        payload, properties = seal(self._key, topic, message)
        return await self._send(topic, payload, properties, qos, retain, expiry)

    async def _send(
        self, topic: str, payload: bytes, properties: dict[str, str], qos: int, retain: bool, expiry: int | None
    ) -> bool:
        try:
            async with asyncio.timeout(PATIENCE_S):
                await self._session.publish(
                    topic, payload, qos=qos, retain=retain, properties=properties, expiry=expiry, wait=False
                )
            return True
        except (OutriderError, TimeoutError) as error:
            log.info("%s waits for the next connection: %s", topic, error)
            return False
