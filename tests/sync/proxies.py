"""A small real HTTP proxy that knows CONNECT, with a user or without."""

from __future__ import annotations

import asyncio
import contextlib
from base64 import b64encode


class Proxy:
    """Carries connections to where they ask; `asked` says where that was."""

    def __init__(self, user: str = "", password: str = "") -> None:
        self.user, self.password = user, password
        self.asked: list[tuple[str, int]] = []
        self.deny = False
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        access = f"{self.user}:{self.password}@" if self.user else ""
        return f"http://{access}127.0.0.1:{self.port}"

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            answer = await self._http(reader, writer)
            if answer:
                far, to = await asyncio.open_connection(*self.asked[-1])
                self._writers.append(to)
                writer.write(answer)
                await asyncio.gather(_pump(reader, to), _pump(far, writer))
        writer.close()

    async def _http(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        shown = b64encode(f"{self.user}:{self.password}".encode()).decode()
        if self.user and f"Proxy-Authorization: Basic {shown}" not in head:
            writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n")
            return b""
        host, _, port = head.split(" ")[1].rpartition(":")
        self.asked.append((host, int(port)))
        if self.deny:
            writer.write(b"HTTP/1.1 403 Forbidden\r\nX: y\r\n\r\n")
            return b""
        return b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n"


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
    writer.close()
