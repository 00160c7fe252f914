"""The audit log at the hub: a changed or missing entry shows, its devices' too, and it leaves in forms others read."""

import json
from pathlib import Path

import msgspec
import sqlalchemy as sa

from edge_agent.audit import Audit as DeviceAudit
from edge_agent.store import Store
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.messages import Record
from hub import audit
from hub.audit import Audit, broken_line, cef
from hub.db import Database, devices, telemetry


async def some(database: Database) -> Audit:
    log = Audit(database)
    for n in range(5):
        await log.add("ann", "call:tool", {"n": n, "text": "a=b|c\\d\né", "float": 1e22})
    return log


async def test_a_changed_or_missing_entry_shows(database: Database) -> None:
    log = await some(database)
    assert await log.first_broken() is None
    ids = [entry["id"] for entry in await log.entries()]
    await database.write(
        lambda c: c.execute(audit.audit.update().where(audit.audit.c.id == ids[2]).values(actor="eve"))
    )
    assert await log.first_broken() == ids[2]
    await database.write(lambda c: c.execute(audit.audit.delete().where(audit.audit.c.id == ids[2])))
    assert await log.first_broken() == ids[3]


async def test_an_export_is_checked_with_no_hub(database: Database) -> None:
    lines = [msgspec.json.encode(entry) for entry in await (await some(database)).entries()]
    assert broken_line(lines) is None
    assert broken_line(lines[:1] + lines[2:]) == 3
    assert broken_line([lines[0], lines[1].replace(b'"n":1', b'"n":7'), *lines[2:]]) == 2


async def test_cef_escapes_what_would_end_a_field(database: Database) -> None:
    entry = (await (await some(database)).entries())[0]
    line = cef(entry | {"action": "a|b"})
    assert line.startswith(r"CEF:0|Outrider|hub|1|a\|b|a\|b|3|rt=")
    assert "\n" not in line
    assert r"a\=b|c" in line


async def test_a_devices_chain_is_followed_and_anchored(database: Database, tmp_path: Path) -> None:
    store = Store(tmp_path / "state.db")
    outbox = await Outbox.open(store)
    own = DeviceAudit(store, outbox)
    for n in range(4):
        await own.append("call", "ann", call=f"stop_line({n})")
    part = await outbox.batch(0)
    assert part is not None
    records = [msgspec.json.decode(line, type=Record) for line in part.lines]
    store.close()

    def commit(connection: sa.Connection) -> None:
        connection.execute(
            devices.insert().values(name="press-1", public_key="k", enrolled=0.0, desired={}, reported={})
        )
        for record in records:
            body = msgspec.json.encode(record.body).decode()
            row = {"device": "press-1", "epoch": 1, "seq": record.seq, "ts": 0.0, "received": 0.0, "kind": record.kind}
            connection.execute(telemetry.insert().values(priority=2, body=body, **row))

    await database.write(commit)
    log = Audit(database)
    await log.anchor()
    await log.anchor()
    anchors = [entry for entry in await log.entries() if entry["action"] == "anchor:device"]
    assert [(entry["actor"], entry["detail"]["n"]) for entry in anchors] == [("press-1", 4)]
    assert (await log.devices())["press-1"] | {"head": ""} == {"entries": 4, "head": "", "wrong": ""}
    table = telemetry.c

    def change(seq: int, body: str) -> None:
        with database.engine.begin() as connection:
            connection.execute(telemetry.update().where(table.seq == seq).values(body=body))

    last = msgspec.json.encode(records[3].body).decode()
    change(4, last.replace("stop_line(3)", "stop_line(9)"))
    assert "is not the one that was anchored" in (await log.devices())["press-1"]["wrong"]
    change(4, last)
    change(2, json.dumps(records[1].body | {"call": "none"}))
    assert "entry 3 does not follow" in (await log.devices())["press-1"]["wrong"]
