"""A real hub, its embedded broker and a real daemon: enrolment, jobs, records, and the loss of either side."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from bench.fleet import Device, Hub, running, until
from bench.link import Link

TERMINAL = ("succeeded", "failed", "rejected", "expired", "cancelled")


@pytest.fixture
async def hub(tmp_path: Path) -> AsyncIterator[Hub]:
    async with running(tmp_path) as made:
        yield made


async def enrolled(hub: Hub, folder: Path, name: str, *args: str) -> Device:
    device = Device(name, folder, hub)
    token = (await hub.post("/v1/enrolments", {"name": name, "ttl_s": 600}))["token"]
    pack = ("--pack", "tests.e2e.daemon_pack", "--telemetry-s", "0.2")
    await device.start("--hub", hub.url, "--token", token, *pack, *args)
    await until(f"{name} online", 60, _online, hub, device)
    return device


async def _online(hub: Hub, device: Device) -> bool | None:
    device.process.check()
    seen = {each["name"]: each for each in await hub.get("/v1/devices")}
    return True if device.name in seen and seen[device.name]["presence"]["online"] else None


async def job(hub: Hub, device: Device, body: dict[str, Any], kind: str = "tool") -> dict[str, Any]:
    made = await hub.post(f"/v1/devices/{device.name}/jobs", {"kind": kind, "body": body})

    async def ended() -> dict[str, Any] | None:
        seen: dict[str, Any] = await hub.get(f"/v1/jobs/{made['id']}")
        return seen if seen["state"] in TERMINAL else None

    return await until("the end of the job", 60, ended)


async def seqs(hub: Hub, device: str) -> list[int]:
    found: list[int] = []
    while True:
        after = found[-1] if found else 0
        page = await hub.get("/v1/telemetry", device=device, after_seq=after, limit=1000)
        if not page["records"]:
            return found
        found += [record["seq"] for record in page["records"]]


async def test_a_token_works_once_and_a_name_belongs_to_one_device(hub: Hub, tmp_path: Path) -> None:
    token = (await hub.post("/v1/enrolments", {"name": "press-1", "ttl_s": 600}))["token"]
    other = (await hub.post("/v1/enrolments", {"ttl_s": 600}))["token"]
    first = Device("press-1", tmp_path, hub)
    await first.start("--hub", hub.url, "--token", token)
    await until("press-1 online", 60, _online, hub, first)
    for number, (name, shown, says) in enumerate(
        [
            ("press-2", token, "was used by press-1"),
            ("press-1", other, "belongs to another key"),
            ("press-3", "made-up", "not known"),
        ]
    ):
        again = Device(name, tmp_path / str(number), hub)
        (tmp_path / str(number)).mkdir()
        await again.start("--hub", hub.url, "--token", shown)
        await until("the refusal", 30, _ended, again)
        text = again.process.log.read_text()
        assert says in text
        assert "hint:" in text
        assert "Traceback" not in text
        assert not again.state.exists()
        await again.stop()
    await first.stop()


async def _ended(device: Device) -> bool | None:
    try:
        device.process.check()
    except Exception:  # noqa: BLE001 - that it ended is what is asked
        return True
    return None


async def test_tool_jobs_come_back_with_their_results_and_refusals(hub: Hub, tmp_path: Path) -> None:
    device = await enrolled(hub, tmp_path, "press-1")
    good = await job(hub, device, {"tool": "read_sensor", "args": {"sensor": "wear", "line": 2}})
    assert good["state"] == "succeeded"
    assert good["result"] == {"result": {"sensor": "wear", "line": 2, "value": 7.5}}
    for body, says in [
        ({"tool": "read_sensor", "args": {"sensor": "wear", "line": 9}}, "line"),
        ({"tool": "open_door", "args": {}}, "open_door"),
        ({"tool": "jam", "args": {}}, "the feeder is jammed"),
        ({"tool": "hang", "args": {}}, "no answer"),
    ]:
        bad = await job(hub, device, body)
        assert bad["state"] == "failed"
        assert says in bad["error"]
    assert (await job(hub, device, {"tool": "stamp", "args": {"text": "a"}}))["result"] == {"result": 1}
    await device.stop()


async def test_the_hub_has_every_record_once_after_cuts_and_kills(hub: Hub, tmp_path: Path) -> None:
    port = int((await hub.get("/v1/broker"))["url"].rsplit(":", 1)[1])
    async with Link("127.0.0.1", port) as link:
        device = await enrolled(hub, tmp_path, "press-1", "--broker", f"mqtt://127.0.0.1:{link.port}")
        for _ in range(2):
            before = (await device.status())["last_seq"]
            link.cut()
            await until("records while cut", 30, _beyond, device, before + 20)
            await device.process.kill()
            await device.start()
            await until("the restart", 30, _beyond, device, before + 25)
            link.mend()
            await until("catching up", 60, _caught_up, device)
        target = (await device.status())["last_seq"]
        await until("the last ack", 60, _acked, device, target)
        assert [seq for seq in await seqs(hub, "press-1") if seq <= target] == list(range(1, target + 1))
        stamped = await job(hub, device, {"tool": "stamp", "args": {"text": "b"}})
        assert stamped["result"] == {"result": 1}
        await device.stop()


async def _beyond(device: Device, seq: int) -> bool | None:
    device.process.check()
    return True if (await device.status())["last_seq"] >= seq else None


async def _caught_up(device: Device) -> bool | None:
    status = await device.status()
    return True if status["connected"] and status["outbox"]["depth"] < 10 else None


async def _acked(device: Device, seq: int) -> bool | None:
    return True if (await device.status())["acked"] >= seq else None
