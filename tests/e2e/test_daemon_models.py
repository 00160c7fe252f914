"""Models over the wire to a real daemon: installed, probed, used by the agent and by a tool, kept over a kill -9."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.fleet import Hub, running, until
from models.package import package
from models.publish import publish
from tests.e2e.test_daemon_hub import enrolled

BUNDLES = ("ppocr-det", "ppocr-rec", "smollm2")


async def assign(hub: Hub, device: str, cache: Path) -> dict[str, str]:
    digests = {}
    for name in BUNDLES:
        bundle, manifest = await asyncio.to_thread(package, name, cache)
        await asyncio.to_thread(publish, hub.url, hub.token, bundle)
        await hub.post(f"/v1/devices/{device}/bundles", {"name": name, "version": manifest.version})
        digests[name] = str(manifest.meta["content_digest"])
    return digests


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_device_works_with_what_the_hub_assigned_and_a_kill_9_costs_it_nothing(
    tmp_path: Path, model_cache: Path, smollm2_folder: Path, ppocr_models: dict[str, Path]
) -> None:
    async with running(tmp_path) as hub:
        device = await enrolled(hub, tmp_path, "press-1", "--pack", "tools.sim.pack", "--option", "seed=1")
        digests = await assign(hub, "press-1", model_cache)

        async def installed() -> bool | None:
            device.process.check()
            models = (await device.status())["models"]
            return True if all(models.get(n, {}).get("state") == "committed" for n in BUNDLES) else None

        async def ended(id: str) -> dict[str, Any] | None:
            task: dict[str, Any] = (await device.client.get(f"/v1/tasks/{id}")).json()
            return task if task["state"] != "running" else None

        async def begun(id: str) -> bool | None:
            task = (await device.client.get(f"/v1/tasks/{id}")).json()
            return True if task["steps"] else None

        async def work(text: str) -> str:
            return str((await device.client.post("/v1/tasks", json={"text": text})).json()["id"])

        await until("the installation", 150, installed)
        models = (await device.status())["models"]
        assert {name: models[name]["digest"] for name in BUNDLES} == digests
        label = await device.client.post("/v1/tools/read_label", json={"args": {"camera": 1}})
        assert label.status_code == 202 or "no readable label" in label.text, label.text
        first = await until("the first task", 90, ended, await work("how hot is line 3?"))
        assert [step["role"] for step in first["steps"][:1]] == ["model"]

        interrupted = await work("read the label at camera 2")
        await until("the task to begin", 30, begun, interrupted)
        await device.process.kill()
        await device.start()
        resumed = await until("the resumed task", 120, ended, interrupted)
        assert resumed["runs"] == 2
        assert resumed["steps"][0]["role"] == "model"

        command = [sys.executable, "-m", "edge_agent.cli", "doctor", "--json", "--state", str(device.state)]
        doctor = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        said = json.loads((await doctor.communicate())[0])
        assert said["ok"], said
        proven = [check["detail"] for check in said["checks"] if check["name"] == "model"]
        assert len(proven) == len(BUNDLES)
        assert all("ran an inference" in detail for detail in proven)
        await device.stop()
