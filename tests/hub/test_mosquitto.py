"""A hub and its devices over a real Mosquitto with the configuration that Outrider writes: who gets in, to do what."""

import asyncio
import datetime
import ssl
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from cryptography import x509
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent import enrol
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.sync.transport import MqttSession
from edge_agent.wire.messages import Presence, PresenceState
from edge_agent.wire.signed import seal
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.topics import Topic, TopicKind
from hub.broker import hub_user
from hub.ca import Authority, renew_issuing
from hub.errors import Fatal
from tests.hub.rig import Device, Hub, enrolled, pack, running, telemetry, until
from tests.hub.site import Site
from tests.sync.brokers import mosquitto

pytestmark = pytest.mark.skipif(mosquitto() is None, reason="no mosquitto binary: apt-get install mosquitto")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path).start()
    yield made
    made.stop()


@pytest.fixture
async def hub(site: Site) -> AsyncIterator[Hub]:
    async with running(**site.hub) as started:
        await started.services.session.wait_connected()
        yield started


class Client:
    """A bare client with a device's certificate, which does what a device would not."""

    def __init__(self, device: Device, client_id: str = "", will: str = "") -> None:
        self.client = paho.Client(CallbackAPIVersion.VERSION2, client_id, protocol=paho.MQTTv5)
        self.codes: list[int] = []
        self.got: list[str] = []
        self.puts: list[int] = []
        self.subs: list[list[int]] = []
        self.ends: list[int] = []
        assert device.tls is not None
        context = ssl.create_default_context(cafile=device.tls / "ca.pem")
        context.load_cert_chain(device.tls / "cert.pem", device.tls / "key.pem")
        self.client.tls_set_context(context)
        if will:
            self.client.will_set(will, b"gone", 1, True)
        self.client.on_connect = lambda c, u, f, code, p: self.codes.append(code.value)
        self.client.on_message = lambda c, u, message: self.got.append(message.topic)
        self.client.on_publish = lambda c, u, mid, code, p: self.puts.append(code.value)
        self.client.on_subscribe = lambda c, u, mid, codes, p: self.subs.append([code.value for code in codes])
        self.client.on_disconnect = lambda c, u, f, code, p: self.ends.append(code.value)
        self._url = device.broker["url"]

    async def __aenter__(self) -> "Client":
        properties = Properties(PacketTypes.CONNECT)
        port = int(self._url.rsplit(":", 1)[1])
        await asyncio.to_thread(self.client.connect, "127.0.0.1", port, 60, properties=properties)
        self.client.loop_start()
        await until(lambda: self.codes or self.ends)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.client.disconnect()
        await asyncio.to_thread(self.client.loop_stop)

    async def put(self, topic: str, retain: bool = False, size: int = 3) -> int:
        """The reason code of the PUBACK."""
        before = len(self.puts)
        self.client.publish(topic, bytes(size), 1, retain)
        await until(lambda: len(self.puts) > before or self.ends)
        return self.puts[-1] if len(self.puts) > before else -1

    async def listen(self, *topics: str) -> None:
        before = len(self.subs)
        self.client.subscribe([(topic, 1) for topic in topics])
        await until(lambda: len(self.subs) > before or self.ends)


NOT_AUTHORISED = 0x87


async def test_an_enrolled_device_works_end_to_end(hub: Hub, tmp_path: Path) -> None:
    device = await enrolled(hub, "press-1", tmp_path / "d1")
    async with device.online():
        await until(lambda: hub.services.devices.online("press-1"))
        await device.send(telemetry(range(1, 200)))
        await until(lambda: device.acked() == (1, 199))
        await hub.services.twin.patch_desired("press-1", {"a": 1}, "admin", "test")
        await until(lambda: device.desired and device.desired[-1].doc == {"a": 1})


async def test_the_key_stays_and_the_certificate_says_no_more_than_the_hub_knows(hub: Hub, tmp_path: Path) -> None:
    device = await enrolled(hub, "press-1", tmp_path / "d1")
    assert device.tls is not None
    leaf, issuing = x509.load_pem_x509_certificates((device.tls / "cert.pem").read_bytes())
    assert leaf.subject.rfc4514_string() == "CN=press-1,O=main"
    assert leaf.public_key() == device.key.public.key
    life = leaf.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert datetime.timedelta(89) < life < datetime.timedelta(91)
    leaf.verify_directly_issued_by(issuing)
    issuing.verify_directly_issued_by(x509.load_pem_x509_certificate((device.tls / "ca.pem").read_bytes()))
    constraints = [c.extensions.get_extension_for_class(x509.BasicConstraints).value for c in (leaf, issuing)]
    assert [(c.ca, c.path_length) for c in constraints] == [(False, None), (True, 0)]
    assert not (tmp_path / "hub" / "ca" / "root.key").exists()


