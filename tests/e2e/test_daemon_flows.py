"""A workflow as a bundle: published, assigned, checked on the device, run; one that cannot run changes nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from bench.fleet import running, until
from edge_agent.sync.transport import MqttSession
from models.errors import ModelError
from models.package import package_workflows
from models.publish import publish
from tests.e2e.daemon_process import DaemonProcess
from tests.e2e.daemon_process import until as wait
from tests.e2e.test_daemon_hub import enrolled, job
from tests.sync.brokers import PASSWORD, USER, Mosquitto

FLOW = """workflow: stamp-once
version: "{version}"
run_as: [operator]
steps:
  - {{id: look, tool: read_sensor, args: {{sensor: wear, line: 1}}}}
  - {{id: mark, tool: {tool}, depends_on: [look], args: {{text: "{version}"}}}}
"""


POLICY = """[[interlocks]]
name = "worn"
tools = ["stamp"]
look.wear = { tool = "read_sensor", args = { sensor = "wear", line = 1 } }
never = "wear.value > 5.0"
hint = "change the stamp"
"""


def bundle(folder: Path, version: str, tool: str = "stamp") -> Path:
    files = folder / version / "stamping"
    files.mkdir(parents=True)
    (files / "stamp.yaml").write_text(FLOW.format(version=version, tool=tool))
    if version >= "4":
        (files / "policy.toml").write_text(
            POLICY if version == "4" else POLICY.replace("wear.value >", "wear.value >>")
        )
    return package_workflows(files, folder, folder / version / "bundle", version)[0]


@pytest.mark.timeout(300)
async def test_a_workflow_bundle_runs_and_one_that_could_not_run_is_refused_with_file_line_and_column(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as hub:
        device = await enrolled(hub, tmp_path, "press-1")
        for version, tool in (("1", "stamp"), ("2", "no_such_tool"), ("3", "stamp"), ("4", "stamp"), ("5", "stamp")):
            made = await asyncio.to_thread(bundle, tmp_path / "bundles", version, tool)
            await asyncio.to_thread(publish, hub.url, hub.token, made)

        async def fares(version: str) -> str:
            await hub.post("/v1/devices/press-1/bundles", {"name": "stamping", "version": version})

            async def ended() -> str | None:
                seen = (await hub.get("/v1/devices/press-1"))["reported"].get("bundles", {}).get("stamping", {})
                there = seen.get("target") == version and seen["state"] in ("committed", "quarantined")
                return f"{seen['state']} {seen['error']}" if there else None

            return await until(version, 60, ended)

        async def marks() -> list[str]:
            done = await job(hub, device, {"tool": "run_workflow", "args": {"name": "stamp-once"}})
            assert done["state"] == "succeeded", done
            return (device.state / "tools" / "stamps").read_text().split()

        assert await fares("1") == "committed "
        assert await marks() == ["1"]
        refused = await fares("2")
        assert refused.startswith("quarantined stamp.yaml:6:")
        assert "no_such_tool" in refused
        assert await marks() == ["1", "1"]  # the one before is still there
        assert await fares("3") == "committed "
        assert (await device.status())["models"]["stamping"]["state"] == "committed"
        await device.process.kill()
        await device.start()
        await until("its return", 60, ready, device)
        assert await marks() == ["1", "1", "3"]
        assert await fares("4") == "committed "
        refused = await fares("5")
        assert refused.startswith("quarantined ")
        assert "policy.toml cannot be used" in refused
        for _ in range(2):
            done = await job(hub, device, {"tool": "run_workflow", "args": {"name": "stamp-once"}})
            assert done["state"] == "failed"
            assert "the interlock worn forbids it" in done["error"]
            await device.process.kill()
            await device.start()
            await until("its return", 60, ready, device)
        await device.stop()


async def ready(device) -> bool | None:  # type: ignore[no-untyped-def]
    return True if (await device.status())["connected"] else None


def manuals(folder: Path, version: str, text: bytes) -> Path:
    files = folder / version / "manuals"
    (files / "documents").mkdir(parents=True)
    (files / "documents" / "press.md").write_bytes(text)
    return package_workflows(files, folder, folder / version / "bundle", version)[0]


@pytest.mark.timeout(200)
async def test_documents_come_to_a_device_in_a_bundle_and_one_that_is_no_text_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        pack = ("--pack", "tests.e2e.daemon_pack,tools.knowledge")
        device = await enrolled(hub, tmp_path, "press-1", *pack)
        texts = {"1": b"# Slide\n\nGrease it weekly.", "2": b"# Slide\n\nGrease it daily.", "3": b"\xff\xfe"}
        for version, text in texts.items():
            made = await asyncio.to_thread(manuals, tmp_path / "bundles", version, text)
            await asyncio.to_thread(publish, hub.url, hub.token, made)
        for version, state in (("1", "committed"), ("2", "committed"), ("3", "quarantined")):
            await hub.post("/v1/devices/press-1/bundles", {"name": "manuals", "version": version})

            async def there(version: str = version, state: str = state) -> bool | None:
                seen = (await hub.get("/v1/devices/press-1"))["reported"].get("bundles", {}).get("manuals", {})
                return True if seen.get("target") == version and seen["state"] == state else None

            await until(f"{version} {state}", 60, there)
            asked = {"tool": "search_knowledge", "args": {"question": "how often is the slide greased"}}
            done = await job(hub, device, asked)
            [passage] = done["result"]["result"]["passages"]
            often = "weekly" if version == "1" else "daily"
            assert (passage["source"], passage["text"]) == ("manuals/press.md", f"Grease it {often}.")
        await device.stop()


def test_a_folder_without_workflows_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match="is no folder of workflows"):
        package_workflows(tmp_path, tmp_path)


def test_a_message_of_the_sites_broker_starts_a_run_in_a_daemon(tmp_path: Path) -> None:
    broker, daemon = Mosquitto(tmp_path), DaemonProcess(tmp_path / "state")
    broker.start()
    (tmp_path / "password").write_text(PASSWORD)
    site = f'[site]\nbroker = "{broker.url}"\nuser = "{USER}"\npassword_file = "{tmp_path}/password"\n'
    (tmp_path / "outrider.toml").write_text(site)
    (daemon.state / "workflows").mkdir()
    text = 'workflow: door\nversion: "1"\nrun_as: [operator]\ntriggers:\n  - {mqtt: plant/door, when: payload.open}\n'
    text += "steps:\n  - {id: mark, tool: stamp, args: {text: '${event.topic}'}}\n"
    (daemon.state / "workflows/door.yaml").write_text(text)
    try:
        daemon.start("--config", str(tmp_path / "outrider.toml"))
        wait("the site's broker", lambda: daemon.status()["site"]["connected"])
        publish_one(broker, "plant/door", b'{"open": true}')
        marks = daemon.state / "tools/stamps"
        wait("the run", lambda: marks.exists() and marks.read_text().split() == ["plant/door"])
        assert daemon.status()["site"]["messages"] == 1
    finally:
        daemon.end()
        broker.stop()


def publish_one(broker: Mosquitto, topic: str, payload: bytes) -> None:
    async def send() -> None:
        async with MqttSession(broker.url, "plc", username=USER, password=PASSWORD, session_expiry=0) as plc:
            await plc.wait_connected()
            await plc.publish(topic, payload)

    asyncio.run(send())
