"""What helps from afar: a device's own account of itself in a file, with no secret in it."""

import asyncio
import io
import json
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.fleet import Device, Hub, running, until
from edge_agent import support
from edge_agent.config import Settings
from hub.cli import app


def test_secrets_are_taken_out_of_every_text() -> None:
    text = (
        "mqtts://ann:hunter2@broker:8883 Authorization: Bearer abc.def token=xyz "
        "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJhIn0.c2ln\n-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\nend"
    )
    hidden = support.hide(text)
    for secret in ("hunter2", "abc.def", "xyz", "eyJ", "MC4C"):
        assert secret not in hidden
    assert hidden.startswith("mqtts://***@broker:8883")
    assert hidden.endswith("end")
    shown = support.settings_shown(Settings(state=Path("x"), token="once", proxy="http://u:p4ss@gate:1"))
    made = zipfile.ZipFile(io.BytesIO(support.bundle(settings=shown)))
    assert b"once" not in made.read("settings.json")
    assert b"p4ss" not in made.read("settings.json")


async def test_a_device_sends_its_file_by_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(tmp_path) as hub:
        device = Device("press-1", tmp_path, hub)
        token = (await hub.post("/v1/enrolments", {"name": "press-1"}))["token"]
        await device.start("--hub", hub.url, "--token", token, "--pack", "tests.e2e.daemon_pack")
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.setenv("OUTRIDER_HUB", hub.url)
        monkeypatch.setenv("OUTRIDER_TOKEN", hub.token)
        try:
            await until("the device", 60, _there, hub)
            asked = ["support", "press-1", "--out", str(tmp_path / "s.zip"), "--json"]
            done = await asyncio.to_thread(CliRunner().invoke, app, asked)
            assert done.exit_code == 0, done.output
            made = zipfile.ZipFile(tmp_path / "s.zip")
            names = {"checks.txt", "status.json", "log.txt", "settings.json", "versions.txt"}
            assert set(made.namelist()) == names
            assert json.loads(made.read("status.json"))["device"] == "press-1"
            assert b"press-1 is up" in made.read("log.txt")
            checks = json.loads(made.read("checks.txt"))["checks"]
            assert {each["name"] for each in checks} >= {"state", "hub", "identity"}
            whole = b"".join(made.read(name) for name in names)
            identity = json.loads((device.state / "identity.json").read_text())
            for secret in (token, hub.token, identity["enrolled"]["broker"]["password"]):
                assert secret.encode() not in whole
        finally:
            await device.stop()


async def _there(hub: Hub) -> bool | None:
    return any(each["presence"]["online"] for each in await hub.get("/v1/devices")) or None
