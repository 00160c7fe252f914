"""One suite for every place that blobs live in: a folder, memory, a folder by obstore, a real S3 server on loopback."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from obstore.store import LocalStore, MemoryStore, S3Store

from edge_agent.wire.bundle import sha256
from hub.errors import Fatal, Refused
from hub.objects import YOUNG_S, Folder, Objects, Store, at
from tests.hub.rig import running
from tests.hub.test_registry import folder_of, upload

KEYS = {"access_key_id": "k", "secret_access_key": "s", "region": "us-east-1"}
Place = Callable[[str], Objects]
"""A hub's view of one place, by the hub's name."""


@pytest.fixture(scope="module")
def s3() -> str:
    """The address of an S3 server in OUTRIDER_S3, made to have the bucket `blobs`.

    None is installed with us: moto's needs a python-dateutil below 3. In an environment of its own:
    `pip install 'moto[s3,server]'; moto_server -p 5005`, then OUTRIDER_S3=http://127.0.0.1:5005.
    """
    if not (url := os.environ.get("OUTRIDER_S3", "")):
        pytest.skip("no S3 server: name one in OUTRIDER_S3")
    httpx.put(f"{url}/blobs").raise_for_status()
    return url


@pytest.fixture(params=["folder", "memory", "local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return lambda hub: Folder(tmp_path / "blobs")
    if request.param == "s3":
        url = request.getfixturevalue("s3")
        store: Any = S3Store("blobs", prefix=tmp_path.name, endpoint=url, client_options={"allow_http": True}, **KEYS)
    else:
        (tmp_path / "store").mkdir()
        store = MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "store")
    return lambda hub: Store(store, Folder(tmp_path / hub))


def file(folder: Path, data: bytes) -> Path:
    path = folder / "new"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [0, 1, 12_000_000])  # the last in several parts
async def test_what_was_put_is_there_for_every_hub(place: Place, tmp_path: Path, size: int) -> None:
    data, one, two = os.urandom(size), place("one"), place("two")
    name = sha256(data)
    assert await one.local(name) is None
    await one.put(name, file(tmp_path, data))
    await one.put(name, file(tmp_path, data))  # again
    for hub in (one, two):
        path = await hub.local(name)
        assert path is not None
        assert path.read_bytes() == data
    assert await two.local("0" * 64) is None


async def test_many_that_ask_at_once_get_it_whole(place: Place, tmp_path: Path) -> None:
    data = os.urandom(3_000_000)
    await place("one").put(sha256(data), file(tmp_path, data))
    two = place("two")
    paths = await asyncio.gather(*(two.local(sha256(data)) for _ in range(20)))
    assert {path and path.read_bytes() for path in paths} == {data}
    assert not [name for _, _, names in os.walk(tmp_path / "two") for name in names if name.startswith(".")]


async def test_a_damaged_copy_is_fetched_anew_where_there_is_another(place: Place, tmp_path: Path) -> None:
    data, hub = b"content", place("one")
    await hub.put(sha256(data), file(tmp_path, data))
    path = await hub.local(sha256(data))
    assert path is not None
    path.write_bytes(b"rot")
    again = await hub.local(sha256(data), anew=True)
    assert again is not None
    assert again.read_bytes() == (b"rot" if isinstance(hub, Folder) else data)


async def test_copies_are_bounded_and_those_in_use_stay(tmp_path: Path) -> None:
    now = [1e9]
    hub = Store(MemoryStore(), Folder(tmp_path / "cache"), limit=250, clock=lambda: now[0])
    blobs = [os.urandom(100) for _ in range(5)]
    for data in blobs:
        now[0] += 10
        await hub.put(sha256(data), file(tmp_path, data))
        assert await hub.local(sha256(data))
    assert len(list((tmp_path / "cache").glob("??/*"))) == 5  # all are young
    now[0] += YOUNG_S + 1
    assert await hub.local(sha256(blobs[0]))
    data = os.urandom(100)
    await hub.put(sha256(data), file(tmp_path, data))
    left = {path.name for path in (tmp_path / "cache").glob("??/*")}
    assert len(left) == 2
    assert sha256(blobs[0]) in left
    path = await hub.local(sha256(blobs[1]))  # from the store again
    assert path is not None
    assert path.read_bytes() == blobs[1]


async def test_a_store_that_is_not_there_is_said(tmp_path: Path) -> None:
    options: Any = {"allow_http": True, "connect_timeout": "1s"}
    retry: Any = {"max_retries": 0}
    gone = S3Store("b", endpoint="http://127.0.0.1:9", client_options=options, retry_config=retry, **KEYS)  # type: ignore[arg-type]
    hub = Store(gone, Folder(tmp_path / "cache"))
    with pytest.raises(Refused, match="the object store does not answer"):
        await hub.local("0" * 64)
    with pytest.raises(Refused, match="the object store does not answer"):
        await hub.put("0" * 64, file(tmp_path, b"x"))


def test_an_address_that_is_none_is_refused_with_its_form(tmp_path: Path) -> None:
    assert isinstance(at("", tmp_path), Folder)
    for url in ("nonsense", "s3://", "ftp://x/y"):
        with pytest.raises(Fatal, match="blobs at"):
            at(url, tmp_path)


async def test_a_hub_with_its_blobs_in_s3_publishes_and_another_serves_them(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ENDPOINT": s3, "ACCESS_KEY_ID": "k", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    data = os.urandom(400_000)
    async with running(tmp_path / "hub", blobs="s3://blobs/fleet") as hub:
        developer = await hub.user("developer")
        files = await upload(developer, folder_of(tmp_path / "m", a_onnx=data))
        manifest = {"name": "m", "version": "1", "kind": "onnx", "files": files}
        answer = await developer.post("/v1/bundles", json={"manifest": manifest})
        assert answer.status_code == 201, answer.text
        for path in (tmp_path / "hub" / "blobs").glob("??/*"):
            path.unlink()  # another machine, or a cache that was emptied
        blob = f"/v1/blobs/{files[0]['sha256']}"
        part = await developer.get(blob, headers={"Range": "bytes=1000-1999"})
        assert (part.status_code, part.content) == (206, data[1000:2000])
        again = await developer.post("/v1/bundles", json={"manifest": manifest | {"version": "2"}})
        assert again.status_code == 201, again.text
        assert msgspec.json.decode(again.content)["version"] == "2"
