"""The device's side of the contract, over both brokers, against a hub of forty lines."""

import asyncio
import itertools
import socket
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.link import Link
from edge_agent.audit import Audit
from edge_agent.store import Store
from edge_agent.sync import session as session_module
from edge_agent.sync.inbox import Inbox
from edge_agent.sync.outbox import Outbox
from edge_agent.sync.session import Session
from edge_agent.sync.twin import GrantsCache, Twin
from edge_agent.wire.grants import SHIPPED_ROLES, Grants, sign_grants
from edge_agent.wire.messages import Ack, Desired, Job, JobKind, JobState, PresenceState
from edge_agent.wire.signed import seal
from edge_agent.wire.signing import SigningKey, to_text
from edge_agent.wire.topics import TopicKind
from tests.sync.brokers import Embedded, Mosquitto, until
from tests.sync.peer import DEVICE, FLEET, Hub, topic

Broker = Embedded | Mosquitto


class Device:
    """The parts a session joins."""

    def __init__(self, store: Store, outbox: Outbox, twin: Twin, grants: GrantsCache, **more: Any) -> None:
        inbox = Inbox(store, outbox)
        self.store, self.outbox, self.inbox, self.twin, self.grants = store, outbox, inbox, twin, grants
        parts = {"outbox": outbox, "inbox": inbox, "twin": twin, "grants": grants, "audit": Audit(store, outbox)}
        self.session = Session(fleet=FLEET, device=DEVICE, agent="test", **parts, **more)

    def cut(self) -> None:
        link = self.session._mqtt._link
        assert link is not None
        link._socket.shutdown(socket.SHUT_RDWR)


@asynccontextmanager
async def device_of(hub: Hub, broker: Broker, key: SigningKey, path: Path, **more: Any) -> AsyncIterator[Device]:
    store = Store(path)
    outbox = await Outbox.open(store)
    twin, grants = await Twin.open(store, outbox), await GrantsCache.open(store, hub.key.public)
    access = {"broker": broker.url, "username": broker.username, "password": broker.password}
    device = Device(store, outbox, twin, grants, key=key, hub_key=hub.key.public, **access, **more)
    task = asyncio.create_task(device.session.run())
    yield device
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled(), task.exception()
    store.close()


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate()


@pytest.fixture
async def hub(broker: Broker, key: SigningKey) -> AsyncIterator[Hub]:
    async with Hub(broker, key.public) as running:
        yield running


@pytest.fixture
async def device(hub: Hub, broker: Broker, key: SigningKey, tmp_path: Path) -> AsyncIterator[Device]:
    async with device_of(hub, broker, key, tmp_path / "d" / "s.db") as made:
        yield made


def job(id: str, ttl: float = 60, key: str = "") -> Job:
    now = time.time()
    return Job(id, JobKind.TASK, {"text": "hello"}, "ann", ["operator"], now, now + ttl, key)


async def test_every_record_arrives_once_in_order_and_the_outbox_empties(hub: Hub, device: Device) -> None:
    for n in range(20):
        await device.outbox.append_many("telemetry", [{"n": n * 100 + i} for i in range(100)])
    await until(lambda: device.outbox.depth == 0)
    assert [r.seq for r in hub.records] == list(range(1, 2001))
    assert [r.body["n"] for r in hub.records] == list(range(2000))


@pytest.mark.parametrize("wrong", [365 * 86400.0, -365 * 86400.0])
async def test_jobs_expire_by_the_hubs_clock_when_the_devices_own_is_wrong(
    hub: Hub, device: Device, wrong: float
) -> None:
    device.inbox._clock = lambda: time.time() + wrong
    await until(lambda: device.session.connected)
    await device.outbox.append("telemetry", {"n": 0})
    await until(lambda: device.outbox.depth == 0)
    await hub.send(TopicKind.JOBS, job("over", ttl=-60))
    await hub.send(TopicKind.JOBS, job("good"))
    assert (await asyncio.wait_for(device.inbox.next(), 10)).id == "good"
    assert await device.inbox.state("over") is JobState.EXPIRED


async def test_an_ack_of_an_earlier_connection_tells_no_time(hub: Hub, device: Device) -> None:
    await until(lambda: device.session.connected)
    await device.outbox.append("telemetry", {"n": 0})
    await until(lambda: device.outbox.depth == 0)
    told, heard = device.inbox.now(), device.outbox._ages.note.hub
    assert heard is not None
    connections = device.session.counters.connections
    device.cut()
    await until(lambda: device.session.connected and device.session.counters.connections > connections)
    acks = device.session.counters.acks
    await hub.send(TopicKind.ACK, Ack(hub.epoch, hub.watermark, 0.0, hub.nonce))
    await until(lambda: device.session.counters.acks > acks)
    assert device.inbox.now() >= told
    assert device.outbox._ages.note.hub == pytest.approx(heard, abs=60.0)


