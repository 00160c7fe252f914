"""A message of the site's own broker starts the workflows that listen to it, and whatever it holds stops nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.client import topic_matches_sub

from edge_agent.agent.workflow import topic_pattern
from edge_agent.agent.workflow_topics import Topics
from edge_agent.agent.workflow_triggers import Library, Triggers
from edge_agent.config import Site
from edge_agent.errors import Retry
from edge_agent.sync.transport import MqttSession
from edge_agent.wire.grants import Subject
from tests.agent.test_workflow import read_gauge
from tests.agent.test_workflow_run import GAUGE, HEAD, permit
from tests.fakes import LocalTools
from tests.sync.brokers import PASSWORD, USER, Mosquitto, until
from tests.sync.conftest import certificate

__all__ = ["certificate"]

levels = st.sampled_from(["plant", "a", "", "b c", "$x", "é"])


@given(st.lists(levels | st.just("+"), min_size=1, max_size=4), st.booleans(), st.lists(levels, min_size=1, max_size=5))
def test_a_filter_matches_what_the_mqtt_library_says_it_matches(parts: list[str], more: bool, topic: list[str]) -> None:
    wanted, name = "/".join([*parts, "#"] if more else parts), "/".join(topic)
    if not wanted or wanted.startswith("$"):
        with pytest.raises(ValueError, match="is no topic"):
            topic_pattern(wanted)
    else:
        assert bool(topic_pattern(wanted).fullmatch(name)) == topic_matches_sub(wanted, name)


@pytest.mark.parametrize("wanted", ["", "$SYS/#", "$share/g/a", "a/#/b", "a+/b", "a/b#", "x" * 1025, "a\0"])
def test_what_is_no_filter_is_refused(wanted: str) -> None:
    with pytest.raises(ValueError, match=r"topic|level"):
        topic_pattern(wanted)


class Rig:
    """A device's triggers on a broker, with the runs they started: (id, event)."""

    def __init__(self, folder: Path, broker: Mosquitto) -> None:
        self.folder, self.started, self.now, self.full = folder, list[tuple[str, Any]](), 1000.0, False
        self.triggers = Triggers(Library(folder), LocalTools(read_gauge), permit, self._start, lambda: self.now)
        (folder / "password").write_text(f"{PASSWORD}\n")
        site = Site(broker.url, USER, str(folder / "password"))
        self.topics = Topics(site, "press-1", self.triggers.topics, self.triggers.message, again_s=0.1)
        self.other = MqttSession(broker.url, "plc", username=USER, password=PASSWORD, session_expiry=0)

    async def _start(self, name: str, subject: Subject, id: str, inputs: dict[str, Any], event: Any) -> None:
        if self.full:
            raise Retry("the disk is full")
        self.started.append((id, event))

    def write(self, trigger: str) -> None:
        (self.folder / "w.yaml").write_text(f"{HEAD}triggers:\n  - {trigger}\n{GAUGE}")

    async def send(self, topic: str, payload: bytes, count: int, **more: Any) -> None:
        """Returns when so many messages were heard in all."""
        self.now += 1
        await self.other.publish(topic, payload, **more)
        await until(lambda: self.topics.messages >= count)

    async def listening(self) -> None:
        await until(lambda: self.topics.status()["connected"])


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[Mosquitto]:
    made = Mosquitto(tmp_path)
    made.start()
    yield made
    made.stop()


@pytest.fixture
async def rig(tmp_path: Path, broker: Mosquitto) -> AsyncIterator[Rig]:
    (tmp_path / "flows").mkdir()
    made = Rig(tmp_path / "flows", broker)
    running = asyncio.create_task(made.topics.run())
    async with made.other:
        await made.other.wait_connected()
        yield made
        assert not running.done(), running.result()
        running.cancel()
        await asyncio.wait([running])


async def test_a_message_that_the_condition_is_true_of_starts_a_run_with_its_payload(rig: Rig) -> None:
    rig.write("{mqtt: plant/+/door, when: payload.open == true, debounce_s: 10}")
    await rig.listening()
    await rig.send("plant/2/door", b'{"open": false}', 1)
    await rig.send("plant/2/lamp", b'{"open": true}', 1)
    await rig.send("plant/2/door", b'{"open": true}', 2)
    await rig.send("plant/3/door", b'{"open": true}', 3)  # within debounce_s
    await until(lambda: rig.started)
    assert rig.started == [("w-mqtt-0-1003000", {"topic": "plant/2/door", "payload": {"open": True}})]
    rig.now += 10
    await rig.send("plant/3/door", b'{"open": true}', 4)
    await until(lambda: len(rig.started) == 2)


