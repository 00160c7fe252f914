"""Login, users, grants and the audit log."""

from typing import Annotated, Any

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


class NewUser(BaseModel):
    name: str
    password: str = Field(description="8 to 1024 characters")
    roles: list[str] = Field(description="of admin, developer, operator, auditor, viewer")


@router.post("/login", summary="Exchange user and password for an access token")
async def login(body: Login, request: Request, hub: Hub) -> dict[str, Any]:
    client = request.client.host if request.client else "unknown"
    token, lifetime = await hub.auth.login(body.user, body.password, client)
    return {"access_token": token, "token_type": "Bearer", "expires_in": lifetime}


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
