"""The fleet's own language model, where the hub has one: OpenAI's chat completions, passed on."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from edge_agent.wire.grants import Subject
from hub.api.guard import Hub, May
from hub.errors import Refused
from hub.upstream import Upstream

router = APIRouter(prefix="/v1", tags=["models"])
Runner = Annotated[Subject, Depends(May("run:model", device=True))]


def _upstream(hub: Hub) -> Upstream:
    if hub.models is None:
        raise Refused(404, "this hub has no language model", "outrider hub run --models http://HOST:PORT/v1")
    return hub.models


@router.get("/models", summary="The language models that the hub passes requests on to")
async def models(hub: Hub, request: Request, who: Runner) -> Response:
    return await _upstream(hub).pass_on(request, "models", who.name)


@router.post("/chat/completions", summary="A chat completion of the fleet's own model")
async def completions(hub: Hub, request: Request, who: Runner) -> Response:
    """Body and answer are OpenAI's, streamed where it asks for that."""
    return await _upstream(hub).pass_on(request, "chat/completions", who.name)
