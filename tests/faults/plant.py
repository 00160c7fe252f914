"""A plant of real processes: a hub, Mosquitto with our configuration, a daemon, and a cable that can be bad."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from bench.fleet import Device, Hub, until
from bench.link import Link
from tests.faults.disk import Disk
from tests.faults.packets import FAR, NEAR, Packets
from tests.hub.site import Site
from tests.sync.brokers import mosquitto

Seen = Callable[[str, object], None]
"""pytest's record_property: what a row of the matrix shows as seen."""
PLANT = [
    pytest.mark.faults,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(mosquitto() is None, reason="no mosquitto binary: apt-get install mosquitto"),
]
"""The marks of a module whose tests have the plant."""
PATIENCE_S = 240.0  # a busy machine starts a hub slowly; nothing here is a measure of time
CLOCK = """
import os, pathlib, time
if "CLOCK_OFFSET" in os.environ:
    _real, _file = time.time, pathlib.Path(os.environ["CLOCK_OFFSET"])
    time.time = lambda: _real() + float(_file.read_text())
"""


class RoughLink(Link):
    """`delay_s` each way; `stalled` carries nothing and closes nothing."""

    def __init__(self, port: int) -> None:
        super().__init__("127.0.0.1", port)
        self.delay_s, self.stalled = 0.0, False

    @contextlib.asynccontextmanager
    async def over_packets(self) -> AsyncIterator[Packets]:
        """New connections go through a network of which each packet can be lost. Raises OSError where it cannot be."""
        before = self._target
        with Packets() as packets:
            relay = await asyncio.start_server(Link(*before)._carry, NEAR, 0)
            try:
                self._target = (FAR, relay.sockets[0].getsockname()[1])
                self.cut()
                self.mend()
                yield packets
            finally:
                self._target = before
                self.cut()
                self.mend()
                relay.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.CancelledError):  # the loop ends
            await super()._carry(reader, writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # type: ignore[override]
        """What comes together arrives together, each piece `delay_s` after it came."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        arriving = asyncio.create_task(self._arrive(under_way, writer))
        try:
            with contextlib.suppress(OSError):
                while data := await reader.read(65536):
                    under_way.put_nowait((asyncio.get_running_loop().time() + self.delay_s, data))
            under_way.put_nowait((0.0, b""))
            await arriving
        finally:
            arriving.cancel()

    async def _arrive(self, under_way: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while (piece := await under_way.get())[1]:
                await asyncio.sleep(piece[0] - asyncio.get_running_loop().time())
                while self.stalled:  # noqa: ASYNC110 - what a dead cable does
                    await asyncio.sleep(0.05)
                writer.write(piece[1])
                await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()


def under_clock(folder: Path, offset: Path) -> dict[str, str]:
    """Environment of a Python process whose `time.time` is off by the seconds in a file."""
    (folder / "sitecustomize.py").write_text(CLOCK)
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "CLOCK_OFFSET": str(offset)}


def step(offset: Path, seconds: float) -> None:
    partial = offset.with_suffix(".part")
    partial.write_text(str(seconds))
    partial.replace(offset)


class SiteHub(Hub):
    """A hub process over the site's broker."""

    def __init__(self, folder: Path, site: Site) -> None:
        super().__init__(folder)
        self._site, self._folder = site, folder
        self.step_clock(0.0)

    def step_clock(self, seconds: float) -> None:
        step(self._folder / "hub-offset", seconds)

    async def start(self) -> None:
        where = ["--data", str(self.data), "--http", f"127.0.0.1:{self.port}", "--no-dashboard"]
        broker = ["--broker", self._site.url, "--broker-config", str(self._site.config)]
        env = under_clock(self._folder, self._folder / "hub-offset") | {"OUTRIDER_ADMIN_PASSWORD": self.password}
        await self.process.start("hub", "run", *where, *broker, env=env)
        await until("the hub's start", PATIENCE_S, self._ready)
        answer = await self.post("/v1/login", {"user": "admin", "password": self.password})
        self.token = answer["access_token"]
        self.client.headers["Authorization"] = f"Bearer {self.token}"


class Plant:
    """The processes; `step_clock` moves the daemon's clock, and that alone."""

    def __init__(self, folder: Path, site: Site, link: RoughLink, disks: dict[str, Disk]) -> None:
        self.folder, self.site, self.link, self.disks = folder, site, link, disks
        self.hub = SiteHub(folder, site)
        self.device = Device("press-1", folder, self.hub)
        self._offset = folder / "offset"

    async def start(self) -> None:
        await self.hub.start()
        self.step_clock(0.0)
        self.device.client.headers["Authorization"] = f"Bearer {self.hub.token}"
        token = (await self.hub.post("/v1/enrolments", {"name": "press-1", "ttl_s": 600}))["token"]
        broker = ("--broker", f"mqtts://127.0.0.1:{self.link.port}")
        pack = ("--pack", "tests.e2e.daemon_pack", "--telemetry-s", "0.2")
        await self.start_device("--hub", self.hub.url, "--token", token, *broker, *pack)
        await self.settled()

    async def start_device(self, *args: str) -> None:
        env = under_clock(self.folder, self._offset)
        before = {name: os.environ.get(name) for name in env}
        os.environ.update(env)
        try:
            await self.device.start(*args)
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})

    def step_clock(self, seconds: float) -> None:
        step(self._offset, seconds)

    async def beyond(self, more: int = 10) -> int:
        """Wait until the device has made so many more records; the last seq."""
        start = await until("the local API", PATIENCE_S, self._last)

        async def grown() -> int | None:
            self.device.process.check()
            last: int = (await self.device.status())["last_seq"]
            return last if last >= start + more else None

        return await until("more records", PATIENCE_S, grown)

    async def settled(self, within: float = PATIENCE_S) -> int:
        """All that was made until now is at the hub, once and in order; how many records that is."""

        async def acked() -> dict[str, Any] | None:
            self.device.process.check()
            status = await self.device.status()
            return status if status["acked"] >= target else None

        target = await until("the local API", PATIENCE_S, self._last)
        status = await until(f"the ack of {target}", within, acked)
        assert await self.seqs(status["epoch"], target) == list(range(1, target + 1))
        return target

    async def whole(self) -> None:
        """Everything as it should be, whatever the last fault left."""
        self.link.delay_s, self.link.stalled = 0.0, False
        self.link.mend()
        self.step_clock(0.0)
        self.hub.step_clock(0.0)
        for disk in self.disks.values():
            disk.free()
        await until("the local API", PATIENCE_S, self._last)
        await until("the hub", PATIENCE_S, self.hub._ready)

    async def _last(self) -> int | None:
        self.device.process.check()
        last: int = (await self.device.status())["last_seq"]
        return last or None

    async def seqs(self, epoch: int, upto: int) -> list[int]:
        found: list[int] = []
        while True:
            after = found[-1] if found else 0
            page = await self.hub.get("/v1/telemetry", device="press-1", epoch=epoch, after_seq=after, limit=1000)
            if not page["records"]:
                return [seq for seq in found if seq <= upto]
            found += [record["seq"] for record in page["records"]]

    async def stop(self) -> None:
        await self.device.stop()
        await self.hub.stop()


@contextlib.asynccontextmanager
async def plant(folder: Path) -> AsyncIterator[Plant]:
    """Everything up and the first records acknowledged; hub and device on small disks of their own where allowed."""
    disks: dict[str, Disk] = {}
    with contextlib.suppress(OSError):
        disks |= {name: Disk(folder / name) for name in ("hub", "press-1")}
    site = await asyncio.to_thread(lambda: Site(folder).start())
    try:
        async with RoughLink(site.port) as link:
            made = Plant(folder, site, link, disks)
            try:
                await made.start()
                yield made
            finally:
                await made.stop()
    finally:
        await asyncio.to_thread(site.stop)
        for disk in disks.values():
            disk.unmount()
