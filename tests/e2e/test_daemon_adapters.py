"""An adapter over the wire to a real daemon: beside its base model, switched under load, kept over every crash."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.fleet import Device, Hub, running, until
from edge_agent.wire.bundle import Manifest
from models.adapter import package_adapter
from models.package import package, write_bundle
from models.publish import publish
from tests.adapters import adapter
from tests.e2e.test_daemon_hub import enrolled, job


class Site:
    """A hub and a device, and the adapters a site makes for it."""

    def __init__(self, hub: Hub, device: Device, folder: Path, cache: Path, base: Path) -> None:
        self.hub, self.device, self._folder, self._cache, self._base = hub, device, folder, cache, base

    async def adapter(self, version: str, seed: int, **changed: Any) -> Manifest:
        """Publish an adapter `site`; `changed` fields of its manifest are as given."""
        made = adapter(self._folder / version, self._base, seed, version=version)
        bundle = self._folder / f"bundle-{version}"
        _, manifest = await asyncio.to_thread(package_adapter, "site", made, self._cache, bundle, version)
        if changed:
            manifest = msgspec.structs.replace(manifest, **changed)
            write_bundle(bundle, made, manifest)
        await asyncio.to_thread(publish, self.hub.url, self.hub.token, bundle)
        return manifest

    async def assign(self, name: str, version: str) -> None:
        await self.hub.post(f"/v1/devices/{self.device.name}/bundles", {"name": name, "version": version})

    async def model(self, name: str = "site") -> dict[str, Any]:
        self.device.process.check()
        found: dict[str, Any] = (await self.device.status())["models"].get(name, {})
        return found

    async def comes_to(self, state: str, target: str, name: str = "site") -> dict[str, Any]:
        async def there() -> dict[str, Any] | None:
            model = await self.model(name)
            return model if (model.get("state"), model.get("target")) == (state, target) else None

        return await until(f"{name} {target} {state}", 90, there)

    async def spoke(self) -> tuple[set[str], list[dict[str, Any]]]:
        """The adapters that a task spoke with, and its decisions as the hub has them."""
        done = await job(self.hub, self.device, {"text": "how fast is line 1?"}, "task")
        decisions = [step for step in done["result"]["steps"] if step["role"] == "model"]
        assert decisions, done
        return {decision.get("adapter", "") for decision in decisions}, decisions


@asynccontextmanager
async def site(folder: Path, cache: Path, base: Path) -> AsyncIterator[Site]:
    async with running(folder) as hub:
        device = await enrolled(hub, folder, "press-1")
        try:
            yield Site(hub, device, folder, cache, base)
        finally:
            await device.stop()


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_an_adapter_is_installed_switched_and_kept_beside_the_model_that_is_loaded_once(
    tmp_path: Path, model_cache: Path, smollm2_folder: Path
) -> None:
    bundle, base = await asyncio.to_thread(package, "smollm2", model_cache)
    async with site(tmp_path, model_cache, smollm2_folder) as it:
        first = await it.adapter("1", 1)
        await it.assign("site", "1")
        waits = await it.comes_to("failed", "1")
        assert "is for smollm2" in waits["error"]
        assert "does not run here" in waits["error"]
        await asyncio.to_thread(publish, it.hub.url, it.hub.token, bundle)
        await it.assign("smollm2", base.version)
        shown = await it.comes_to("committed", "1")  # by itself, when its base runs
        assert (shown["kind"], shown["base"], shown["digest"]) == ("adapter", "smollm2", first.meta["content_digest"])
        loaded = await it.model("smollm2")
        spoke, decisions = await it.spoke()
        assert spoke == {"site 1"}
        assert {decision["digest"] for decision in decisions} == {base.meta["content_digest"]}
        assert max(decision["prompt_tokens"] for decision in decisions) < 600  # signatures, no examples
        assert (await it.device.status())["speaks"] == {"model": base.meta["content_digest"], "adapter": "site 1"}

        await it.adapter("2", 2)  # switched while tasks run
        tasks = asyncio.create_task(_tasks(it, 6))
        await it.assign("site", "2")
        await it.comes_to("committed", "2")
        spoken = await tasks
        assert set().union(*spoken) <= {"site 1", "site 2"}
        assert (await it.spoke())[0] == {"site 2"}
        assert (await it.model("smollm2"))["load_s"] == loaded["load_s"]
        assert (await it.device.status())["workers"]["language"]["starts"] == 1

        wrong = first.meta | {"base_digest": "0" * 64}
        for version, fault, state, says in (
            ("other", {"meta": wrong}, "failed", "of digest 000000000000, installed is"),
            ("worse", {"probe": first.probe | {"text": "§"}}, "quarantined", "a good one"),
        ):
            await it.adapter(version, 3, **fault)
            await it.assign("site", version)
            shown = await it.comes_to(state, version)
            assert says in shown["error"]
            assert shown["version"] == "2"
            assert (await it.spoke())[0] == {"site 2"}

        os.kill((await it.device.status())["workers"]["language"]["pid"], signal.SIGKILL)
        assert (await it.spoke())[0] == {"site 2"}
        assert (await it.device.status())["workers"]["language"]["starts"] == 2

        await it.adapter("4", 4)
        await it.assign("site", "4")
        await it.comes_to("trial", "4")
        await it.device.process.kill()
        await it.device.start()
        await it.comes_to("committed", "4")
        assert (await it.spoke())[0] == {"site 4"}
        reported = (await it.hub.get("/v1/devices/press-1"))["reported"]["bundles"]["site"]
        assert (reported["version"], reported["kind"], reported["state"]) == ("4", "adapter", "committed")

        command = [sys.executable, "-m", "edge_agent.cli", "doctor", "--json", "--state", str(it.device.state)]
        doctor = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        said = json.loads((await doctor.communicate())[0])
        assert {"site 4", f"smollm2 {base.version}"} <= {
            check["detail"].split(" ran")[0] for check in said["checks"] if check["name"] == "model"
        }, said


async def _tasks(it: Site, count: int) -> list[set[str]]:
    return [(await it.spoke())[0] for _ in range(count)]


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_a_device_may_do_without_the_adapter(tmp_path: Path, model_cache: Path, smollm2_folder: Path) -> None:
    bundle, base = await asyncio.to_thread(package, "smollm2", model_cache)
    async with site(tmp_path, model_cache, smollm2_folder) as it:
        await it.adapter("1", 1)
        await asyncio.to_thread(publish, it.hub.url, it.hub.token, bundle)
        await it.assign("smollm2", base.version)
        await it.assign("site", "1")
        await it.comes_to("committed", "1")
        assert (await it.spoke())[0] == {"site 1"}
        for adapter_, spoke in (("none", {""}), ("site", {"site 1"})):
            await it.device.process.stop()
            await it.device.start("--adapter", adapter_, "--pack", "tests.e2e.daemon_pack")
            await it.comes_to("committed", "1")
            assert (await it.spoke())[0] == spoke
