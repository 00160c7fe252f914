"""Rollouts carried out by a real hub: devices over real MQTT, signed directives, a restart, the API and its rights."""

import asyncio
import hashlib
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from sqlalchemy.exc import OperationalError

from edge_agent.wire.bundle import Sealed, open_directive
from hub import rollout_runner
from tests.hub.rig import Device, Hub, enrolled, running, until

REASON = "golden probe: 3 of 8 answers differ"


async def publish(admin: httpx.AsyncClient, version: str, **meta: Any) -> None:
    content = f"weights {version}".encode()
    digest = hashlib.sha256(content).hexdigest()
    await admin.put(f"/v1/blobs/{digest}", content=content)
    entry = {"path": "model.bin", "size": len(content), "sha256": digest}
    manifest = {"name": "reader", "version": version, "kind": "onnx", "files": [entry], "meta": meta}
    assert (await admin.post("/v1/bundles", json={"manifest": manifest})).status_code == 201


async def obey(device: Device, bad: dict[str, str]) -> None:
    """Install what the signed directive says, or quarantine it as `bad` (version: reason) says."""
    runs, counter = "", 0
    while True:
        await until(lambda: device.desired and device.desired[-1].doc.get("director"), 60)
        directive = open_directive(device.hub_key, msgspec.convert(device.desired[-1].doc["director"], Sealed))
        if directive.counter > counter and "reader" in directive.bundles:
            counter, target = directive.counter, directive.bundles["reader"].version
            report = {"version": runs, "target": target, "state": "downloading", "error": "", "of_the_future": 1}
            await device.report("reported", {"version": 1, "doc": {"bundles": {"reader": report}}})
            if reason := bad.get(target, ""):
                report |= {"state": "quarantined", "error": reason, "why": {"figures": {"agreement": 0.61}}}
            else:
                runs = target
                report |= {"version": runs, "state": "committed"}
            await device.report("reported", {"version": 2, "doc": {"bundles": {"reader": report}}})
        await asyncio.sleep(0.02)


@asynccontextmanager
async def fleet(hub: Hub, count: int, bad: dict[str, dict[str, str]] | None = None) -> AsyncIterator[list[Device]]:
    async with AsyncExitStack() as stack:
        devices = [await enrolled(hub, f"press-{n}") for n in range(count)]
        for device in devices:
            await stack.enter_async_context(device.online())
        tasks = [asyncio.create_task(obey(device, (bad or {}).get(device.name, {}))) for device in devices]
        await until(lambda: all(hub.services.devices.online(device.name) for device in devices))
        yield devices
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_runner, "TICK_S", 0.05)
    monkeypatch.setattr(rollout_runner, "REFRESH_S", 600.0)  # what is not heard is missed
    monkeypatch.setattr(rollout_runner, "GRACE_S", 0.0)


async def start(admin: httpx.AsyncClient, version: str = "2", **plan: Any) -> str:
    made = await admin.post("/v1/rollouts", json={"plan": {"bundle": "reader", "version": version} | plan})
    assert made.status_code == 201, made.text
    return str(made.json()["id"])


async def reached(admin: httpx.AsyncClient, id: str, status: str) -> dict[str, Any]:
    async def there() -> dict[str, Any] | None:
        shown: dict[str, Any] = (await admin.get(f"/v1/rollouts/{id}")).json()
        return shown if shown["status"] == status else None

    found: dict[str, Any] = await until(there, 30)
    return found


async def test_waves_reach_devices_a_failure_pauses_with_its_reason_and_a_rollback_undoes_it(hub: Hub) -> None:
    admin = await hub.login()
    for version in ("1", "2"):
        await publish(admin, version)
    async with fleet(hub, 5, {"press-3": {"2": REASON}}) as devices:
        first = await reached(admin, await start(admin, "1"), "succeeded")
        assert first["waves"][0]["steps"] == {"succeeded": 5}
        assert first["reason"] == "5 devices have it"

        id = await start(admin, waves=[{"count": 2}, {"approval": True}], failure=0.0, min_sample=1)

        async def stands() -> Any:
            shown = (await admin.get(f"/v1/rollouts/{id}")).json()
            return shown if "approval" in shown["reason"] or shown["status"] == "paused" else None

        shown = await until(stands)
        while shown["status"] != "paused":
            if "approve" in shown["commands"]:
                assert (await admin.post(f"/v1/rollouts/{id}/approve")).status_code == 200
            shown = (await admin.get(f"/v1/rollouts/{id}")).json()
        assert REASON in shown["reason"]
        failed = (await admin.get(f"/v1/rollouts/{id}/devices", params={"step": "failed"})).json()
        assert [(d["device"], d["reason"], d["figures"], d["before"]) for d in failed] == [
            ("press-3", REASON, {"agreement": 0.61}, "1")
        ]
        assert [entry[1] for entry in failed[0]["history"]][:2] == ["pending", "assigned"]

        assert (await admin.post(f"/v1/rollouts/{id}/rollback")).status_code == 200

        async def undone() -> bool:
            told = (await admin.get("/v1/rollouts/" + id)).json()
            return not told["live"]

        await until(undone)
        for device in devices:
            assert device.desired[-1].doc["bundles"]["reader"]["version"] == "1"
        rows = {d["device"]: d for d in (await admin.get(f"/v1/rollouts/{id}/devices")).json()}
        assert rows["press-3"]["step"] == "reverted"
        assert {row["step"] for row in rows.values()} <= {"reverted", "skipped"}
        late = await admin.post(f"/v1/rollouts/{id}/resume")
        assert late.status_code == 409
        actions = {
            entry["action"] for entry in (await admin.get("/v1/audit", params={"limit": 1000})).json()["entries"]
        }
        assert {"create:rollout", "advance:rollout", "rollback:rollout", "assign:bundle"} <= actions
    await admin.aclose()


