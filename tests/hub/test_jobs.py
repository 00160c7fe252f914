"""Jobs taken back, jobs for a group, and who sees which."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import sqlalchemy as sa

from edge_agent.wire.messages import Job, JobKind, JobReport, JobState, Progress
from hub.db import Database, devices, jobs
from hub.fanout import Fanouts
from hub.jobs import GRACE_S, SILENT, UNCONFIRMED, Jobs
from tests.hub.rig import Device, Hub, enrolled, until


async def labelled(hub: Hub, admin: httpx.AsyncClient, group: str, *names: str) -> list[Device]:
    made = [await enrolled(hub, name) for name in names]
    for name in names:
        await admin.put(f"/v1/devices/{name}/labels", json={"groups": [group], "tags": []})
    return made


@asynccontextmanager
async def online(*devices: Device) -> AsyncIterator[None]:
    async with AsyncExitStack() as stack:
        for device in devices:
            await stack.enter_async_context(device.online())
        yield


async def told(device: Device, job: str, state: JobState, **more: Any) -> None:
    await device.report("job", msgspec.to_builtins(JobReport(job, state, 1.0, **more)))


async def test_a_job_nobody_has_is_cancelled_and_the_device_is_told_when_it_comes(hub: Hub) -> None:
    admin, device = await hub.login(), await enrolled(hub, "press-1")
    job = (await admin.post("/v1/devices/press-1/tasks", json={"text": "stop line 2"})).json()
    seen = (await admin.post(f"/v1/jobs/{job['id']}/cancel")).json()
    assert (seen["state"], seen["cancelled_by"]) == ("cancelled", "admin")
    assert (await admin.post(f"/v1/jobs/{job['id']}/cancel")).status_code == 200, "again is the same"
    async with device.online():
        came: Job = await until(lambda: next((j for j in device.jobs if j.kind is JobKind.CANCEL), None))
        assert came.body == {"job": job["id"]}
        await told(device, job["id"], JobState.CANCELLED, error="cancelled by admin")

        async def confirmed() -> bool:
            return bool((await admin.get(f"/v1/jobs/{job['id']}")).json()["error"] == "cancelled by admin")

        await until(confirmed)
    actions = [entry["action"] for entry in await hub.services.audit.newest()]
    assert "cancel:job" in actions


async def test_what_the_device_did_counts_when_the_cancellation_came_too_late(hub: Hub) -> None:
    admin, device = await hub.login(), await enrolled(hub, "press-1")
    async with device.online():
        job = (await admin.post("/v1/devices/press-1/tasks", json={"text": "stop line 2"})).json()["id"]
        await until(lambda: device.jobs)
        assert (await admin.post(f"/v1/jobs/{job}/cancel")).json()["state"] == "cancelled"
        await told(device, job, JobState.DELIVERED)
        await told(device, job, JobState.RUNNING)
        await told(device, job, JobState.SUCCEEDED, result={"answer": "stopped"})

        async def succeeded() -> bool:
            return bool((await admin.get(f"/v1/jobs/{job}")).json()["state"] == "succeeded")

        await until(succeeded)
    assert (await admin.post(f"/v1/jobs/{job}/cancel")).status_code == 200
    assert (await admin.post("/v1/jobs/none/cancel")).status_code == 404


async def test_progress_is_shown_while_a_job_runs_and_never_after_its_end(hub: Hub) -> None:
    admin, device = await hub.login(), await enrolled(hub, "press-1")
    async with device.online():
        job = (await admin.post("/v1/devices/press-1/tasks", json={"text": "stop line 2"})).json()["id"]
        await told(device, job, JobState.RUNNING)
        await told(device, job, JobState.RUNNING, progress=Progress(2, 5, "stop: stop_line(line=2)"))

        async def shown() -> Any:
            return (await admin.get(f"/v1/jobs/{job}")).json()["progress"]

        assert await until(shown) == {"done": 2, "total": 5, "text": "stop: stop_line(line=2)"}
        await told(device, job, JobState.SUCCEEDED)
        await told(device, job, JobState.RUNNING, progress=Progress(1))
        seq = device.seq
        await until(lambda: device.acked()[1] == seq)
        seen = (await admin.get(f"/v1/jobs/{job}")).json()
        assert (seen["state"], seen["progress"]["done"]) == ("succeeded", 2)


async def test_of_a_group_at_most_so_many_run_at_a_time_those_that_are_there_first(hub: Hub) -> None:
    admin = await hub.login()
    devices = await labelled(hub, admin, "line-2", *(f"press-{n}" for n in range(1, 5)))
    await enrolled(hub, "other")
    body = {"kind": "tool", "body": {"tool": "stop_line", "args": {}}, "at_once": 2, "idempotency_key": "k", "ttl_s": 9}
    there = devices[2:]
    async with online(*there):
        await until(lambda: all(hub.services.devices.online(d.name) for d in there))
        made = (await admin.post("/v1/groups/line-2/jobs", json=body)).json()
        again = (await admin.post("/v1/groups/line-2/jobs", json=body)).json()
        assert again["id"] == made["id"], "the same key is the same fan-out"
        assert made["states"] == {"queued": 2, "held": 2}
        children = {job["device"]: job for job in made["jobs"]}
        assert {name for name, job in children.items() if not job["held"]} == {"press-3", "press-4"}
        await until(lambda: all(len(d.jobs) == 1 for d in there))
        await asyncio.sleep(1.2)  # a tick
        assert (await admin.get(f"/v1/fanouts/{made['id']}")).json()["states"] == {"queued": 2, "held": 2}
        for device in there:
            await told(device, children[device.name]["id"], JobState.SUCCEEDED)

        async def released() -> bool:
            seen = (await admin.get(f"/v1/fanouts/{made['id']}")).json()
            return bool(seen["states"] == {"succeeded": 2, "queued": 2})

        await until(released)
        assert all(len(d.jobs) == 1 for d in there), "nobody does it twice"
        other = body | {"body": {"tool": "start_line", "args": {}}}
        assert (await admin.post("/v1/groups/line-2/jobs", json=other)).status_code == 409
        assert (await admin.post("/v1/groups/nobody/jobs", json=body)).status_code == 404


async def test_cancelling_a_fan_out_takes_back_for_certain_what_was_held(hub: Hub) -> None:
    admin = await hub.login()
    await labelled(hub, admin, "line-2", "press-1", "press-2", "press-3")
    body = {"kind": "task", "body": {"text": "stop"}, "at_once": 1}
    made = (await admin.post("/v1/groups/line-2/jobs", json=body)).json()
    ended = (await admin.post(f"/v1/fanouts/{made['id']}/cancel")).json()
    assert ended["states"] == {"cancelled": 3}
    assert sorted(job["error"] for job in ended["jobs"])[0] == "cancelled before a device confirmed it"
    assert sum("before it was sent" in job["error"] for job in ended["jobs"]) == 2
    assert await hub.services.fanouts.release(()) == 0


async def test_a_role_for_a_group_is_answered_with_its_devices_and_no_others(hub: Hub) -> None:
    admin = await hub.login()
    given = [f"{verb}:group=line-2" for verb in ("read:device", "read:job", "read:telemetry", "run:task")]
    assert (await admin.put("/v1/roles/line-2", json={"permissions": given})).status_code == 204
    (mine,), (theirs,) = (
        await labelled(hub, admin, "line-2", "press-1"),
        await labelled(hub, admin, "line-3", "press-2"),
    )
    ann = await hub.user("line-2")
    for name in ("press-1", "press-2"):
        await admin.post(f"/v1/devices/{name}/tasks", json={"text": "stop"})
    async with online(mine, theirs):
        for device in (mine, theirs):
            await device.report("telemetry", {"x": device.name})
            await until(lambda device=device: device.acked()[1] == 1)
    for path, names in [
        ("/v1/devices", lambda body: {each["name"] for each in body}),
        ("/v1/jobs", lambda body: {each["device"] for each in body}),
        ("/v1/telemetry", lambda body: {each["device"] for each in body["records"]}),
    ]:
        assert names((await admin.get(path)).json()) == {"press-1", "press-2"}, path
        assert names((await ann.get(path)).json()) == {"press-1"}, path
    jobs = {each["device"]: each["id"] for each in (await admin.get("/v1/jobs")).json()}
    assert [(await ann.get(f"/v1/jobs/{jobs[name]}")).status_code for name in ("press-1", "press-2")] == [200, 403]
    assert (await ann.post(f"/v1/jobs/{jobs['press-2']}/cancel")).status_code == 403
    body = {"kind": "task", "body": {"text": "stop"}}
    assert (await ann.post("/v1/groups/line-2/jobs", json=body)).status_code == 201
    assert (await ann.post("/v1/groups/line-3/jobs", json=body)).status_code == 403
    assert (await ann.get("/v1/audit")).status_code == 403


async def seen_as(hub: Hub, job: str, state: str) -> None:
    async def there() -> bool:
        return bool((await hub.services.jobs.get(job))["state"] == state)

    await until(there)


async def test_of_a_fan_out_a_scoped_subject_sees_and_takes_back_no_other_devices_jobs(hub: Hub) -> None:
    admin = await hub.login()
    a1, *_ = await labelled(hub, admin, "all", "a1", "a2", "b1")
    for role, given in {
        "runner": ["run:task:b*"],
        "reader": ["read:job:b*"],
        "stranger": ["read:job:c*"],
        "half": ["run:task", "read:job:b*"],
    }.items():
        assert (await admin.put(f"/v1/roles/{role}", json={"permissions": given})).status_code == 204
    work = {"kind": "task", "body": {"text": "stop"}}
    made = (await admin.post("/v1/groups/all/jobs", json=work)).json()
    at, jobs = f"/v1/fanouts/{made['id']}", {job["device"]: job["id"] for job in made["jobs"]}

    reader, stranger, runner, half = [await hub.user(role) for role in ("reader", "stranger", "runner", "half")]
    page = (await reader.get(at, params={"limit": 2})).json()
    assert ([job["device"] for job in page["jobs"]], page["states"]) == (["b1"], {"queued": 1})
    assert (await reader.get(at, params={"after": "b1"})).json()["jobs"] == []
    assert (await stranger.get(at)).status_code == 403

    async with a1.online():
        await told(a1, jobs["a1"], JobState.FAILED, error="secret of a1")
        await seen_as(hub, jobs["a1"], "failed")
    for _ in range(2):  # while some are open, and when all have ended
        refused = await runner.post(f"{at}/cancel")
        assert refused.status_code == 403
        assert not any(word in refused.text for word in ("secret", "a1", "a2"))
        assert not [
            each
            for each in await hub.services.audit.newest()
            if each["actor"] == "some-runner" and each["action"] == "cancel:fanout"
        ]
        await admin.post(f"{at}/cancel")
    ended = (await half.post(f"{at}/cancel")).json()
    assert ([job["device"] for job in ended["jobs"]], ended["states"]) == (["b1"], {"cancelled": 1})


async def test_a_child_on_a_dead_device_gives_its_place_up_when_it_is_cancelled(hub: Hub) -> None:
    admin = await hub.login()
    dead, _ = await labelled(hub, admin, "line-2", "press-1", "press-2")
    work = {"kind": "task", "body": {"text": "stop"}, "at_once": 1}
    made = (await admin.post("/v1/groups/line-2/jobs", json=work)).json()
    first = next(job["id"] for job in made["jobs"] if not job["held"])
    async with dead.online():
        await told(dead, first, JobState.RUNNING)
        await seen_as(hub, first, "running")
    assert await hub.services.fanouts.release(()) == 0
    assert (await admin.post(f"/v1/jobs/{first}/cancel")).json()["state"] == "running"

    async def released() -> bool:
        return bool((await hub.services.fanouts.get(made["id"]))["states"] == {"running": 1, "queued": 1})

    await until(released)


async def aged(hub: Hub, job: str, seconds: float) -> None:
    """As if its time had been over, and the last been heard of it, so much earlier; then the hub looks."""
    then = time.time() - seconds
    await hub.services.db.write(
        lambda c: c.execute(jobs.update().where(jobs.c.id == job).values(expires=then, updated=then))
    )
    await hub.services.jobs.expire()


async def begun(hub: Hub, device: Device, job: str) -> None:
    """The device takes the job, and is gone."""
    async with device.online():
        await told(device, job, JobState.RUNNING)
        await seen_as(hub, job, "running")


async def test_a_job_whose_device_vanished_ends_by_itself_and_its_fan_out_with_it(hub: Hub) -> None:
    admin = await hub.login()
    gone, removed, _ = await labelled(hub, admin, "line-2", "press-1", "press-2", "press-3")
    work = {"kind": "tool", "body": {"tool": "stop_line", "args": {}}, "at_once": 1}
    made = (await admin.post("/v1/groups/line-2/jobs", json=work)).json()
    first, second, third = (job["id"] for job in made["jobs"])

    async def states() -> Any:
        return (await hub.services.fanouts.get(made["id"]))["states"]

    async def passed_on() -> bool:
        return "queued" in await states()

    await begun(hub, gone, first)
    await aged(hub, first, GRACE_S - 60)
    assert await states() == {"running": 1, "held": 2}, "an outage is no end"
    await aged(hub, first, GRACE_S + 60)
    job = (await admin.get(f"/v1/jobs/{first}")).json()
    assert (job["state"], job["error"]) == ("expired", SILENT)
    await until(passed_on)
    await begun(hub, removed, second)
    assert (await admin.delete("/v1/devices/press-2")).status_code == 204
    await aged(hub, second, GRACE_S + 60)
    await until(passed_on)
    await aged(hub, third, 60)
    assert await states() == {"expired": 3}
    assert (await admin.get(f"/v1/jobs/{third}")).json()["error"] == UNCONFIRMED
    async with gone.online():
        await told(gone, first, JobState.SUCCEEDED, result={"result": "stopped"})
        await seen_as(hub, first, "succeeded")


async def test_a_device_that_comes_back_with_a_job_given_up_is_told_of_its_cancellation(hub: Hub) -> None:
    admin, device = await hub.login(), await enrolled(hub, "press-1")
    job = (await admin.post("/v1/devices/press-1/tasks", json={"text": "stop line 2"})).json()["id"]
    await begun(hub, device, job)
    assert (await admin.post(f"/v1/jobs/{job}/cancel")).json()["state"] == "running"
    await aged(hub, job, GRACE_S + 60)
    sent = list[Job]()

    async def send(_device: str, told: Job) -> None:
        sent.append(told)

    assert await Jobs(hub.services.db, send).send_queued("press-1") == 1
    assert [(each.kind, each.body) for each in sent] == [(JobKind.CANCEL, {"job": job})]
    async with device.online():
        await told(device, job, JobState.CANCELLED, error="cancelled by admin")
        await seen_as(hub, job, "cancelled")
    assert await hub.services.jobs.send_queued("press-1") == 0


async def test_releasing_reads_the_body_once_and_sends_each_device_its_own_job(tmp_path: Path) -> None:
    database, sent, read = Database(f"sqlite:///{tmp_path / 'hub.db'}"), list[tuple[str, Job]](), list[str]()

    def decode(text: str) -> Any:
        read.append(text)
        return msgspec.json.decode(text)

    database.engine.dialect._json_deserializer = decode

    async def send(device: str, job: Job) -> None:
        sent.append((device, job))

    def fleet(connection: sa.Connection) -> None:
        for n in range(6):
            labels = {"groups": ["all"]}
            row = {"name": f"d{n}", "public_key": "k", "enrolled": 0.0, "desired": {}, "reported": {}}
            connection.execute(devices.insert().values(labels=labels, **row))

    await database.write(fleet)
    fanouts = Fanouts(database, Jobs(database, send), send)
    body = {"tool": "write", "args": {"text": "x" * 60_000}}
    who: dict[str, Any] = {"subject": "ann", "roles": ["admin"], "may": lambda _: True}
    made = await fanouts.create("all", JobKind.TOOL, body, at_once=2, ttl_s=9, **who)
    for job in made["jobs"][:2]:
        await database.write(
            lambda c, id=job["id"]: c.execute(jobs.update().where(jobs.c.id == id).values(state="failed"))
        )
    read.clear()
    assert await fanouts.release({"d5"}) == 2
    assert len([text for text in read if len(text) > 60_000]) == 1
    assert [device for device, _ in sent] == ["d0", "d1", "d5", "d2"]
    own = {job["device"]: job["id"] for job in made["jobs"]}
    assert all((job.id, job.body, job.subject) == (own[device], body, "ann") for device, job in sent)
    assert all(job.expires > time.time() + 8 for _, job in sent[2:])
    database.close()
