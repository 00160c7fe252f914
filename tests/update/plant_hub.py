"""A real HTTP server that publishes bundles as the hub does, with Range, device tokens, and faults on request."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from edge_agent.errors import Refused
from edge_agent.update.download import Downloads, hub_client
from edge_agent.update.machine import Target
from edge_agent.update.slots import Installed
from edge_agent.wire.bundle import BundleKind, Manifest, SignedManifest, scan
from edge_agent.wire.errors import BadSignature
from edge_agent.wire.messages import encode
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tokens import issue_device_token, verify_device_token

FLEET, DEVICE = "plant", "line-1"


class PlantHub:
    """`cut_at`: bytes sent of a blob before the connection dies, once each; `tamper`: changes what a blob sends."""

    def __init__(self) -> None:
        self.key, self.device_key = SigningKey.generate(), SigningKey.generate()
        self.manifests: dict[tuple[str, str], SignedManifest] = {}
        self.blobs: dict[str, bytes] = {}
        self.cut_at: list[int] = []
        self.tamper: Callable[[bytes], bytes] = lambda data: data
        self.tamper_manifest: Callable[[SignedManifest], SignedManifest] = lambda signed: signed
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.url = ""

    def publish(self, name: str, version: str, files: dict[str, bytes], scratch: Path, **more: object) -> Target:
        folder = scratch / f"{name}-{version}"
        for path, data in files.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_bytes(data)
        kind = more.pop("kind", BundleKind.ONNX)
        manifest = Manifest(name, version, kind, scan(folder), **more)  # type: ignore[arg-type]
        return self.publish_raw(name, version, encode(manifest), files.values())

    def publish_raw(self, name: str, version: str, manifest: bytes, blobs: object = ()) -> Target:
        import hashlib

        key_text = self.key.sign("outrider/1/bundle", manifest)
        signed = SignedManifest(manifest.decode(), key_text, self.key.public.key_id)
        self.manifests[name, version] = signed
        for data in blobs:  # type: ignore[attr-defined]
            self.blobs[hashlib.sha256(data).hexdigest()] = data
        return Target(version, signed.sha256)

    def downloads(self) -> Downloads:
        return Downloads(hub_client(self.url), self.token, backoff_s=0.01)

    def token(self) -> str:
        return issue_device_token(self.device_key, FLEET, DEVICE, now=time.time())

    def _refused(self, request: Request) -> Response | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        try:
            verify_device_token(self.device_key.public, token, fleet=FLEET, device=DEVICE, now=time.time())
        except BadSignature:
            return JSONResponse({"detail": "no"}, 401)
        return None

    async def bundle(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        if refused := self._refused(request):
            return refused
        signed = self.manifests.get((request.path_params["name"], request.path_params["version"]))
        if signed is None:
            return JSONResponse({"detail": "no such bundle"}, 404)
        return Response(msgspec.json.encode(self.tamper_manifest(signed)), media_type="application/json")

    async def blob(self, request: Request) -> Response:
        span = request.headers.get("range", "bytes=0-")
        self.asked.append(f"{request.url.path} {span}")
        if refused := self._refused(request):
            return refused
        data = self.blobs.get(request.path_params["sha256"])
        if data is None:
            return JSONResponse({"detail": "no such blob"}, 404)
        data = self.tamper(data)
        start = int(span.removeprefix("bytes=").rstrip("-"))
        if start >= len(data) > 0:
            return Response(status_code=416)
        headers = {"content-length": str(len(data) - start)}
        if start:
            headers["content-range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        cut = self.cut_at.pop(0) if self.cut_at else None
        body = self._body(data[start:], cut)
        return StreamingResponse(body, 206 if start else 200, headers, "application/octet-stream")

    async def _body(self, data: bytes, cut: int | None) -> AsyncIterator[bytes]:
        for at in range(0, len(data), 4096):
            await asyncio.to_thread(self.gate.wait, 10)
            if cut is not None and at >= cut:
                raise ConnectionResetError("cut by the test")
            yield data[at : at + 4096]

    @contextlib.contextmanager
    def serving(self) -> Iterator[PlantHub]:
        routes = [Route("/v1/bundles/{name}/{version}", self.bundle), Route("/v1/blobs/{sha256}", self.blob)]
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            config = uvicorn.Config(Starlette(routes=routes), log_level="critical", ws="none", lifespan="off")
            server = uvicorn.Server(config)
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()
            try:
                yield self
            finally:
                self.gate.set()
                server.should_exit = True
                thread.join(10)


class ReadsGood:
    """A prober that reads the model: good ones begin with `good`."""

    async def probe(self, name: str, candidate: Installed) -> None:
        if not (candidate.folder / "model.bin").read_bytes().startswith(b"good"):
            raise Refused(f"{name} {candidate.manifest.version} answers the probe wrongly")


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition."""

    async def wait() -> None:
        while not condition():  # noqa: ASYNC110 - any condition, not only events
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), timeout_s)
