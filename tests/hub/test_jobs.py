"""Jobs taken back, jobs for a group, and who sees which."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import msgspec

from edge_agent.wire.messages import Job, JobKind, JobReport, JobState, Progress
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