async def test_as_one_device_nothing_of_another_can_be_written_read_or_taken(
    hub: Hub, site: Site, tmp_path: Path
) -> None:
    victim, thief = [await enrolled(hub, name, tmp_path / name) for name in ("press-1", "press-2")]
    topics = [str(Topic("main", kind, "press-1")) for kind in TopicKind if kind is not TopicKind.GRANTS]
    own = [str(Topic("main", kind, "press-2")) for kind in (TopicKind.ACK, TopicKind.DESIRED, TopicKind.JOBS)]
    foreign = [*topics, *own, str(Topic("main", TopicKind.GRANTS)), "outrider/1/other/press-2/up", "anything", "$SYS/x"]
    async with victim.online(), Client(thief, client_id="device-press-1") as client:
        await until(lambda: hub.services.devices.online("press-1"))
        assert client.codes == [0]
        for topic in foreign:
            assert await client.put(topic) == NOT_AUTHORISED, topic
            assert await client.put(topic, retain=True) == NOT_AUTHORISED, topic
        await client.listen(
            "#", "+/+/+/+/+", "outrider/1/main/+/up", "$SYS/#", "$share/hub/outrider/1/main/+/up", *topics
        )
        presences = victim.presences
        await victim.send(telemetry(range(1, 50)))
        await hub.services.twin.patch_desired("press-1", {"a": 1}, "admin", "test")
        await hub.services.twin.patch_desired("press-2", {"a": 2}, "admin", "test")
        await until(lambda: victim.acked() == (1, 49) and victim.desired)
        await until(lambda: str(Topic("main", TopicKind.DESIRED, "press-2")) in client.got)
        allowed = {*own, str(Topic("main", TopicKind.GRANTS))}
        assert set(client.got) <= allowed
        # the id it asked for is not the one it has, so nobody was thrown out
        assert victim.session.connections == 1
        assert victim.presences - presences <= 1
    assert hub.services.session.connected


async def test_a_will_on_anothers_topic_is_never_sent(hub: Hub, site: Site, tmp_path: Path) -> None:
    victim, thief = [await enrolled(hub, name, tmp_path / name) for name in ("press-1", "press-2")]
    topic = str(Topic("main", TopicKind.PRESENCE, "press-1"))
    async with victim.online():
        await until(lambda: hub.services.devices.online("press-1"))
        client = Client(thief, will=topic)
        async with client:
            if client.codes == [0]:
                client.client.socket().shutdown(2)
                await until(lambda: client.ends)
        probe = asyncio.Event()
        seen: list[bytes] = []
        async with MqttSession(
            site.url, "probe", ca=tmp_path / "hub" / "ca" / "hub", subscriptions=[topic]
        ) as watching:
            await watching.wait_connected()

            async def read() -> None:
                async for message in watching.messages():
                    seen.append(message.payload)
                    message.ack()
                    probe.set()

            reading = asyncio.create_task(read())
            async with asyncio.timeout(10):
                await probe.wait()
            reading.cancel()
        assert b"gone" not in seen
        assert hub.services.devices.online("press-1")


