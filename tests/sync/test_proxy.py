"""To the broker through a real proxy, in the clear and in TLS, and what is said when it does not let through."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.sync import proxy as proxies
from edge_agent.sync.transport import MqttSession
from tests.sync.brokers import Mosquitto, until
from tests.sync.conftest import needs_mosquitto
from tests.sync.proxies import Proxy

pytestmark = needs_mosquitto


@pytest.mark.parametrize("tls", [False, True], ids=["clear", "tls"])
async def test_a_session_goes_through_the_proxy_and_comes_again_when_it_is_cut(
    tls: bool, tmp_path: Path, certificate: Callable[[str], tuple[Path, Path]]
) -> None:
    pair = certificate("127.0.0.1") if tls else None
    broker = Mosquitto(tmp_path, pair)
    broker.start()
    try:
        async with Proxy("ann", "p@ss:word") as proxy:
            given = f"http://ann:p%40ss%3Aword@127.0.0.1:{proxy.port}"
            access = {"username": broker.username, "password": broker.password, "ca": pair[0] if pair else None}
            session = MqttSession(broker.url, "d", subscriptions=["a"], proxy=given, backoff=(0.05, 0.1), **access)
            async with session:
                await session.wait_connected()
                await session.publish("a", b"x" * 100_000)
                async for message in session.messages():
                    message.ack()
                    assert len(message.payload) == 100_000
                    break
                assert proxy.asked == [("127.0.0.1", broker.port)]
                for writer in proxy._writers:
                    writer.transport.abort()
                await until(lambda: session.connections == 2)
    finally:
        broker.stop()


async def test_what_a_proxy_refuses_is_said_with_what_to_do_and_no_password(tmp_path: Path) -> None:
    async with Proxy("ann", "secret") as proxy:
        wrong = f"http://ann:wr0ng@127.0.0.1:{proxy.port}"
        error = await _failure(wrong)
        assert isinstance(error, Refused)
        assert "user and password of the proxy" in error.hint
        assert "wr0ng" not in f"{error}{error.hint}"
        proxy.deny = True
        error = await _failure(proxy.url)
        assert isinstance(error, Retry)
        assert "does not connect to broker.example:8883" in error.message
    error = await _failure(f"http://127.0.0.1:{proxy.port}")
    assert isinstance(error, Retry), "the proxy is away"


async def _failure(given: str) -> OutriderError:
    session = MqttSession("mqtts://broker.example:8883", "d", proxy=given)
    async with session:
        with pytest.raises(OutriderError) as caught:
            await session.wait_connected(3)
    return session.error or caught.value


def test_the_environment_names_the_proxy_and_what_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    of = proxies.Proxy.of
    assert of("broker.example") is None
    monkeypatch.setenv("https_proxy", "http://gate:3128")
    monkeypatch.setenv("no_proxy", "broker.local,10.0.0.5")
    assert str(of("broker.example")) == "http://gate:3128"
    assert [of(host) for host in ("broker.local", "10.0.0.5", "localhost", "127.0.0.1", "::1")] == [None] * 5
    assert str(of("localhost", "other")) == "http://other:8080"
    for bad in ("ftp://x", "http://", "http://x:y", "socks5://x"):
        with pytest.raises(Refused, match="not a proxy"):
            of("broker.example", bad)


async def test_connecting_again_waits_anything_up_to_the_whole_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.001

    monkeypatch.setattr(random, "uniform", uniform)
    async with MqttSession("mqtt://127.0.0.1:1", "d", backoff=(0.2, 1.0)):
        await until(lambda: len(drawn) > 4)
    assert drawn[:5] == [(0, 0.2), (0, 0.4), (0, 0.8), (0, 1.0), (0, 1.0)]
