"""Two small real proxies: HTTP CONNECT and SOCKS 5, with a user or without."""

from __future__ import annotations

import asyncio
import contextlib
from base64 import b64encode


class Proxy:
    """Carries connections to where they ask; `asked` says where that was."""

    def __init__(self, scheme: str, user: str = "", password: str = "") -> None:
        self.scheme, self.user, self.password = scheme, user, password
        self.asked: list[tuple[str, int]] = []
        self.deny = False
        self._writers: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        access = f"{self.user}:{self.password}@" if self.user else ""
        return f"{self.scheme}://{access}127.0.0.1:{self.port}"

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
            answer = await (self._http if self.scheme == "http" else self._socks)(reader, writer)
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

    async def _socks(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
        _, count = await reader.readexactly(2)
        offered = await reader.readexactly(count)
        wanted = 2 if self.user else 0
        if wanted not in offered:
            writer.write(b"\x05\xff")
            return b""
        writer.write(bytes([5, wanted]))
        if wanted:
            user = await reader.readexactly((await reader.readexactly(2))[1])
            password = await reader.readexactly((await reader.readexactly(1))[0])
            good = (user.decode(), password.decode()) == (self.user, self.password)
            writer.write(bytes([1, 0 if good else 1]))
            if not good:
                return b""
        assert await reader.readexactly(4) == b"\x05\x01\x00\x03", "the proxy resolves the name"
        host = (await reader.readexactly((await reader.readexactly(1))[0])).decode()
        self.asked.append((host, int.from_bytes(await reader.readexactly(2))))
        if self.deny:
            writer.write(b"\x05\x02\x00\x01" + bytes(6))
            return b""
        return b"\x05\x00\x00\x03\x04home\x00\x00"


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while piece := await reader.read(65536):
        writer.write(piece)
    writer.close()
