"""OpenAI-compatible servers for the tests: a real device with a real model, and one that misbehaves on command."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec

from edge_agent.config import Endpoint
from edge_agent.engines.openai import FILE
from models.package import package
from tests.api.serving import Served, installed, serving, token

LM = "smollm2"
Answer = Callable[["Handler"], None]


def folder(path: Path, url: str, model: str = LM, key: str = "", **more: Any) -> Path:
    """The folder that an endpoint is loaded from; the key goes into a file beside it."""
    path.mkdir(parents=True, exist_ok=True)
    if key:
        (path.parent / f"{path.name}.key").write_text(key + "\n")
        more["key_file"] = str(path.parent / f"{path.name}.key")
    (path / FILE).write_bytes(msgspec.json.encode(Endpoint(url, model, **more)))
    return path


@contextmanager
def device(model_cache: Path) -> Iterator[Served]:
    """A device's own API with SmolLM2 behind it, on a thread of its own."""
    base = installed(package(LM, model_cache)[0])
    ready, done, made = threading.Event(), threading.Event(), list[Served]()

    async def serve() -> None:
        async with serving(base) as device:
            made.append(device)
            ready.set()
            await asyncio.to_thread(done.wait)

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(170)
        yield made[0]
    finally:
        done.set()
        thread.join()


def key() -> str:
    """A token of that device."""
    return token()


class Handler(BaseHTTPRequestHandler):
    """Answers each chat completion by the next of the server's answers, the last one again and again."""

    protocol_version = "HTTP/1.1"
    server: Scripted

    def do_POST(self) -> None:
        self.body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append((self.path, dict(self.headers), self.body))
        answers = self.server.answers
        (answers.pop(0) if len(answers) > 1 else answers[0])(self)

    def do_GET(self) -> None:
        whole(200, {"data": [{"id": "one"}, {"id": "two"}]})(self)

    def log_message(self, *_: Any) -> None: ...


class Scripted(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, *answers: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = list(answers), list[tuple[str, dict[str, str], dict[str, Any]]]()
        self.let_go = threading.Event()

    def handle_error(self, *_: Any) -> None: ...  # a client that leaves is what some tests are about

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


@contextmanager
def server(*answers: Answer) -> Iterator[Scripted]:
    """A real HTTP server on a free port."""
    made = Scripted(*answers)
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield made
    finally:
        made.let_go.set()
        made.shutdown()
        thread.join()
        made.server_close()


def whole(status: int, body: Any, kind: str = "application/json", **headers: str) -> Answer:
    """One body with its length."""

    def answer(handler: Handler) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        handler.send_response(status)
        for name, value in {"content-type": kind, "content-length": str(len(raw)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(raw)

    return answer


def stream(*events: Any, cut: bool = False, stall: bool = False) -> Answer:
    """Server-sent events: bytes as they are, anything else as JSON; then the connection ends, or nothing comes."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream; charset=utf-8")
        handler.send_header("transfer-encoding", "chunked")
        handler.end_headers()
        for event in events:
            raw = event if isinstance(event, bytes) else b"data: " + json.dumps(event).encode() + b"\n\n"
            handler.wfile.write(f"{len(raw):x}\r\n".encode() + raw + b"\r\n")
        if stall:
            handler.server.let_go.wait(30)
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    return answer


def says(text: str = "", finish: str | None = None, **delta: Any) -> dict[str, Any]:
    """A chunk of a completion."""
    return {"choices": [{"index": 0, "delta": {"content": text, **delta}, "finish_reason": finish}]}


DONE = b"data: [DONE]\n\n"
