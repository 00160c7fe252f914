"""The brokers: a Mosquitto configuration for production, and the embedded one for trying out.

Mosquitto: who a client is comes from its certificate alone, and is its client id too; a device may write its own `up`
and `presence` and read its own down topics and the fleet's grants; everything has a limit. The hub keeps the list of
revoked certificates and the topic rules in the folder up to date, and has Mosquitto read them again.

Embedded: rumqttd (package `iotcore`) as a child process on loopback. User, password and port are made once and kept
0600 in the data directory, so devices enrolled before a restart still find it; a crashed child is started again; the
child holds the read end of a pipe whose write end only this process has, so it ends with the hub, `kill -9` included.
Sessions live in the broker's memory. Whatever a broker forgets is sent again, because only the hub's own ack empties
an outbox.
"""

import logging
import os
import secrets
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import iotcore
import msgspec

from edge_agent.wire import durable
from edge_agent.wire.topics import Topic, TopicKind
from hub.ca import Authority
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


def hub_user(fleet: str) -> str:
    """The hub's name at the broker; the colon keeps it from being a device's."""
    return f"hub:{fleet}"


def topic_rules(fleet: str, revoked: Iterable[str] = ()) -> str:
    """Mosquitto's ACL file. A revoked device that is still connected reads and writes nothing from now on."""
    ups = (TopicKind.UP, TopicKind.PRESENCE)
    rules = [f"user {hub_user(fleet)}"]
    rules += [f"topic {'read' if kind in ups else 'write'} {Topic.filter(kind, fleet)}" for kind in TopicKind]
    rules += [line for name in sorted(revoked) for line in (f"user {name}", "topic deny #")]
    rules += [f"pattern {'write' if kind in ups else 'read'} {Topic.filter(kind, fleet, '%u')}" for kind in TopicKind]
    return "\n".join(rules) + "\n"


def write_config(
    folder: Path, authority: Authority, names: Sequence[str], port: int = 8883, bind: str = "0.0.0.0", user: str = ""
) -> None:
    """Everything Mosquitto needs to serve these host names, for the user it runs as. Raises Fatal."""
    folder = folder.resolve()
    user = user or ("mosquitto" if os.getuid() == 0 else "")
    certificate, key = authority.server(names)
    settings = Path(__file__).with_name("mosquitto.conf").read_text()
    domain = "ipv6" if ":" in bind else "ipv4"
    settings = settings.format(
        folder=folder, user=user or "mosquitto", port=port, bind=bind, domain=domain, packet=MAX_PAYLOAD + 4096
    )
    try:
        (folder / "data").mkdir(parents=True, exist_ok=True, mode=0o750)
        files = {"mosquitto.conf": settings.encode(), "ca.pem": authority.trusted_pem.encode()}
        files |= {"server.pem": certificate.encode(), "server.key": key, "crl.pem": authority.crl([])}
        for name, content in (files | {"acl": topic_rules(authority.fleet).encode()}).items():
            durable.write(folder / name, content, 0o600 if name == "server.key" else 0o640)
        for path in [folder, *folder.iterdir()] if os.getuid() == 0 and user else []:
            shutil.chown(path, user)
    except (OSError, LookupError) as error:
        hint = "is the folder writable, and does Mosquitto's user exist? name it with --user"
        raise Fatal(f"the broker's configuration cannot be written to {folder}: {error}", hint) from error


class Mosquitto:
    """The files of a running Mosquitto that say whom to refuse. Without a folder there is nobody to tell."""

    def __init__(self, folder: Path | None, authority: Authority) -> None:
        self._folder, self._authority = folder, authority
        self._told: object = None
        self._when = 0.0
        self._lock = threading.Lock()

    def identity(self) -> Path:
        """The folder with the hub's own certificate for the broker, a new one at each call."""
        self._authority.client(self._authority.folder / "hub", hub_user(self._authority.fleet))
        return self._authority.folder / "hub"

    def tell(self, serials: list[tuple[str, float]], revoked: list[str]) -> None:
        """Revoked certificates and devices. Where the hub may not signal Mosquitto, a systemd unit does."""
        with self._lock:
            if self._folder is None or self._told == (serials, revoked):
                return
            # of two lists OpenSSL takes the later, and their times are whole seconds; no clock set back makes it longer
            time.sleep(min(1.0, max(0.0, self._when + 1.0 - time.time())) if self._told else 0.0)
            self._when = time.time()
            try:
                rules = topic_rules(self._authority.fleet, revoked).encode()
                _replace(self._folder, {"crl.pem": self._authority.crl(serials), "acl": rules})
                self._told = (serials, revoked)
                pid = int((self._folder / "mosquitto.pid").read_text())
                if Path(f"/proc/{pid}/comm").read_text().strip() == "mosquitto":  # the file outlives a kill -9
                    os.kill(pid, signal.SIGHUP)
            except (OSError, ValueError) as error:
                log.warning("Mosquitto was not told to read %s again: %s", self._folder, error)


def _replace(folder: Path, files: dict[str, bytes]) -> None:
    """Owners stay, so that Mosquitto's user can read them."""
    for name, content in files.items():
        known = (folder / name).stat()
        durable.write(folder / name, content, 0o640)
        if os.getuid() == 0:
            os.chown(folder / name, known.st_uid, known.st_gid)


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
        known = self._load(port)
        self.port, self.username, self.password = known.port, known.username, known.password
        self._stopping = threading.Event()
        self._watcher: threading.Thread | None = None
        self._child: iotcore.Broker | None = None
        self.restarts = 0

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
            except (Fatal, OSError) as error:  # or a full disk, of this moment
                log.error("%s", error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
