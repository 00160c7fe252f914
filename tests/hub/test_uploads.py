"""What a device uploads arrives whole, however often it is cut, and nobody else's token puts it there."""

import asyncio
import contextlib
import hashlib
import os
import random
import resource
import shutil
import time
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import uvicorn
from starlette.requests import ClientDisconnect

from bench.fleet import free_port
from bench.link import Link
from edge_agent.errors import Refused, Retry
from edge_agent.store import Store
from edge_agent.sync.blobs import Blobs
from edge_agent.sync.outbox import Outbox
from edge_agent.wire.signing import SigningKey
from edge_agent.wire.tokens import issue_device_token
from hub.blobs import Uploads
from hub.errors import Refused as HubRefused
from tests.hub.rig import Device, Hub, enrolled, running, until


class Cutter(Link):
    """Cuts a connection after so many bytes, while it has some."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        super().__init__("127.0.0.1", port)
        self.cuts, self.carried = cuts, 0

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:  # type: ignore[override]
        left = self.cuts.pop(0) if self.cuts else 1 << 40
        with contextlib.suppress(OSError):
            while data := await reader.read(8192):
                writer.write(data[:left])
                await writer.drain()
                self.carried += len(data[:left])
                left -= len(data)
                if left <= 0:
                    writer.transport.abort()


@pytest.fixture
async def served(hub: Hub) -> AsyncIterator[int]:
    config = uvicorn.Config(hub.app, port=(port := free_port()), lifespan="off", log_level="error")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield port
    server.should_exit = True
    await task


@contextlib.asynccontextmanager
async def blobs(device: Device, state: Path, port: int, quota: int = 1 << 24) -> AsyncIterator[tuple[Blobs, Outbox]]:
    store = Store(state / "outrider.db")
    outbox = await Outbox.open(store)

    def token() -> str:
        return issue_device_token(device.key, device.fleet, device.name, now=time.time())

    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
        yield Blobs(state / "blobs", outbox, client, token, quota), outbox
    store.close()


async def test_an_upload_cut_at_random_bytes_arrives_whole_and_sends_nothing_twice(
    hub: Hub, served: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.sync.blobs.BACKOFF_S", (0.01, 0.02))
    device, chance = await enrolled(hub, "press-1"), random.Random(11)
    content = chance.randbytes(3_000_000)
    cuts = [chance.randrange(600_000) for _ in range(12)]
    async with Cutter(served, cuts) as link, blobs(device, tmp_path, link.port) as (queue, outbox):
        sha256 = await queue.put(content, "bundle.tar", "application/x-tar")
        task = asyncio.create_task(queue.run())
        await until(lambda: not list((tmp_path / "blobs").iterdir()), 60)
        task.cancel()
        part = await outbox.batch(0)
    assert not cuts, "every cut was made"
    assert link.carried < 1.4 * len(content) + 12 * 200_000, "what the hub had was not sent again"
    assert part is not None
    assert sha256.encode() in part.lines[0], "a record names it"
    admin = await hub.login()
    answer = await admin.get(f"/v1/devices/press-1/blobs/{sha256}")
    assert hashlib.sha256(answer.content).hexdigest() == sha256
    assert (await hub.http.get(f"/v1/devices/press-1/blobs/{sha256}")).status_code == 401


async def test_past_the_devices_quota_the_oldest_goes_and_is_told(hub: Hub, served: int, tmp_path: Path) -> None:
    device = await enrolled(hub, "press-1")
    async with blobs(device, tmp_path, served, quota=1000) as (queue, outbox):
        first = await queue.put(bytes(600), "a")
        await queue.put(b"1" * 600, "b")
        with pytest.raises(Refused):
            await queue.put(bytes(1001), "c")
        part = await outbox.batch(0)
    assert len(list((tmp_path / "blobs").iterdir())) == 1
    assert part is not None
    assert first.encode() in part.lines[1]
    assert b'"lost":"quota"' in part.lines[1]


async def test_a_sign_in_page_between_takes_no_blob(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mobile network whose credit is used up answers everything with 200 and a page."""
    monkeypatch.setattr("edge_agent.sync.blobs.BACKOFF_S", (0.01, 0.02))
    device, answers = await enrolled(hub, "press-1"), [b"200 OK", b"201 Created", b"400 Bad Request"]

    async def page(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        said = answers.pop(0) if answers else b"200 OK"
        writer.write(b"HTTP/1.1 %b\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello" % said)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(page, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, blobs(device, tmp_path, port) as (queue, outbox):
        await queue.put(b"evidence" * 100, "camera.jpg")
        task = asyncio.create_task(queue.run())
        await until(lambda: not answers)
        await asyncio.sleep(0.2)
        assert len(list((tmp_path / "blobs").iterdir())) == 1
        assert outbox.depth == 1, "and none was told lost"
        task.cancel()


async def test_a_blob_that_cannot_be_read_is_told_once_and_those_behind_it_go_on(
    hub: Hub, served: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Links stand for bad blocks: one does not open as a file, one leads nowhere."""
    monkeypatch.setattr("edge_agent.sync.blobs.BACKOFF_S", (0.01, 0.02))
    device, folder = await enrolled(hub, "press-1"), tmp_path / "blobs"
    async with blobs(device, tmp_path, served) as (queue, outbox):
        for n, there in enumerate((tmp_path, Path("/nowhere"), None)):
            path = folder / f"{n + 1}-{await queue.put(bytes([n] * 10), 'x')}"
            path.write_bytes(b"other")
            if there is not None:
                path.unlink()
                path.symlink_to(there)
        (folder / "9-notes").write_text("nobody's")
        good = await queue.put(b"good", "camera.jpg")
        for _ in range(2):
            task = asyncio.create_task(queue.run())
            await until(lambda: not list(folder.glob(f"*-{good}")))
            task.cancel()
        await queue.put(b"more", "camera.jpg")
        part = await outbox.batch(0)
    assert part is not None
    lost = [line for line in part.lines if b'"lost"' in line]
    assert len(lost) == 3, lost
    assert {path.name for path in folder.iterdir()} > {"9-notes", "unread"}, "the last one is kept for who looks"
    assert caplog.text.count("is set aside") == 2
    assert (await (await hub.login()).get(f"/v1/devices/press-1/blobs/{good}")).content == b"good"


async def test_a_blob_that_is_refused_for_now_is_passed_by_those_behind_it_and_arrives_later(
    hub: Hub, served: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub has room for the small ones only (507), until somebody makes some."""
    monkeypatch.setattr("edge_agent.sync.blobs.HELD_S", (0.2, 0.4))
    device, folder = await enrolled(hub, "press-1"), tmp_path / "blobs"
    monkeypatch.setattr(hub.services.uploads, "_quota", 1000)
    async with blobs(device, tmp_path, served) as (queue, outbox):
        large = [await queue.put(bytes([n]) * 2000, "log") for n in range(2)]
        small = [await queue.put(bytes([n]) * 20, "camera.jpg") for n in range(3)]
        task = asyncio.create_task(queue.run())
        await until(lambda: len(list(folder.iterdir())) == 2)
        await queue.put(b"more", "camera.jpg")
        await until(lambda: len(list(folder.iterdir())) == 2)
        assert {path.name.partition("-")[2] for path in folder.iterdir()} == {*large}
        assert outbox.depth == 6, "none was told lost"
        monkeypatch.setattr(hub.services.uploads, "_quota", 10_000)
        await until(lambda: not list(folder.iterdir()))
        task.cancel()
    admin = await hub.login()
    for sha256 in (*large, *small):
        assert (await admin.get(f"/v1/devices/press-1/blobs/{sha256}")).status_code == 200


async def answering(answers: dict[str, bytes], seen: list[str]) -> asyncio.Server:
    """Stands for a hub: what it answers to the blobs that it knows, 200 to the others, in the order of `seen`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told = (await reader.readuntil(b"\r\n\r\n")).decode()
        sha256 = b64decode(told.partition("sha256 ")[2].partition("\r\n")[0]).decode()
        seen.append(sha256)
        head = b"HTTP/1.1 %b\r\nTus-Resumable: 1.0.0\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        writer.write(head % answers.get(sha256, b"200 OK"))
        await writer.drain()
        writer.close()

    return await asyncio.start_server(serve, "127.0.0.1", 0)


@pytest.mark.parametrize("said", [b"409 Conflict", b"500 Oh", b"507 Full"])
async def test_blobs_that_are_refused_again_and_again_are_tried_ever_less_often_and_in_turn(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr("edge_agent.sync.blobs.BACKOFF_S", (0.01, 0.02))
    monkeypatch.setattr("edge_agent.sync.blobs.HELD_S", (1.0, 60.0))
    seen, answers = list[str](), dict[str, bytes]()
    server = await answering(answers, seen)
    device, port = await enrolled(hub, "press-1"), server.sockets[0].getsockname()[1]
    async with server, blobs(device, tmp_path, port) as (queue, outbox):
        bad = [await queue.put(bytes([n]), "log") for n in range(7)]
        answers.update((sha256, said) for sha256 in bad)
        good = [await queue.put(bytes([n]), "log") for n in range(100, 104)]
        task = asyncio.create_task(queue.run())
        await until(lambda: len(list((tmp_path / "blobs").iterdir())) == len(bad))
        assert list(dict.fromkeys(seen)) == bad + good, "in their order, past more than say that it is the hub"
        await until(lambda: min(map(seen.count, bad)) == 3, 30)
        assert max(map(seen.count, bad)) <= 5
        assert outbox.depth == len(bad) + len(good), "none was told lost"
        task.cancel()


async def test_a_hub_that_refuses_the_device_itself_is_asked_for_one_blob_alone(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.sync.blobs.BACKOFF_S", (0.01, 0.02))
    seen, answers = list[str](), dict[str, bytes]()
    server = await answering(answers, seen)
    device, port = await enrolled(hub, "press-1"), server.sockets[0].getsockname()[1]
    async with server, blobs(device, tmp_path, port) as (queue, _):
        put = [await queue.put(bytes([n]), "log") for n in range(5)]
        answers.update((sha256, b"401 Who") for sha256 in put)
        task = asyncio.create_task(queue.run())
        await until(lambda: len(seen) > 4)
        assert {*seen} == {put[0]}
        answers.clear()
        await until(lambda: not list((tmp_path / "blobs").iterdir()))
        assert list(dict.fromkeys(seen)) == put
        task.cancel()


async def test_a_blob_the_disk_has_no_room_for_leaves_nothing_behind(
    hub: Hub, served: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file size limit stands for the full disk: the kernel refuses the write in the middle of the file."""
    device = await enrolled(hub, "press-1")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ".7-abc.part").write_bytes(bytes(1000))  # of a process that was killed
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    async with blobs(device, tmp_path, served) as (queue, _):
        assert not list((tmp_path / "blobs").iterdir())
        for n in range(3):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
            try:
                with pytest.raises(Retry, match="cannot keep"):
                    await queue.put(bytes([n]) * (2 << 20), "camera.jpg")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list((tmp_path / "blobs").iterdir())


async def begin(client: httpx.AsyncClient, content: bytes, sha256: str = "") -> httpx.Response:
    named = b64encode((sha256 or hashlib.sha256(content).hexdigest()).encode()).decode()
    told = {"Upload-Length": str(len(content)), "Upload-Metadata": f"filename eA==,sha256 {named}"}
    return await client.post("/v1/uploads", headers=told)


def as_device(hub: Hub, device: Device, key: SigningKey | None = None) -> httpx.AsyncClient:
    return hub.client(issue_device_token(key or device.key, device.fleet, device.name, now=time.time()))


async def test_only_the_devices_own_key_uploads_and_only_what_was_declared(hub: Hub) -> None:
    device, content = await enrolled(hub, "press-1"), b"x" * 1000
    assert (await begin(as_device(hub, device, SigningKey.generate()), content)).status_code == 401
    assert (await begin(await hub.user("viewer"), content)).status_code == 403
    assert (await begin(await hub.login(), content)).status_code == 422
    client = as_device(hub, device)
    at = (await begin(client, content)).headers["Location"]
    assert (await client.patch(at, headers={"Upload-Offset": "1"}, content=content[1:])).status_code == 409
    assert (await client.patch(at, headers={"Upload-Offset": "0"}, content=content + b"y")).status_code == 413
    await begin(client, b"y" * 1000, hashlib.sha256(b"z" * 1000).hexdigest())
    wrong = f"/v1/uploads/{hashlib.sha256(b'z' * 1000).hexdigest()}"
    assert (await client.patch(wrong, headers={"Upload-Offset": "0"}, content=b"y" * 1000)).status_code == 422
    assert (await client.head(wrong)).status_code == 404, "it is begun anew"
    assert (await begin(client, content, "../../etc/passwd")).status_code == 422


async def test_a_device_cannot_fill_the_hub(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, quota=1000)
    await uploads.begin("press-1", "a" * 64, 600)
    assert await uploads.begin("press-1", "a" * 64, 600) == 0, "the same again"
    with pytest.raises(HubRefused) as caught:
        await uploads.begin("press-1", "b" * 64, 600)
    assert caught.value.status == 507
    assert await uploads.begin("press-2", "b" * 64, 600) == 0, "another device has its own"


async def test_what_came_long_ago_goes_but_not_what_a_device_brings_again_or_is_bringing(tmp_path: Path) -> None:
    uploads, folder, now, day = Uploads(tmp_path), tmp_path / "uploads" / "press-1", time.time(), 86400.0

    async def pieces(content: bytes) -> AsyncIterator[bytes]:
        yield content

    async def while_it_comes() -> AsyncIterator[bytes]:
        assert await uploads.prune(now - 90 * day) == 2, "the old blob and the stale part"
        yield b"some"

    blobs = {text: hashlib.sha256(text).hexdigest() for text in (b"old", b"again", b"young")}
    for (text, sha256), days in zip(blobs.items(), (100, 100, 10), strict=True):
        await uploads.begin("press-1", sha256, len(text))
        await uploads.append("press-1", sha256, 0, pieces(text))
        os.utime(folder / sha256, (now, now - days * day))
    assert await uploads.begin("press-1", blobs[b"again"], 5) == 5
    stale, waits, comes = (folder / f"{digit * 64}.1000.part" for digit in "abc")
    for part, days in ((stale, 8), (waits, 6), (comes, 8)):
        part.touch()
        os.utime(part, (now, now - days * day))
    await uploads.append("press-1", "c" * 64, 0, while_it_comes())
    assert set(folder.iterdir()) == {folder / blobs[b"again"], folder / blobs[b"young"], waits, comes}
    assert await uploads.begin("press-1", blobs[b"old"], 3) == 0, "it can be brought anew"
    assert await Uploads(tmp_path / "none").prune(now) == 0


async def test_a_blob_whose_last_step_was_cut_off_is_finished_before_the_device_may_forget_it(tmp_path: Path) -> None:
    content = random.Random(3).randbytes(5000)
    sha256 = hashlib.sha256(content).hexdigest()

    async def cut_off(sent: bytes) -> AsyncIterator[bytes]:
        yield sent
        raise ClientDisconnect  # after the last byte, before the end

    uploads = Uploads(tmp_path)
    for sent, here in ((content, len(content)), (bytes(5000), 0)):
        assert await uploads.begin("press-1", sha256, len(content)) == 0
        with pytest.raises(ClientDisconnect):
            await uploads.append("press-1", sha256, 0, cut_off(sent))
        assert await uploads.begin("press-1", sha256, len(content)) == here
        if here:
            assert (await uploads.file("press-1", sha256)).read_bytes() == content
        await asyncio.to_thread(shutil.rmtree, tmp_path / "uploads")


async def test_a_restarted_hub_goes_on_with_an_upload(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(5000)
    async with running(tmp_path / "hub") as hub:
        device = await enrolled(hub, "press-1")
        client = as_device(hub, device)
        at = (await begin(client, content)).headers["Location"]
        sha256 = at.rpartition("/")[2]

        async def half() -> AsyncIterator[bytes]:
            yield content[:2500]

        await hub.services.uploads.append("press-1", sha256, 0, half())
    async with running(tmp_path / "hub") as hub:
        client = as_device(hub, device)
        assert (await client.head(at)).headers["Upload-Offset"] == "2500"
        answer = await client.patch(at, headers={"Upload-Offset": "2500"}, content=content[2500:])
        assert (answer.status_code, answer.headers["Upload-Offset"]) == (204, "5000")
        assert (await hub.services.uploads.file("press-1", sha256)).read_bytes() == content