async def test_a_hub_that_is_started_again_goes_on_where_it_was(tmp_path: Path) -> None:
    async with running(tmp_path / "hub") as hub:
        admin = await hub.login()
        await publish(admin, "2")
        async with fleet(hub, 2):
            id = await start(admin, waves=[{"count": 1}, {"approval": True}])
            await until(lambda: _says(admin, id, "waits for approval"))
    async with running(tmp_path / "hub") as hub:
        admin = await hub.login()
        shown = (await admin.get(f"/v1/rollouts/{id}")).json()
        assert (shown["status"], shown["wave"]) == ("running", 1)
        await admin.post(f"/v1/rollouts/{id}/approve")
        await until(lambda: _says(admin, id, "wave 2"))
        steps = [wave["steps"] for wave in (await admin.get(f"/v1/rollouts/{id}")).json()["waves"]]
        assert steps == [{"succeeded": 1}, {"pending": 1}]  # nobody is online here
        await admin.aclose()


async def _says(admin: httpx.AsyncClient, id: str, words: str) -> bool:
    shown = (await admin.get(f"/v1/rollouts/{id}")).json()
    return words in shown["reason"] or words == f"wave {shown['wave']}"


async def test_labels_facts_and_hardware_choose_and_a_newer_rollout_takes_over(hub: Hub) -> None:
    admin = await hub.login()
    await publish(admin, "2")
    await publish(admin, "3")
    await publish(admin, "4", hardware=["aarch64"])
    async with fleet(hub, 3) as devices:
        await devices[0].report("reported", {"doc": {"agent": {"machine": "x86_64"}}})
        assert (
            await admin.put("/v1/devices/press-0/labels", json={"groups": ["north"], "tags": ["line"]})
        ).status_code == 200
        assert (await admin.put("/v1/devices/press-1/labels", json={"groups": ["north"]})).status_code == 200
        assert (await admin.put("/v1/devices/press-1/labels", json={"zone": "Nowhere/Land"})).status_code == 422
        assert (await admin.put("/v1/devices/oven-9/labels", json={})).status_code == 404
        other = await reached(admin, await start(admin, "4", select={"devices": ["press-0"]}), "succeeded")
        assert other["waves"][0]["steps"] == {"skipped": 1}
        older = await start(admin, select={"groups": ["north"]}, waves=[{"count": 1}, {"approval": True}])
        await until(lambda: _says(admin, older, "waits for approval"))
        newer = await start(admin, "3", select={"groups": ["north"]})
        assert (await reached(admin, newer, "succeeded"))["waves"][0]["steps"] == {"succeeded": 2}
        await until(lambda: _says(admin, older, "waits for approval"))
        assert (await admin.post(f"/v1/rollouts/{older}/approve")).status_code == 200
        ended = await reached(admin, older, "succeeded")
        assert ended["reason"] == "1 devices have it; a newer rollout took over 1"
    await admin.aclose()


