"""The ingest over real brokers: nothing lost and nothing twice, kill -9 of the hub included."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import sqlalchemy as sa

from edge_agent.errors import OutriderError
from edge_agent.wire.batch import Header, encode_batch
from edge_agent.wire.errors import WireError
from edge_agent.wire.messages import Record
from edge_agent.wire.topics import TopicKind
from hub.db import Database, dead_letters, telemetry
from tests.hub.rig import PASSWORD, Device, Hub, enrolled, ledger, pack, running, until
from tests.hub.rig import telemetry as make


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[str]:
    """URL of a private Mosquitto with user and password."""
    program = shutil.which("mosquitto", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("mosquitto is not installed")
    port, folder = free_port(), tmp_path / "mosquitto"
    folder.mkdir()
    subprocess.run(["mosquitto_passwd", "-b", "-c", folder / "passwords", "hub", "secret"], check=True)
    (folder / "passwords").chmod(0o644)
    config = f"listener {port} 127.0.0.1\nuser root\nallow_anonymous false\npassword_file {folder / 'passwords'}\n"
    (folder / "mosquitto.conf").write_text(config)
    with subprocess.Popen([program, "-c", folder / "mosquitto.conf"], stderr=subprocess.DEVNULL) as process:
        yield f"mqtt://hub:secret@127.0.0.1:{port}"
        process.terminate()


@pytest.fixture(params=["embedded", "mosquitto"])
async def any_hub(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Hub]:
    """A hub over each broker."""
    broker = "embedded" if request.param == "embedded" else request.getfixturevalue("mosquitto")
    async with running(tmp_path / "hub", broker=broker) as hub:
        await hub.services.session.wait_connected()
        yield hub


async def records_of(hub: Hub, device: str) -> list[dict[str, Any]]:
    return await hub.services.telemetry.query(device, limit=1000)


async def test_batches_are_committed_and_acknowledged_by_a_signed_ack(any_hub: Hub) -> None:
    device = await enrolled(any_hub, "press-1")
    async with device.online():
        for at in range(1, 301, 50):
            await device.send(make(range(at, at + 50)))
        await until(lambda: device.acked() == (1, 300))
    assert [r["seq"] for r in await records_of(any_hub, "press-1")] == list(range(1, 301))


async def test_a_gap_and_a_doubled_batch_are_answered_with_the_watermark(any_hub: Hub) -> None:
    device = await enrolled(any_hub, "press-1")
    async with device.online():
        await device.send(make([1, 2]))
        await until(lambda: device.acked() == (1, 2))
        seen = len(device.acks)
        await device.send(make([9]))
        await device.send(make([1, 2]))
        await until(lambda: len(device.acks) > seen)
        assert device.acked() == (1, 2)
    assert len(await records_of(any_hub, "press-1")) == 2


async def test_forged_and_malformed_batches_leave_the_loop_alive(any_hub: Hub) -> None:
    device, other = await enrolled(any_hub, "press-1"), await enrolled(any_hub, "press-2")
    async with device.online():
        topic = device.topic(TopicKind.UP)
        forged = pack(other.key, topic, make([1, 2]), 1)
        await device.session.publish(topic, forged.payload, properties=forged.properties)
        await device.session.publish(topic, b"rubbish")
        await device.session.publish(topic.replace("press-1", "nobody"), forged.payload, properties=forged.properties)
        await device.session.publish(device.topic(TopicKind.PRESENCE), b"\xff" * 1000, properties={"sig": "x"})
        await device.send(make([1, 2]))
        await until(lambda: device.acked() == (1, 2))

    async def audited() -> bool:
        actions = {entry["action"] for entry in await any_hub.services.audit.entries()}
        return {"refuse:batch", "refuse:device", "refuse:presence"} <= actions

    await until(audited)
    assert len(await records_of(any_hub, "press-1")) == 2
    with pytest.raises(WireError):
        device.hub_key.verify(topic, forged.payload, forged.properties["sig"])


async def test_a_database_that_cannot_commit_holds_the_batches_back(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device = await enrolled(hub, "press-1")
    monkeypatch.setattr("hub.ingest.RETRY_S", (0.05, 0.1))
    path = hub.services.db.engine.url.database
    assert path
    async with device.online():
        blocker = sqlite3.connect(path, isolation_level=None)
        await hub.services.db.write(lambda c: c.exec_driver_sql("PRAGMA busy_timeout=50"))
        blocker.execute("BEGIN IMMEDIATE")
        await device.send(make([1, 2, 3]))
        await until(lambda: "the database cannot commit" in caplog.text)
        assert device.acked()[1] == 0
        blocker.execute("ROLLBACK")
        blocker.close()
        await until(lambda: device.acked() == (1, 3))


async def test_dead_letters_and_gaps_are_listed_looked_at_and_replayed_over_the_api(hub: Hub) -> None:
    device, admin = await enrolled(hub, "press-1"), await hub.login()
    topic = device.topic(TopicKind.UP)
    no_record = encode_batch([b'{"seq":1,"unheard":"of"}'], device.key, topic, Header(1, 1, 2))
    async with device.online():
        await device.session.publish(topic, no_record.payload, properties=no_record.properties)
        await device.send(make([3, 7]), last=7)
        await until(lambda: device.acked() == (1, 7))
    (letter,) = (await admin.get("/v1/deadletters", params={"device": "press-1"})).json()
    assert (letter["first"], letter["last"], letter["replayed"]) == (1, 2, None)
    assert (await admin.get("/v1/deadletters", params={"device": "press-2"})).json() == []
    whole = (await admin.get(f"/v1/deadletters/{letter['id']}")).json()
    assert whole["text"] == '{"seq":1,"unheard":"of"}'
    assert whole["properties"]["sig"]
    still_dead = await admin.post(f"/v1/deadletters/{letter['id']}/replay")
    assert (still_dead.status_code, "cannot be taken" in still_dead.text) == (422, True)
    good = pack(device.key, topic, make([1, 2]), 1)  # as if a newer hub could read it
    change = dead_letters.update().values(payload=good.payload)
    await hub.services.db.write(lambda c: c.execute(change))
    assert (await (await hub.user("operator")).post(f"/v1/deadletters/{letter['id']}/replay")).status_code == 403
    assert (await admin.post(f"/v1/deadletters/{letter['id']}/replay")).json()["records"] == 2
    assert (await admin.get("/v1/deadletters/999")).status_code == 404
    assert sorted(r["seq"] for r in await records_of(hub, "press-1")) == [1, 2, 3, 7]
    gaps = (await admin.get("/v1/devices/press-1/gaps")).json()
    assert (gaps["missing"], gaps["lost"], gaps["unexplained"]) == (3, 0, 3)
    assert [(g["first"], g["last"], g["count"]) for g in gaps["gaps"]] == [(4, 6, 3)]
    assert "replay:deadletter" in {entry["action"] for entry in await hub.services.audit.entries()}


async def test_one_batch_the_database_refuses_does_not_harm_its_neighbours(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, other = await enrolled(hub, "press-1"), await enrolled(hub, "press-2")
    await hub.services.db.write(
        lambda c: c.exec_driver_sql(
            "CREATE TRIGGER poison BEFORE INSERT ON telemetry WHEN NEW.kind = 'poison' "
            "BEGIN SELECT RAISE(ABORT, 'no'); END"
        )
    )
    async with device.online(), other.online():
        await device.send([*make([1]), Record(2, 1.0, "poison", 5, {})])
        await other.send(make([1, 2]))
        await device.send(make([3]))
        await until(lambda: device.acked() == (1, 3) and other.acked() == (1, 2))
    assert [r["seq"] for r in await records_of(hub, "press-1")] == [3]
    assert [r["seq"] for r in await records_of(hub, "press-2")] == [1, 2]


@asynccontextmanager
async def hub_process(data: Path, port: int) -> AsyncIterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "hub", "run", "--data", str(data), "--http", f"127.0.0.1:{port}", "--no-dashboard"]
    environment = os.environ | {"OUTRIDER_ADMIN_PASSWORD": PASSWORD}
    with (
        (data / "log").open("ab") as log,
        await asyncio.to_thread(subprocess.Popen, command, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:

                async def ready() -> bool:
                    assert process.poll() is None, (data / "log").read_text()
                    try:
                        return (await http.get("/readyz")).status_code == 200
                    except httpx.TransportError:
                        return False

                await until(ready, 30)
            yield process
        finally:
            process.kill()


async def pump(device: Device, records: list[Record]) -> None:
    """What an outbox does: send from the ack on, a few batches ahead, again when no ack comes."""
    at, acked, moved = device.acked()[1], device.acked()[1], time.monotonic()
    while acked < len(records):
        if device.acked()[1] > acked:
            acked, moved = device.acked()[1], time.monotonic()
        if time.monotonic() - moved > 0.5:
            at, moved = acked, time.monotonic()
        if at < len(records) and at - acked < 200:
            with contextlib.suppress(OutriderError):
                await device.send(records[at : at + 25])
                at += 25
        await asyncio.sleep(0.001)


@pytest.mark.slow
async def test_kill_9_of_the_hub_in_mid_ingest_loses_and_doubles_nothing(tmp_path: Path) -> None:
    data, port = tmp_path / "hub", free_port()
    data.mkdir()
    rng = random.Random(7)
    records = [Record(n, 1000.0 + n, "telemetry", 5, {"n": n, "noise": rng.random()}) for n in range(1, 8_001)]
    device: Device | None = None
    kills = 0
    while device is None or device.acked()[1] < len(records):
        async with hub_process(data, port) as process:
            if device is None:
                async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
                    login = await http.post("/v1/login", json={"user": "admin", "password": PASSWORD})
                    http.headers["Authorization"] = f"Bearer {login.json()['access_token']}"
                    token = (await http.post("/v1/enrolments", json={})).json()["token"]
                    device = await Device.enrol(http, "press-1", token)
            async with device.online():
                before = device.acked()[1]
                sending = asyncio.create_task(pump(device, records))
                enough = before + rng.randint(300, 1500) if kills < 4 else len(records)
                await until(lambda d=device, e=enough: d.acked()[1] >= min(e, len(records)), 60)
                if kills < 4:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                sending.cancel()
                await asyncio.wait([sending])
    database = Database(f"sqlite:///{data / 'hub.db'}")
    with database.engine.connect() as connection:
        rows = connection.execute(sa.select(telemetry).order_by(telemetry.c.id)).mappings().all()
    database.close()
    committed = [{"seq": row["seq"], "body": msgspec.json.decode(row["body"])} for row in rows]
    produced = [{"seq": record.seq, "body": record.body} for record in records]
    assert kills == 4
    assert ledger(committed) == ledger(produced)
