"""A whole fleet loses its broker and comes back at once."""

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_agent import enrol
from edge_agent.sync.transport import MqttSession
from edge_agent.wire.signing import SigningKey
from hub.ca import Authority
from tests.hub.rig import until
from tests.hub.site import Site
from tests.sync.brokers import mosquitto

DEVICES = 500


@pytest.mark.fault(
    "500 devices reconnect at once",
    "all are connected again",
    "real: 500 TLS sessions on Mosquitto",
)
@pytest.mark.faults
@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(mosquitto() is None, reason="no mosquitto binary: apt-get install mosquitto")
async def test_five_hundred_devices_come_back_after_the_broker_restarts(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    site = await asyncio.to_thread(lambda: Site(tmp_path).start())
    authority = Authority(site.data / "ca", site.data / "root", "main")
    sessions = []
    for n in range(DEVICES):
        name, key, folder = f"d{n}", SigningKey.generate(), tmp_path / f"d{n}"
        folder.mkdir()
        key.save(folder / "key.pem")
        (folder / "ca.pem").write_text(authority.root_pem)
        leaf = authority.certify(enrol.csr(key, name), name, key.public.text)
        (folder / "cert.pem").write_text(authority.chain(leaf))
        topics = [f"outrider/1/main/{name}/ack", "outrider/1/main/grants"]
        sessions.append(MqttSession(site.url, name, ca=folder, subscriptions=topics))
    try:
        async with contextlib.AsyncExitStack() as stack:
            for session in sessions:
                await stack.enter_async_context(session)
            await until(lambda: all(session.connected for session in sessions), 150)
            await asyncio.to_thread(site.stop, signal.SIGKILL, forget=True)
            await until(lambda: not any(session.connected for session in sessions), 60)
            await asyncio.to_thread(site.start)
            began = time.monotonic()
            await until(lambda: all(session.connected for session in sessions), 150)
            took = time.monotonic() - began
            await asyncio.gather(*(s.publish(f"outrider/1/main/{s.client_id}/up", b"x") for s in sessions))
            record_property("seen", f"{DEVICES} connected again {took:.1f} s after the broker, all heard")
    finally:
        await asyncio.to_thread(site.stop)
