"""A site downloads about once, and a neighbour that lies is refused by name."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import msgspec
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from edge_agent.api.access import Device as ApiDevice
from edge_agent.api.app import MAX_ASKED, create_app
from edge_agent.audit import Audit
from edge_agent.errors import Retry
from edge_agent.reports import Reports
from edge_agent.store import Store
from edge_agent.sync.outbox import Outbox
from edge_agent.sync.twin import Twin
from edge_agent.update.neighbours import ANSWER, AUTO, PEERS, SERVED, Answer, Neighbours
from edge_agent.wire.chunks import HASH
from tests.update.plant_hub import FLEET, PlantHub, until
from tests.update.test_update import Device, device

ROUTE = partial(Route, "/v1/chunks", methods=["POST"])
DATA = b"good" + os.urandom(3_000_000)


@pytest.fixture
def hub() -> Iterator[PlantHub]:
    with PlantHub().serving() as hub:
        yield hub


@contextlib.asynccontextmanager
async def serving(app: Starlette) -> AsyncIterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="critical", ws="none", lifespan="off")
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


@contextlib.asynccontextmanager
async def site(hub: PlantHub, folder: Path, count: int) -> AsyncIterator[list[Device]]:
    """Devices whose HTTP APIs know one another."""
    async with contextlib.AsyncExitStack() as stack:
        devices, urls = [], []
        for number in range(count):
            it = await stack.enter_async_context(device(folder / f"state-{number}", hub))
            it.service.neighbours = Neighbours(f"line-{number}", FLEET, it.service.slots, [])
            app = create_app(cast(ApiDevice, SimpleNamespace()), near=it.service.neighbours)
            urls.append(await stack.enter_async_context(serving(app)))
            devices.append(it)
        for number, it in enumerate(devices):
            near = it.service.neighbours
            assert near is not None
            near.known = {url: url for other, url in enumerate(urls) if other != number}
            stack.push_async_callback(near._client.aclose)
        yield devices


async def test_three_devices_that_begin_together_download_about_once(hub: PlantHub, tmp_path: Path) -> None:
    data = DATA + os.urandom(5_000_000)
    target = hub.publish("net", "1", {"model.bin": data}, tmp_path)
    async with site(hub, tmp_path, 3) as devices:
        for it in devices:
            await it.directed({"net": target})
        await until(lambda: all(it.running == ["1"] for it in devices), 60)
    assert hub.sent < 1.3 * len(data)


async def test_one_that_comes_later_asks_the_hub_for_no_chunk(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": DATA}, tmp_path)
    async with site(hub, tmp_path, 2) as (first, second):
        await first.directed({"net": target})
        await until(lambda: first.running == ["1"], 30)
        fetched = len(hub.fetched())
        await second.directed({"net": target})
        await until(lambda: second.running == ["1"], 30)
        assert len(hub.fetched()) == fetched
        installed = second.service.slots.current("net")
        assert installed is not None
        assert (installed.folder / "model.bin").read_bytes() == DATA


def says(answer: Any) -> Starlette:
    async def chunks(request: Request) -> Response:
        asked = await request.body()
        return Response(answer([asked[at : at + HASH] for at in range(0, len(asked), HASH)]))

    return Starlette(routes=[ROUTE(chunks)])


@pytest.mark.parametrize(
    "lie",
    [
        lambda hashes: {hash: os.urandom(1000) for hash in hashes},
        lambda hashes: {b"not what was asked": b"x"},
        lambda hashes: {hashes[0]: DATA[:100_000]},
    ],
)
async def test_a_poisoned_neighbour_is_refused_by_name_and_the_update_comes_from_the_hub(
    hub: PlantHub, tmp_path: Path, lie: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[int] = []

    def answer(hashes: list[bytes]) -> bytes:
        asked.append(len(hashes))
        return msgspec.msgpack.encode(Answer("press-9", lie(hashes)))

    target = hub.publish("net", "1", {"model.bin": DATA}, tmp_path)
    async with site(hub, tmp_path, 1) as (it,), serving(says(answer)) as url:
        assert it.service.neighbours is not None
        it.service.neighbours.known = {url: url}
        await it.wants(target, "committed")
        assert list(it.service.neighbours.dropped) == [url]
    assert len(asked) == 1
    assert f"poisoned neighbour press-9 ({url})" in caplog.text


async def test_liars_that_come_under_ever_new_names_are_remembered_and_reported_a_bounded_number_of_times(
    hub: PlantHub, tmp_path: Path
) -> None:
    store = Store(tmp_path / "outrider.db")
    outbox = await Outbox.open(store)
    twin = await Twin.open(store, outbox)
    reports = Reports(twin, Audit(store, outbox), lambda *_: asyncio.sleep(0))
    lies = says(lambda hashes: msgspec.msgpack.encode(Answer("press-9", {hashes[0]: b"x"})))
    async with site(hub, tmp_path, 1) as (it,), serving(lies) as url:
        near = it.service.neighbours
        assert near is not None
        reporting = asyncio.create_task(reports.waiting(it.service, {}))
        for version in "12":
            near.known = {f"{version}-{n}": url for n in range(PEERS)}
            await it.wants(
                hub.publish("net", version, {"model.bin": b"good" + os.urandom(9000)}, tmp_path), "committed"
            )
            await until(lambda: (twin.reported.get("updates") or {}).get("poisoned") == near.dropped)
        assert list(near.dropped) == list(near.known), "the newest, who may still be asked"
        reporting.cancel()
    store.close()


@pytest.mark.parametrize("body", [b"", b"\xc1", b"x" * (ANSWER + 400_000)])
async def test_a_neighbour_that_makes_no_sense_costs_nothing(hub: PlantHub, tmp_path: Path, body: bytes) -> None:
    target = hub.publish("net", "1", {"model.bin": DATA[:300_000]}, tmp_path)
    async with site(hub, tmp_path, 1) as (it,), serving(says(lambda hashes: body)) as url:
        assert it.service.neighbours is not None
        it.service.neighbours.known = {url: url, "gone": "http://127.0.0.1:9"}
        await it.wants(target, "committed")


async def test_one_that_promises_and_never_gives_is_waited_for_a_bounded_time(
    hub: PlantHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.update.neighbours.WAIT_S", 0.001)
    target = hub.publish("net", "1", {"model.bin": DATA}, tmp_path)
    promise = says(lambda hashes: msgspec.msgpack.encode(Answer("zz", {}, hashes)))
    async with site(hub, tmp_path, 1) as (it,), serving(promise) as url:
        assert it.service.neighbours is not None
        it.service.neighbours.known = {url: url}
        await it.wants(target, "committed")


async def test_one_that_trickles_or_is_not_there_holds_up_no_update(
    hub: PlantHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.update.neighbours.ANSWER_S", 0.3)
    asked: list[str] = []

    async def trickle(request: Request) -> Response:
        async def drops() -> AsyncIterator[bytes]:
            with contextlib.suppress(asyncio.CancelledError):
                while True:
                    yield b"x"
                    await asyncio.sleep(0.05)

        asked.append("trickle")
        await request.body()
        return StreamingResponse(drops())

    async def hangs_up(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append("gone")
        writer.close()

    target = hub.publish("net", "1", {"model.bin": DATA}, tmp_path)
    gone = await asyncio.start_server(hangs_up, "127.0.0.1", 0)
    async with gone, site(hub, tmp_path, 1) as (it,), serving(Starlette(routes=[ROUTE(trickle)])) as url:
        assert it.service.neighbours is not None
        there = f"http://127.0.0.1:{gone.sockets[0].getsockname()[1]}"
        it.service.neighbours.known = {url: url, there: there}
        await it.wants(target, "committed")
    assert sorted(asked) == ["gone", "trickle"], "once, not for each few chunks of a large model"


async def test_what_is_served_is_bounded_and_off_unless_it_is_set(hub: PlantHub, tmp_path: Path) -> None:
    async with site(hub, tmp_path, 1) as (it,):
        near = it.service.neighbours
        assert near is not None
        app = create_app(cast(ApiDevice, SimpleNamespace()), near=near)
        near._serving = SERVED
        with pytest.raises(Retry, match="too many"):
            await near.answer(b"")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://d") as client:
            assert (await client.post("/v1/chunks", content=b"x" * HASH)).status_code == 503
            near._serving = 0
            assert (await client.post("/v1/chunks", content=bytes(MAX_ASKED + 1))).status_code == 413
            answer = msgspec.msgpack.decode((await client.post("/v1/chunks", content=b"x" * HASH)).content, type=Answer)
            assert answer == Answer("line-0")
        closed = httpx.ASGITransport(create_app(cast(ApiDevice, SimpleNamespace())))
        async with httpx.AsyncClient(transport=closed, base_url="http://d") as client:
            assert (await client.post("/v1/chunks", content=b"x" * HASH)).status_code == 404


async def test_devices_on_one_network_find_each_other(hub: PlantHub, tmp_path: Path) -> None:
    async with site(hub, tmp_path, 1) as (it,):
        slots = it.service.slots
        near = [Neighbours(name, fleet, slots, [AUTO]) for name, fleet in (("a", "x"), ("b", "x"), ("c", "y"))]
        tasks = [asyncio.create_task(each.find("127.0.0.1", 9000 + number)) for number, each in enumerate(near)]
        try:
            await until(lambda: list(near[0].known.values()) == ["http://127.0.0.1:9001"], 30)
            await until(lambda: list(near[1].known.values()) == ["http://127.0.0.1:9000"], 30)
            assert near[2].known == {}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for each in near:
                await each._client.aclose()