async def test_what_one_device_says_under_anothers_name_counts_for_neither(hub: Hub, tmp_path: Path) -> None:
    """Its certificate is its own, and so is the topic, which the broker lets it write; what it says is another's."""
    victim, thief = [await enrolled(hub, name, tmp_path / name) for name in ("press-1", "press-2")]
    stolen = pack(victim.key, victim.topic(TopicKind.UP), telemetry([1]), 1)  # a true batch of press-1's
    resigned = pack(victim.key, thief.topic(TopicKind.UP), telemetry([1]), 1)  # with press-1's stolen key
    claimed = Presence(PresenceState.ONLINE, 0.0, 1, 1, "", "rig 1")
    posed = seal(victim.key, thief.topic(TopicKind.PRESENCE), claimed)
    async with thief.online():
        await until(lambda: hub.services.devices.online("press-2"))
        for batch in (stolen, resigned):
            await thief.session.publish(thief.topic(TopicKind.UP), batch.payload, properties=batch.properties)
        await thief.session.publish(thief.topic(TopicKind.PRESENCE), posed[0], properties=posed[1])
        with pytest.raises(Refused, match="refuses a message"):
            await thief.session.publish(victim.topic(TopicKind.UP), stolen.payload, properties=stolen.properties)
        await thief.send(telemetry([1, 2]))
        await until(lambda: thief.acked() == (1, 2))
        seen = await hub.services.telemetry.query()
        assert {(each["device"], each["seq"]) for each in seen} == {("press-2", 1), ("press-2", 2)}
        assert not hub.services.devices.online("press-1")
        assert (await hub.services.devices.row("press-1")).watermark == 0

        async def told() -> bool:
            entries = await hub.services.audit.newest(1000)
            refused = {e["action"] for e in entries if e["actor"] == "press-2" and e["action"].startswith("refuse:")}
            return len(refused) == 2

        await until(told)


async def test_nobody_gets_in_without_a_good_certificate(hub: Hub, site: Site, tmp_path: Path) -> None:
    device = await enrolled(hub, "press-1", tmp_path / "d1")
    assert device.tls is not None
    other = Authority(tmp_path / "other", tmp_path / "other-root", "main")
    brief = Authority(tmp_path / "hub" / "ca", tmp_path / "none", "main", outage_s=-1200)
    key = SigningKey.generate()
    chains = {
        "none": "",
        "another CA's": other.chain(other.certify(enrol.csr(key, "press-1"), "press-1", key.public.text)),
        "run out": brief.chain(brief.certify(enrol.csr(key, "press-1"), "press-1", key.public.text)),
    }
    for what, chain in chains.items():
        folder = tmp_path / what
        folder.mkdir()
        (folder / "ca.pem").write_bytes((device.tls / "ca.pem").read_bytes())
        if chain:
            (folder / "cert.pem").write_text(chain)
            key.save(folder / "key.pem")
        async with MqttSession(site.url, "x", ca=folder, backoff=(0.05, 0.1)) as session:
            with pytest.raises((Retry, Refused)):
                await session.wait_connected(1)
    old = ssl.create_default_context(cafile=device.tls / "ca.pem")
    old.load_cert_chain(device.tls / "cert.pem", device.tls / "key.pem")
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        await asyncio.open_connection("127.0.0.1", site.port, ssl=old)
    async with device.online():
        assert device.session.connected


async def test_a_revoked_device_is_out_at_once_and_its_replacement_is_in(hub: Hub, site: Site, tmp_path: Path) -> None:
    admin = await hub.login()
    device, other = await enrolled(hub, "press-1", tmp_path / "d1"), await enrolled(hub, "press-2", tmp_path / "d2")
    async with device.online(), other.online():
        await device.send(telemetry(range(1, 3)))
        await until(lambda: device.acked() == (1, 2))
        assert (await admin.delete("/v1/devices/press-1")).status_code == 204

        async def shut_out() -> bool:  # Mosquitto takes a moment to read its files again
            try:
                await device.send(telemetry(range(3, 4)))
            except OutriderError:
                return True
            return False

        await until(shut_out, 2.0)
        assert (await hub.services.devices.row("press-1")).watermark == 2
        await other.send(telemetry(range(1, 3)))
        await until(lambda: other.acked() == (1, 2))
    async with MqttSession(site.url, "x", ca=device.tls, backoff=(0.05, 0.1)) as again:
        with pytest.raises(Retry, match=r"certificate|hung up"):
            await again.wait_connected(1)
    forbidden = await hub.http.post(
        "/v1/devices/press-1/certificate",
        json={"csr": enrol.csr(device.key, "press-1")},
        headers={"Authorization": f"Bearer {own_token(device)}"},
    )
    assert forbidden.status_code == 401
    token = (await admin.post("/v1/enrolments", json={"name": "press-1"})).json()["token"]
    new = await Device.enrol(hub.http, "press-1", token, state=tmp_path / "new")
    new.epoch = 2
    async with new.online():
        await new.send(telemetry(range(1, 4)))
        await until(lambda: new.acked() == (2, 3))


