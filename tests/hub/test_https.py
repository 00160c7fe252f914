"""The hub's own HTTPS: a device and a person trust it from the first contact on, and nobody in between."""

import asyncio
import re
import shutil
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bench.fleet import Device, Hub, Process, free_port, until
from edge_agent import enrol
from edge_agent.errors import Refused
from edge_agent.sync import https
from hub.ca import Authority
from hub.cli import app
from hub.client import HubClient
from tests.hub.rig import until as eventually


class Served:
    """`outrider hub` in a process of its own, over HTTPS."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.folder, self.port, self.more = folder, free_port(), more
        self.process = Process("hub", folder)
        self.url = f"https://localhost:{self.port}"
        self.ca = ""

    async def start(self) -> "Served":
        where = ("hub", "--data", str(self.folder / "data"), "--http", f"127.0.0.1:{self.port}", "--no-dashboard")
        await self.process.start(*where, *self.more, env={"OUTRIDER_ADMIN_PASSWORD": "correct horse"})

        async def up() -> Any:
            self.process.check()
            return re.search(r"hub at https", self.process.log.read_text())

        await eventually(up, 60)
        found = re.search(r"CA: (sha256:\w+)", self.process.log.read_text())
        self.ca = found[1] if found else ""
        return self


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = await Served(tmp_path, "--https", "localhost").start()
    yield made
    await made.process.stop()


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("OUTRIDER_PASSWORD", "correct horse")
    for name in ("OUTRIDER_HUB", "OUTRIDER_TOKEN", "OUTRIDER_CA"):
        monkeypatch.delenv(name, raising=False)
    return CliRunner()


def logged_in(shell: CliRunner, served: Served) -> None:
    done = shell.invoke(app, ["login", "--hub", served.url, "--ca", served.ca])
    assert done.exit_code == 0, done.output


async def test_a_device_enrols_uploads_and_stays_by_the_ca_that_its_token_names(
    served: Served, shell: CliRunner, tmp_path: Path
) -> None:
    blind = await asyncio.to_thread(shell.invoke, app, ["login", "--hub", served.url])
    assert blind.exit_code == 1
    assert "sha256:" in blind.output, "it says how to trust the hub"
    await asyncio.to_thread(logged_in, shell, served)
    token = (await asyncio.to_thread(shell.invoke, app, ["enrol-token", "--name", "press-1"])).output.strip()
    assert token.endswith(https.MARK + served.ca.removeprefix("sha256:"))
    with HubClient() as client:
        hub = Hub(tmp_path)
        hub.token = client._http.headers["Authorization"].removeprefix("Bearer ")
        device = Device("press-1", tmp_path, hub)
        await device.start("--hub", served.url, "--token", token, "--pack", "tests.e2e.daemon_pack")
        try:

            async def online() -> bool | None:
                device.process.check()
                seen = await asyncio.to_thread(client.get, "/v1/devices")
                return any(each["presence"]["online"] for each in seen) or None

            await until("the device online", 60, online)
            blob = (await device.client.post("/v1/blobs?name=a.log", content=b"hello")).json()["sha256"]

            async def there() -> bool | None:
                found = await asyncio.to_thread(client._http.get, f"/v1/devices/press-1/blobs/{blob}")
                return found.content == b"hello" or None

            await until("the upload over HTTPS", 30, there)
            identity = enrol.load(device.state)
            assert identity is not None
            assert f"sha256:{https.fingerprint(identity.ca)}" == served.ca
            await device.process.stop()
            await device.start()  # the token and its fingerprint are spent: the CA is kept
            await until("the device again", 60, online)
        finally:
            await device.stop()
            await hub.client.aclose()


def test_another_hub_in_the_middle_is_refused_before_the_token_is_shown(tmp_path: Path, served: Served) -> None:
    wrong = "0" * 64
    with pytest.raises(Refused, match="another CA"):
        enrol.enrol(tmp_path / "d", served.url, f"tok{https.MARK}{wrong}", "press-1")
    with pytest.raises(Refused, match="nobody known here vouches"):
        enrol.enrol(tmp_path / "d", served.url, "tok", "press-1")
    with pytest.raises(Refused, match="is not HTTPS"):
        enrol.enrol(tmp_path / "d", served.url.replace("https", "http"), f"tok{https.MARK}{wrong}", "press-1")
    assert not (tmp_path / "d").exists()


def test_a_certificate_slipped_in_behind_the_true_one_is_not_trusted(tmp_path: Path) -> None:
    ours, evil = (Authority(tmp_path / n / "ca", tmp_path / n / "root", "main") for n in ("ours", "evil"))
    both = ours.root_pem + evil.root_pem
    assert https.fingerprint(both) == https.fingerprint(ours.root_pem)
    trusted = https.verify(https.first(both))
    assert isinstance(trusted, ssl.SSLContext)
    assert len(trusted.get_ca_certs()) == 1


def test_the_certificate_is_kept_while_it_is_good_and_made_anew_for_other_names(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "ca", tmp_path / "root", "main")

    def serial(*names: str) -> str:
        authority.https(tmp_path / "https", names)
        return (tmp_path / "https" / "cert.pem").read_text()

    first = serial("hub.example", "10.0.0.5")
    assert serial("10.0.0.5", "hub.example") == first
    assert serial("hub.example") != first
    assert (tmp_path / "https" / "key.pem").stat().st_mode & 0o077 == 0


async def test_given_files_are_served_and_their_ca_is_given_as_a_file(tmp_path: Path, shell: CliRunner) -> None:
    authority = Authority(tmp_path / "ca", tmp_path / "root", "other")
    authority.https(tmp_path / "site", ["localhost"])
    pair = ("--cert", str(tmp_path / "site" / "cert.pem"), "--key", str(tmp_path / "site" / "key.pem"))
    served = await Served(tmp_path, *pair).start()
    try:
        given = ["login", "--hub", served.url, "--ca", str(tmp_path / "ca" / "root.pem")]
        done = await asyncio.to_thread(shell.invoke, app, given)
        assert done.exit_code == 0, done.output
        token = (await asyncio.to_thread(shell.invoke, app, ["enrol-token"])).output.strip()
        assert https.MARK not in token, "the hub's own CA does not vouch for this HTTPS"
        identity = await asyncio.to_thread(
            lambda: enrol.enrol(tmp_path / "d", served.url, token, "press-1", ca=str(tmp_path / "ca" / "root.pem"))
        )
        assert identity.ca == authority.root_pem
    finally:
        await served.process.stop()
        await asyncio.to_thread(shutil.rmtree, tmp_path / "data")
