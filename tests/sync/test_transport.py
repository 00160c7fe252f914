"""The same behaviour over the embedded broker and over Mosquitto."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_agent.errors import Refused, Retry
from edge_agent.sync.broker import Address, Message, Publication
from edge_agent.sync.proxy import Proxy
from edge_agent.sync.transport import MqttSession
from tests.sync.brokers import Embedded, Mosquitto, until
from tests.sync.conftest import needs_mosquitto

Broker = Embedded | Mosquitto


def session(broker: Broker, client_id: str, *topics: str, **more: Any) -> MqttSession:
    access = {"username": broker.username, "password": broker.password, "backoff": (0.05, 0.5)}
    return MqttSession(broker.url, client_id, subscriptions=topics, **(access | more))


@asynccontextmanager
async def connected(*sessions: MqttSession) -> AsyncIterator[None]:
    for each in sessions:
        await each.__aenter__()
    for each in sessions:
        await each.wait_connected()
    yield
    for each in sessions:
        await each.__aexit__()


async def take(mqtt: MqttSession, count: int, *, ack: bool = True) -> list[Message]:
    taken: list[Message] = []
    async with asyncio.timeout(20):
        async for message in mqtt.messages():
            taken.append(message)
            if ack:
                message.ack()
            if len(taken) == count:
                break
    return taken


def cut(mqtt: MqttSession) -> None:
    """Pull the cable: the socket dies under the client, no DISCONNECT is sent."""
    assert mqtt._link is not None
    mqtt._link._socket.shutdown(socket.SHUT_RDWR)


async def test_a_message_arrives_with_its_user_properties(broker: Broker) -> None:
    a, b = session(broker, "a"), session(broker, "b", "t/+")
    async with connected(a, b):
        await a.publish("t/x", b"hello", properties={"sig": "s", "epoch": "1"})
        (message,) = await take(b, 1)
    assert (message.topic, message.payload, message.properties) == ("t/x", b"hello", {"sig": "s", "epoch": "1"})
    assert not message.retain


async def test_250_kb_arrive_whole(broker: Broker) -> None:
    a, b = session(broker, "a"), session(broker, "b", "t/big")
    payload = bytes(range(256)) * 1000
    async with connected(a, b):
        await asyncio.gather(*(a.publish("t/big", payload) for _ in range(10)))
        assert [m.payload for m in await take(b, 10)] == [payload] * 10


async def test_messages_of_one_publisher_keep_their_order(broker: Broker) -> None:
    a, b = session(broker, "a"), session(broker, "b", "t/order")
    async with connected(a, b):
        for n in range(300):
            await a.publish("t/order", str(n).encode(), wait=False)
        assert [int(m.payload) for m in await take(b, 300)] == list(range(300))


async def test_a_retained_message_reaches_a_later_subscriber(broker: Broker) -> None:
    a, b = session(broker, "a"), session(broker, "b", "t/kept")
    async with connected(a):
        await a.publish("t/kept", b"old", retain=True)
        await a.publish("t/kept", b"new", retain=True, properties={"sig": "s"})
        async with connected(b):
            (message,) = await take(b, 1)
    assert (message.payload, message.retain, message.properties) == (b"new", True, {"sig": "s"})


async def test_the_will_is_sent_when_the_cable_is_cut(broker: Broker) -> None:
    will = Publication("t/will", b"offline", {"sig": "s"}, retain=True)
    a, b = session(broker, "a", will=lambda: will, backoff=(5.0, 5.0)), session(broker, "b", "t/will")
    async with connected(a, b):
        cut(a)
        (message,) = await take(b, 1)
    assert (message.payload, message.properties) == (b"offline", {"sig": "s"})


async def test_an_expired_message_is_not_delivered(broker: Broker) -> None:
    a, b = session(broker, "a"), session(broker, "b", "t/short")
    async with connected(a):
        async with connected(session(broker, "b", "t/short")):
            pass  # the broker keeps b's session
        await a.publish("t/short", b"gone", expiry=1)
        await a.publish("t/short", b"stays", expiry=600)
        await asyncio.sleep(2.1)  # what is tested is that time passes
        async with connected(b):
            assert [m.payload for m in await take(b, 1)] == [b"stays"]


async def test_what_was_not_acked_comes_again_after_a_cut(broker: Broker) -> None:
    a, b = session(broker, "a"), session(broker, "b", "t/again")
    async with connected(a, b):
        await a.publish("t/again", b"1")
        await a.publish("t/again", b"2")
        first, second = await take(b, 2, ack=False)
        first.ack()
        cut(b)
        await until(lambda: b.connections == 2 and b.connected)
        second.ack()  # of the connection that is gone: too late
        (message,) = await take(b, 1)
    assert message.payload == b"2"


async def test_acks_leave_in_the_order_of_arrival(broker: Broker) -> None:
    a, b = session(broker, "a"), session(broker, "b", "t/fifo")
    async with connected(a, b):
        for n in range(3):
            await a.publish("t/fifo", b"%d" % n)
        first, second, third = await take(b, 3, ack=False)
        third.ack()
        second.ack()
        cut(b)
        await until(lambda: b.connections == 2 and b.connected)
        assert [m.payload for m in await take(b, 3)] == [b"0", b"1", b"2"]
        assert first.payload == b"0"


async def test_a_restarted_broker_is_found_again_and_subscriptions_are_made_again(broker: Broker) -> None:
    lost: list[Exception] = []
    a, b = session(broker, "a", on_disconnect=lost.append), session(broker, "b", "t/again")
    async with connected(a, b):
        await asyncio.to_thread(broker.stop)
        await until(lambda: not a.connected and not b.connected)
        with pytest.raises(Retry, match="not connected"):
            await a.publish("t/again", b"lost")
        await asyncio.to_thread(broker.start)
        await until(lambda: a.connected and b.connected)
        await a.publish("t/again", b"found")
        assert [m.payload for m in await take(b, 1)] == [b"found"]
    assert all(isinstance(error, Retry) for error in lost)


async def test_publishing_waits_for_a_slot_and_fails_loudly_when_the_cable_is_cut(broker: Broker) -> None:
    a = session(broker, "a", inflight=4, backoff=(5.0, 5.0))
    async with connected(a):
        publishing = asyncio.gather(*(a.publish("t/x", b"x" * 200_000) for _ in range(50)), return_exceptions=True)
        await asyncio.sleep(0)
        assert a._link is not None
        assert len(a._link._publishing) <= 4
        cut(a)
        results = await asyncio.wait_for(publishing, 10)
    assert results
    assert all(each is None or isinstance(each, Retry) for each in results)
    assert any(isinstance(each, Retry) for each in results)


async def test_a_slow_consumer_bounds_what_waits_in_memory(broker: Broker) -> None:
    a, b = session(broker, "a"), session(broker, "b", "t/flood", inbound=8)
    async with connected(a, b):
        sender = asyncio.gather(*(a.publish("t/flood", b"%d" % n) for n in range(200)))
        await until(lambda: b.received.qsize() >= 8)
        await sender
        assert b.received.qsize() <= 40
        assert [int(m.payload) for m in await take(b, 200)] == list(range(200))


async def test_a_consumer_that_publishes_while_it_is_flooded_does_not_wait_for_ever(broker: Broker) -> None:
    a, b, c = (
        session(broker, "a"),
        session(broker, "b", "t/flood", inbound=2, inflight=1),
        session(broker, "c", "t/echo"),
    )
    async with connected(a, b, c):
        for number in range(300):
            await a.publish("t/flood", b"%d" % number, qos=0)
        await until(lambda: b.received.qsize() >= 8)
        sent = 0
        async with asyncio.timeout(20):
            async for message in b.messages():
                await b.publish("t/echo", message.payload, wait=False)
                message.ack()
                sent += 1
                if b.received.empty():
                    break
        assert sent >= 8
        assert len(await take(c, sent)) == sent


async def test_a_wrong_password_is_refused_with_a_hint(broker: Broker) -> None:
    async with session(broker, "a", password="wrong") as mqtt:
        with pytest.raises((Refused, Retry), match="user and password"):
            await mqtt.wait_connected(2)


async def test_an_error_in_a_callback_ends_the_connection_and_it_is_made_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a = session(broker, "a", "t/x")
    async with connected(a):
        put = a.received.put_nowait
        monkeypatch.setattr(a.received, "put_nowait", lambda _: 1 / 0)
        await a.publish("t/x", b"poison", wait=False)
        await until(lambda: not a.connected)
        monkeypatch.setattr(a.received, "put_nowait", put)
        await until(lambda: a.connected)
        assert (await take(a, 1))[0].payload == b"poison"
    assert "the MQTT client failed" in caplog.text


async def test_nothing_listens_there() -> None:
    async with MqttSession("mqtt://127.0.0.1:9", "a") as mqtt:
        with pytest.raises(Retry, match="nothing listens there"):
            await mqtt.wait_connected(0.5)


async def test_a_server_that_is_no_broker_is_told_apart() -> None:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, MqttSession(f"mqtt://127.0.0.1:{port}", "a") as mqtt:
        with pytest.raises(Retry, match="hung up"):
            await mqtt.wait_connected(1.0)


@pytest.mark.parametrize("url", ["http://x:1", "mqtt://", "nonsense", "mqtt://h:99999", "mqtt://h/path"])
def test_a_wrong_address_is_refused_and_shows_no_password(url: str) -> None:
    with pytest.raises(Refused, match="write mqtt://"):
        Address.parse(url)
    assert "secret" not in repr(Address.parse("mqtt://u:secret@h"))


def test_an_address_knows_user_password_and_default_ports() -> None:
    assert Address.parse("mqtts://u:p%40w@h") == Address("h", 8883, True, "u", "p@w")
    assert Address.parse("mqtt://h").port == 1883


@needs_mosquitto
async def test_tls_needs_the_right_ca(tmp_path: Path, certificate: Callable[[str], tuple[Path, Path]]) -> None:
    cert, key = certificate("127.0.0.1")
    broker = Mosquitto(tmp_path, (cert, key))
    broker.start()
    try:
        async with session(broker, "a", ca=cert) as mqtt:
            await mqtt.wait_connected()
            await mqtt.publish("t/x", b"x" * 250_000)
        async with session(broker, "a") as mqtt:
            with pytest.raises(Refused, match="give the CA"):
                await mqtt.wait_connected()
    finally:
        broker.stop()


@needs_mosquitto
async def test_tls_against_a_plain_port_is_refused(tmp_path: Path) -> None:
    broker = Mosquitto(tmp_path)
    broker.start()
    try:
        async with MqttSession(broker.url.replace("mqtt:", "mqtts:"), "a") as mqtt:
            with pytest.raises((Refused, Retry), match=r"TLS|lost|reset"):
                await mqtt.wait_connected(1)
    finally:
        broker.stop()


def test_a_missing_ca_file_is_refused() -> None:
    with pytest.raises(Refused, match="CA file"):
        MqttSession("mqtts://h", "a", ca=Path("/nowhere/ca.pem"))


def test_a_proxy_of_the_environment_that_cannot_be_used_keeps_no_device_down(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5://proxy:1080")
    assert Proxy.of("hub.example") is None
    assert "not used" in caplog.text
    with pytest.raises(Refused):
        Proxy.of("hub.example", "socks5://proxy:1080")
