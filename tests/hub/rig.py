"""A real hub in this process or beside it, and a device of a few lines that speaks the contract over real MQTT."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
from fastapi import FastAPI

from edge_agent import enrol
from edge_agent.sync.transport import MqttSession
from edge_agent.wire.batch import Batch, Header, encode_batch
from edge_agent.wire.messages import Ack, Desired, Job, Presence, PresenceState, Record, encode
from edge_agent.wire.signed import seal, unseal
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.topics import Topic, TopicKind
from hub.app import Settings, create_app
from hub.services import Services

PASSWORD = "correct horse"


async def until(condition: Callable[[], Any], within: float = 15.0) -> Any:
    """Wait for a true answer; the condition may be async."""
    end = time.monotonic() + within
    while True:
        answer = condition()
        if isinstance(answer, Awaitable):
            answer = await answer
        if answer:
            return answer
        assert time.monotonic() < end, "condition not met in time"
        await asyncio.sleep(0.01)


def telemetry(seqs: range | list[int]) -> list[Record]:
    return [Record(seq, 1000.0 + seq, "telemetry", 5, {"n": seq}) for seq in seqs]


def pack(
    key: SigningKey, topic: str, records: list[Record], epoch: int, first: int | None = None, last: int | None = None
) -> Batch:
    header = Header(epoch, records[0].seq if first is None else first, records[-1].seq if last is None else last)
    return encode_batch([encode(record) for record in records], key, topic, header)


class Hub:
    """A hub in this process with clients over HTTP."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.http = self.client()

    @property
    def services(self) -> Services:
        services: Services = self.app.state.services
        return services

    def client(self, token: str = "") -> httpx.AsyncClient:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(app=self.app), base_url="http://hub", headers=headers, timeout=30
        )

    async def login(self, user: str = "admin", password: str = PASSWORD) -> httpx.AsyncClient:
        answer = await self.http.post("/v1/login", json={"user": user, "password": password})
        assert answer.status_code == 200, answer.text
        return self.client(answer.json()["access_token"])

    async def user(self, role: str) -> httpx.AsyncClient:
        """Somebody with one role, logged in."""
        await self.services.auth.add_user(f"some-{role}", [role], PASSWORD, by="test")
        return await self.login(f"some-{role}")


@asynccontextmanager
async def running(data: Path, **more: Any) -> AsyncIterator[Hub]:
    app = create_app(Settings(**({"data": data, "admin_password": PASSWORD, "dashboard": False} | more)))
    async with app.router.lifespan_context(app):
        hub = Hub(app)
        yield hub
        await hub.http.aclose()


class Device:
    """Sends batches, notes acks, answers nonces, collects what comes down."""

    def __init__(self, name: str, key: SigningKey, enrolment: dict[str, Any]) -> None:
        self.name, self.key, self.epoch = name, key, 1
        self.fleet: str = enrolment["fleet"]
        self.hub_key = VerifyKey.from_text(enrolment["hub_key"])
        self.broker: dict[str, str] = enrolment["broker"]
        self.answer_nonces = True
        self.acks: list[Ack] = []
        self.jobs: list[Job] = []
        self.desired: list[Desired] = []
        self.presences = 0
        self.seq = 0
        self.session: MqttSession
        self.tls: Path | None = None

    @staticmethod
    async def enrol(
        http: httpx.AsyncClient, name: str, token: str, key: SigningKey | None = None, state: Path | None = None
    ) -> "Device":
        """With a state directory it has its certificate there."""
        key = key or SigningKey.generate()
        body = {"token": token, "name": name, "public_key": key.public.text, "csr": enrol.csr(key, name)}
        answer = await http.post("/v1/enrol", json=body)
        assert answer.status_code == 201, answer.text
        device = Device(name, key, answer.json())
        if state is not None:
            await asyncio.to_thread(state.mkdir)
            key.save(state / enrol.KEY)
            enrolled = msgspec.convert(answer.json(), enrol.Enrolled)
            device.tls = enrol.tls(state, enrol.Identity("", enrolled), enrolled.certificate)
        return device

    def topic(self, kind: TopicKind) -> str:
        return str(Topic(self.fleet, kind, self.name))

    @asynccontextmanager
    async def online(self) -> AsyncIterator["Device"]:
        kinds = (TopicKind.ACK, TopicKind.JOBS, TopicKind.DESIRED)
        came_up = asyncio.Event()
        self.session = MqttSession(
            self.broker["url"],
            f"device-{self.name}",
            username=self.broker["username"] or None,
            password=self.broker["password"] or None,
            ca=self.tls,
            subscriptions=[self.topic(kind) for kind in kinds],
            on_connect=lambda _: came_up.set(),
            backoff=(0.05, 0.2),
        )
        async with self.session:
            reading = asyncio.create_task(self._read())
            greeting = asyncio.create_task(self._greet(came_up))
            await self.session.wait_connected()
            yield self
            for task in (reading, greeting):
                task.cancel()
            await asyncio.wait([reading, greeting])

    async def _greet(self, came_up: asyncio.Event) -> None:
        while True:
            await came_up.wait()
            came_up.clear()
            await self.present(nonce="")

    async def _read(self) -> None:
        known = ""
        async for message in self.session.messages():
            kind = Topic.parse(message.topic).kind
            open_as = {TopicKind.ACK: Ack, TopicKind.JOBS: Job, TopicKind.DESIRED: Desired}[kind]
            came = unseal(self.hub_key, message.topic, message.payload, message.properties, open_as)
            if isinstance(came, Ack):
                self.acks.append(came)
                if came.nonce != known and self.answer_nonces:
                    known = came.nonce
                    await self.present(known)
            elif isinstance(came, Job):
                self.jobs.append(came)
            elif isinstance(came, Desired):
                self.desired.append(came)
            message.ack()

    async def present(self, nonce: str, state: PresenceState = PresenceState.ONLINE, skew_s: float = 0.0) -> None:
        presence = Presence(state, time.time() + skew_s, self.epoch, self.seq, nonce, "rig 1")
        topic = self.topic(TopicKind.PRESENCE)
        payload, properties = seal(self.key, topic, presence)
        self.presences += 1
        await self.session.publish(topic, payload, properties=properties, retain=True, wait=False)

    async def send(self, records: list[Record], **more: Any) -> None:
        topic = self.topic(TopicKind.UP)
        batch = pack(self.key, topic, records, self.epoch, **more)
        await self.session.publish(topic, batch.payload, properties=batch.properties)

    async def report(self, kind: str, body: dict[str, Any]) -> None:
        """One record of a kind, as the next seq."""
        self.seq += 1
        await self.send([Record(self.seq, time.time(), kind, 1, body)])

    def acked(self) -> tuple[int, int]:
        return (self.acks[-1].epoch, self.acks[-1].seq) if self.acks else (0, 0)


async def enrolled(hub: Hub, name: str, state: Path | None = None) -> Device:
    return await Device.enrol(hub.http, name, await hub.services.devices.create_enrolment("admin"), state=state)


def ledger(records: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """What a producer knows of its records: seq and content."""
    return [(record["seq"], json.dumps(record["body"], sort_keys=True)) for record in records]