def own_token(device: Device) -> str:
    from time import time

    from edge_agent.wire.tokens import issue_device_token

    return issue_device_token(device.key, device.fleet, device.name, now=time())


async def test_a_packet_that_is_too_big_ends_its_connection_alone(hub: Hub, tmp_path: Path) -> None:
    one, two = [await enrolled(hub, name, tmp_path / name) for name in ("press-1", "press-2")]
    async with two.online(), Client(one) as client:
        assert await client.put(str(Topic("main", TopicKind.UP, "press-1")), size=1 << 20) == -1
        await two.send(telemetry(range(1, 3)))
        await until(lambda: two.acked() == (1, 2))


async def test_a_device_renews_its_certificate_at_two_thirds_of_its_life(
    hub: Hub, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await enrolled(hub, "press-1", tmp_path / "d1")
    authority = hub.services.devices._authority
    monkeypatch.setattr(authority, "leaf_s", -1200.0)  # made an hour ago, gone since 20 minutes
    assert device.tls is not None
    (device.tls / "cert.pem").write_text(await hub.services.devices.renew("press-1", enrol.csr(device.key, "press-1")))
    monkeypatch.setattr(authority, "leaf_s", 7200.0)
    renewal = enrol.Renewal(tmp_path / "d1", "press-1", hub.http, lambda: own_token(device))
    assert renewal.due_s() == 0, "one that ran out during an outage is renewed, not given up"
    task = asyncio.create_task(renewal.run())
    await until(lambda: renewal.due_s() > 0)
    task.cancel()
    assert 3000 < renewal.due_s() < 3700, "two thirds of three hours, one of which is over"
    async with device.online():
        assert device.session.connected


async def test_a_csr_of_another_key_or_name_gets_no_certificate(hub: Hub, tmp_path: Path) -> None:
    one, two = [await enrolled(hub, name) for name in ("press-1", "press-2")]

    async def ask(device: Device, path: str, csr: str) -> int:
        headers = {"Authorization": f"Bearer {own_token(device)}"}
        answer = await hub.http.post(f"/v1/devices/{path}/certificate", json={"csr": csr}, headers=headers)
        return answer.status_code

    assert await ask(one, "press-1", enrol.csr(one.key, "press-1")) == 200
    assert await ask(one, "press-1", enrol.csr(one.key, hub_user("main"))) == 200, "the subject is the hub's to say"
    assert await ask(one, "press-1", enrol.csr(two.key, "press-1")) == 422
    assert await ask(one, "press-2", enrol.csr(one.key, "press-2")) == 409
    assert await ask(one, "press-1", "rubbish") == 422
    assert await ask(one, "press-1", enrol.csr(one.key, "press-1").replace("M", "N", 3)) == 422


def test_the_root_may_be_away_until_the_issuing_certificate_is_renewed(tmp_path: Path) -> None:
    folder, root = tmp_path / "ca", tmp_path / "root"
    first = Authority(folder, root, "main")
    key = SigningKey.generate()
    leaf = first.certify(enrol.csr(key, "press-1"), "press-1", key.public.text)
    root.rename(tmp_path / "drawer")
    assert Authority(folder, root, "main").issuing_pem == first.issuing_pem
    with pytest.raises(Fatal, match="the root key is not in"):
        renew_issuing(folder, root, "main")
    renew_issuing(folder, tmp_path / "drawer", "main")
    renewed = Authority(folder, root, "main")
    assert renewed.issuing_pem != first.issuing_pem
    leaf.verify_directly_issued_by(x509.load_pem_x509_certificate(renewed.issuing_pem.encode()))


async def test_a_broker_that_lost_everything_gets_retained_state_again_and_unacked_batches(
    hub: Hub, site: Site, tmp_path: Path
) -> None:
    import signal

    device = await enrolled(hub, "press-1", tmp_path / "d1")
    await hub.services.twin.patch_desired("press-1", {"a": 1}, "admin", "test")
    async with device.online():
        await until(lambda: device.desired)
        site.stop(signal.SIGKILL, forget=True)
        await until(lambda: not device.session.connected and not hub.services.session.connected)
        device.desired.clear()
        site.start()
        await until(lambda: device.session.connected and hub.services.session.connected, 30)
        await until(lambda: device.desired and device.desired[-1].doc == {"a": 1})
        await device.send(telemetry(range(1, 5)))
        await until(lambda: device.acked() == (1, 4))
