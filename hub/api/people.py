"""Login, users, grants and the audit log."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, Field

from edge_agent.wire.grants import Subject
from hub.api.guard import Hub, May

router = APIRouter(prefix="/v1", tags=["people"])
UserManager = Annotated[Subject, Depends(May("manage:user"))]


class Login(BaseModel):
    user: str = Field(max_length=64)
    password: str = Field(max_length=1024)


class Refresh(BaseModel):
    refresh_token: str = Field(max_length=128)


class Role(BaseModel):
    permissions: list[str] = Field(max_length=200, description="verb:noun or verb:noun:scope, * for any")


class OfflineToken(BaseModel):
    ttl_s: float = Field(7 * 86400, description="seconds it should be good for; the grants' hard expiry ends it too")


class NewUser(BaseModel):
    name: str
    password: str = Field(description="8 to 1024 characters")
    roles: list[str] = Field(description="of GET /v1/roles")


@router.post("/login", summary="Exchange user and password for an access token")
async def login(body: Login, request: Request, hub: Hub) -> dict[str, Any]:
    client = request.client.host if request.client else "unknown"
    token, lifetime = await hub.auth.login(body.user, body.password, client)
    following = await hub.auth.refresh_token(body.user)
    return {"access_token": token, "token_type": "Bearer", "expires_in": lifetime, "refresh_token": following}


@router.post("/token", summary="Exchange a refresh token, good once, for an access token and the next refresh token")
async def refresh(body: Refresh, hub: Hub) -> dict[str, Any]:
    token, following, lifetime = await hub.auth.refresh(body.refresh_token)
    return {"access_token": token, "token_type": "Bearer", "expires_in": lifetime, "refresh_token": following}


@router.get("/jwks", summary="The keys that sign access tokens: in use, next, and last (RFC 7517)")
async def jwks(hub: Hub) -> dict[str, Any]:
    return {"keys": hub.auth.grants.jwks}


@router.get("/ca", summary="The root certificate, PEM: trust it by its fingerprint", response_class=PlainTextResponse)
async def ca(hub: Hub) -> str:
    return hub.authority.root_pem


@router.post("/keys/rotate", status_code=204, summary="Sign access tokens with the next key from now on")
async def rotate(hub: Hub, who: Annotated[Subject, Depends(May("rotate:key"))]) -> Response:
    await hub.auth.rotate_keys(by=who.name)
    await hub.publish_grants()
    return Response(status_code=204)


@router.get("/roles", summary="Every role and its permissions")
async def roles(hub: Hub, _: Annotated[Subject, Depends(May("read:grants"))]) -> dict[str, list[str]]:
    return hub.auth.grants.roles


@router.put("/roles/{role}", status_code=204, summary="Make or change a custom role")
async def set_role(role: str, body: Role, hub: Hub, who: Annotated[Subject, Depends(May("manage:role"))]) -> Response:
    await hub.auth.set_role(role, body.permissions, by=who.name)
    await hub.publish_grants()
    return Response(status_code=204)


@router.delete("/roles/{role}", status_code=204, summary="Remove a custom role: who has it may do that no more")
async def remove_role(role: str, hub: Hub, who: Annotated[Subject, Depends(May("manage:role"))]) -> Response:
    await hub.auth.set_role(role, None, by=who.name)
    await hub.publish_grants()
    return Response(status_code=204)


@router.post("/devices/{device}/offline-token", status_code=201, summary="A token for one device, for a long cut")
async def offline_token(
    device: str, body: OfflineToken, hub: Hub, who: Annotated[Subject, Depends(May("create:offline-token"))]
) -> dict[str, Any]:
    await hub.devices.row(device)
    token, until = await hub.auth.offline_token(who, device, body.ttl_s)
    return {"access_token": token, "token_type": "Bearer", "expires": until}


@router.get("/users", summary="Everybody who can log in, and who was revoked")
async def users(hub: Hub, _: UserManager) -> list[dict[str, Any]]:
    return await hub.auth.users()


@router.post("/users", status_code=201, summary="Add somebody")
async def add_user(body: NewUser, hub: Hub, who: UserManager) -> dict[str, Any]:
    await hub.auth.add_user(body.name, body.roles, body.password, by=who.name)
    return {"name": body.name, "roles": body.roles}


@router.delete("/users/{user}", status_code=204, summary="Revoke somebody: no login, and old tokens are void")
async def revoke_user(user: str, hub: Hub, who: UserManager) -> Response:
    await hub.revoke_user(user, by=who.name)
    return Response(status_code=204)


@router.get("/grants", summary="The signed grants, a compact JWS", response_class=PlainTextResponse)
async def grants(hub: Hub, _: Annotated[Subject, Depends(May("read:grants", device=True))]) -> str:
    return hub.auth.grants_text


@router.get("/audit", summary="The hash-chained log, oldest first")
async def audit(
    hub: Hub,
    _: Annotated[Subject, Depends(May("read:audit"))],
    after: Annotated[int, Query(ge=0, description="entries with an id above this")] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    verify: Annotated[bool, Query(description="also walk the whole chain: `first_broken` is an id or null")] = False,
) -> dict[str, Any]:
    checked = {"first_broken": await hub.audit.first_broken()} if verify else {}
    return {"entries": await hub.audit.entries(after, limit), **checked}


@router.get("/audit/devices", summary="What devices chained, by device, epoch and seq")
async def audit_of_devices(
    hub: Hub,
    _: Annotated[Subject, Depends(May("read:audit"))],
    device: Annotated[str, Query(description="past this device, epoch and seq")] = "",
    epoch: Annotated[int, Query(ge=0)] = 0,
    seq: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 1000,
) -> dict[str, Any]:
    """`body` is the very text that the device hashed."""
    entries = await hub.audit.device_entries((device, epoch, seq), limit)
    return {"entries": msgspec.to_builtins(entries)}


@router.get("/retention", summary="How long records, uploads and finished jobs are kept, and what was pruned")
async def retention(hub: Hub, _: Annotated[Subject, Depends(May("read:audit"))]) -> dict[str, Any]:
    return await hub.retention.report()


@router.get("/audit/verify", summary="Walk the hub's chain and every device's, with the heads that were anchored")
async def verify_audit(hub: Hub, _: Annotated[Subject, Depends(May("read:audit"))]) -> dict[str, Any]:
    await hub.audit.anchor()
    return {"first_broken": await hub.audit.first_broken(), "devices": await hub.audit.devices()}
