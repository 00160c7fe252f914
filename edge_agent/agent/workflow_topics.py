"""Messages of the site's own broker, as far as workflows listen to them.

Invariants: a message is acknowledged when the run that it starts is journaled; what the broker holds for a device that
is away is bounded by the broker and by RESUME_S, what comes at once by the transport (64 unacknowledged messages; of
QoS 0 more are dropped and counted). A payload that is no JSON, or that `when` cannot be asked of, is counted and told,
and stops nothing. A retained message says how things stand, not that something happened: it starts nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.config import Site
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.sync.transport import MqttSession
from edge_agent.trouble import Trouble

MAX_PAYLOAD = 64 * 1024  # bytes
RESUME_S = 3600
LOOK_S = 0.5
AGAIN_S = 10.0
_log = logging.getLogger("outrider.site")


class Topics:
    """Listens to what `wanted` says now, and tells `heard` each topic with its payload; that raises ValueError,
    and Retry for what is to be told again."""

    def __init__(
        self,
        site: Site,
        device: str,
        wanted: Callable[[], set[str]],
        heard: Callable[[str, Any], Awaitable[None]],
        again_s: float = AGAIN_S,
    ) -> None:
        self._site, self._device, self._wanted, self._heard, self._again_s = site, device, wanted, heard, again_s
        self._session: MqttSession | None = None
        self._bad_trouble, self._trouble = Trouble(_log, "not understood"), Trouble(_log, "no site broker")
        self.messages = self.bad = self._dropped = 0

    def status(self) -> dict[str, Any]:
        """How it fares."""
        session = self._session
        told = {"connected": bool(session and session.connected), "error": str(session.error or "") if session else ""}
        dropped = self._dropped + (session.dropped if session else 0)
        return {"broker": self._site.broker, **told, "messages": self.messages, "bad": self.bad, "dropped": dropped}

    async def run(self) -> None:
        """Listen until cancelled; a connection that is lost is made again, settings that are wrong are told."""
        while True:
            if not (wanted := self._wanted()):
                await asyncio.sleep(LOOK_S)
                continue
            try:
                await self._listen(wanted)
                self._trouble.over()
            except OutriderError as error:
                self._trouble.tell(error)
                await asyncio.sleep(self._again_s)

    async def _listen(self, wanted: set[str]) -> None:
        """Until other topics are wanted. Raises Refused for settings that cannot be used."""
        async with self._connect(sorted(wanted)) as self._session:
            taking = asyncio.create_task(self._take(self._session), name="site messages")
            over = set[asyncio.Task[None]]()
            try:
                while not over and self._wanted() == wanted:
                    over, _ = await asyncio.wait([taking], timeout=LOOK_S)
            finally:
                taking.cancel()
                self._dropped += self._session.dropped
                self._session = None
                with contextlib.suppress(asyncio.CancelledError):
                    await taking

    def _connect(self, topics: list[str]) -> MqttSession:
        site = self._site
        try:
            password = Path(site.password_file).read_text().strip() if site.password_file else None
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(f"{site.password_file} cannot be read: {error}", "a file with the site's password") from error
        # a session of another name for other topics: the broker keeps the old subscriptions of the old name
        name = f"{self._device}-site-{hashlib.sha256(chr(0).join(topics).encode()).hexdigest()[:8]}"
        ca = Path(site.ca_file) if site.ca_file else None
        more: dict[str, Any] = {"username": site.user or None, "password": password, "ca": ca}
        return MqttSession(site.broker, name, subscriptions=topics, session_expiry=RESUME_S, **more)

    async def _take(self, session: MqttSession) -> None:
        async for message in session.messages():
            self.messages += not message.retain
            while not message.retain and not await self._message(message.topic, message.payload):  # noqa: ASYNC110
                await asyncio.sleep(self._again_s)
            message.ack()

    async def _message(self, topic: str, payload: bytes) -> bool:
        """Whether it is dealt with."""
        try:
            if len(payload) > MAX_PAYLOAD:
                raise ValueError(f"{len(payload)} bytes, at most {MAX_PAYLOAD} are read")
            await self._heard(topic, msgspec.json.decode(payload))
        except (ValueError, RecursionError) as error:  # of JSON, UTF-8 and CEL
            self.bad += 1
            self._bad_trouble.tell(f"{topic}: {error}")
        except Retry:  # who cannot take it says why
            return False
        return True
