"""The audit log at the hub: a changed or missing entry shows, its devices' too, and it leaves in forms others read."""

import hashlib
import json
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from edge_agent.audit import Audit as DeviceAudit
from edge_agent.store import Store
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.messages import Record
from hub import audit
from hub.audit import Audit, cef, cef_device, check_export
from hub.db import Database, devices, telemetry
from tests.hub.rig import PASSWORD, Hub, enrolled


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
    assert check_export(lines)["first_broken"] is None
    assert check_export(lines[:1] + lines[2:])["first_broken"] == 3
    assert check_export([lines[0], lines[1].replace(b'"n":1', b'"n":7'), *lines[2:]])["first_broken"] == 2


async def test_cef_escapes_what_would_end_a_field(database: Database) -> None:
    entry = (await (await some(database)).entries())[0]
    line = cef(entry | {"action": "a|b"})
    assert line.startswith(r"CEF:0|Outrider|hub|1|a\|b|a\|b|3|rt=")
    assert "\n" not in line
    assert r"a\=b|c" in line


def test_no_device_splits_or_ends_an_export_for_a_siem() -> None:
    body = json.dumps({"event": "call\nCEF:0|Outrider|hub|1|login:user\u2028x", "subject": "a\nb", "n": 1})
    line = cef_device({"device": "press-1", "epoch": 1, "seq": 1, "ts": 1e308, "body": body})
    assert len(line.splitlines()) == 1
    assert line.startswith(r"CEF:0|Outrider|agent|1|call CEF:0\|Outrider\|hub\|1\|login:user x|")
    assert "|rt=253402300799000 suser=a\\nb " in line
    assert "|rt=0 " in cef_device({"device": "press-1", "epoch": 1, "seq": 1, "ts": -1e308, "body": "{}"})


def chain(device: str, epoch: int, calls: list[str]) -> tuple[list[bytes], list[dict[str, Any]]]:
    """The lines of an export that a device chained, and the anchor that each would be."""
    prev, lines, anchors = "", list[bytes](), list[dict[str, Any]]()
    for n, call in enumerate(calls, 1):
        body = json.dumps({"event": "call", "call": call, "n": n, "prev": prev})
        prev = hashlib.sha256(body.encode()).hexdigest()
        anchors.append({"device": device, "n": n, "head": prev})
        lines.append(msgspec.json.encode({"device": device, "epoch": epoch, "seq": n, "ts": 1.0, "body": body}))
    return lines, anchors


async def test_a_device_that_began_anew_has_two_sound_chains_and_one_that_is_gone_shows(database: Database) -> None:
    (old, was), (new, now) = chain("press-1", 1, ["stop", "start"]), chain("press-1", 2, ["purge", "stop", "start"])
    other, last = chain("press-2", 1, ["stop"])
    log = Audit(database)
    for anchor in (was[1], now[1], last[0]):
        await log.add(anchor["device"], "anchor:device", anchor)
    own = [msgspec.json.encode(entry) for entry in await log.entries()]
    whole = [*own, *old, *new, *other]
    assert {name: each["wrong"] for name, each in check_export(whole)["devices"].items()} == {
        "press-1": "",
        "press-2": "",
    }
    assert "was anchored and is gone" in check_export([*own, *old, *new])["devices"]["press-2"]["wrong"]
    assert "is not the one that was anchored" in check_export([*own, *new, *other])["devices"]["press-1"]["wrong"]
    assert set(check_export(own)["devices"]) == {"press-1", "press-2"}
    assert check_export(own, devices=False) == {"first_broken": None, "devices": {}}


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
    export = [msgspec.json.encode(each) for each in (*await log.entries(), *await log.device_entries())]
    export.append(msgspec.json.encode({"device": "press-1", "chain": (await log.devices())["press-1"]}))
    assert check_export(export)["devices"]["press-1"]["wrong"] == ""
    changed = [line.replace(b"stop_line(3)", b"stop_line(9)") for line in export]
    assert "anchored" in check_export(changed)["devices"]["press-1"]["wrong"]
    shorter = [line for line in export if b"stop_line(1)" not in line]
    assert "entry 3 does not follow" in check_export(shorter)["devices"]["press-1"]["wrong"]
    said = cef_device(msgspec.to_builtins((await log.device_entries(("press-1", 1, 1)))[0]))
    assert said.startswith("CEF:0|Outrider|agent|1|call|call|3|")
    assert "suser=ann" in said
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


async def test_every_change_says_from_where_and_strangers_are_told_of_at_a_bounded_rate(hub: Hub) -> None:
    admin = await hub.login()
    await admin.post("/v1/users", json={"name": "ann", "password": PASSWORD, "roles": ["viewer"]})
    await enrolled(hub, "press-1")
    await admin.patch("/v1/devices/press-1/desired", json={"config": {"log": "debug"}})
    for token in ("", "rubbish", "rubbish"):
        assert (await hub.client(token).get("/v1/devices")).status_code == 401
    entries = (await admin.get("/v1/audit", params={"limit": 1000})).json()["entries"]
    for action in ("create:user", "configure:device", "login:user", "refuse:token"):
        found = [each["detail"]["where"] for each in entries if each["action"] == action and each["actor"] != "hub"]
        assert set(found) == {"127.0.0.1"}, action
    told = [each["detail"] for each in entries if each["action"] == "refuse:token"]
    assert [(each["path"], each["count"]) for each in told] == [("/v1/devices", 1)], "then once a minute, with a count"
    own = [each for each in entries if each["actor"] == "hub"]
    assert own, "the hub's own deeds"
    assert all("where" not in each["detail"] for each in own)


async def test_what_devices_chained_is_read_without_reading_all_that_they_sent(tmp_path: Path) -> None:
    database, asked = Database(f"sqlite:///{tmp_path / 'hub.db'}"), list[tuple[str, Any]]()
    sa.event.listen(
        database.engine, "before_cursor_execute", lambda _c, _cursor, text, given, *_: asked.append((text, given))
    )
    log = Audit(database)
    await log.devices()
    await log.device_entries(("press-1", 1, 7))
    queries = [each for each in asked if "FROM telemetry" in each[0]]
    assert len(queries) == 2
    for text, given in queries:
        with database.engine.connect() as connection:
            plan = str(connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", given).all())
        assert "USING INDEX telemetry_audit" in plan, plan
    database.close()
