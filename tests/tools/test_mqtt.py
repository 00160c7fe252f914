"""Topics of a real Mosquitto: what is listed is heard and said, a broker that goes is told and comes back."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.tool import ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.errors import Fatal
from tests.sync.brokers import Mosquitto, mosquitto
from tools import mqtt

pytestmark = pytest.mark.skipif(mosquitto() is None, reason="no mosquitto binary: apt-get install mosquitto")
FILE = """
[site]
broker = "{broker}"
user = "outrider"
password_file = "{secret}"
[read]
states = "site/+/state"
all = "site/#"
[publish.speed]
topic = "site/1/speed"
retain = true
[publish.horn]
topic = "site/horn"
texts = ["on", "off"]
"""


class Site:
    """A broker and somebody else on it."""

    def __init__(self, folder: Path) -> None:
        self.broker, self.heard = Mosquitto(folder), list[tuple[str, bytes]]()
        self.broker.start()
        self.client = Client(CallbackAPIVersion.VERSION2)
        self.client.username_pw_set(self.broker.username, self.broker.password)
        self.client.on_connect = lambda client, *_: client.subscribe("#", 1)
        self.client.on_message = lambda _, __, message: self.heard.append((message.topic, message.payload))
        self.client.connect("127.0.0.1", self.broker.port)
        self.client.loop_start()
        (folder / "secret").write_text(f"{self.broker.password}\n")
        (folder / "mqtt.toml").write_text(FILE.format(broker=self.broker.url, secret=folder / "secret"))
        self.made = {tool.spec.name: tool for tool in load("tools.mqtt", folder, {})}

    def say(self, topic: str, text: str | bytes) -> None:
        self.client.publish(topic, text, qos=1, retain=True).wait_for_publish(5)

    def close(self) -> None:
        self.made.clear()
        gc.collect()
        self.client.disconnect()
        self.client.loop_stop()
        self.broker.stop()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


def soon(ask: Callable[[], Any], within_s: float = 40.0) -> Any:
    """What it gives, once it gives something."""
    end = time.monotonic() + within_s
    while True:
        try:
            if found := ask():
                return found
        except ToolError:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end
        time.sleep(0.02)


def test_the_last_message_of_each_topic_is_read_and_others_are_not_heard(site: Site) -> None:
    read = site.made["read_topic"].function
    with pytest.raises(ToolError, match=r"nothing was heard on states \(site/\+/state\) yet"):
        read(name="states")
    for topic, text in (("site/1/state", "up"), ("site/2/state", "down"), ("site/1/state", '{"speed": 3}'), ("x", "y")):
        site.say(topic, text)
    site.say("site/1/other", b"\xff" * 5000)
    soon(lambda: len(read(name="all")["messages"]) == 3)
    found = read(name="states")["messages"]
    assert [(m["topic"], m["text"]) for m in found] == [("site/1/state", '{"speed": 3}'), ("site/2/state", "down")]
    assert 0 <= found[0]["age_s"] < 10
    assert len(read(name="all")["messages"][0]["text"]) == mqtt.MAX_PAYLOAD


def test_what_is_kept_is_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mqtt, "MAX_TOPICS", 12)
    for n in range(20):
        site.say(f"site/{n}/state", f"{n}")
    read = site.made["read_topic"].function
    soon(lambda: read(name="states")["messages"][0]["text"] == "19")
    assert [m["text"] for m in read(name="states")["messages"]] == [f"{n}" for n in range(19, 9, -1)]
    assert len(read.__self__._heard.last("states")) == 12


def test_a_result_fits_whatever_the_messages_hold(site: Site) -> None:
    read = site.made["read_topic"].function
    site.say("site/" + "x" * 2000, "too long a topic")
    for text, count in ((b"\1", 2), (b"\xff", 4), (b"x", mqtt.SHOWN)):
        for n in range(mqtt.SHOWN):
            site.say(f"site/{n}/state", text * 5000)
        soon(lambda text=text: read(name="states")["messages"][0]["text"][0] == text.decode(errors="replace"))
        soon(lambda: read(name="all")["messages"][0]["topic"] == "site/9/state")
        found = read(name="states")["messages"]
        assert [m["topic"] for m in found] == [f"site/{n}/state" for n in range(9, 9 - count, -1)]
        assert len(msgspec.json.encode(found)) <= 60 * 1024
    assert all(len(topic) < 100 for topic, _ in read.__self__._heard.last("all"))


def test_a_message_is_sent_where_the_file_says_and_says_what_it_allows(site: Site) -> None:
    publish = site.made["publish_topic"]
    assert (publish.spec.risk, publish.spec.idempotent) == ("act", False)
    assert publish.function(name="speed", text="40") == "sent to site/1/speed"
    assert publish.function(name="horn", text="on") == "sent to site/horn"
    soon(lambda: ("site/horn", b"on") in site.heard and ("site/1/speed", b"40") in site.heard)
    with pytest.raises(ToolError, match="horn takes one of on, off, not 'louder'"):
        publish.function(name="horn", text="louder")
    with pytest.raises(CallError, match="is one of horn, speed"):
        validate(Call("publish_topic", {"name": "site/#", "text": "x"}), [publish.spec])


def test_a_broker_that_is_away_is_told_nothing_is_queued_and_it_comes_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mqtt, "CONNECT_S", 0.3)
    site.say("site/1/state", "up")
    soon(lambda: site.made["read_topic"].function(name="states"))
    site.broker.stop()
    with pytest.raises(ToolError, match=r"is not connected|is not sent|did not confirm"):
        soon(lambda: site.made["publish_topic"].function(name="speed", text="never") and None, 2)
    for name, args in (("publish_topic", {"name": "speed", "text": "never"}), ("read_topic", {"name": "states"})):
        with pytest.raises(ToolError, match=f"the site's broker {site.broker.url} is not connected"):
            site.made[name].function(**args)
    site.heard.clear()
    site.broker.start()
    soon(lambda: site.made["publish_topic"].function(name="speed", text="41"))
    soon(lambda: ("site/1/speed", b"41") in site.heard)
    site.say("site/1/state", "again")
    soon(lambda: site.made["read_topic"].function(name="states")["messages"][0]["text"] == "again")


def test_a_message_that_is_told_as_failed_is_not_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The broker is a socket: no real one keeps its confirmations back and breaks the link on command."""
    monkeypatch.setattr(mqtt, "CONFIRM_S", 0.1)
    heard: list[tuple[int, bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (tmp_path / "mqtt.toml").write_text(
            f'[site]\nbroker = "mqtt://127.0.0.1:{port}"\n[publish.valve]\ntopic = "v"\n'
        )
        made, answers = load("tools.mqtt", tmp_path, {}), threading.Event()
        for link in range(2):
            peer, _ = server.accept()

            def serve(peer: socket.socket = peer, link: int = link) -> None:
                with peer, peer.makefile("rb") as stream:
                    while head := stream.read(2):
                        rest = stream.read(head[1])
                        if head[0] >> 4 == 1:
                            peer.sendall(b"\x20\x02\x00\x00")
                        elif head[0] >> 4 == 3:
                            heard.append((link, rest[5:]))
                            if answers.is_set():
                                peer.sendall(b"\x40\x02" + rest[3:5])

            thread = threading.Thread(target=serve, daemon=True)
            thread.start()
            if link == 0:
                for _ in range(25):  # more than a client has under way by itself
                    with pytest.raises(ToolError, match="did not confirm the message to valve"):
                        made[0].function(name="valve", text="open")
                soon(lambda: heard == [(0, b"open")] * 25, 2)
                answers.set()
                monkeypatch.setattr(mqtt, "CONFIRM_S", 5.0)
            else:
                assert soon(lambda: made[0].function(name="valve", text="shut")) == "sent to v"
                assert heard[25:] == [(1, b"shut")]
            peer.shutdown(socket.SHUT_RDWR)
            thread.join(5)
    made.clear()
    gc.collect()


def test_a_pack_that_is_gone_leaves_no_connection(site: Site) -> None:
    soon(lambda: site.made["publish_topic"].function(name="horn", text="on"))
    before = threading.active_count()
    site.made.clear()
    gc.collect()
    assert threading.active_count() == before - 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "missing required field `site`"),
        ('[site]\nbroker = "mqtt://h"', "no topic to read or to publish"),
        ('[site]\nbroker = "mqtt://h"\n[publish.a]\ntopic = "a/+"', "no topic to write to"),
        ('[site]\nbroker = "mqtt://h"\n[read]\na = "a/b#"', "a: 'a/b#' is no topic filter"),
        ('[site]\nbroker = "mqtt://h"\n[read]\na = "a+/b"', "is no topic filter"),
        ('[site]\nbroker = "mqtt://h"\n[read]\na = ""', "is no topic filter"),
        ('[site]\nbroker = "mqtt://u:p@h"\n[read]\na = "b"', "password_file beside"),
    ],
)
def test_a_file_that_is_wrong_says_where(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "mqtt.toml").write_text(text)
    with pytest.raises(Fatal, match=told):
        load("tools.mqtt", tmp_path, {})


def test_a_password_that_cannot_be_read_loads_no_pack(tmp_path: Path) -> None:
    text = FILE.format(broker="mqtt://127.0.0.1:1", secret=tmp_path / "gone")
    (tmp_path / "mqtt.toml").write_text(text)
    with pytest.raises(Fatal, match=r"No such file or directory.*gone"):
        load("tools.mqtt", tmp_path, {})
