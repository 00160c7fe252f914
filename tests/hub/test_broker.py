"""The embedded broker: a real rumqttd child, real clients."""

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edge_agent.wire import durable
from hub.broker import EmbeddedBroker, Mosquitto, write_config
from hub.ca import Authority
from hub.errors import Fatal


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    pause = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        pause.wait(0.02)
    raise AssertionError("condition not met in time")


def listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def connect(broker: EmbeddedBroker, password: str | None = None) -> tuple[paho.Client, list[int]]:
    client = paho.Client(CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.username_pw_set(broker.username, broker.password if password is None else password)
    codes: list[int] = []
    client.on_connect = lambda c, u, flags, code, props: codes.append(code.value)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    return client, codes


def end(client: paho.Client) -> None:
    client.disconnect()
    client.loop_stop()


def test_a_batch_sized_message_with_user_properties_comes_through(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path) as broker:
        client, codes = connect(broker)
        until(lambda: codes == [0])
        got: list[paho.MQTTMessage] = []
        client.on_message = lambda c, u, message: got.append(message)
        ready: list[int] = []
        client.on_subscribe = lambda *a: ready.append(1)
        client.subscribe("outrider/1/+/+/up", qos=1)
        until(lambda: bool(ready))
        properties = Properties(PacketTypes.PUBLISH)
        properties.UserProperty = [("epoch", "7")]
        client.publish("outrider/1/f/d/up", bytes(300_000), qos=1, properties=properties)
        until(lambda: bool(got))
        assert len(got[0].payload) == 300_000
        assert got[0].properties is not None
        assert got[0].properties.UserProperty == [("epoch", "7")]
        end(client)


def test_a_wrong_password_is_refused(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path) as broker:
        client, codes = connect(broker, password="wrong")
        closed: list[int] = []
        client.on_disconnect = lambda *a: closed.append(1)
        until(lambda: bool(closed) or (bool(codes) and codes[0] != 0))
        assert 0 not in codes
        end(client)


def test_credentials_and_port_survive_a_restart_and_are_private(tmp_path: Path) -> None:
    with EmbeddedBroker(tmp_path) as first:
        known = (first.port, first.username, first.password)
    assert not listening(known[0])
    with EmbeddedBroker(tmp_path) as second:
        assert (second.port, second.username, second.password) == known
        assert listening(second.port)
    for file in (tmp_path / "broker").iterdir():
        assert file.stat().st_mode & 0o077 == 0, file


def test_a_taken_port_is_a_clear_error_with_a_hint(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(Fatal) as caught:
            EmbeddedBroker(tmp_path, port=port).start()
        assert str(port) in caught.value.message
        assert "--broker" in caught.value.hint


def test_a_killed_broker_comes_back_on_the_same_port(tmp_path: Path) -> None:
    others = children(os.getpid())
    with EmbeddedBroker(tmp_path) as broker:
        [child] = set(children(os.getpid())).difference(others)
        os.kill(child, signal.SIGKILL)
        until(lambda: broker.restarts == 1 and broker.alive and listening(broker.port))


def test_a_full_disk_at_the_moment_that_the_broker_ends_is_not_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, full = durable.write, [OSError(errno.ENOSPC, "No space left on device")]

    def limited(path: Path, data: bytes, mode: int = 0o644) -> None:
        if full:
            raise full.pop()
        write(path, data, mode)

    with EmbeddedBroker(tmp_path) as broker:
        monkeypatch.setattr("edge_agent.wire.durable.write", limited)
        assert broker._child is not None
        broker._child._process.kill()
        until(lambda: broker.restarts == 1 and broker.alive and listening(broker.port))
    assert not full


def test_a_clock_that_is_set_back_does_not_hold_up_revocations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = Authority(tmp_path / "ca", tmp_path / "root", "main")
    write_config(tmp_path / "broker", authority, ["localhost"])
    mosquitto, slept = Mosquitto(tmp_path / "broker", authority), list[float]()
    mosquitto.tell([], [])
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 3600)
    monkeypatch.setattr(time, "sleep", slept.append)
    mosquitto.tell([], ["press-1"])
    assert "user press-1" in (tmp_path / "broker" / "acl").read_text()
    assert slept == [1.0]


def test_the_broker_ends_when_its_hub_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys; from hub.broker import EmbeddedBroker\n"
        "print(EmbeddedBroker(sys.argv[1]).start().port, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        port = int(parent.stdout.readline())
        assert listening(port)
        parent.kill()
        until(lambda: not listening(port))


def children(pid: int) -> list[int]:
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