async def test_cuts_lose_and_double_nothing(hub: Hub, device: Device) -> None:
    enough = asyncio.Event()

    async def produce() -> int:
        for n in itertools.count():
            if enough.is_set():
                return n
            await device.outbox.append("telemetry", {"n": n})
        return 0

    producing = asyncio.create_task(produce())
    for cuts in range(4):
        await until(lambda cuts=cuts: device.session.counters.connections > cuts and device.session.connected)
        before = hub.batches
        await until(lambda before=before: hub.batches >= before + 2)
        device.cut()
        await until(lambda: not device.session.connected)
    enough.set()
    count = await producing
    await until(lambda: device.outbox.depth == 0)
    assert [r.body["n"] for r in hub.records] == list(range(count))
    assert device.session.counters.connections >= 5


async def test_a_restarted_broker_loses_and_doubles_nothing(hub: Hub, device: Device, broker: Broker) -> None:
    hub.deaf = True
    await device.outbox.append_many("telemetry", [{"n": n} for n in range(3000)])
    await until(lambda: device.session.counters.batches >= 1)
    await asyncio.to_thread(broker.stop)
    await until(lambda: not device.session.connected)
    hub.deaf = False
    await asyncio.to_thread(broker.start)
    await until(lambda: device.outbox.depth == 0)
    assert [r.body["n"] for r in hub.records] == list(range(3000))


async def test_a_batch_lost_on_the_way_is_sent_again_from_the_watermark(
    hub: Hub, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "PATIENCE_S", (0.5, 1.0))
    await until(lambda: device.session.connected)
    device.session._patience = 0.5
    hub.forget = 1
    await device.outbox.append("telemetry", {"n": 0})
    await until(lambda: hub.forget == 0)
    for n in range(1, 4):
        await device.outbox.append("telemetry", {"n": n})
    await until(lambda: device.outbox.depth == 0)
    assert [r.body["n"] for r in hub.records] == [0, 1, 2, 3]
    assert device.session.counters.resent >= 1


async def test_presence_is_signed_answers_the_nonce_and_ends_offline(
    hub: Hub, broker: Broker, key: SigningKey, tmp_path: Path
) -> None:
    async with device_of(hub, broker, key, tmp_path / "d" / "s.db") as device:
        await until(lambda: hub.presence)
        assert hub.presence[0].state is PresenceState.ONLINE
        await device.outbox.append("telemetry", {})
        await until(lambda: hub.presence[-1].nonce == "n1")
        assert (hub.presence[-1].epoch, hub.presence[-1].agent) == (device.outbox.epoch, "test")
    await until(lambda: hub.presence[-1].state is PresenceState.OFFLINE)


async def test_a_brief_cut_says_nothing_and_a_long_one_that_the_device_is_lost(
    hub: Hub, broker: Broker, key: SigningKey, tmp_path: Path
) -> None:
    port = int(broker.url.rsplit(":", 1)[1])
    async with Link("127.0.0.1", port) as link:
        through = type("Through", (), {"url": f"mqtt://127.0.0.1:{link.port}"})
        through.username, through.password = broker.username, broker.password
        async with device_of(hub, through, key, tmp_path / "d" / "s.db", will_delay_s=2) as device:
            await until(lambda: hub.presence)
            for _ in range(2):
                link.cut()
                link.mend()
                before = device.session.counters.connections
                await until(lambda before=before: device.session.counters.connections > before)
            await asyncio.sleep(2.5)
            assert {p.state for p in hub.presence} == {PresenceState.ONLINE}
            link.cut()
            await until(lambda: hub.presence[-1].state is PresenceState.OFFLINE)
            assert hub.presence[-1].reason == "lost"
            link.mend()
            await until(lambda: hub.presence[-1].state is PresenceState.ONLINE)
    await until(lambda: hub.presence[-1].reason == "shutdown")


async def test_a_job_is_journaled_once_and_its_report_reaches_the_hub(hub: Hub, device: Device) -> None:
    await until(lambda: device.session.connected)
    await hub.send(TopicKind.JOBS, job("j1"))
    await hub.send(TopicKind.JOBS, job("j1"))
    taken = await asyncio.wait_for(device.inbox.next(), 10)
    assert taken.body == {"text": "hello"}
    await device.inbox.report("j1", JobState.SUCCEEDED, {"answer": "done"})
    await until(lambda: device.outbox.depth == 0 and len(hub.records) >= 3)
    states = [r.body["state"] for r in hub.records if r.kind == "job"]
    assert states == ["delivered", "running", "succeeded"]


