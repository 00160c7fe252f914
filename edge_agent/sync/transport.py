"""An asyncio face of an MQTT 5 client (OASIS MQTT 5.0), for device and hub. The only file that imports paho.

Invariants: the event loop's thread owns the client (only the blocking connect runs beside it, before anyone else may
touch it); every connection is a fresh client over one broker session, so nothing queues while the cable is cut:
`publish` then says Retry; at most `inflight` publishes await their PUBACK; the broker is told to have at most
`inbound` messages unacked; past four times that the socket is not read, unless a publish waits for a PUBACK that comes
through it, and what came with QoS 0 is dropped; a message is PUBACKed when its consumer calls `ack()`, in order of
arrival. An error in a callback ends the connection loudly and it is made again.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.sync.broker import Address, Message, Publication, dial, explain, refusal, tls_context
from edge_agent.sync.proxy import Proxy

T = TypeVar("T")
log = logging.getLogger(__name__)
CONNECT_TIMEOUT_S = 20.0  # TLS takes two round trips: 8 s where one is 4
MAX_PACKET = 1 << 20  # bytes a broker may send us in one packet
STEADY_S = 10.0  # a connection that lasted this long resets the backoff


class MqttSession:
    """`async with MqttSession(...)` connects in the background, and again whenever the connection is lost.

    `on_connect(session_present)` and `on_disconnect(error)` run on the event loop; subscriptions are made (again)
    before `on_connect`. `will` is asked for before each connection. Without `proxy` the environment's is used.
    Raises Refused for a bad URL, proxy or CA file.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        username: str | None = None,
        password: str | None = None,
        ca: Path | None = None,
        proxy: str = "",
        subscriptions: Sequence[str] = (),
        will: Callable[[], Publication] | None = None,
        session_expiry: int = 7 * 86400,
        keepalive: int = 20,
        inflight: int = 32,
        inbound: int = 64,
        backoff: tuple[float, float] = (0.2, 10.0),
        on_connect: Callable[[bool], None] | None = None,
        on_disconnect: Callable[[OutriderError], None] | None = None,
    ) -> None:
        self.address = Address.parse(url, username, password)
        self.client_id, self.subscriptions, self.will = client_id, list(subscriptions), will
        self.tls = partial(tls_context, ca) if self.address.tls else None  # anew for each connection: it is renewed
        if self.tls:
            self.tls()
        self.proxy, _ = proxy, Proxy.of(self.address.host, proxy)
        self.session_expiry, self.keepalive, self.inflight, self.inbound = session_expiry, keepalive, inflight, inbound
        self.on_connect, self.on_disconnect = on_connect, on_disconnect
        self.error: OutriderError | None = None  # why the last connection failed or ended
        self.connections = 0  # how many were made
        self.dropped = 0  # messages of QoS 0 that came faster than they were taken
        self.received: asyncio.Queue[Message | None] = asyncio.Queue()
        self._backoff = backoff
        self._link: _Link | None = None
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def connected(self) -> bool:
        return self._link is not None

    async def __aenter__(self) -> MqttSession:
        self._task = asyncio.create_task(self._run(), name=f"mqtt {self.client_id}")
        self._task.add_done_callback(lambda _: self.received.put_nowait(None))
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])
        if not self._task.cancelled():
            self._task.result()

    async def wait_connected(self, within: float = CONNECT_TIMEOUT_S) -> None:
        """Raises why not: Refused at once, Retry when so many seconds are over."""
        end = time.monotonic() + within
        while self._link is None:
            if isinstance(self.error, Refused):
                raise self.error.with_traceback(None)
            try:
                async with asyncio.timeout(end - time.monotonic()):
                    await self._changed.wait()
            except TimeoutError:
                raise self.error or Retry(f"no answer from {self.address} in {within:g} s") from None

    async def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int = 1,
        retain: bool = False,
        properties: Mapping[str, str] | None = None,
        expiry: int | None = None,
        wait: bool = True,
    ) -> None:
        """Send; with `wait` return when the broker has it. `properties` are user properties, `expiry` is in seconds.

        Raises Retry when there is no connection or it ends before the PUBACK, Refused when the broker refuses.
        """
        link = self._link
        if link is None:
            raise Retry(f"not connected to {self.address}", "it is tried again by itself")
        if link.slots.locked():
            link.resume()
        await link.slots.acquire()
        done = link.publish(Publication(topic, payload, properties or {}, qos, retain), expiry)
        if wait:
            await asyncio.shield(done)

    async def messages(self) -> AsyncIterator[Message]:
        """What comes, for ever; for one consumer. Ends with the session."""
        while (message := await self.received.get()) is not None:
            if self._link is not None:
                self._link.resume()
            yield message
        if self._task is not None and self._task.done() and not self._task.cancelled():
            self._task.result()

    async def _run(self) -> None:
        first, longest = self._backoff
        delay = first
        while True:
            began = time.monotonic()
            link = _Link(self)
            try:
                present = await link.open()
                began = time.monotonic()
                self._up(link, present)
                error = await link.hold()
            except OutriderError as failed:
                error = failed
            finally:
                self._link = None
                link.close()
            self._down(error)
            delay = first if time.monotonic() - began > STEADY_S else delay
            await asyncio.sleep(random.uniform(0, delay))  # full jitter: a fleet does not come back at once
            delay = min(delay * 2, longest)

    def _up(self, link: _Link, session_present: bool) -> None:
        log.info("connected to %s as %s", self.address, self.client_id)
        self._link, self.error = link, None
        self.connections += 1
        if self.on_connect:
            self.on_connect(session_present)
        self._tell()

    def _down(self, error: OutriderError) -> None:
        if str(error) != str(self.error):
            log.warning("%s: %s", self.client_id, error)
        self.error = error
        if self.on_disconnect:
            self.on_disconnect(error)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Link:
    """One connection: a paho client that the event loop drives through its socket."""

    def __init__(self, session: MqttSession) -> None:
        self.session, self.loop = session, asyncio.get_running_loop()
        self.slots = asyncio.Semaphore(session.inflight)
        self.lost: asyncio.Future[OutriderError] = self.loop.create_future()
        self._accepted: asyncio.Future[bool] = self.loop.create_future()
        self._subscribed: asyncio.Future[None] = self.loop.create_future()
        self._publishing: dict[int, asyncio.Future[None]] = {}
        self._unacked: deque[list[int]] = deque()  # [mid, 1 when dealt with]
        self._socket: Any = None  # a socket, or one wrapped in TLS
        self._reading = self._writing = False
        self._largest = 1 << 28
        self.client = self._make_client()

    def _make_client(self) -> paho.Client:
        session = self.session
        client = paho.Client(CallbackAPIVersion.VERSION2, session.client_id, protocol=paho.MQTTv5, manual_ack=True)
        dialled = partial(dial, session.address, session.tls, CONNECT_TIMEOUT_S / 2, session.proxy)
        client._create_socket = dialled  # type: ignore[method-assign]  # paho leaks one whose TLS handshake failed
        client.max_inflight_messages_set(session.inflight)
        if session.address.username is not None:
            client.username_pw_set(session.address.username, session.address.password)
        if session.will and (will := session.will()):
            properties = _user(PacketTypes.WILLMESSAGE, will)
            properties.WillDelayInterval = will.delay_s
            client.will_set(will.topic, will.payload, will.qos, will.retain, properties)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_disconnect = self._on_disconnect
        return client

    async def open(self) -> bool:
        """Connect and subscribe: whether the broker still had our session. Raises Retry or Refused."""
        properties = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        properties.SessionExpiryInterval = self.session.session_expiry
        properties.ReceiveMaximum = self.session.inbound
        properties.MaximumPacketSize = MAX_PACKET
        address = self.session.address
        connect = partial(self.client.connect, clean_start=False, properties=properties)
        connecting = self.loop.run_in_executor(None, connect, address.host, address.port, self.session.keepalive)
        try:
            await asyncio.shield(connecting)
        except asyncio.CancelledError:
            connecting.add_done_callback(lambda _: self.close())
            raise
        except (OSError, ValueError) as error:
            raise explain(error, address) from error
        self._socket = self.client.socket()
        if self._socket is None:
            raise Retry(f"{address} hung up at once", "is it an MQTT 5 broker, and is mqtt:// or mqtts:// right?")
        self.client.on_socket_close = lambda *_: self._forget_socket()
        self.resume()
        self._pump()
        present = await self._answer(self._accepted, "accept the connection")
        if self.session.subscriptions:
            options = SubscribeOptions(qos=1)
            self.client.subscribe([(each, options) for each in self.session.subscriptions])
            self._pump()
            await self._answer(self._subscribed, "accept the subscriptions")
        return present

    async def _answer(self, answer: asyncio.Future[T], what: str) -> T:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):  # wait_for of Python 3.11 can lose a cancellation
                return await asyncio.shield(answer)
        except TimeoutError:
            hint = "check user and password; it must be an MQTT 5 broker"
            raise Retry(f"{self.session.address} did not {what} in {CONNECT_TIMEOUT_S:g} s", hint) from None

    async def hold(self) -> OutriderError:
        """Keep alive until the connection ends: why it did."""
        while not self.lost.done():
            await asyncio.wait([self.lost], timeout=self.session.keepalive / 4)
            if self._reading:
                self._guard(self.client.loop_misc)
        return self.lost.result()

    def close(self) -> None:
        """Say goodbye when there is someone to say it to; fail what still waits."""
        self._end(Retry(f"the connection to {self.session.address} was closed"))
        link = self.client.socket()
        self.client.disconnect()
        self._forget_socket()
        if link is not None:
            link.close()

    def publish(self, out: Publication, expiry: int | None) -> asyncio.Future[None]:
        """Resolved by the PUBACK, failed by the end of the connection; a slot was taken and is given back."""
        done: asyncio.Future[None] = self.loop.create_future()
        done.add_done_callback(self._give_back)
        properties = _user(PacketTypes.PUBLISH, out)
        if expiry is not None:
            properties.MessageExpiryInterval = expiry
        if len(out.payload) + len(out.topic) + 1024 > self._largest:
            hint = f"the broker takes {self._largest}: raise that"
            done.set_exception(Refused(f"{len(out.payload)} bytes on {out.topic}", hint))
            return done
        if not self.lost.done():
            info = self.client.publish(out.topic, out.payload, out.qos, out.retain, properties)
            self._publishing[info.mid] = done
            self._pump()
        if self.lost.done() and not done.done():
            done.set_exception(self.lost.result())
        elif out.qos == 0 and not done.done():
            self._publishing.pop(info.mid).set_result(None)
        return done

    def resume(self) -> None:
        """Read from the socket (again) when the consumer has caught up."""
        behind = self.session.received.qsize() > self.session.inbound and not self.slots.locked()
        if self._socket is not None and not self._reading and not behind:
            self._reading = True
            self.loop.add_reader(self._socket, self._readable)

    def _give_back(self, done: asyncio.Future[None]) -> None:
        self.slots.release()
        if isinstance(error := done.exception(), Refused):
            log.error("%s", error)

    def _readable(self) -> None:
        self._guard(self.client.loop_read)
        while isinstance(self._socket, ssl.SSLSocket) and self._socket.pending():
            self._guard(self.client.loop_read)
        if self._socket is not None and self._full and not self.slots.locked():
            self._reading = False
            self.loop.remove_reader(self._socket)
        self._pump()

    @property
    def _full(self) -> bool:
        return self.session.received.qsize() >= 4 * self.session.inbound

    def _pump(self) -> None:
        wants = self._socket is not None and self.client.want_write()
        if wants and not self._writing:
            self.loop.add_writer(self._socket, self._writable)
        elif self._writing and not wants:
            self.loop.remove_writer(self._socket)
        self._writing = wants

    def _writable(self) -> None:
        self._guard(self.client.loop_write)
        self._pump()

    def _guard(self, step: Callable[[], object]) -> None:
        try:
            step()
        except Exception as error:  # an error in a callback must not pass unseen
            log.exception("the MQTT client failed")
            self._end(Retry(f"the MQTT client failed: {error!r}", "this is a fault in Outrider: report it"))

    def _end(self, error: OutriderError) -> None:
        if not self.lost.done():
            self.lost.set_result(error)
        waiters: list[asyncio.Future[Any]] = [self._accepted, self._subscribed, *self._publishing.values()]
        for waiting in (each for each in waiters if not each.done()):
            waiting.set_exception(error)
            waiting.exception()
        self._publishing.clear()
        self._unacked.clear()

    def _forget_socket(self) -> None:
        if self._socket is not None:
            self.loop.remove_reader(self._socket)
            self.loop.remove_writer(self._socket)
            self._socket = None
            self._reading = self._writing = False

    def _on_connect(self, _c: object, _u: object, flags: paho.ConnectFlags, reason: ReasonCode, told: Any) -> None:
        if reason.is_failure:
            self._end(refusal(reason.value, str(reason), self.session.address))
            return
        self._largest = getattr(told, "MaximumPacketSize", self._largest)
        self.slots = asyncio.Semaphore(min(self.session.inflight, getattr(told, "ReceiveMaximum", 65535)))
        if not self._accepted.done():
            self._accepted.set_result(flags.session_present)

    def _on_subscribe(self, _c: object, _u: object, _mid: int, reasons: list[ReasonCode], _p: object) -> None:
        if refused := [t for t, r in zip(self.session.subscriptions, reasons, strict=False) if r.is_failure]:
            hint = "give this user the right to read them at the broker"
            self._end(Refused(f"{self.session.address} refuses subscriptions: {', '.join(refused)}", hint))
        elif not self._subscribed.done():
            self._subscribed.set_result(None)

    def _on_publish(self, _c: object, _u: object, mid: int, reason: ReasonCode, _p: object) -> None:
        if (done := self._publishing.pop(mid, None)) is None:
            return
        if reason.is_failure:
            hint = "give this user the right to write there, or raise the broker's limits"
            done.set_exception(Refused(f"{self.session.address} refuses a message: {reason}", hint))
        else:
            done.set_result(None)

    def _on_message(self, _c: object, _u: object, came: paho.MQTTMessage) -> None:
        if self._full and came.qos == 0:
            self.session.dropped += 1
            return
        entry = [came.mid, 0]
        if came.qos:
            self._unacked.append(entry)
        pairs: list[tuple[str, str]] = getattr(came.properties, "UserProperty", [])
        ack = partial(self._ack, entry)
        message = Message(came.topic, bytes(came.payload), dict(pairs), came.retain, came.qos, ack)
        self.session.received.put_nowait(message)

    def _ack(self, entry: list[int]) -> None:
        entry[1] = 1
        while self._unacked and self._unacked[0][1]:
            mid, _ = self._unacked.popleft()
            self._guard(partial(self.client.ack, mid, 1))
        self._pump()

    def _on_disconnect(self, _c: object, _u: object, _flags: object, reason: ReasonCode, _p: object) -> None:
        if self._accepted.done():
            self._end(Retry(f"the connection to {self.session.address} was lost: {reason}"))
        else:
            hint = "check user and password, or the certificate; it must be an MQTT 5 broker"
            self._end(Retry(f"{self.session.address} hung up before it accepted the connection", hint))


def _user(packet: int, out: Publication) -> Properties:
    properties = Properties(packet)  # type: ignore[no-untyped-call]
    if out.properties:
        properties.UserProperty = list(out.properties.items())
    return properties
