"""What came signed and could not be taken, and what never came: to look at, and to take after all."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query

from edge_agent.wire.grants import Subject
from hub.api.guard import Hub, May, visible

router = APIRouter(prefix="/v1", tags=["devices"])
Reader = Annotated[Subject, Depends(May("read:telemetry"))]
SomeReader = Annotated[Subject, Depends(May("read:telemetry", scoped=True))]


@router.get("/deadletters", summary="Batches that could not be taken, newest first")
async def list_dead_letters(
    hub: Hub, who: SomeReader, device: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 100
) -> list[dict[str, Any]]:
    return await hub.telemetry.dead(device, limit, await visible(hub, who, "read:telemetry"))


@router.get("/deadletters/{id}", summary="One of them with its payload, and its text if it unpacks")
async def get_dead_letter(id: int, hub: Hub, who: SomeReader) -> dict[str, Any]:
    found = await hub.telemetry.dead_letter(id)
    hub.auth.require(who, "read:telemetry", found["device"])
    return found


@router.post("/deadletters/{id}/replay", summary="Take what it holds and is not here yet")
async def replay(
    id: int, hub: Hub, who: Annotated[Subject, Depends(May("replay:deadletter", scoped=True))]
) -> dict[str, Any]:
    hub.auth.require(who, "replay:deadletter", (await hub.telemetry.dead_letter(id))["device"])
    return {"id": id, "records": await hub.telemetry.replay(id, who.name)}


@router.get("/devices/{device}/gaps", summary="Which seqs never came, newest first")
async def gaps(device: str, hub: Hub, _: Reader) -> dict[str, Any]:
    row = await hub.devices.get(device)
    counts = {name: row[name] for name in ("missing", "lost")}
    return counts | {"unexplained": max(0, row["missing"] - row["lost"]), "gaps": await hub.telemetry.gaps(device)}