async def test_a_job_sent_while_offline_arrives_on_reconnect(
    hub: Hub, broker: Broker, key: SigningKey, tmp_path: Path
) -> None:
    async with device_of(hub, broker, key, tmp_path / "d" / "s.db") as device:
        await until(lambda: device.session.connected)
    await hub.send(TopicKind.JOBS, job("later"))
    async with device_of(hub, broker, key, tmp_path / "d" / "s.db") as device:
        assert (await asyncio.wait_for(device.inbox.next(), 10)).id == "later"


async def test_desired_and_grants_are_kept_and_never_go_back(hub: Hub, device: Device) -> None:
    await until(lambda: device.session.connected)
    await hub.send(TopicKind.DESIRED, Desired(2, 1.0, {"a": 2}))
    await hub.send(TopicKind.DESIRED, Desired(1, 1.0, {"a": 1}))
    assert (await asyncio.wait_for(device.twin.newer_than(0), 10)).doc == {"a": 2}
    for epoch in (7, 6):
        text = sign_grants(hub.key, Grants(epoch, 0.0, 1.0, SHIPPED_ROLES, []))
        await hub.mqtt.publish(topic(TopicKind.GRANTS), text.encode(), retain=True)
    await until(lambda: device.session.counters.refused == 1)
    assert device.grants.grants is not None
    assert device.grants.grants.epoch == 7
    assert device.twin.desired.version == 2
    again = await GrantsCache.open(device.store, hub.key.public)
    assert again.grants == device.grants.grants


async def test_a_message_the_hub_did_not_sign_is_audited_and_changes_nothing(hub: Hub, device: Device) -> None:
    await until(lambda: device.session.connected)
    await device.outbox.append("telemetry", {"n": 1})
    await until(lambda: device.outbox.depth == 0)
    forger = SigningKey.generate()
    await hub.send(TopicKind.JOBS, job("forged"), forger)
    await hub.send(TopicKind.ACK, Ack(device.outbox.epoch, 10**9, 0.0), forger)
    await hub.mqtt.publish(topic(TopicKind.JOBS), b"\xff\x00 rubbish")
    await hub.mqtt.publish(topic(TopicKind.DESIRED), b"x" * 300_000)
    odd = to_text(b'{"alg":"Ed25519","crit":1}')
    await hub.mqtt.publish(topic(TopicKind.GRANTS), f"{odd}.{to_text(b'{}')}.AA".encode())
    await until(lambda: device.session.counters.refused == 5)
    await hub.send(TopicKind.JOBS, job("real"))
    assert (await asyncio.wait_for(device.inbox.next(), 10)).id == "real"
    assert await device.inbox.state("forged") is None
    await until(lambda: device.outbox.depth == 0)
    assert [r.body["event"] for r in hub.records if r.kind == "audit"] == ["refuse:message"]
    assert device.session.error is None


async def test_a_device_put_back_to_an_older_state_loses_nothing_of_either_life(
    hub: Hub, broker: Broker, key: SigningKey, tmp_path: Path
) -> None:
    path, copy = tmp_path / "d" / "s.db", tmp_path / "copy" / "s.db"
    copy.parent.mkdir()
    async with device_of(hub, broker, key, path) as device:
        await device.outbox.append_many("telemetry", [{"n": n} for n in range(10)])
        await until(lambda: device.outbox.depth == 0)
        hub.deaf = True
        await device.outbox.append_many("telemetry", [{"n": n} for n in range(10, 20)])
        await device.store.read(lambda db: db.execute("VACUUM INTO ?", [str(copy)]))  # the backup: 10 are not acked
        hub.deaf = False
        await device.outbox.append_many("telemetry", [{"n": n} for n in range(20, 30)])
        device.session._patience = 0.1
        await until(lambda: device.outbox.depth == 0)
    store = Store(copy)
    outbox = await Outbox.open(store)
    await outbox.append_many("telemetry", [{"n": n} for n in range(100, 130)])  # seqs the hub knows
    store.close()
    async with device_of(hub, broker, key, copy) as device:
        await until(lambda: device.outbox.depth == 0)
    told = [r for r in hub.records if r.kind == "telemetry"]
    assert [r.body["n"] for r in told] == [*range(30), *range(100, 130)]


async def test_a_device_flashed_anew_with_its_clock_behind_moves_past_the_known_epoch(
    hub: Hub, broker: Broker, key: SigningKey, tmp_path: Path
) -> None:
    hub.epoch, hub.watermark = 10**15, 7
    async with device_of(hub, broker, key, tmp_path / "d" / "s.db") as device:
        await device.outbox.append_many("telemetry", [{"n": n} for n in range(5)])
        await until(lambda: device.outbox.depth == 0)
        assert device.outbox.epoch == hub.epoch == 10**15 + 1
    assert [r.body["n"] for r in hub.records if r.kind == "telemetry"] == list(range(5))


