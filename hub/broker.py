"""The embedded MQTT 5 broker: rumqttd (package `iotcore`) as a child process on loopback.

Invariants: user, password and port are made once and kept 0600 in the data directory, so devices enrolled before a
restart still find it; a crashed child is started again; the child holds the read end of a pipe whose write end only
this process has, so it ends with the hub, `kill -9` included. Sessions live in the broker's memory: it is for trying
out and tests. A message it forgets is sent again by the device, because only the hub's own ack empties an outbox.
"""

import logging
import secrets
import socket
import threading
from pathlib import Path

import iotcore
import msgspec

from edge_agent.wire import durable
from hub.errors import Fatal

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_PAYLOAD = 384 * 1024  # bytes; a batch is at most 256 KiB before compression
RESTART_DELAY = (0.1, 5.0)  # seconds: first and longest pause before a crashed broker is started again
WATCH_TICK = 0.1  # seconds between looks at the child

CONFIG = """\
id = 0
[router]
id = 0
max_connections = 10010
max_outgoing_packet_count = 200
max_segment_size = 8388608
max_segment_count = 8
[v5.1]
name = "outrider"
listen = "{host}:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = {max_payload}
max_inflight_count = 100
dynamic_filters = true
[v5.1.connections.auth]
{username} = "{password}"
"""


class Credentials(msgspec.Struct):
    """What a client needs to reach the embedded broker; kept in `broker.json`."""

    port: int
    username: str
    password: str


class EmbeddedBroker:
    """rumqttd on 127.0.0.1; `port=0` picks a free port once and remembers it.

    Raises:
        Fatal: on `start` when the port is taken or the broker does not come up.
    """

    def __init__(self, data_dir: str | Path, port: int = 0) -> None:
        self._dir = Path(data_dir) / "broker"
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._credentials = self._load(port)
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._child: iotcore.Broker | None = None
        self.restarts = 0

    @property
    def port(self) -> int:
        return self._credentials.port

    @property
    def username(self) -> str:
        return self._credentials.username

    @property
    def password(self) -> str:
        return self._credentials.password

    @property
    def url(self) -> str:
        """Address without credentials, as handed to devices beside user and password."""
        return f"mqtt://{HOST}:{self.port}"

    @property
    def url_with_credentials(self) -> str:
        return f"mqtt://{self.username}:{self.password}@{HOST}:{self.port}"

    @property
    def alive(self) -> bool:
        return self._child is not None and self._child.is_running

    def start(self) -> "EmbeddedBroker":
        """Start the child and wait until it listens (about 0.2 s)."""
        if self._watcher is not None:
            return self
        self._start_child()
        self._stopping.clear()
        self._watcher = threading.Thread(target=self._watch, name="broker-watch", daemon=True)
        self._watcher.start()
        return self

    def stop(self) -> None:
        """End the child and free the port; safe to call twice."""
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
            self._watcher = None
        if self._child is not None:
            self._child.stop()
            self._child = None

    def __enter__(self) -> "EmbeddedBroker":
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _load(self, port: int) -> Credentials:
        path = self._dir / "broker.json"
        if path.exists():
            known = msgspec.json.decode(path.read_bytes(), type=Credentials)
            if port in (0, known.port):
                return known
            known.port = port
        else:
            known = Credentials(port or _free_port(), f"outrider-{secrets.token_hex(4)}", secrets.token_urlsafe(24))
        durable.write(path, msgspec.json.encode(known), 0o600)
        return known

    def _start_child(self) -> None:
        config = self._dir / "rumqttd.toml"
        settings = CONFIG.format(
            host=HOST, port=self.port, max_payload=MAX_PAYLOAD, username=self.username, password=self.password
        )
        durable.write(config, settings.encode(), 0o600)
        child = iotcore.Broker(config_path=str(config))
        try:
            child.start()
        except OSError as error:
            raise Fatal(
                f"the embedded broker cannot listen on {HOST}:{self.port}: {error}",
                "another program, perhaps another hub, uses this port: stop it, or give --broker-port or --broker",
            ) from error
        except RuntimeError as error:
            raise Fatal(f"the embedded broker did not start: {error}", f"see its settings in {config}") from error
        self._child = child

    def _watch(self) -> None:
        delay = RESTART_DELAY[0]
        while not self._stopping.wait(WATCH_TICK):
            if self.alive:
                delay = RESTART_DELAY[0]
                continue
            log.warning("the embedded broker has ended; starting it again in %.1f s", delay)
            if self._stopping.wait(delay):
                return
            delay = min(delay * 2, RESTART_DELAY[1])
            if self._child is not None:
                self._child.stop()
            try:
                self._start_child()
                self.restarts += 1
            except Fatal as error:
                log.error("%s", error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
