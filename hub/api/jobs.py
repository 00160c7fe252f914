"""Jobs: to one device, to a group of them, how they fare, and taking them back."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from edge_agent.wire.grants import Subject
from edge_agent.wire.messages import JobKind, JobState
from hub.api.guard import Hub, May, visible, within
from hub.jobs import MAX_TEXT

router = APIRouter(prefix="/v1", tags=["jobs"])
Worker = Annotated[Subject, Depends(May("run:task"))]
SomeWorker = Annotated[Subject, Depends(May("run:task", scoped=True))]
JobReader = Annotated[Subject, Depends(May("read:job", scoped=True))]


class NewTask(BaseModel):
    text: str = Field(min_length=1, max_length=MAX_TEXT, description="what to do, in plain words")
    idempotency_key: str = Field("", description="the same key again gives the same job")
    ttl_s: float = Field(3600, description="seconds in which the device must take it up")


class NewJob(BaseModel):
    kind: Literal["task", "tool"]
    body: dict[str, Any] = Field(description='{"tool": name, "args": {…}} for a tool, {"text": …} for a task')
    idempotency_key: str = ""
    ttl_s: float = 3600


class NewFanout(NewJob):
    at_once: int = Field(0, description="at most so many devices at a time; 0: all. The others' ttl_s begins later.")


@router.post("/devices/{device}/tasks", status_code=201, summary="Give a device a task in plain words")
async def create_task(device: str, body: NewTask, hub: Hub, who: Worker) -> dict[str, Any]:
    work = NewJob(kind="task", body={"text": body.text}, idempotency_key=body.idempotency_key, ttl_s=body.ttl_s)
    return await create_job(device, work, hub, who)


@router.post("/devices/{device}/jobs", status_code=201, summary="Give a device a job of any kind")
async def create_job(device: str, body: NewJob, hub: Hub, who: Worker) -> dict[str, Any]:
    return await hub.jobs.create(
        device,
        JobKind(body.kind),
        body.body,
        subject=who.name,
        roles=who.roles,
        idempotency_key=body.idempotency_key,
        ttl_s=body.ttl_s,
    )


@router.get("/jobs", summary="Jobs, newest first")
async def list_jobs(
    hub: Hub,
    who: JobReader,
    device: str | None = None,
    state: Annotated[str | None, Query(description=f"of {', '.join(JobState)}")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[dict[str, Any]]:
    return await hub.jobs.list(device, state, limit, await visible(hub, who, "read:job"))


@router.get("/jobs/{job}", summary="One job with its progress and result")
async def get_job(job: str, hub: Hub, who: JobReader) -> dict[str, Any]:
    found = await hub.jobs.get(job)
    hub.auth.require(who, "read:job", found["device"])
    return found


@router.post("/jobs/{job}/cancel", summary="Take a job back, or have the device end it")
async def cancel_job(job: str, hub: Hub, who: SomeWorker) -> dict[str, Any]:
    """One that no device has is cancelled for certain; else the state says what the device made of it."""
    hub.auth.require(who, "run:task", (await hub.jobs.get(job))["device"])
    return await hub.jobs.cancel(job, who.name)


@router.post("/groups/{group}/jobs", status_code=201, summary="Give every device of a group the same job")
async def create_fanout(group: str, body: NewFanout, hub: Hub, who: SomeWorker) -> dict[str, Any]:
    return await hub.fanouts.create(
        group,
        JobKind(body.kind),
        body.body,
        subject=who.name,
        roles=who.roles,
        may=within(hub, who, "run:task"),
        there=set(hub.devices.liveness.claiming()),
        idempotency_key=body.idempotency_key,
        ttl_s=body.ttl_s,
        at_once=body.at_once,
    )


@router.get("/fanouts/{fanout}", summary="A fan-out: its jobs by state, and each by its device")
async def get_fanout(
    fanout: str,
    hub: Hub,
    who: JobReader,
    after: Annotated[str, Query(description="only devices past this name")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> dict[str, Any]:
    """Of the devices whose jobs the subject may read."""
    found = await hub.fanouts.get(fanout, after, limit, await visible(hub, who, "read:job"))
    if not found["states"]:
        hub.auth.require(who, "read:job")
    return found


@router.post("/fanouts/{fanout}/cancel", summary="Cancel every job of a fan-out that has not ended")
async def cancel_fanout(fanout: str, hub: Hub, who: SomeWorker) -> dict[str, Any]:
    may, only = within(hub, who, "run:task"), await visible(hub, who, "read:job")
    return await hub.fanouts.cancel(fanout, who.name, may, only)
