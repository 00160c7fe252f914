"""Blobs, bundles, and giving bundles to devices."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field

from edge_agent.wire.bundle import seal_root
from edge_agent.wire.grants import Subject
from hub.api.guard import Hub, May
from hub.repository import Repository

router = APIRouter(prefix="/v1", tags=["bundles"])
Publisher = Annotated[Subject, Depends(May("publish:bundle"))]
BundleReader = Annotated[Subject, Depends(May("read:bundle"))]
BundleTaker = Annotated[Subject, Depends(May("read:bundle", device=True))]


class NewBundle(BaseModel):
    manifest: dict[str, Any] = Field(description="name, version, kind, files [{path, size, sha256}], …")


class Assignment(BaseModel):
    name: str
    version: str


@router.put("/blobs/{sha256}", status_code=201, summary="Upload a file's content under its SHA-256")
async def put_blob(sha256: str, request: Request, hub: Hub, _: Publisher) -> dict[str, Any]:
    return {"sha256": sha256, "size": await hub.registry.put_blob(sha256, request.stream())}


@router.head("/blobs/{sha256}", summary="Is a blob here?")
@router.get("/blobs/{sha256}", summary="A blob's content, whole or a Range of it", response_class=FileResponse)
async def get_blob(sha256: str, hub: Hub, _: BundleTaker) -> FileResponse:
    return FileResponse(await hub.registry.blob(sha256), media_type="application/octet-stream")


@router.post("/bundles", status_code=201, summary="Publish a bundle whose files are uploaded: it is cut and signed")
async def publish(body: NewBundle, hub: Hub, who: Publisher) -> dict[str, Any]:
    target = await hub.registry.publish(msgspec.json.encode(body.manifest), who.name)
    return {"name": body.manifest["name"], "version": target.version, "manifest_sha256": target.manifest_sha256}


@router.get("/bundles", summary="What is published, oldest first")
async def list_bundles(hub: Hub, _: BundleReader) -> list[dict[str, Any]]:
    return await hub.registry.list()


@router.get("/bundles/{name}/{version}", summary="A manifest")
async def get_bundle(name: str, version: str, hub: Hub, _: BundleReader) -> dict[str, Any]:
    manifest, target = await hub.registry.get(name, version)
    return {"manifest": msgspec.to_builtins(manifest), "manifest_sha256": target.manifest_sha256}


@router.get("/trust", summary="The newest TUF root, signed with the hub's key: what a new device starts from")
async def trust(hub: Hub, _: BundleTaker) -> dict[str, Any]:
    root = await hub.registry.trusted(Repository.root)
    built: dict[str, Any] = msgspec.to_builtins(seal_root(hub.key, root))
    return built


@router.get("/trust/{file}", summary="TUF metadata; the targets it names are blobs", response_class=Response)
async def metadata(file: str, hub: Hub, _: BundleTaker) -> Response:
    content = await hub.registry.trusted(lambda repository: repository.file(file))
    return Response(content, media_type="application/json")


@router.post("/devices/{device}/bundles", status_code=201, summary="Assign a published bundle to a device")
async def assign(
    device: str, body: Assignment, hub: Hub, who: Annotated[Subject, Depends(May("assign:bundle"))]
) -> dict[str, Any]:
    desired = await hub.assign_bundle(device, body.name, body.version, who.name)
    return {"device": device, "desired_version": desired.version, "desired": desired.doc}


class UpdateRules(BaseModel, extra="forbid"):
    updates: dict[str, Any] | None = Field(None, description="time_zone, download, activate (windows), min_battery, …")
    activation: dict[str, Any] | None = Field(None, description="by bundle: policy, trial {mode, share, seconds, …}")


@router.patch("/devices/{device}/updates", summary="When a device may update, and what a new version must show")
async def update_rules(
    device: str, body: UpdateRules, hub: Hub, who: Annotated[Subject, Depends(May("assign:bundle"))]
) -> dict[str, Any]:
    patch = body.model_dump(exclude_unset=True)
    desired = await hub.twin.patch_desired(device, patch, who.name, "change:updates")
    return {"device": device, "desired_version": desired.version, "desired": desired.doc}