async def test_who_may_read_rollouts_of_a_group_sees_those_of_its_devices_and_nothing_of_others(hub: Hub) -> None:
    admin = await hub.login()
    for version in ("2", "3"):
        await publish(admin, version)
    given = {"line": ["read:rollout:group=line-2"], "stranger": ["read:rollout:oven-*"]}
    for role, permissions in given.items():
        assert (await admin.put(f"/v1/roles/{role}", json={"permissions": permissions})).status_code == 204
    line, stranger = await hub.user("line"), await hub.user("stranger")
    async with fleet(hub, 3, {"press-2": {"2": REASON}}):
        for name in ("press-0", "press-1"):
            await admin.put(f"/v1/devices/{name}/labels", json={"groups": ["line-2"]})
        theirs = await reached(admin, await start(admin, "3", select={"devices": ["press-2"]}), "succeeded")
        both = await start(admin, failure=0.0, min_sample=1, select={"devices": ["press-1", "press-2"]})
        assert REASON in (await reached(admin, both, "paused"))["reason"]
        (seen,) = (await line.get("/v1/rollouts")).json()
        shown = await line.get(f"/v1/rollouts/{both}")
        assert shown.json() | {"tick_ms": 0} == seen | {"tick_ms": 0}
        assert (seen["id"], seen["status"], seen["waves"][0]["devices"]) == (both, "paused", 1)
        devices = await line.get(f"/v1/rollouts/{both}/devices")
        assert [each["device"] for each in devices.json()] == ["press-1"]
        assert not any(word in shown.text + devices.text for word in ("press-2", REASON))
        assert len((await admin.get("/v1/rollouts")).json()) == 2
        assert (await line.post(f"/v1/rollouts/{both}/abort")).status_code == 403
        assert (await stranger.get("/v1/rollouts")).json() == []
        for who, unseen in ((line, theirs["id"]), (stranger, theirs["id"]), (stranger, both)):
            for part in ("", "/devices", "/devices?step=failed"):
                told, unknown = [await who.get(f"/v1/rollouts/{id}{part}") for id in (unseen, "none")]
                assert (told.status_code, told.text.replace(unseen, "none")) == (404, unknown.text), part
        assert (await line.get(f"/v1/rollouts/{both}/devices?step=reverted")).json() == []
    for client in (admin, line, stranger):
        await client.aclose()


async def test_rights_and_refusals_say_what_to_do(hub: Hub) -> None:
    admin, viewer, auditor = await hub.login(), await hub.user("viewer"), await hub.user("auditor")
    developer = await hub.user("developer")
    await publish(admin, "2")
    plan = {"plan": {"bundle": "reader", "version": "2"}, "draft": True}
    assert (await viewer.get("/v1/rollouts")).json() == []
    for reader in (viewer, auditor):
        assert (await reader.post("/v1/rollouts", json=plan)).status_code == 403
    made = (await developer.post("/v1/rollouts", json=plan)).json()
    assert (made["status"], made["commands"]) == ("draft", ["resume", "abort"])
    assert (await developer.post(f"/v1/rollouts/{made['id']}/approve")).status_code == 403
    assert (await admin.post(f"/v1/rollouts/{made['id']}/approve")).status_code == 409
    missing = await admin.post("/v1/rollouts", json={"plan": {"bundle": "reader", "version": "9"}})
    assert missing.status_code == 404
    wrong = await admin.post("/v1/rollouts", json={"plan": {"bundle": "reader", "version": "2", "wave": []}})
    assert wrong.status_code == 422
    assert "wave" in wrong.json()["detail"]
    assert (await admin.post("/v1/rollouts/none/pause")).status_code == 404
    assert (await admin.post(f"/v1/rollouts/{made['id']}/explode")).status_code == 422
    for client in (admin, viewer, auditor, developer):
        await client.aclose()


async def test_no_device_stops_rollouts_by_what_it_reports_of_itself(hub: Hub) -> None:
    admin = await hub.login()
    await publish(admin, "2", hardware=["aarch64"])
    async with fleet(hub, 2) as devices:
        for told in ("a text", ["a list"]):
            await devices[0].report("reported", {"doc": {"agent": told}})
        await until(lambda: devices[0].acked()[1] == devices[0].seq)
        assigned = await admin.post("/v1/devices/press-0/bundles", json={"name": "reader", "version": "2"})
        assert assigned.status_code == 201
        assert (await reached(admin, await start(admin), "succeeded"))["waves"][0]["devices"] == 2
    await admin.aclose()


def full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The hub's database takes so many writes for rollouts and no more, as when its disk is full."""
    write, taken = hub.services.db.write, 0

    async def limited(change: Any) -> Any:
        nonlocal taken
        taken += change.__module__ == rollout_runner.__name__
        if taken > after:
            raise OperationalError("", {}, Exception("disk I/O error"))
        return await write(change)

    monkeypatch.setattr(hub.services.db, "write", limited)


