"""A running daemon with no hub: what is installed answers the clients, and what they need it does not load."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from openai import OpenAI
from tritonclient import http as triton

from edge_agent import enrol
from edge_agent.config import Settings
from edge_agent.daemon import Daemon
from edge_agent.update.slots import Offer, Slots
from edge_agent.wire.bundle import sha256
from models.package import package
from tests.e2e.daemon_process import DaemonProcess, until


@pytest.fixture
def daemon(tmp_path: Path, model_cache: Path) -> Iterator[DaemonProcess]:
    made = DaemonProcess(tmp_path / "press-1")
    slots = Slots(made.state / "bundles")
    for name in ("ppocr-rec", "smollm2"):
        bundle, manifest = package(name, model_cache)
        raw = (bundle / "bundle.json").read_bytes()
        slots.receive(name, Offer(raw, b""))
        for entry in manifest.files:
            path = slots.incoming(name, sha256(raw)) / "files" / entry.path
            path.parent.mkdir(exist_ok=True)
            shutil.copy(bundle / "files" / entry.path, path)
        slots.stage(name, sha256(raw))
        slots.commit(name, sha256(raw))
    yield made
    made.end(signal.SIGKILL)


async def test_the_clock_that_is_set_changes_no_uptime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = DaemonProcess(tmp_path / "press-1")
    state = process.state
    identity = enrol.load(state)
    assert identity is not None
    made = await Daemon.open(Settings(state, api=f"127.0.0.1:{process.port}"), identity)
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now - 9e8)
    assert 0 <= (await made.status())["uptime_s"] < 60
    made._api._socket.close()
    made._store.close()


@pytest.mark.slow
def test_a_daemon_serves_networks_and_language_models_to_the_clients_of_others(daemon: DaemonProcess) -> None:
    daemon.start("--request-mb", "1")
    auth = {"Authorization": f"Bearer {daemon.token('operator')}"}
    with OpenAI(base_url=f"{daemon.url}/v1", api_key=daemon.token("operator"), timeout=120) as client:
        until("the language model", lambda: [m.id for m in client.models.list()] == ["smollm2"], 120)
        said = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": "What is the capital of France?"}], max_tokens=12
        )
        assert "Paris" in str(said.choices[0].message.content)
    with triton.InferenceServerClient(daemon.url.removeprefix("http://")) as networks:
        until("the network", lambda: networks.is_model_ready("ppocr-rec", headers=auth) or None, 120)
        tensor = triton.InferInput("x", [1, 3, 48, 64], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 3, 48, 64), np.float32))
        found = networks.infer("ppocr-rec", [tensor], headers=dict(auth))  # it writes into them
        assert found.as_numpy("codepoint").dtype == np.int32
    url = f"{daemon.url}/v2/models/ppocr-rec/infer"
    assert httpx.post(url, content=bytes(2 << 20), headers=auth).status_code == 413
    metrics = httpx.get(f"{daemon.url}/metrics", headers=auth).text
    for model, count in (("ppocr-rec", 2), ("smollm2", 1)):
        assert f'outrider_requests_total{{model="{model}"}} {count}' in metrics
    assert 'outrider_worker_restarts_total{worker="tools"} 0' in metrics
    assert daemon.process is not None
    maps = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert not [library for library in ("numpy", "onnxruntime", "pydantic_core") if library in maps]
    assert daemon.end() == 0
