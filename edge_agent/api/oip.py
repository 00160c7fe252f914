"""The Open Inference Protocol v2 (REST) for the installed networks, with the binary tensor data extension.

Invariants: health is open, all else is asked of the grants, `run:model` for the network's name; an inference that was
taken runs to its end, whether its client waits or not; the only version there is of a network is the one that runs.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from edge_agent.api import tensors
from edge_agent.api.access import RUN_MODEL, Caller, Gate, Problem, answer
from edge_agent.update.slots import Installed
from edge_agent.wire.bundle import BundleKind

_INLINE = 64 * 1024  # bytes of numbers in JSON that are read or written on the event loop


def routes(gate: Gate) -> list[Route]:
    """Everything below /v2."""

    async def live(_: Request) -> Response:
        return answer({"live": True})

    async def ready(_: Request) -> Response:
        models = gate.device.models
        up = gate.device.healthy() and all([await models.ready(name) for name in list(models.running)])
        return answer({"ready": up}, 200 if up else 503)

    made = [
        Route("/v2/health/live", live),
        Route("/v2/health/ready", ready),
        gate.route("/v2", "GET", "read:device", _server),
    ]
    for model in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}"):
        made.append(gate.route(model, "GET", "read:device", _model))
        made.append(gate.route(f"{model}/ready", "GET", "read:device", _model_ready))
        made.append(gate.route(f"{model}/infer", "POST", RUN_MODEL, _infer))
    return made


async def _server(_: Caller) -> Response:
    return answer({"name": "outrider", "version": version("outrider"), "extensions": ["binary_tensor_data"]})


async def _model(caller: Caller) -> Response:
    network = _network(caller)
    signature = {
        part: [{"name": t["name"], "datatype": tensors.DATATYPES[t["dtype"]], "shape": t["shape"]} for t in declared]
        for part, declared in (("inputs", network.manifest.inputs), ("outputs", network.manifest.outputs))
    }
    name, versions = network.manifest.name, [network.manifest.version]
    return answer({"name": name, "versions": versions, "platform": "onnxruntime_onnx", **signature})


async def _model_ready(caller: Caller) -> Response:
    name = _network(caller).manifest.name
    up = await caller.device.models.ready(name)
    return answer({"name": name, "ready": up}, 200 if up else 503)


async def _infer(caller: Caller) -> Response:
    manifest, headers = _network(caller).manifest, caller.request.headers
    with caller.metrics.timed(manifest.name):
        if (encoding := headers.get("content-encoding", "identity")) != "identity":
            raise Problem(415, f"a body in {encoding} is not read", "send it uncompressed")
        body = await caller.body(caller.max_body)
        length = tensors.json_length(len(body), headers.get(tensors.LENGTH))
        if length < _INLINE:
            asked = tensors.parse(body, length)
        else:
            asked = await asyncio.to_thread(tensors.parse, body, length)
        if manifest.outputs:
            tensors.chosen(asked.outputs, [str(output["name"]) for output in manifest.outputs])
        found = await caller.device.models.infer(manifest.name, asked.inputs, asked.priority, asked.within_s)
        about = {"model_name": manifest.name, "model_version": manifest.version}
        if sum(len(tensor.data) for tensor in found.values()) < _INLINE or asked.binary:
            pieces, json = tensors.respond(about, asked, found)
        else:
            pieces, json = await asyncio.to_thread(tensors.respond, about, asked, found)
    if json is None:
        return Response(pieces[0], media_type="application/json")
    return _Pieces(pieces, {tensors.LENGTH: str(json)})


class _Pieces(Response):
    """Tensors that are sent as they lie in the memory shared with the worker."""

    media_type = "application/octet-stream"

    def __init__(self, pieces: list[bytes], headers: dict[str, str]) -> None:
        size = sum(map(len, pieces))
        self._pieces = pieces if size > _INLINE else [b"".join(pieces)]
        super().__init__(headers=headers | {"Content-Length": str(size)})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for left, piece in zip(range(len(self._pieces) - 1, -1, -1), self._pieces, strict=True):
            await send({"type": "http.response.body", "body": piece, "more_body": left > 0})


def _network(caller: Caller) -> Installed:
    """The network of the path, in the version of the path. Raises Problem."""
    wanted, running = caller.request.path_params, caller.device.models.running
    found = running.get(wanted["name"])
    if found is None or found.manifest.kind is not BundleKind.ONNX:
        names = sorted(name for name, i in running.items() if i.manifest.kind is BundleKind.ONNX)
        raise Problem(404, f"there is no network {wanted['name']}", f"installed: {', '.join(names) or 'none'}")
    if wanted.get("version", found.manifest.version) != found.manifest.version:
        there = f"{wanted['name']} is of version {found.manifest.version}"
        raise Problem(404, f"there is no version {wanted['version']}", f"{there}; leave it out for the one that runs")
    return found
