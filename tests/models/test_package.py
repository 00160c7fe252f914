"""Bundles of the real models: built once, one digest everywhere, with probes that tell good from bad."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from typer.testing import CliRunner

from edge_agent.engines.onnxruntime import OnnxNetwork
from edge_agent.errors import Refused
from edge_agent.update import probe
from edge_agent.update.download import Downloads, hub_client
from edge_agent.update.service import BundleReport, UpdateService
from edge_agent.update.slots import Installed
from edge_agent.update.trial import Activation, Figures
from edge_agent.update.trust import Director, Repository
from edge_agent.wire.bundle import BundleKind, Manifest, content_digest, scan
from edge_agent.wire.signing import SigningKey, VerifyKey
from edge_agent.wire.tensor import Tensor
from edge_agent.wire.tokens import issue_device_token
from models.cli import app
from models.errors import ModelError
from models.golden import TEXT
from models.package import build, open_bundle, package
from models.publish import login, publish


def test_bundle_has_the_digest_of_the_folder_it_was_made_from(model_cache: Path, tmp_path: Path) -> None:
    folder = build("ppocr-det", model_cache)
    bundle, manifest = package("ppocr-det", model_cache, tmp_path / "bundle")
    assert content_digest(scan(folder)) == content_digest(scan(bundle / "files")) == manifest.meta["content_digest"]
    assert open_bundle(bundle) == manifest
    assert manifest.kind is BundleKind.ONNX
    assert manifest.license == "Apache-2.0"
    assert manifest.inputs == [{"name": "x", "dtype": "float32", "shape": [-1, 3, -1, -1]}]
    assert (bundle / "files" / "LICENSE").is_file()


def test_model_is_built_once(model_cache: Path) -> None:
    first = build("ppocr-rec", model_cache)
    made = (first / "model.onnx").stat().st_mtime_ns
    assert build("ppocr-rec", model_cache) == first
    assert (first / "model.onnx").stat().st_mtime_ns == made


@pytest.mark.parametrize("name", ["ppocr-det", "ppocr-rec"])
def test_golden_probe_accepts_the_model_and_refuses_another_answer(model_cache: Path, name: str) -> None:
    folder = build(name, model_cache)
    _, manifest = package(name, model_cache)
    golden = probe.golden(Installed("0" * 64, folder, manifest))
    assert golden is not None
    network = OnnxNetwork(folder)
    found = network.infer(golden.inputs)
    probe.compare(manifest.probe, golden.outputs, found)
    output, tensor = next(iter(found.items()))
    changed = found | {output: Tensor(tensor.dtype, tensor.shape, b"\x40" * len(tensor.data))}
    with pytest.raises(Refused, match=f"output {output}"):
        probe.compare(manifest.probe, golden.outputs, changed)
    with pytest.raises(Refused, match="is missing"):
        probe.compare(manifest.probe, golden.outputs, {})
    network.close()


def test_golden_probe_of_the_reader_is_a_number_it_reads(model_cache: Path) -> None:
    golden = msgspec.msgpack.decode((build("ppocr-rec", model_cache) / "probe.msgpack").read_bytes(), type=probe.Golden)
    points = memoryview(golden.outputs["codepoint"].data).cast("i")
    assert "".join(chr(point) for point in points if point) == TEXT
    assert min(memoryview(golden.outputs["confidence"].data).cast("f")) > 0.9


def test_language_bundle_has_a_probe_in_text(model_cache: Path, smollm2_folder: Path) -> None:
    _, manifest = package("smollm2", model_cache)
    assert manifest.kind is BundleKind.LLM
    assert "Paris" in manifest.probe["text"]
    assert manifest.meta["content_digest"] == content_digest(scan(smollm2_folder))
    probe.compare_text(manifest.probe, manifest.probe["text"])
    with pytest.raises(Refused):
        probe.compare_text(manifest.probe, " London")


@pytest.mark.parametrize("damage", ["file", "manifest", "gone"])
def test_damaged_bundle_is_not_published(model_cache: Path, tmp_path: Path, damage: str) -> None:
    bundle, _ = package("ppocr-det", model_cache, tmp_path / "bundle")
    if damage == "file":
        (bundle / "files/LICENSE").unlink()
        (bundle / "files/LICENSE").write_text("mine")
    else:
        (bundle / "bundle.json").write_text('{"name": "../x"}')
    if damage == "gone":
        (bundle / "bundle.json").unlink()
    with pytest.raises(ModelError):
        open_bundle(bundle)


def test_folder_that_is_no_bundle_is_never_overwritten(model_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ModelError, match="no bundle"):
        package("ppocr-det", model_cache, tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    """URL of a real hub in a process of its own; its admin's password is `secret-secret`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", "from hub.cli import app; app()", "run", "--no-dashboard"]
    command += ["--data", str(tmp_path / "hub"), "--http", address]
    environment = os.environ | {"OUTRIDER_ADMIN_PASSWORD": "secret-secret"}
    with (tmp_path / "hub.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=Path(__file__).parents[2])
    try:
        pause = threading.Event()
        for _ in range(600):
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://{address}/healthz").status_code == 200:
                    break
            assert process.poll() is None, (tmp_path / "hub.log").read_text()
            pause.wait(0.05)
        else:
            pytest.fail(f"the hub does not start: {(tmp_path / 'hub.log').read_text()}")
        yield f"http://{address}"
    finally:
        process.terminate()
        process.wait(20)


class RunsProbe:
    """Loads the candidate with the serving engine and compares its golden probe."""

    async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
        golden = probe.golden(candidate)
        assert golden is not None
        network = await asyncio.to_thread(OnnxNetwork, candidate.folder)
        probe.compare(candidate.manifest.probe, golden.outputs, network.infer(golden.inputs))
        network.close()
        return Figures("probe")


def _enrol(hub: str, token: str) -> tuple[SigningKey, str, str, VerifyKey]:
    key = SigningKey.generate()
    bearer = {"Authorization": f"Bearer {token}"}
    ticket = httpx.post(f"{hub}/v1/enrolments", json={"name": "line-1", "ttl_s": 60}, headers=bearer).json()["token"]
    body = {"token": ticket, "name": "line-1", "public_key": key.public.text}
    answer = httpx.post(f"{hub}/v1/enrol", json=body).json()
    return key, answer["fleet"], answer["device"], VerifyKey.from_text(answer["hub_key"])


def _assign(hub: str, token: str, device: str, manifest: Manifest) -> dict[str, Any]:
    bearer, body = {"Authorization": f"Bearer {token}"}, {"name": manifest.name, "version": manifest.version}
    answer: dict[str, Any] = httpx.post(f"{hub}/v1/devices/{device}/bundles", json=body, headers=bearer).json()
    return answer


async def test_published_bundle_installs_on_a_device(model_cache: Path, tmp_path: Path, hub: str) -> None:
    bundle, manifest = package("ppocr-rec", model_cache, tmp_path / "bundle")
    token = await asyncio.to_thread(login, hub, "admin", "secret-secret")
    steps: list[str] = []
    signed = await asyncio.to_thread(publish, hub, token, bundle, lambda what, *_: steps.append(what))
    assert steps.count("uploading model.onnx") > 1
    again: list[str] = []
    answer = await asyncio.to_thread(publish, hub, token, bundle, lambda what, *_: again.append(what))
    assert answer["manifest_sha256"] == signed["manifest_sha256"]
    assert again.count("uploading model.onnx") == 1  # it is there, no byte is sent
    with pytest.raises(ModelError, match=r"the hub refused \(401\)"):
        await asyncio.to_thread(login, hub, "admin", "wrong")
    with pytest.raises(ModelError, match="does not let you publish"):
        await asyncio.to_thread(publish, hub, "bad-token", bundle)

    key, fleet, device, hub_key = await asyncio.to_thread(_enrol, hub, token)
    running: asyncio.Queue[Installed] = asyncio.Queue()
    reports: list[BundleReport] = []

    async def switch(name: str, installed: Installed) -> None:
        running.put_nowait(installed)

    async def report(name: str, report: BundleReport) -> None:
        reports.append(report)

    async with hub_client(hub) as client:
        downloads = Downloads(client, lambda: issue_device_token(key, fleet, device, now=time.time()))
        director = Director(tmp_path / "trust", hub_key, fleet, device)
        known = Repository(tmp_path / "trust", downloads, director, hub_key)
        service = UpdateService(tmp_path / "device", director, known, downloads, RunsProbe(), switch, report)
        answer = await asyncio.to_thread(_assign, hub, token, device, manifest)
        assert answer["desired"]["bundles"][manifest.name]["manifest_sha256"] == signed["manifest_sha256"]
        await service.direct(answer["desired"]["director"])
        task = asyncio.create_task(service.run())
        installed = await asyncio.wait_for(running.get(), 30)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert content_digest(scan(installed.folder)) == manifest.meta["content_digest"]
    assert reports[-1].error == ""


def test_hub_that_is_not_there_is_a_clear_error(model_cache: Path, tmp_path: Path) -> None:
    bundle, _ = package("ppocr-det", model_cache, tmp_path / "bundle")
    with pytest.raises(ModelError, match=r"127\.0\.0\.1:9/? cannot be reached"):
        publish("http://127.0.0.1:9", "token", bundle)


def test_commands_speak_json_and_say_errors_with_hints(model_cache: Path) -> None:
    run = CliRunner()
    environment = {"OUTRIDER_CACHE": str(model_cache)}
    listed = json.loads(run.invoke(app, ["list", "--json"], env=environment).stdout)
    assert {row["name"] for row in listed} >= {"smollm2", "ppocr-det", "ppocr-rec"}
    built = json.loads(run.invoke(app, ["build", "ppocr-det", "--json"], env=environment).stdout)
    shown = json.loads(run.invoke(app, ["digest", built["path"], "--json"]).stdout)
    assert shown["digest"] == built["digest"]
    wrong = run.invoke(app, ["fetch", "nope", "--json"], env=environment)
    assert wrong.exit_code == 1
    assert "known:" in json.loads(wrong.stdout)["hint"]
    anonymous = run.invoke(app, ["publish", "ppocr-det", "--json"], env=environment)
    assert "who publishes" in json.loads(anonymous.stdout)["error"]