async def test_a_rollback_that_was_cut_off_goes_on_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path / "hub") as hub:
        admin = await hub.login()
        await publish(admin, "2")
        async with fleet(hub, 2):
            id = await start(admin)
            await reached(admin, id, "succeeded")
            full_disk(hub, monkeypatch, after=2)  # the command, and what the tick decided; nobody is directed
            rollouts = hub.services.rollouts
            await rollouts.command(id, "rollback", "admin")
            with pytest.raises(OperationalError):
                await rollouts.tick()
    async with running(tmp_path / "hub") as hub:
        admin = await hub.login()

        async def undone() -> bool:
            shown = [(await admin.get(f"/v1/devices/press-{n}")).json()["desired"]["bundles"] for n in range(2)]
            return shown == [{}, {}] and not (await admin.get(f"/v1/rollouts/{id}")).json()["live"]

        await until(undone)


async def test_a_command_that_could_not_be_kept_is_not_obeyed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    admin = await hub.login()
    await publish(admin, "2")
    id = await start(admin, not_before="2999-01-01T00:00:00+00:00")
    with monkeypatch.context() as broken:
        full_disk(hub, broken, after=0)
        with pytest.raises(OperationalError):
            await hub.services.rollouts.command(id, "abort", "admin")
    assert (await admin.get(f"/v1/rollouts/{id}")).json()["status"] == "scheduled"
    assert list(hub.services.rollouts._lives) == [id], "it still begins when its time has come"
    await admin.aclose()


async def test_a_command_right_after_a_start_finds_nobody_missing_who_had_no_time_to_show(hub: Hub) -> None:
    admin = await hub.login()
    await publish(admin, "2")
    await enrolled(hub, "press-1")
    id = await start(admin, timeout_s=0.5)
    await reached(admin, id, "running")
    assert (await admin.post(f"/v1/rollouts/{id}/pause")).status_code == 200
    await asyncio.sleep(1)
    hub.services.rollouts._lives[id].waits = time.monotonic() + 600  # as after a start
    assert (await admin.post(f"/v1/rollouts/{id}/resume")).json()["status"] == "running"
    await asyncio.sleep(0.5)
    shown = (await admin.get(f"/v1/rollouts/{id}")).json()
    assert (shown["status"], shown["waves"][0]["steps"]) == ("running", {"pending": 1})
    await admin.aclose()


async def test_a_rollout_that_raises_says_so_where_one_looks_and_the_others_go_on(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hub.rollout_runner")
    admin, decide, died = await hub.login(), rollout_runner.rollout.tick, 0

    def tick(run: Any, *rest: Any) -> Any:
        nonlocal died
        if run.plan.version == "1":
            run.reason, died = "half decided", died + 1
            raise ZeroDivisionError("nobody foresaw this")
        return decide(run, *rest)

    for version in ("1", "2"):
        await publish(admin, version)
    async with fleet(hub, 2):
        with monkeypatch.context() as broken:
            broken.setattr(rollout_runner.rollout, "tick", tick)
            bad = await start(admin, "1", select={"devices": ["press-0"]})
            await reached(admin, await start(admin, "2", select={"devices": ["press-1"]}), "succeeded")
            await until(lambda: died > 3)
            shown = (await admin.get(f"/v1/rollouts/{bad}")).json()
            assert shown["error"] == "ZeroDivisionError: nobody foresaw this"
            assert shown["error"] in shown["reason"]
            assert shown["error"] in (await admin.get("/v1/rollouts")).json()[1]["reason"]
        shown = await reached(admin, bad, "succeeded")
        assert (shown["error"], shown["reason"]) == ("", "1 devices have it")
    told = [record.message for record in caplog.records if bad in record.message]
    assert told == [f"rollout {bad} cannot go on; it is tried again each tick", f"rollout {bad} goes on again"]
    await admin.aclose()


async def test_a_rollout_that_cannot_be_read_at_a_start_stops_no_other(tmp_path: Path) -> None:
    async with running(tmp_path / "hub") as hub:
        admin = await hub.login()
        for version in ("1", "2"):
            await publish(admin, version)
        bad, good = [await start(admin, version, not_before="2999-01-01T00:00:00+00:00") for version in ("1", "2")]
    with sqlite3.connect(tmp_path / "hub" / "hub.db") as of_a_newer_hub:
        of_a_newer_hub.execute("UPDATE rollouts SET run = json_set(run, '$.status', 'unheard') WHERE id = ?", [bad])
    of_a_newer_hub.close()
    async with running(tmp_path / "hub") as hub:
        await until(lambda: list(hub.services.rollouts._lives) == [good])
        admin = await hub.login()
        by_id = {each["id"]: each for each in (await admin.get("/v1/rollouts")).json()}
        assert "it cannot be read: Invalid enum value 'unheard'" in by_id[bad]["reason"]
        assert (by_id[bad]["status"], by_id[bad]["commands"], by_id[good]["error"]) == ("scheduled", [], "")
        refused = await admin.post(f"/v1/rollouts/{bad}/pause")
        assert refused.status_code == 409
        assert "cannot be read" in refused.text
        await admin.aclose()
