"""Enrolment, true presence, twins and jobs over a real broker."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy.exc import OperationalError

from edge_agent.sync.transport import MqttSession
from edge_agent.wire.grants import verify_grants
from edge_agent.wire.messages import TWIN_LIMIT, Presence, PresenceState, merge_patch
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.topics import Topic, TopicKind
from hub import db, liveness
from hub.errors import Refused
from hub.liveness import CHALLENGES_PER_S, HEARTBEAT_S, OFFLINE_S, STALE, Heard, Liveness
from tests.hub.rig import Device, Hub, enrolled, running, telemetry, until


def deep(levels: int) -> dict[str, Any]:
    """An object of that many levels."""
    made: dict[str, Any] = {}
    for _ in range(levels - 1):
        made = {"a": made}
    return made


async def test_enrolment_gives_a_device_all_it_needs(hub: Hub) -> None:
    admin = await hub.login()
    token = (await admin.post("/v1/enrolments", json={"name": "press-1", "ttl_s": 60})).json()["token"]
    key = SigningKey.generate()
    body = {"token": token, "name": "press-1", "public_key": key.public.text}
    answer = (await hub.http.post("/v1/enrol", json=body)).json()
    assert answer["device"] == "press-1"
    assert answer["broker"]["url"].startswith("mqtt://127.0.0.1:")
    assert abs(answer["clock"] - time.time()) < 5
    device = Device("press-1", key, answer)
    assert verify_grants(device.hub_key, answer["grants"], 0).epoch == 1


async def test_a_token_is_good_once_for_its_name_and_its_time(hub: Hub) -> None:
    admin = await hub.login()

    async def enrol(token: str, name: str, public_key: str | None = None) -> tuple[int, str]:
        body = {"token": token, "name": name, "public_key": public_key or SigningKey.generate().public.text}
        answer = await hub.http.post("/v1/enrol", json=body)
        return answer.status_code, answer.json().get("hint", "")

    async def token(**more: object) -> str:
        made = await admin.post("/v1/enrolments", json=more)
        return str(made.json()["token"])

    once = await token()
    assert (await enrol(once, "a"))[0] == 201
    assert await enrol(once, "a") == (409, "a token is good once: make a new one")
    assert (await enrol("rubbish", "b"))[0] == 403
    assert await enrol(await token(name="c"), "d") == (403, "enrol as c")
    assert (await enrol(await token(ttl_s=1e-6), "e")) == (403, "make a new one: outrider hub enrol-token")
    taken = await token()
    assert await enrol(taken, "a") == (
        409, "choose another name, or replace the device: outrider hub enrol-token --name a"
    )  # fmt: skip
    assert (await enrol(taken, "f"))[0] == 201, "a refusal does not use the token up"
    for name in ("Bad", "../x", "a/b", "", "a" * 64):
        assert (await enrol(await token(), name))[0] == 422
    assert (await enrol(await token(), "g", "not a key"))[0] == 422
    assert (await admin.post("/v1/enrolments", json={"ttl_s": -1})).status_code == 422


async def test_the_same_key_may_enrol_again_with_a_new_token(hub: Hub) -> None:
    device = await enrolled(hub, "press-1")
    token = await hub.services.devices.create_enrolment("admin")
    assert (await Device.enrol(hub.http, "press-1", token, device.key)).key is device.key


async def test_a_device_that_lost_its_state_comes_back_with_a_token_for_its_name(hub: Hub) -> None:
    old, admin = await enrolled(hub, "press-1"), await hub.login()
    async with old.online():
        await old.send(telemetry(range(1, 4)))
        await until(lambda: old.acked() == (1, 3))
    token = (await admin.post("/v1/enrolments", json={"name": "press-1"})).json()["token"]
    new = await Device.enrol(hub.http, "press-1", token)
    new.epoch = 2
    async with new.online():
        await new.send(telemetry(range(1, 3)))
        await until(lambda: new.acked() == (2, 2))
    told = (await admin.get("/v1/audit", params={"limit": 1000})).json()["entries"]
    assert [e["detail"] for e in told if e["action"] == "rekey:device"] == [
        {"old": old.key.public.text, "new": new.key.public.text, "where": "127.0.0.1"}
    ]


async def test_a_device_is_online_only_once_it_answered_the_hub(hub: Hub) -> None:
    device, viewer = await enrolled(hub, "press-1"), await hub.user("viewer")

    async def presence() -> dict[str, object]:
        shown: dict[str, object] = (await viewer.get("/v1/devices/press-1")).json()["presence"]
        return shown

    device.answer_nonces = False
    async with device.online():
        await until(lambda: device.acks)
        assert (await presence())["online"] is False
        await device.present(device.acks[-1].nonce, skew_s=-100)

        async def told() -> dict[str, object] | None:
            shown = await presence()
            return shown if shown["online"] and shown["clock_offset_s"] is not None else None

        shown = await until(told)
        assert isinstance(shown["clock_offset_s"], float)
        assert abs(shown["clock_offset_s"] + 100) < 5
        await device.present("", PresenceState.OFFLINE)
        await until(lambda: not hub.services.devices.online("press-1"))


async def test_a_replayed_or_forged_presence_makes_nobody_online(hub: Hub, tmp_path: Path) -> None:
    device, other = await enrolled(hub, "press-1"), await enrolled(hub, "press-2")
    async with device.online():
        await until(lambda: hub.services.devices.online("press-1"))
        await device.present("", PresenceState.OFFLINE)
        await until(lambda: not hub.services.devices.online("press-1"))
        before = device.presences
        device.answer_nonces = False
        for _ in range(3):
            await device.present(device.acks[-1].nonce)
        other.session, other.name = device.session, "press-1"
        await other.present(device.acks[-1].nonce)
        await until(lambda: len(device.acks) > 1)
        assert device.presences == before + 3
        assert not hub.services.devices.online("press-1")

        async def audited() -> bool:
            return any(entry["action"] == "refuse:presence" for entry in await hub.services.audit.entries())

        await until(audited)


def online(nonce: str, state: PresenceState = PresenceState.ONLINE) -> Presence:
    return Presence(state, 0.0, 1, 0, nonce)


def test_liveness_asks_again_and_forgets_the_silent() -> None:
    live = Liveness()
    first = live.nonce("d", 0.0)
    assert live.nonce("d", 1.0) == first
    assert live.heard("d", online(""), 1.0) is Heard.STALE
    assert not live.online("d", 1.0)
    assert live.heard("d", online(first), 1.0) is Heard.BACK
    assert live.heard("d", online(first), 1.0) is Heard.FRESH
    second = live.nonce("d", HEARTBEAT_S)
    assert second != first
    assert live.heard("d", online(first), HEARTBEAT_S + 1) is Heard.FRESH, "an answer under way when it changed"
    third = live.nonce("d", 2 * HEARTBEAT_S)
    assert live.heard("d", online(first), 2 * HEARTBEAT_S) is Heard.STALE
    assert live.online("d", HEARTBEAT_S + OFFLINE_S)
    assert not live.online("d", HEARTBEAT_S + 1 + OFFLINE_S)
    assert live.heard("d", online(third), 2 * HEARTBEAT_S + OFFLINE_S) is Heard.STALE, "an answer after too long"
    assert live.claiming() == ["d"]
    assert live.heard("d", online("", PresenceState.OFFLINE), 99.0) is Heard.GONE
    assert live.claiming() == []


def test_what_is_not_online_is_stale_or_offline_with_its_reason() -> None:
    live = Liveness()
    assert live.state("d", 0.0) == ("offline", "not heard since the hub started")
    nonce = live.nonce("d", 0.0)
    assert live.state("d", 0.0) == ("offline", "not heard since the hub started"), "an ack is no sign of life"
    live.heard("d", online(""), 0.0)
    assert live.state("d", 1.0) == ("stale", "not proven yet")
    assert live.state("d", STALE * OFFLINE_S) == ("offline", "no answer")
    live.heard("d", online(nonce), 2.0)
    assert live.state("d", 2.0 + OFFLINE_S - 1) == ("online", "")
    assert live.state("d", 2.0 + OFFLINE_S) == ("stale", "no answer"), "its connection may be half-open"
    assert live.state("d", 2.0 + STALE * OFFLINE_S) == ("offline", "no answer")
    for told, shown in [("lost", "connection lost"), ("shutdown", "shut down"), (msgspec.UNSET, "it said so")]:
        live.heard("d", msgspec.structs.replace(online("", PresenceState.OFFLINE), reason=told), 3.0)
        assert live.state("d", 3.0) == ("offline", shown)
    live.heard("d", online(""), 200.0)
    assert live.state("d", 201.0) == ("stale", "not proven yet"), "its time begins when it comes again"


async def test_a_device_that_is_revoked_or_has_no_good_certificate_is_shown_as_such(hub: Hub) -> None:
    admin = await hub.login()
    devices = [await enrolled(hub, name) for name in ("press-1", "press-2", "press-3")]

    async def shown(name: str) -> tuple[str, str]:
        presence = (await admin.get(f"/v1/devices/{name}")).json()["presence"]
        return presence["state"], presence["reason"]

    assert await shown("press-1") == ("offline", "never heard")
    async with devices[0].online():
        await until(lambda: hub.services.devices.online("press-1"))
        assert await shown("press-1") == ("online", "")
        old = db.certificates.update().where(db.certificates.c.device != "press-3").values(expires=time.time() - 1)
        await hub.services.db.write(lambda c: c.execute(old))
        assert await shown("press-1") == ("online", ""), "what answers is there, whatever its certificate says"
    assert await shown("press-2") == ("offline", "certificate expired")
    await admin.delete("/v1/devices/press-3")
    assert await shown("press-3") == ("offline", "revoked")


def test_a_large_fleet_is_challenged_at_a_bounded_rate_and_silence_is_waited_for_as_much_longer() -> None:
    live = Liveness()
    for n in range(2500):
        live.nonce(f"d{n}", 0.0)
    assert live.beat_s == 2500 / CHALLENGES_PER_S == 5 * HEARTBEAT_S
    first = live.nonce("d0", 4 * HEARTBEAT_S)
    assert first == live.nonce("d0", 0.0)
    assert live.heard("d0", online(first), 4 * HEARTBEAT_S) is Heard.BACK
    assert live.online("d0", 4 * HEARTBEAT_S + 4 * OFFLINE_S)
    assert not live.online("d0", 4 * HEARTBEAT_S + 5 * OFFLINE_S)


async def test_a_silent_device_goes_offline_and_answers_each_heartbeat(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(liveness, "OFFLINE_S", 1.0)
    monkeypatch.setattr("hub.ingest.HEARTBEAT_S", 0.2)
    async with running(hub.services.registry._blobs.parent.parent / "second") as quick:
        device = await enrolled(quick, "press-1")
        async with device.online():
            await until(lambda: quick.services.devices.online("press-1"))
            await until(lambda: device.presences > 4)
            device.answer_nonces = False
            await until(lambda: not quick.services.devices.online("press-1"))
            device.answer_nonces = True
            await until(lambda: quick.services.devices.online("press-1"))


async def test_desired_documents_arrive_signed_retained_and_with_growing_versions(hub: Hub) -> None:
    device = await enrolled(hub, "press-1")
    await hub.services.twin.patch_desired("press-1", {"a": 1, "b": {"c": 2}}, "admin")
    await hub.services.twin.patch_desired("press-1", {"b": {"d": 3}, "a": None}, "admin")
    async with device.online():
        await until(lambda: device.desired and device.desired[-1].version == 2)
        assert device.desired[-1].doc == {"b": {"c": 2, "d": 3}}
        await hub.services.twin.patch_desired("press-1", {"e": True}, "admin")
        await until(lambda: device.desired[-1].version == 3)
    with pytest.raises(Exception, match="would pass"):
        await hub.services.twin.patch_desired("press-1", {"big": "x" * TWIN_LIMIT}, "admin")
    assert (await hub.services.devices.get("press-1"))["desired_version"] == 3


def test_merge_follows_rfc_7396() -> None:
    assert merge_patch({"a": {"b": 1, "c": [1]}, "d": 2}, {"a": {"b": None, "c": [2]}, "d": {"e": None}}) == {
        "a": {"c": [2]},
        "d": {},
    }


async def test_a_task_reaches_the_device_and_its_result_comes_back(hub: Hub) -> None:
    device, operator = await enrolled(hub, "press-1"), await hub.user("operator")
    async with device.online():
        body = {"text": "stop line 2", "idempotency_key": "k1"}
        job = (await operator.post("/v1/devices/press-1/tasks", json=body)).json()
        assert job["state"] == "queued"
        same = (await operator.post("/v1/devices/press-1/tasks", json=body)).json()
        assert same["id"] == job["id"]
        different = await operator.post("/v1/devices/press-1/tasks", json=body | {"text": "start line 2"})
        assert different.status_code == 409
        await until(lambda: device.jobs)
        came = device.jobs[0]
        assert (came.id, came.body, came.subject, came.roles) == (
            job["id"], {"text": "stop line 2"}, "some-operator", ["operator"]
        )  # fmt: skip
        for state in ("delivered", "running", "succeeded", "running"):
            result = {"answer": "done"} if state == "succeeded" else {}
            await device.report("job", {"id": job["id"], "state": state, "ts": time.time(), "result": result})
        await until(lambda: device.acked() == (1, 4))
        done = (await operator.get(f"/v1/jobs/{job['id']}")).json()
        assert (done["state"], done["result"]) == ("succeeded", {"answer": "done"})
        listed = (await operator.get("/v1/jobs", params={"device": "press-1", "state": "succeeded"})).json()
        assert [j["id"] for j in listed] == [job["id"]]


async def test_a_job_made_while_a_device_is_away_arrives_when_it_comes(hub: Hub) -> None:
    device, operator = await enrolled(hub, "press-1"), await hub.user("operator")
    body = {"kind": "tool", "body": {"tool": "stop_line", "args": {"line": 2}}}
    job = (await operator.post("/v1/devices/press-1/jobs", json=body)).json()
    async with device.online():
        await until(lambda: device.jobs)
        assert device.jobs[0].id == job["id"]
    again = len(device.jobs)
    async with device.online():
        await until(lambda: len(device.jobs) > again)
        assert {j.id for j in device.jobs} == {job["id"]}, "until confirmed it is sent again, under the same id"


async def test_bad_jobs_are_refused_with_a_hint(hub: Hub) -> None:
    await enrolled(hub, "press-1")
    operator = await hub.user("operator")
    for path, body, status in (
        ("/v1/devices/nobody/tasks", {"text": "x"}, 404),
        ("/v1/devices/press-1/tasks", {"text": ""}, 422),
        ("/v1/devices/press-1/tasks", {"text": "x", "ttl_s": 0}, 422),
        ("/v1/devices/press-1/tasks", {"text": "x", "idempotency_key": "k" * 200}, 422),
        ("/v1/devices/press-1/jobs", {"kind": "conquer", "body": {}}, 422),
        ("/v1/devices/press-1/tasks", {"text": "x" * 2001}, 422),
        ("/v1/devices/press-1/jobs", {"kind": "task", "body": {"text": "x" * 2001}}, 422),
        ("/v1/devices/press-1/jobs", {"kind": "task", "body": {}}, 422),
        ("/v1/devices/press-1/jobs", {"kind": "tool", "body": {"tool": "stop_line", "args": [1]}}, 422),
        ("/v1/devices/press-1/jobs", {"kind": "tool", "body": {"tool": "t", "args": {"a": "\ud800"}}}, 422),
        ("/v1/devices/press-1/jobs", {"kind": "tool", "body": {"tool": "t", "args": {"\ud800": 1}}}, 422),
        ("/v1/devices/press-1/tasks", {"text": "\ud800"}, 422),
        ("/v1/devices/press-1/jobs", {"kind": "tool", "body": {"tool": "t", "args": deep(300)}}, 422),
        ("/v1/devices/press-1/jobs", {"kind": "tool", "body": {"x": "y" * 70_000}}, 413),
        ("/v1/devices/press-1/jobs", {"kind": "tool", "body": {"x": "y" * 2_000_000}}, 413),
    ):
        answer = await operator.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["hint"]
    assert (await operator.get("/v1/jobs/nothing")).status_code == 404
    assert (await operator.get("/v1/jobs")).json() == []


async def test_records_nested_too_deep_are_dead_letters_and_every_page_still_opens(hub: Hub) -> None:
    device, viewer = await enrolled(hub, "press-1"), await hub.user("viewer")
    async with device.online():
        for kind in ("reported", "telemetry", "job"):
            await device.report(kind, deep(300))
        await device.report("reported", {"doc": deep(31)})
        await until(lambda: device.acked() == (1, 4))
    for path in ("/v1/devices", "/v1/devices/press-1", "/v1/telemetry", "/v1/jobs"):
        assert (await viewer.get(path)).status_code == 200
    assert (await viewer.get("/v1/devices/press-1")).json()["reported"] == deep(31)
    with pytest.raises(Refused, match="deeper"):
        await hub.services.twin.patch_desired("press-1", deep(300), "admin")


async def test_jobs_nobody_took_expire(hub: Hub) -> None:
    await enrolled(hub, "press-1")
    operator = await hub.user("operator")
    job = (await operator.post("/v1/devices/press-1/tasks", json={"text": "x", "ttl_s": 1e-6})).json()
    await hub.services.jobs.expire()
    shown = (await operator.get(f"/v1/jobs/{job['id']}")).json()
    assert (shown["state"], shown["error"]) == ("expired", "no device confirmed it in time")


async def test_telemetry_is_paged_by_device_and_over_all(hub: Hub) -> None:
    viewer = await hub.user("viewer")
    device, other = await enrolled(hub, "press-1"), await enrolled(hub, "press-2")
    async with device.online(), other.online():
        await device.send(telemetry(range(1, 31)))
        await other.send(telemetry(range(1, 11)))
        await until(lambda: device.acked() == (1, 30) and other.acked() == (1, 10))

    async def page(**query: object) -> list[dict[str, object]]:
        answer = await viewer.get("/v1/telemetry", params={k: str(v) for k, v in query.items()})
        records: list[dict[str, object]] = answer.json()["records"]
        return records

    assert [r["seq"] for r in await page(device="press-1", after_seq=25)] == [26, 27, 28, 29, 30]
    assert [r["seq"] for r in await page(device="press-1", limit=3)] == [1, 2, 3]
    assert await page(device="press-1", epoch=9) == []
    assert await page(device="press-1", kind="job") == []
    everything, after = [], 0
    while records := await page(after=after, limit=7):
        everything += records
        after = int(str(records[-1]["id"]))
    assert len(everything) == 40
    assert (await viewer.get("/v1/telemetry", params={"limit": 100_000})).status_code == 422
    assert await hub.services.telemetry.count_after(0) == (40, after)


async def test_a_fresh_broker_gets_grants_and_desired_again_once_the_database_is_back(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await enrolled(hub, "press-1")
    await hub.services.twin.patch_desired("press-1", {"a": 1}, "admin")
    void, away = hub.services.devices.void, list[OperationalError]()

    async def look() -> Any:
        if away:
            raise away.pop()
        return await void()

    monkeypatch.setattr(hub.services.devices, "void", look)
    await until(lambda: hub.services.session.connected)
    await asyncio.sleep(0.2)  # it is greeted
    away.append(OperationalError("", {}, Exception("the server is starting up")))
    broker = hub.services.broker
    assert broker is not None
    assert broker._child is not None
    connections = hub.services.session.connections
    broker._child._process.kill()
    await until(lambda: hub.services.session.connections > connections)
    topic = str(Topic("main", TopicKind.GRANTS))
    session = MqttSession(
        broker.url, "reader", username=broker.username, password=broker.password, subscriptions=[topic]
    )
    async with asyncio.timeout(20), session, device.online():
        message = await anext(session.messages())
        assert verify_grants(device.hub_key, message.payload.decode(), 0).epoch == 1
        await until(lambda: device.desired and device.desired[-1].version == 1)
        message.ack()
