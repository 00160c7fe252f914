"""Liveness and readiness, open to everybody."""

import logging

import sqlalchemy as sa
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from hub.api.guard import Hub
from hub.api.problems import problem

router = APIRouter(tags=["health"])
log = logging.getLogger(__name__)


@router.get("/healthz", summary="Is the process there?")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Can it do its work: database and broker?")
async def readyz(hub: Hub) -> JSONResponse:
    try:
        await hub.auth.users()
    except sa.exc.SQLAlchemyError as error:
        log.warning("the database gives nothing: %s", error)
        return problem(503, f"the database gives nothing: {type(error).__name__}", "does it run? the log says more")
    if hub.db.failing:
        log.warning("the database takes nothing: %s", hub.db.failing)
        return problem(503, "the database takes nothing", "is the disk full or read-only? the log says more")
    if not hub.session.connected:
        reason = str(hub.session.error or "connecting")
        return problem(503, f"no connection to the broker at {hub.address.url}: {reason}", "check --broker")
    return JSONResponse({"status": "ready"})