@pytest.mark.parametrize(
    "payload", [b"\xff\xfe", b"{", b"[" * 5000, b'{"a": ' * 3000, b"7", b'"x"', b"", b" " * 70_000]
)
async def test_a_payload_that_cannot_be_asked_is_counted_told_and_stops_nothing(
    rig: Rig, payload: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    rig.write("{mqtt: door, when: payload.open == true}")
    await rig.listening()
    with caplog.at_level(logging.WARNING, "outrider.site"):
        await rig.send("door", payload, 1)
        await rig.send("door", b'{"open": true}', 2)
        await until(lambda: rig.started)
    assert (rig.topics.bad, len(rig.started)) == (1, 1)
    assert "not understood: door: " in caplog.text


async def test_what_came_while_the_broker_or_the_line_was_down_is_heard_after_and_retained_state_starts_nothing(
    rig: Rig, broker: Mosquitto
) -> None:
    rig.write("{mqtt: door}")
    await rig.listening()
    await rig.send("door", b"1", 1, retain=True)
    broker.stop()
    await until(lambda: not rig.topics.status()["connected"])
    broker.start()
    await rig.listening()
    await rig.other.wait_connected()
    await rig.send("door", b"2", 2)
    await until(lambda: len(rig.started) == 2)
    assert [event["payload"] for _, event in rig.started] == [1, 2]


async def test_a_message_whose_run_is_not_journaled_is_not_acknowledged(rig: Rig, broker: Mosquitto) -> None:
    rig.write("{mqtt: door, debounce_s: 10}")
    await rig.listening()
    rig.full = True
    await rig.send("door", b"1", 1)
    rig.now += 1
    broker.stop()
    await until(lambda: not rig.topics.status()["connected"])
    assert rig.started == []
    rig.full = False
    broker.start()
    await until(lambda: rig.started)
    assert [event["payload"] for _, event in rig.started] == [1]


async def test_other_topics_are_listened_to_as_soon_as_a_file_says_so(rig: Rig) -> None:
    rig.write("{mqtt: old}")
    await rig.listening()
    rig.write("{mqtt: 'new/#'}")
    (rig.folder / "w.yaml").touch()
    await until(lambda: rig.topics._session is not None and rig.topics._session.subscriptions == ["new/#"])
    await rig.listening()
    await rig.other.publish("old", b"1")
    await rig.send("new/x", b"2", 1)
    await until(lambda: rig.started)
    assert [event["topic"] for _, event in rig.started] == ["new/x"]


async def test_a_password_file_that_is_not_there_is_told_and_tried_again(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    (rig.folder / "password").unlink()
    with caplog.at_level(logging.WARNING, "outrider.site"):
        rig.write("{mqtt: door}")
        await until(lambda: "no site broker" in caplog.text)
    (rig.folder / "password").write_text(PASSWORD)
    await rig.listening()


async def test_a_broker_with_tls_is_heard_by_its_ca_and_not_without(
    tmp_path: Path, certificate: Callable[[str], tuple[Path, Path]]
) -> None:
    cert, key = certificate("127.0.0.1")
    broker = Mosquitto(tmp_path, (cert, key))
    broker.start()
    (tmp_path / "password").write_text(PASSWORD)
    heard = list[Any]()

    async def hear(topic: str, payload: Any) -> None:
        heard.append((topic, payload))

    def topics(ca: str) -> Topics:
        return Topics(Site(broker.url, USER, str(tmp_path / "password"), ca), "press-1", lambda: {"door"}, hear)

    stranger, knows = topics(""), topics(str(cert))
    running = [asyncio.create_task(each.run()) for each in (stranger, knows)]
    try:
        plc = MqttSession(broker.url, "plc", username=USER, password=PASSWORD, ca=cert, session_expiry=0)
        async with plc:
            await plc.wait_connected()
            await until(lambda: knows.status()["connected"])
            await plc.publish("door", b'{"open": true}')
            await until(lambda: heard)
        assert heard == [("door", {"open": True})]
        await until(lambda: "certificate" in stranger.status()["error"])
        assert not stranger.status()["connected"]
    finally:
        for task in running:
            task.cancel()
        await asyncio.wait(running)
        broker.stop()