async def test_nothing_is_sent_before_the_hub_has_told_where_it_stands(
    hub: Hub, broker: Broker, key: SigningKey, tmp_path: Path
) -> None:
    hub.nonce = ""  # a hub that does not answer a presence
    async with device_of(hub, broker, key, tmp_path / "d" / "s.db") as device:
        await device.outbox.append("telemetry", {})
        await until(lambda: hub.presence)
        await asyncio.sleep(0.3)
        assert (device.session.counters.batches, device.outbox.depth) == (0, 1)
        hub.epoch = device.outbox.epoch
        await hub.ack()
        await until(lambda: device.outbox.depth == 0)


async def test_a_device_whose_epoch_the_hub_has_left_behind_stops_sending_and_says_why(
    hub: Hub, device: Device
) -> None:
    await device.outbox.append("telemetry", {})
    await until(lambda: device.outbox.depth == 0)
    hub.epoch = device.outbox.epoch + 1
    await hub.ack()
    await until(lambda: device.session.error is not None)
    assert "enrol the device anew" in str(device.session.error)
    await device.outbox.append("telemetry", {})
    assert device.outbox.depth == 1


async def test_a_hub_restored_from_a_backup_goes_on_and_the_hole_is_told(hub: Hub, device: Device) -> None:
    await device.outbox.append_many("telemetry", [{"n": n} for n in range(10)])
    await until(lambda: device.outbox.depth == 0)
    hub.watermark, hub.records = 4, hub.records[:4]
    await device.outbox.append("telemetry", {"n": 10})
    await until(lambda: hub.gaps > 0)
    await asyncio.sleep(session_module.GAP_S)
    await hub.ack()
    await until(lambda: device.outbox.depth == 0)
    assert [r.body["n"] for r in hub.records if r.kind == "telemetry"] == [0, 1, 2, 3, 10]
    audit = [r.body for r in hub.records if r.kind == "audit"]
    assert [(each["event"], each["acked"], each["now"]) for each in audit] == [("hub:went-back", 10, 4)]


async def test_a_job_that_found_the_disk_full_is_taken_when_there_is_room(hub: Hub, device: Device) -> None:
    await until(lambda: device.session.connected)
    (pages,) = await device.store.read(lambda db: db.execute("PRAGMA page_count").fetchone())
    await device.store.read(lambda db: db.execute(f"PRAGMA max_page_count = {pages}").fetchone())
    big = msgspec.structs.replace(job("big"), body={"text": "x" * 60_000})
    await hub.send(TopicKind.JOBS, big)
    before = device.session.counters.acks
    await hub.ack()  # others go on
    await until(lambda: device.session.counters.acks > before)
    assert await device.inbox.state("big") is None
    await device.store.read(lambda db: db.execute("PRAGMA max_page_count = 1000000").fetchone())
    assert (await asyncio.wait_for(device.inbox.next(), 10)).body == big.body


async def test_what_cannot_be_stored_makes_no_crowd_of_messages_that_wait(hub: Hub, device: Device) -> None:
    """Acks are of QoS 0 and come again by themselves; a job that the broker sends again after a cut is the same one."""

    def waiting() -> int:
        return sum(task.get_name() == "sync-retry" for task in asyncio.all_tasks())

    hub.deaf = True
    await device.outbox.append_many("telemetry", [{"n": n} for n in range(10)])
    await until(lambda: device.session.counters.batches > 0)
    await device.store.read(lambda db: db.execute("PRAGMA busy_timeout = 0").fetchone())
    other = sqlite3.connect(device.store.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # as good as a full disk: Retry at each write
    await hub.send(TopicKind.JOBS, job("once"))
    await until(lambda: waiting() > 0)
    for _ in range(20):
        before = device.session.counters.acks
        payload, properties = seal(hub.key, topic(TopicKind.ACK), Ack(device.outbox.epoch, 5, time.time(), hub.nonce))
        await hub.mqtt.publish(topic(TopicKind.ACK), payload, properties=properties, qos=0)
        await until(lambda before=before: device.session.counters.acks > before)  # type: ignore[misc]
    for made in (2, 3):
        device.cut()
        await until(lambda made=made: device.session.counters.connections == made)  # type: ignore[misc]
    await asyncio.sleep(0.5)
    assert waiting() == 1
    other.execute("ROLLBACK")
    other.close()
    assert (await asyncio.wait_for(device.inbox.next(), 10)).id == "once"
    assert device.outbox.acked == 0
    hub.deaf = False
    device.cut()
    await until(lambda: device.outbox.depth == 0)
