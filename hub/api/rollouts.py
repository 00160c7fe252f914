"""Rollouts: a version of a bundle in waves; and the groups, tags and zone by which devices are chosen."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, Field

from edge_agent.wire.grants import Subject
from hub.api.guard import Hub, May, visible

router = APIRouter(prefix="/v1", tags=["rollouts"])
Reader = Annotated[Subject, Depends(May("read:rollout", scoped=True))]
Manager = Annotated[Subject, Depends(May("manage:rollout"))]
Approver = Annotated[Subject, Depends(May("approve:rollout"))]


class NewRollout(BaseModel):
    plan: dict[str, Any] = Field(description="bundle, version, waves, select, …: see docs/rollouts.md")
    draft: bool = Field(False, description="keep it until it is resumed")


class Labels(BaseModel):
    groups: list[Annotated[str, Field(max_length=64)]] = Field([], max_length=32)
    tags: list[Annotated[str, Field(max_length=64)]] = Field([], max_length=32)
    zone: str = Field("", max_length=64, description="time zone of its site, such as Europe/Berlin; empty: the plan's")


@router.post("/rollouts", status_code=201, summary="Make a rollout, which begins when its schedule lets it")
async def create(body: NewRollout, hub: Hub, who: Manager) -> dict[str, Any]:
    return await hub.rollouts.create(body.plan, who.name, body.draft)


@router.get("/rollouts", summary="Rollouts with the devices of each wave by step, newest first")
async def list_rollouts(
    hub: Hub, who: Reader, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> list[dict[str, Any]]:
    """Those with devices of which the subject may read it, and of these alone."""
    return await hub.rollouts.list(limit, await visible(hub, who, "read:rollout"))


@router.get("/rollouts/{rollout}", summary="One rollout: status and why, waves, plan, what it can be told now")
async def get(rollout: str, hub: Hub, who: Reader) -> dict[str, Any]:
    return await hub.rollouts.get(rollout, await visible(hub, who, "read:rollout"))


@router.get("/rollouts/{rollout}/devices", summary="Its devices by name: step, reason, figures, history")
async def devices(
    rollout: str,
    hub: Hub,
    who: Reader,
    step: str = "",
    after: Annotated[str, Query(description="only names past this one")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[dict[str, Any]]:
    return await hub.rollouts.devices(rollout, step, after, limit, await visible(hub, who, "read:rollout"))


@router.post("/rollouts/{rollout}/approve", summary="Let the next wave that waits for it begin")
async def approve(rollout: str, hub: Hub, who: Approver) -> dict[str, Any]:
    return await hub.rollouts.command(rollout, "approve", who.name)


@router.post("/rollouts/{rollout}/{verb}", summary="Pause, resume, abort, or send back the devices that took it")
async def command(
    rollout: str, verb: Literal["pause", "resume", "abort", "rollback"], hub: Hub, who: Manager
) -> dict[str, Any]:
    return await hub.rollouts.command(rollout, verb, who.name)


@router.put("/devices/{device}/labels", summary="Set a device's groups, tags and time zone")
async def label(
    device: str, body: Labels, hub: Hub, who: Annotated[Subject, Depends(May("label:device"))]
) -> dict[str, Any]:
    labels = await hub.rollouts.label(device, body.model_dump(), who.name)
    if await hub.auth.regroup():
        await hub.publish_grants()
    return labels
