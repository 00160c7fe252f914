"""Who may call a route: every /v1 route takes a `May(action)` dependency or is one of OPEN.

Invariants: no token or a bad one is 401, a right missing is 403, and the answer comes from `allowed` over the grants
that devices have too; a device's own token opens only routes that say `device=True`.
"""

import time
from collections.abc import Callable
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

OPEN = frozenset({"/v1/login", "/v1/token", "/v1/jwks", "/v1/enrol", "/v1/ca"})
_bearer = HTTPBearer(auto_error=False, description="An access token from POST /v1/login, or a device's own token.")


def services_of(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Hub = Annotated[Services, Depends(services_of)]


class May:
    """A dependency that lets through who may do `action` on the device named in the path; gives the subject.

    One that is `scoped` lets through, too, who may do it to some devices: the route then answers for these alone.
    """

    def __init__(self, action: str, device: bool = False, scoped: bool = False) -> None:
        self.action = action
        self.device = device
        self.scoped = scoped

    async def __call__(
        self, request: Request, shown: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> Subject:
        services = services_of(request)
        try:
            if shown is None:
                raise Refused(401, "this needs a token", "log in: outrider hub login, or POST /v1/login")
            try:
                subject = services.auth.subject(shown.credentials)
            except Refused:
                if not self.device:
                    raise
                return await _device(services, shown.credentials)
        except Refused as error:
            told = {"path": request.url.path[:200], "why": error.message[:200]}
            await services.auth.tell_refused("unknown", "refuse:token", told)
            raise
        if self.scoped and services.auth.somewhere(subject, self.action):
            return subject
        try:
            services.auth.require(subject, self.action, request.path_params.get("device", ""))
        except Refused:
            told = {"action": self.action, "path": request.url.path[:200]}
            await services.auth.tell_refused(subject.name, "refuse:request", told)
            raise
        return subject


def within(services: Services, who: Subject, action: str) -> Callable[[str], bool]:
    """Whether somebody may do something to a device."""
    return lambda device: services.auth.may(who, action, device)


async def visible(services: Services, who: Subject, action: str) -> set[str] | None:
    """The devices that somebody may do something to; None: all that there are."""
    if services.auth.may(who, action):
        return None
    return set(filter(within(services, who, action), await services.devices.names()))


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
