"""Configuring a device: a merge patch for a version, sent down, and what the device made of it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench.fleet import Device, running, until
from bench.fleet import Hub as FleetHub
from edge_agent.wire.messages import Desired
from hub.cli import app
from hub.db import Database, devices
from hub.twin import Twin
from tests.hub.rig import Hub, enrolled
from tests.hub.rig import until as soon


async def test_a_patch_is_merged_for_the_version_it_was_made_for(hub: Hub) -> None:
    device, admin = await enrolled(hub, "press-1"), await hub.login()
    at = "/v1/devices/press-1/desired"
    async with device.online():
        made = await admin.patch(at, json={"config": {"telemetry_s": 5}}, headers={"If-Match": '"0"'})
        assert (made.status_code, made.headers["ETag"]) == (200, '"1"')
        late = await admin.patch(at, json={"config": {"telemetry_s": 6}}, headers={"If-Match": '"0"'})
        assert late.status_code == 412
        assert '"1"' in late.json()["hint"]
        for wrong in ("x", "-1", "1" * 20, "1" * 5000):
            refused = await admin.patch(at, json={"config": {}}, headers={"If-Match": f'"{wrong}"'})
            assert refused.status_code == 422, wrong[:20]
        await admin.patch(at, json={"config": {"log": "debug", "telemetry_s": None}})
        await soon(lambda: device.desired and device.desired[-1].version == 2)
        assert device.desired[-1].doc == {"config": {"log": "debug"}}
        await device.report("reported", {"version": 7, "doc": {"config": {"version": 2}}})
        seen = await soon(lambda: _reported(hub, "press-1"))
        assert seen == (7, {"config": {"version": 2}})
    entries = [e for e in await hub.services.audit.newest() if e["action"] == "configure:device"]
    assert [e["detail"]["patch"] for e in entries][-1] == {"config": {"telemetry_s": 5}}


async def _reported(hub: Hub, name: str) -> tuple[int, object] | None:
    row = await hub.services.devices.row(name)
    return (row.reported_version, row.reported) if row.reported else None


@pytest.mark.parametrize("taken", ["director", "bundles", "updates", "activation"])
async def test_what_other_routes_sign_or_guard_is_not_changed_here(hub: Hub, taken: str) -> None:
    await enrolled(hub, "press-1")
    answer = await (await hub.login()).patch("/v1/devices/press-1/desired", json={taken: None})
    assert answer.status_code == 422
    assert answer.json()["hint"]


async def test_an_operator_configures_no_device(hub: Hub) -> None:
    await enrolled(hub, "press-1")
    operator = await hub.user("operator")
    assert (await operator.patch("/v1/devices/press-1/desired", json={"config": {}})).status_code == 403


async def test_a_real_device_takes_a_table_with_no_restart_and_says_why_it_refuses_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path) as hub:
        device = Device("press-1", tmp_path, hub)
        token = (await hub.post("/v1/enrolments", {"name": "press-1"}))["token"]
        await device.start("--hub", hub.url, "--token", token, "--pack", "tests.e2e.daemon_pack")
        await until("press-1 there", 60, _there, hub, device)
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.setenv("OUTRIDER_HUB", hub.url)
        monkeypatch.setenv("OUTRIDER_TOKEN", hub.token)

        async def told(version: int) -> dict[str, object] | None:
            config = (await hub.get("/v1/devices/press-1"))["reported"].get("config", {})
            return config if config.get("version") == version else None

        shell = CliRunner()
        given = ["desired", "press-1", "--set", "telemetry_s=0.2", "--set", "log=debug", "--expect", "0", "--json"]
        made = shell.invoke(app, given)
        assert made.exit_code == 0, made.output
        assert json.loads(made.output)["desired"] == {"config": {"telemetry_s": 0.2, "log": "debug"}}
        assert "error" not in (await until("the table is taken", 30, told, 1))
        before = (await device.status())["last_seq"]
        await until("samples at the new rate", 10, _beyond, device, before + 20)
        assert shell.invoke(app, ["desired", "press-1", "--set", "log=loud"]).exit_code == 0
        assert "loud" in str((await until("the refusal", 30, told, 2))["error"])
        assert "D outrider: config of version 1 is in force" in device.process.log.read_text()
        await device.stop()


async def _beyond(device: Device, seq: int) -> bool | None:
    return (await device.status())["last_seq"] > seq or None


async def _there(hub: FleetHub, device: Device) -> bool | None:
    device.process.check()
    return any(each["presence"]["online"] for each in await hub.get("/v1/devices")) or None


async def test_the_broker_never_retains_an_older_document_than_went_out(database: Database) -> None:
    retained: dict[str, Desired] = {}

    async def publish(device: str, desired: Desired) -> bool:
        retained[device] = desired
        if device == "press-1" and desired.version == 1 and len(retained) == 2:  # all are sent again, press-2 is next
            await twin.patch_desired("press-2", {"a": 2}, "admin")
        return True

    await _known(database, "press-1", "press-2")
    twin = Twin(database, publish)
    for name in ("press-1", "press-2"):
        await twin.patch_desired(name, {"a": 1}, "admin")
    await twin.send_all()
    assert retained["press-2"].doc == {"a": 2}


async def test_what_a_stalled_broker_did_not_take_is_published_again(database: Database) -> None:
    stalled, told = True, list[tuple[str, int]]()

    async def publish(device: str, desired: Desired) -> bool:
        told.append((device, desired.version))
        return not stalled

    await _known(database, "press-1", "press-2")
    twin = Twin(database, publish)
    await twin.patch_desired("press-1", {"a": 1}, "admin")
    await twin.send_owed()
    stalled = False
    await twin.patch_desired("press-2", {"a": 1}, "admin")
    for _ in range(2):
        await twin.send_owed()
    assert told == [("press-1", 1), ("press-1", 1), ("press-2", 1), ("press-1", 1)]


async def _known(database: Database, *names: str) -> None:
    rows = [{"name": n, "public_key": "", "enrolled": 0.0, "desired": {}, "reported": {}} for n in names]
    await database.write(lambda c: c.execute(devices.insert(), rows))


@pytest.mark.parametrize(
    ("patch", "said"),
    [
        ({"updates": {"activate": ["25:00-26:00"]}}, "window '25:00-26:00': times go from 00:00 to 24:00"),
        ({"updates": {"time_zone": "Europe/Nowhere"}}, "time zone 'Europe/Nowhere' is not known"),
        ({"updates": {"min_batery": 40}}, "unknown field `min_batery`"),
        ({"updates": {"min_battery": "much"}}, "$.updates.min_battery"),
        ({"updates": [1]}, "body.updates: Input should be a valid dictionary"),
        ({"activation": {"net": {"policy": "now"}}}, "Invalid enum value 'now'"),
        ({"activation": {"net": {"trial": {"share": 2}}}}, "share, max_error_rate and min_agreement are from 0 to 1"),
        ({"activation": {"net": "hand-over"}}, "$.activation[...]"),
        ({"update": {"min_battery": 40}}, "Extra inputs are not permitted"),
    ],
)
async def test_rules_for_updates_that_a_device_would_refuse_are_refused_here(
    hub: Hub, patch: dict[str, object], said: str
) -> None:
    await enrolled(hub, "press-1")
    admin, at = await hub.login(), "/v1/devices/press-1/updates"
    good = {"updates": {"min_battery": 40, "activate": ["mon-fri 02:00-04:00"]}, "activation": {"net": {"trial": {}}}}
    assert (await admin.patch(at, json=good)).status_code == 200
    refused = await admin.patch(at, json=patch)
    assert refused.status_code == 422, refused.text
    assert said in refused.json()["detail"], refused.text
    kept = (await admin.get("/v1/devices/press-1")).json()
    assert (kept["desired"], kept["desired_version"]) == (good, 1)
    less = await admin.patch(at, json={"updates": {"min_battery": None}, "activation": None})
    assert less.json()["desired"] == {"updates": {"activate": ["mon-fri 02:00-04:00"]}}


async def test_rules_of_before_that_no_device_takes_hold_up_nothing_else_and_can_be_mended(hub: Hub) -> None:
    await enrolled(hub, "press-1")
    admin, at = await hub.login(), "/v1/devices/press-1/updates"
    await hub.services.db.write(lambda c: c.execute(devices.update().values(desired={"updates": {"min_batery": 40}})))
    assert (await admin.patch("/v1/devices/press-1/desired", json={"config": {"log": "debug"}})).status_code == 200
    assert (await admin.patch(at, json={"activation": {"net": {"trial": {}}}})).status_code == 200
    assert (await admin.patch(at, json={"updates": {"min_battery": 40}})).status_code == 422
    mended = await admin.patch(at, json={"updates": {"min_battery": 40, "min_batery": None}})
    assert mended.json()["desired"]["updates"] == {"min_battery": 40}
