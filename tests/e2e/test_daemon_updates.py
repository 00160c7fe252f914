"""A worse model over the wire: it goes back by itself, and device, command line and hub all say why."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench.fleet import Device, Hub, running, until
from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.wire.bundle import BundleKind, Manifest, scan
from edge_agent.wire.messages import encode
from models.publish import publish
from tests.e2e.test_daemon_hub import enrolled
from tests.update.test_trial import asked, network


def bundle(folder: Path, version: str, model: bytes) -> Path:
    files = folder / version / "files"
    files.mkdir(parents=True)
    (files / "model.onnx").write_bytes(model)
    golden = {"inputs": asked(), "outputs": OnnxNetwork(files).infer(asked())}
    (files / "probe.msgpack").write_bytes(msgspec.msgpack.encode(golden))
    manifest = Manifest("net", version, BundleKind.ONNX, scan(files), probe={"file": "probe.msgpack"})
    (folder / version / "bundle.json").write_bytes(encode(manifest))
    return folder / version


async def reported(hub: Hub, version: str, state: str, device: str = "press-1") -> dict[str, Any]:
    async def there() -> dict[str, Any] | None:
        bundles = (await hub.get(f"/v1/devices/{device}"))["reported"].get("bundles", {})
        found: dict[str, Any] = bundles.get("net", {})
        return found if (found.get("target"), found.get("state")) == (version, state) else None

    return await until(f"{version} {state}", 90, there)


async def update(device: Device, token: str, *args: str) -> str:
    where = ("--api", str(device.client.base_url), "--token", token)
    command = [sys.executable, "-m", "edge_agent.cli", "update", *args, *where]
    done = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    out = (await done.communicate())[0].decode()
    assert done.returncode == 0, out
    return out


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_worse_model_goes_back_the_hub_knows_why_and_a_neighbour_gives_the_good_one(tmp_path: Path) -> None:
    async with running(tmp_path) as hub:
        device = await enrolled(hub, tmp_path, "press-1", "--neighbours", "auto")
        for version, seed in (("1", 1), ("2", 2), ("3", 1)):
            model = network(seed, noise=0.001 if version == "3" else 0.0)
            made = await asyncio.to_thread(bundle, tmp_path / "bundles", version, model)
            await asyncio.to_thread(publish, hub.url, hub.token, made)
        assign = "/v1/devices/press-1/bundles"
        await hub.post(assign, {"name": "net", "version": "1"})
        await reported(hub, "1", "committed")
        plan = {"activation": {"net": {"trial": {"seconds": 0.2, "max_latency_ratio": 1000}}}}
        answer = await hub.client.patch("/v1/devices/press-1/updates", json=plan)
        assert answer.status_code == 200, answer.text
        await hub.post(assign, {"name": "net", "version": "2"})
        seen = await reported(hub, "2", "quarantined")
        assert seen["version"] == "1"
        assert "agreement" in seen["error"]
        assert seen["why"]["figures"]["decided"] == "probe"
        assert "the golden probe decides" in seen["why"]["figures"]["note"]
        assert seen["why"]["samples"]
        text = await update(device, hub.token, "show")
        assert "2 rolled back: decided probe" in text
        assert json.loads(await update(device, hub.token, "show", "--json"))["bundles"]["net"]["why"]["samples"]

        await update(device, hub.token, "hold", "--minutes", "30", "--reason", "batch 7 runs")
        await hub.post(assign, {"name": "net", "version": "3"})
        assert "held: batch 7 runs" in (await reported(hub, "3", "waiting"))["error"]

        async def held() -> dict[str, Any] | None:
            found: dict[str, Any] = (await hub.get("/v1/devices/press-1"))["reported"].get("updates", {})
            return found.get("hold")

        assert (await until("the hold at the hub", 30, held))["reason"] == "batch 7 runs"
        await update(device, hub.token, "release")
        assert (await reported(hub, "3", "committed"))["trial"]["decided"] == "probe"

        for blob in [path for path in (hub.data / "blobs").glob("??/*") if path.stat().st_size > 3000]:
            blob.unlink()  # the hub has manifests and indexes left: no model, no pack
        second = await enrolled(hub, tmp_path, "press-2", "--neighbours", "auto")
        await hub.post("/v1/devices/press-2/bundles", {"name": "net", "version": "3"})
        await reported(hub, "3", "committed", "press-2")  # from the device next door
        await device.stop()
        await second.stop()
