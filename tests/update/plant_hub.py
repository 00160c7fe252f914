"""A real HTTP server with the hub's own repository and packs, Range, device tokens, and faults on request."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from edge_agent.errors import Refused
from edge_agent.update.download import Downloads, hub_client
from edge_agent.update.slots import Installed
from edge_agent.update.trial import Activation, Figures
from edge_agent.update.trust import Director
from edge_agent.update.trust import Repository as Known
from edge_agent.wire.bundle import (
    BundleKind,
    Directive,
    Manifest,
    Target,
    scan,
    seal_directive,
    seal_root,
    sha256,
    target_paths,
)
from edge_agent.wire.chunks import Chunk, decode_index
from edge_agent.wire.errors import BadSignature
from edge_agent.wire.messages import encode
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tokens import issue_device_token, verify_device_token
from hub import packs
from hub.errors import Refused as HubRefused
from hub.repository import Repository, make_key

FLEET, DEVICE = "plant", "line-1"


class Raw(NamedTuple):
    """A file entry that nobody checked."""

    path: str
    size: int
    sha256: str


class PlantHub:
    """`cut_at`: bytes sent of a pack before the connection dies, once each; `tamper`: changes what a pack sends.

    `says`: what is answered for a file of the metadata instead of the repository's.
    """

    def __init__(self) -> None:
        self.key, self.device_key = SigningKey.generate(), SigningKey.generate()
        self.blobs: dict[str, bytes] = {}
        self.packs: set[str] = set()
        self.known: dict[str, dict[bytes, Chunk]] = {}
        self.cut_at: list[int] = []
        self.tamper: Callable[[bytes], bytes] = lambda data: data
        self.says: dict[str, bytes] = {}
        self.counter, self.sent = 0, 0
        self.folder = Path(tempfile.mkdtemp())
        self.offline = [make_key(self.folder / f"root-{number}.key") for number in (1, 2, 3)]
        self.repository = Repository(self.folder / "trust")
        self.repository.create(self.offline, 2, {"bundles": ["bundles/*/*/*"]})
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
        return self.publish_raw(name, version, encode(manifest), {e.path: files[e.path] for e in manifest.files})

    def publish_raw(self, name: str, version: str, manifest: bytes, files: dict[str, bytes]) -> Target:
        """Publish bytes as a manifest, of files that are cut as they are given."""
        with tempfile.TemporaryDirectory() as scratch:
            entries = []
            for number, (path, data) in enumerate(files.items()):
                (Path(scratch) / str(number)).write_bytes(data)
                entries.append((Raw(path, len(data), sha256(data)), Path(scratch) / str(number)))
            known = self.known.setdefault(name, {})
            index, pack = packs.build(entries, known, Path(scratch) / "pack")  # type: ignore[arg-type]
            if pack:
                self.blobs[pack] = (Path(scratch) / "pack").read_bytes()
                self.packs.add(pack)
        known |= {chunk.hash: chunk for chunk in decode_index(index, [e for e, _ in entries]).chunks()}  # type: ignore[misc]
        self.target(name, version, manifest, index)
        return Target(version, sha256(manifest))

    def target(self, name: str, version: str, manifest: bytes, index: bytes) -> None:
        both = dict(zip(target_paths(name, version), (manifest, index), strict=True))
        self.blobs |= {sha256(data): data for data in both.values()}
        self.repository.publish({path: (len(data), sha256(data)) for path, data in both.items()})

    def directs(self, **changes: Any) -> dict[str, Any]:
        """The next directive of the device, as it stands in its desired document."""
        self.counter += 1
        given = {"fleet": FLEET, "device": DEVICE, "hardware": "", "counter": self.counter, "issued": time.time()}
        directive = Directive(**(given | {"bundles": {}} | changes))
        sealed: dict[str, Any] = msgspec.to_builtins(seal_directive(self.key, directive))
        return sealed

    def director(self, folder: Path) -> Director:
        return Director(folder, self.key.public, FLEET, DEVICE, "x86_64")

    def known_to(self, folder: Path, downloads: Downloads, director: Director) -> Known:
        return Known(folder, downloads, director, self.key.public)

    def fetched(self, asked: Iterable[str] | None = None) -> list[str]:
        """Requests for packs."""
        return [path for path in asked or self.asked if any(pack in path for pack in self.packs)]

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

    async def root(self, request: Request) -> Response:
        if refused := self._refused(request):
            return refused
        sealed = seal_root(self.key, self.says.get("root", self.repository.root()))
        return JSONResponse(msgspec.to_builtins(sealed))

    async def metadata(self, request: Request) -> Response:
        self.asked.append(request.url.path)
        if refused := self._refused(request):
            return refused
        try:
            name = request.path_params["file"]
            return Response(self.says[name] if name in self.says else self.repository.file(name))
        except HubRefused:
            return JSONResponse({"detail": "no such metadata"}, 404)

    async def blob(self, request: Request) -> Response:
        span = request.headers.get("range", "bytes=0-")
        self.asked.append(f"{request.url.path} {span}")
        if refused := self._refused(request):
            return refused
        data = self.blobs.get(request.path_params["sha256"])
        if data is None:
            return JSONResponse({"detail": "no such blob"}, 404)
        if "range" not in request.headers:
            self.sent += len(data)
            return Response(data)
        first, last = (int(number) for number in span.removeprefix("bytes=").split("-"))
        whole, data = len(data), self.tamper(data[first : last + 1])
        headers = {"content-range": f"bytes {first}-{last}/{whole}"}
        body = self._body(data, self.cut_at.pop(0) if self.cut_at else None)
        return StreamingResponse(body, 206, headers, "application/octet-stream")

    async def _body(self, data: bytes, cut: int | None) -> AsyncIterator[bytes]:
        for at in range(0, len(data), 4096):
            await asyncio.to_thread(self.gate.wait, 10)
            if cut is not None and at >= cut:
                raise ConnectionResetError("cut by the test")
            self.sent += len(data[at : at + 4096])
            yield data[at : at + 4096]

    @contextlib.contextmanager
    def serving(self) -> Iterator[PlantHub]:
        routes = [
            Route("/v1/trust", self.root),
            Route("/v1/trust/{file}", self.metadata),
            Route("/v1/blobs/{sha256}", self.blob),
        ]
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
                shutil.rmtree(self.folder)


class ReadsGood:
    """A prober that reads the model: good ones begin with `good`."""

    async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
        if not (candidate.folder / "model.bin").read_bytes().startswith(b"good"):
            raise Refused(f"{name} {candidate.manifest.version} answers the probe wrongly")
        return Figures("probe")


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    """Wait for a condition."""

    async def wait() -> None:
        while not condition():  # noqa: ASYNC110 - any condition, not only events
            await asyncio.sleep(0.005)

    await asyncio.wait_for(wait(), timeout_s)
