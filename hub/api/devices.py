"""Enrolment, devices, their configuration and their telemetry."""

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Response
from pydantic import BaseModel, Field

from edge_agent.wire.grants import Subject
from hub.api.guard import Hub, May, visible, within
from hub.errors import Refused
from hub.twin import free

router = APIRouter(prefix="/v1", tags=["devices"])
DeviceReader = Annotated[Subject, Depends(May("read:device"))]
SomeReader = Annotated[Subject, Depends(May("read:device", scoped=True))]


class NewEnrolment(BaseModel):
    name: str | None = Field(None, description="the only name the token is good for, if given")
    ttl_s: float = Field(3600, description="seconds until the token expires")


class Enrol(BaseModel):
    token: str = Field(max_length=256)
    name: str
    public_key: str = Field(max_length=64, description="the device's Ed25519 public key, base64url")
    csr: str = Field("", max_length=4096, description="PKCS#10 in PEM, signed by that key, for a certificate")


class Renewal(BaseModel):
    csr: str = Field(max_length=4096, description="PKCS#10 in PEM, signed by the enrolled key")


@router.post("/enrolments", status_code=201, summary="Make a single-use enrolment token")
async def create_enrolment(
    body: NewEnrolment, hub: Hub, who: Annotated[Subject, Depends(May("create:enrolment"))]
) -> dict[str, Any]:
    return {"token": await hub.devices.create_enrolment(who.name, body.name, body.ttl_s)}


@router.post("/enrol", status_code=201, summary="Enrol a device with a token: no login needed")
async def enrol(body: Enrol, hub: Hub) -> dict[str, Any]:
    certificate = await hub.devices.enrol(body.token, body.name, body.public_key, body.csr)
    await hub.tell_broker()
    return {
        "fleet": hub.fleet,
        "device": body.name,
        "hub_key": hub.key.public.text,
        "broker": {
            "url": hub.address.url,
            "username": hub.address.username,
            "password": hub.address.password,
            "ca": hub.address.ca,
        },
        "certificate": certificate,
        "grants": hub.auth.grants_text,
        "clock": time.time(),
    }


@router.post("/devices/{device}/certificate", summary="A new certificate, for the device itself")
async def renew(
    device: str, body: Renewal, hub: Hub, who: Annotated[Subject, Depends(May("renew:certificate", device=True))]
) -> dict[str, Any]:
    if who.name != device:
        raise Refused(409, f"{who.name} is not {device}", "a device renews its own certificate")
    return {"certificate": await hub.devices.renew(device, body.csr)}


@router.delete("/devices/{device}", status_code=204, summary="Revoke a device: its key and certificates are void")
async def revoke_device(device: str, hub: Hub, who: Annotated[Subject, Depends(May("revoke:device"))]) -> Response:
    await hub.revoke_device(device, by=who.name)
    return Response(status_code=204)


@router.get("/broker", summary="Where devices find the broker")
async def broker(hub: Hub, _: DeviceReader) -> dict[str, Any]:
    return {"url": hub.address.url, "connected": hub.session.connected}


@router.get("/devices", summary="Every device with its true presence")
async def list_devices(hub: Hub, who: SomeReader) -> list[dict[str, Any]]:
    may = within(hub, who, "read:device")
    return [_shown(device) for device in await hub.devices.list() if may(device["name"])]


@router.get("/devices/{device}", summary="One device: presence, clock offset, watermark, twin, bundles")
async def get_device(device: str, hub: Hub, _: DeviceReader) -> dict[str, Any]:
    return _shown(await hub.devices.get(device))


@router.patch("/devices/{device}/desired", summary="Configure a device: a merge patch of its desired document")
async def patch_desired(
    device: str,
    body: dict[str, Any],
    response: Response,
    hub: Hub,
    who: Annotated[Subject, Depends(May("configure:device"))],
    if_match: Annotated[str | None, Header(description="the version it was made for; another one is 412")] = None,
) -> dict[str, Any]:
    """`{"config": {"telemetry_s": 5, "log": "debug", …}}`, see docs/operations.md; null takes a key out."""
    version = if_match.strip().removeprefix("W/").strip('"') if if_match not in (None, "*") else None
    if version is not None and not (version.isdecimal() and len(version) < 20):
        raise Refused(422, f"If-Match {if_match!r} is no version", 'such as If-Match: "7"')
    expected = None if version is None else int(version)
    desired = await hub.twin.patch_desired(device, free(body), who.name, "configure:device", expected)
    response.headers["ETag"] = f'"{desired.version}"'
    return {"device": device, "desired_version": desired.version, "desired": desired.doc}


@router.get("/telemetry", summary="Committed records, a page at a time")
async def telemetry(
    hub: Hub,
    who: Annotated[Subject, Depends(May("read:telemetry", scoped=True))],
    device: Annotated[str | None, Query(description="of this device, by (epoch, seq)")] = None,
    kind: Annotated[str | None, Query(description="of this kind")] = None,
    after: Annotated[int, Query(ge=0, description="without device: records with an id above this")] = 0,
    after_seq: Annotated[int, Query(ge=0, description="with device: above this seq of the epoch")] = 0,
    epoch: Annotated[int | None, Query(ge=0, description="with device: of this epoch, else of the newest")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> dict[str, Any]:
    only = await visible(hub, who, "read:telemetry")
    paged: dict[str, Any] = {"after": after, "after_seq": after_seq, "epoch": epoch, "limit": limit, "only": only}
    records = await hub.telemetry.query(device, kind, **paged)
    return {"records": records, "next": {f: records[-1][f] for f in ("id", "epoch", "seq")} if records else None}


def _shown(device: dict[str, Any]) -> dict[str, Any]:
    told = ("online", "state", "reason", "last_seen", "heartbeat_age_s", "clock_offset_s")
    presence = {name: device.pop(name) for name in told}
    return {"name": device.pop("name"), "presence": presence} | device
