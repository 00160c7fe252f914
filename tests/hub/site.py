"""A site's own Mosquitto, with exactly the configuration that `outrider broker config` writes."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from hub.cli import broker
from tests.sync.brokers import mosquitto


class Site:
    """`hub` are the settings of a hub that uses it."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.data, self.config = folder / "hub", folder / "broker"
        self.url = f"mqtts://127.0.0.1:{self.port}"
        where = ["--data", self.data, "--out", self.config, "--name", "127.0.0.1", "--name", "localhost"]
        made = CliRunner().invoke(
            broker, ["config", *map(str, where), "--port", str(self.port), "--bind", "127.0.0.1", "--user", "root"]
        )
        assert made.exit_code == 0, made.output
        self.hub: dict[str, Any] = {"data": self.data, "broker": self.url, "broker_config": self.config}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "Site":
        with (self.config / "log").open("ab") as log:
            command = [mosquitto() or "mosquitto", "-c", str(self.config / "mosquitto.conf")]
            self._process = subprocess.Popen(command, stderr=log)
        end = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 0.2).close()
                return self
            except OSError:
                assert self._process.poll() is None, self.log()
                assert time.monotonic() < end, "mosquitto does not listen"

    def log(self) -> str:
        return (self.config / "log").read_text()

    def stop(self, how: signal.Signals = signal.SIGTERM, forget: bool = False) -> None:
        """End it; with `forget` all that it had kept is gone."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(10)
            self._process = None
        if forget:
            shutil.rmtree(self.config / "data")
            (self.config / "data").mkdir()
