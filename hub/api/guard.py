"""Who may call a route: every /v1 route takes a `May(action)` dependency or is one of OPEN.

Invariants: no token or a bad one is 401, a right missing is 403, and the answer comes from `allowed` over the grants
that devices have too; a device's own token opens only routes that say `device=True`.
"""

import time
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from edge_agent.wire import tokens
from edge_agent.wire.errors import WireError
from edge_agent.wire.grants import Subject
from edge_agent.wire.signing import VerifyKey
from hub.errors import Fatal, Refused
from hub.services import Services

OPEN = frozenset({"/v1/login", "/v1/token", "/v1/jwks", "/v1/enrol"})
_bearer = HTTPBearer(auto_error=False, description="An access token from POST /v1/login, or a device's own token.")


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Hub = Annotated[Services, Depends(services_of)]


class May:
    """A dependency that lets through who may do `action` on the device named in the path; gives the subject."""

    def __init__(self, action: str, device: bool = False) -> None:
        self.action = action
        self.device = device

    async def __call__(
        self, request: Request, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Subject:
        services = services_of(request)
        if shown is None:
            raise Refused(401, "this needs a token", "log in: outrider hub login, or POST /v1/login")
        try:
            subject = services.auth.subject(shown.credentials)
        except Refused:
            if not self.device:
                raise
            return await _device(services, shown.credentials)
        try:
            services.auth.require(subject, self.action, request.path_params.get("device", ""))
        except Refused:
            await services.auth.tell_refused(subject.name, "refuse:request", {"action": self.action})
            raise
        return subject


async def _device(services: Services, token: str) -> Subject:
    try:
        name = tokens.device_of(token)
        row = await services.devices.row(name)
        key, now = VerifyKey.from_text(row.public_key), time.time()
        tokens.verify_device_token(key, token, fleet=services.fleet, device=name, now=now)
    except (WireError, Refused) as error:
        raise Refused(401, f"the token is refused: {error}", "log in again, or enrol the device again") from None
    return Subject(name, [], now)


def declare_actions(router: APIRouter) -> None:
    """Write each route's action into the OpenAPI as `x-action`. Raises Fatal for a route that has none."""
    for route in router.routes:
        if not isinstance(route, APIRoute):
            raise Fatal(f"{route} is no API route", "a router under /v1 holds API routes only")
        actions = [d.call.action for d in route.dependant.dependencies if isinstance(d.call, May)]
        if not actions and route.path not in OPEN:
            raise Fatal(f"route {route.path} declares no action", "give it a May(...) dependency")
        route.openapi_extra = {"x-action": actions[0] if actions else None}
