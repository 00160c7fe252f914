"""Topics of the site's own broker as tools: the last messages of some, a message to others.

Invariants: the pack's file says which topics are read and which are written, no others are; messages are kept in
memory, the last one of at most MAX_TOPICS topics for each name, of at most MAX_PAYLOAD bytes, none whose topic has over
MAX_TOPIC characters; nothing is queued for a broker that is away: a message is confirmed by it (QoS 1) or the call
fails, and it is not sent later. What others publish is untrusted.
"""

from __future__ import annotations

import re
import time
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Annotated, Any, TypedDict
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta
from paho.mqtt.client import Client, MQTTMessage, topic_matches_sub
from paho.mqtt.enums import CallbackAPIVersion

from edge_agent.agent.tool import Tool, ToolError, declare
from edge_agent.config import Site
from tools import settings

MAX_TOPICS, MAX_TOPIC, MAX_PAYLOAD, SHOWN = 200, 1000, 4096, 10
CONNECT_S, CONFIRM_S = 5.0, 5.0


class Publish(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A topic that may be written; `texts` are all that may be said there, if it is not empty."""

    topic: str
    retain: bool = False
    texts: list[str] = []

    def __post_init__(self) -> None:
        if not self.topic or any(c in self.topic for c in "+#\0"):
            raise ValueError(f"{self.topic!r} is no topic to write to: it has no + and no #")


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file: `read` has a topic filter by its name."""

    site: Site
    read: Annotated[dict[str, str], Meta(max_length=32)] = {}
    publish: Annotated[dict[str, Publish], Meta(max_length=32)] = {}

    def __post_init__(self) -> None:
        if not self.read and not self.publish:
            raise ValueError("there is no topic to read or to publish")
        for name, topic in self.read.items():
            if not re.fullmatch(r"(\+|[^+#/\0]*)(/(\+|[^+#/\0]*))*(/#)?|#", topic) or not topic:
                raise ValueError(f"{name}: {topic!r} is no topic filter; + is a whole level, # the last")


class Message(TypedDict):
    """A topic's last message."""

    topic: str
    text: str
    age_s: float


class Messages(TypedDict):
    """The newest first."""

    messages: list[Message]


class Heard:
    """What came, by the names of the filters."""

    def __init__(self, filters: dict[str, str]) -> None:
        self._filters, self._lock = filters, Lock()
        self._last = {name: OrderedDict[str, tuple[str, float]]() for name in filters}

    def connected(self, client: Client, *_: Any) -> None:
        """paho's on_connect: a new session knows nothing of the one before."""
        if self._filters:
            client.subscribe([(topic, 1) for topic in self._filters.values()])

    def message(self, _: Any, __: Any, message: MQTTMessage) -> None:
        """paho's on_message."""
        if len(message.topic) > MAX_TOPIC:
            return
        text = message.payload[:MAX_PAYLOAD].decode(errors="replace")
        with self._lock:
            for name, topic in self._filters.items():
                if topic_matches_sub(topic, message.topic):
                    self._last[name].pop(message.topic, None)
                    self._last[name][message.topic] = text, time.monotonic()
                    if len(self._last[name]) > MAX_TOPICS:
                        self._last[name].popitem(last=False)

    def last(self, name: str) -> list[tuple[str, tuple[str, float]]]:
        """(topic, (text, when)), the newest last."""
        with self._lock:
            return list(self._last[name].items())


class Topics:
    """The tools, over one connection that is made anew by itself."""

    def __init__(self, given: Settings) -> None:
        self._given, self._heard = given, Heard(given.read)
        site, parts = given.site, urlsplit(given.site.broker)
        self._client = Client(CallbackAPIVersion.VERSION2)
        if site.user:
            password = Path(site.password_file).read_text().strip() if site.password_file else None
            self._client.username_pw_set(site.user, password)
        if parts.scheme == "mqtts":
            self._client.tls_set(site.ca_file or None)
        self._client.on_connect, self._client.on_message = self._heard.connected, self._heard.message
        self._client.reconnect_delay_set(1, 30)
        self._client.max_inflight_messages = 0  # no limit: paho would count those that are dropped
        self._client.connect_async(parts.hostname or "", parts.port or (8883 if parts.scheme == "mqtts" else 1883))
        self._client.loop_start()
        weakref.finalize(self, _end, self._client)

    def read_topic(self, name: str) -> Messages:
        """Read the last messages of a topic of the site's broker."""
        self._wait()
        if not (kept := self._heard.last(name)):
            raise ToolError(f"nothing was heard on {name} ({self._given.read[name]}) yet")
        now = time.monotonic()
        newest = kept[: -SHOWN - 1 : -1]
        told: list[Message] = [{"topic": t, "text": text, "age_s": round(now - at, 1)} for t, (text, at) in newest]
        while len(msgspec.json.encode({"messages": told})) > settings.MAX_RESULT:
            told.pop()
        return {"messages": told}

    def publish_topic(self, name: str, text: str) -> str:
        """Send a message to a topic of the site's broker."""
        to = self._given.publish[name]
        if to.texts and text not in to.texts:
            raise ToolError(f"{name} takes one of {', '.join(to.texts)}, not {text!r:.60}")
        self._wait()
        sent = self._client.publish(to.topic, text, qos=1, retain=to.retain)
        try:
            sent.wait_for_publish(CONFIRM_S)
        except (RuntimeError, ValueError) as error:
            raise ToolError(f"the message to {name} is not sent: {error}") from error
        finally:  # paho would send it again on the next connection, after the call was told as failed
            with self._client._out_message_mutex:
                self._client._out_messages.pop(sent.mid, None)
        if not sent.is_published():
            raise ToolError(f"the broker did not confirm the message to {name} within {CONFIRM_S:g} s: it may have it")
        return f"sent to {to.topic}"

    def _wait(self) -> None:
        """Raises ToolError while there is no connection."""
        end = time.monotonic() + CONNECT_S
        while not self._client.is_connected():
            if time.monotonic() >= end:
                raise ToolError(f"the site's broker {self._given.site.broker} is not connected")
            time.sleep(0.02)


def _end(client: Client) -> None:
    client.disconnect()
    client.loop_stop()


def pack(state: Path, options: dict[str, str]) -> Sequence[Tool]:
    """`read_topic` and `publish_topic`, each where the file has topics for it. Raises ValueError, OSError."""
    given = settings.read("mqtt", state, options, Settings)
    tools, made = Topics(given), list[Tool]()
    if given.read:
        made.append(settings.choosing(declare(tools.read_topic, concurrent=True), name=given.read))
    if given.publish:
        publish = declare(tools.publish_topic, risk="act", idempotent=False, timeout_s=15.0, concurrent=True)
        made.append(settings.choosing(publish, name=given.publish))
    return made
