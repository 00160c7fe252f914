"""Uploads of devices (tus 1.0: core and creation, https://tus.io/protocols/resumable-upload), and reading them."""

from base64 import b64decode
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from fastapi.responses import FileResponse, Response
from starlette.requests import ClientDisconnect

from edge_agent.wire.grants import Subject
from hub.api.guard import Hub, May
from hub.errors import Refused

router = APIRouter(prefix="/v1", tags=["uploads"])
TUS = {"Tus-Resumable": "1.0.0", "Cache-Control": "no-store"}


async def _uploader(who: Annotated[Subject, Depends(May("upload:blob", device=True))]) -> str:
    if who.roles:
        raise Refused(422, "only a device uploads blobs", "show the device's own token")
    return who.name


Uploader = Annotated[str, Depends(_uploader)]
MayUpload = Depends(May("upload:blob", device=True))
MayRead = Depends(May("read:telemetry"))


@router.post("/uploads", status_code=201, summary="Begin (or find again) an upload", dependencies=[MayUpload])
async def begin(
    hub: Hub, device: Uploader, upload_length: Annotated[int, Header()], upload_metadata: Annotated[str, Header()]
) -> Response:
    """`Upload-Metadata` names the blob: `sha256` and the base64 of its hexadecimal digits."""
    told = dict(pair.strip().partition(" ")[::2] for pair in upload_metadata.split(","))
    try:
        sha256 = b64decode(told.get("sha256", ""), validate=True).decode("ascii")
    except ValueError as error:
        raise Refused(422, f"Upload-Metadata: {error}", "sha256 and its base64") from None
    offset = await hub.uploads.begin(device, sha256, upload_length)
    return Response(status_code=201, headers=TUS | {"Location": f"/v1/uploads/{sha256}", "Upload-Offset": str(offset)})


@router.head("/uploads/{sha256}", summary="How much of an upload is here", dependencies=[MayUpload])
async def state(sha256: str, hub: Hub, device: Uploader) -> Response:
    here, size = await hub.uploads.state(device, sha256)
    return Response(headers=TUS | {"Upload-Offset": str(here), "Upload-Length": str(size)})


@router.patch("/uploads/{sha256}", status_code=204, summary="Go on with an upload", dependencies=[MayUpload])
async def append(
    sha256: str, request: Request, hub: Hub, device: Uploader, upload_offset: Annotated[int, Header()]
) -> Response:
    try:
        here = await hub.uploads.append(device, sha256, upload_offset, request.stream())
    except ClientDisconnect:
        return Response(status_code=400)  # to nobody; what came is kept
    return Response(status_code=204, headers=TUS | {"Upload-Offset": str(here)})


@router.get("/devices/{device}/blobs/{sha256}", summary="What a device uploaded", dependencies=[MayRead])
async def read(device: str, sha256: str, hub: Hub) -> FileResponse:
    path = await hub.uploads.file((await hub.devices.row(device)).name, sha256)
    return FileResponse(path, media_type="application/octet-stream")
