"""Real brokers for the tests: the embedded one and Mosquitto, each stopped and started on the same port."""

import asyncio
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from hub.broker import EmbeddedBroker

USER, PASSWORD = "outrider", "a secret"


class Embedded:
    def __init__(self, folder: Path) -> None:
        self._broker = EmbeddedBroker(folder)
        self.url = self._broker.url
        self.username, self.password = self._broker.username, self._broker.password

    def start(self) -> None:
        self._broker.start()

    def stop(self) -> None:
        self._broker.stop()


class Mosquitto:
    """Debian's package; persistent, one user, optionally TLS."""

    def __init__(self, folder: Path, tls: tuple[Path, Path] | None = None) -> None:
        self.username, self.password = USER, PASSWORD
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"{'mqtts' if tls else 'mqtt'}://127.0.0.1:{self.port}"
        self._config, passwords = folder / "mosquitto.conf", folder / "passwords"
        subprocess.run(["mosquitto_passwd", "-c", "-b", passwords, USER, PASSWORD], check=True, capture_output=True)
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nuser root\npassword_file {passwords}\nallow_anonymous false\n"
            f"persistence true\npersistence_location {folder}/\nlog_dest file {folder}/log\n"
            + (f"certfile {tls[0]}\nkeyfile {tls[1]}\n" if tls else "")
        )
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen([mosquitto() or "mosquitto", "-c", self._config], stderr=subprocess.DEVNULL)
        end = time.monotonic() + 10
        while time.monotonic() < end:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return
            except OSError:
                assert self._process.poll() is None, "mosquitto ended"
        raise AssertionError("mosquitto does not listen")

    def stop(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait(10)
            self._process = None


def mosquitto() -> str | None:
    """Where the binary is; Debian keeps it out of a user's PATH."""
    return shutil.which("mosquitto") or shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin")


async def until(condition: Callable[[], object], within: float = 20.0) -> None:
    """Wait for a condition, looking every 5 ms."""
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, "it did not come true in time"
        await asyncio.sleep(0.005)
