"""Blobs and bundles: what is published is whole, signed and never changes."""

import errno
import hashlib
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tuf.api.metadata import Metadata, Targets

from edge_agent.wire import tokens
from edge_agent.wire.bundle import Sealed, Target, open_directive, open_root, scan, target_paths
from edge_agent.wire.chunks import decode_index, unpack_chunk
from hub.registry import Registry
from tests.hub.rig import Hub, enrolled, until


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("_", ".")).write_bytes(content)
    return path


async def upload(client: Any, folder: Path) -> list[dict[str, Any]]:
    entries = scan(folder)
    for entry in entries:
        answer = await client.put(f"/v1/blobs/{entry.sha256}", content=(folder / entry.path).read_bytes())
        assert answer.status_code == 201, answer.text
        assert answer.json()["size"] == entry.size
    return [msgspec.to_builtins(entry) for entry in entries]


async def test_a_published_bundle_is_a_signed_target_cut_into_chunks_that_come_by_ranges(
    hub: Hub, tmp_path: Path
) -> None:
    developer, device = await hub.user("developer"), await enrolled(hub, "press-1")
    folder = folder_of(tmp_path / "model", model_onnx=bytes(range(256)) * 5000, vocab_txt=b"a b c")
    files = await upload(developer, folder)
    manifest = {"name": "reader", "version": "1.0", "kind": "onnx", "files": files, "of_the_future": [1]}
    published = await developer.post("/v1/bundles", json={"manifest": manifest})
    assert published.status_code == 201, published.text
    assert (await developer.post("/v1/bundles", json={"manifest": manifest})).json() == published.json()

    client = hub.client(tokens.issue_device_token(device.key, "main", "press-1", now=time.time()))
    root = open_root(hub.services.key.public, msgspec.convert((await client.get("/v1/trust")).json(), Sealed))
    assert Metadata.from_bytes(root).signed.version == 1
    targets = Metadata[Targets].from_bytes((await client.get("/v1/trust/2.bundles.json")).content).signed.targets
    raw, packed = [
        (await client.get(f"/v1/blobs/{targets[path].hashes['sha256']}")).content
        for path in target_paths("reader", "1.0")
    ]
    assert b'"of_the_future":[1]' in raw
    index = decode_index(packed, scan(folder))
    found = b""
    for chunk in index.chunks():
        span = f"bytes={chunk.offset}-{chunk.offset + chunk.packed - 1}"
        part = await client.get(f"/v1/blobs/{chunk.pack}", headers={"Range": span})
        assert part.status_code == 206
        found += unpack_chunk(chunk, part.content)
    assert found == b"".join((folder / entry.path).read_bytes() for entry in scan(folder))

    assigned = await developer.post("/v1/devices/press-1/bundles", json={"name": "reader", "version": "1.0"})
    wanted = {"version": "1.0", "manifest_sha256": published.json()["manifest_sha256"]}
    desired = assigned.json()["desired"]
    assert desired["bundles"] == {"reader": wanted}
    assert (await developer.get("/v1/devices/press-1")).json()["bundles"] == {"reader": wanted}
    directive = open_directive(hub.services.key.public, msgspec.convert(desired["director"], Sealed))
    assert (directive.fleet, directive.device, directive.counter) == ("main", "press-1", 1)
    assert directive.bundles == {"reader": msgspec.convert(wanted, Target)}
    missing = await developer.post("/v1/devices/press-1/bundles", json={"name": "reader", "version": "2"})
    assert missing.status_code == 404


async def test_a_directive_names_all_bundles_counts_up_and_minds_the_hardware(hub: Hub, tmp_path: Path) -> None:
    developer, device = await hub.user("developer"), await enrolled(hub, "press-1")
    files = await upload(developer, folder_of(tmp_path / "m", a_txt=b"1"))
    for name, meta in (("a", {}), ("b", {"hardware": ["x86_64", "aarch64"]}), ("c", {"hardware": ["riscv64"]})):
        manifest = {"name": name, "version": "1", "kind": "onnx", "files": files, "meta": meta}
        assert (await developer.post("/v1/bundles", json={"manifest": manifest})).status_code == 201
    async with device.online():
        await device.report("reported", {"version": 1, "doc": {"agent": {"machine": "aarch64"}}})
        await until(lambda: device.acked() == (device.epoch, device.seq))
    answers = [await developer.post("/v1/devices/press-1/bundles", json={"name": n, "version": "1"}) for n in "abc"]
    assert [answer.status_code for answer in answers] == [201, 201, 409]
    assert "riscv64" in answers[2].json()["detail"]
    sealed = msgspec.convert(answers[1].json()["desired"]["director"], Sealed)
    directive = open_directive(hub.services.key.public, sealed)
    assert (directive.hardware, directive.counter, set(directive.bundles)) == ("aarch64", 2, {"a", "b"})


async def test_versions_share_chunks_and_only_new_ones_are_packed(hub: Hub, tmp_path: Path) -> None:
    developer, data = await hub.user("developer"), os.urandom(1_000_000)
    packs = []
    for version, content in (("1", data), ("2", b"head" + data)):
        files = await upload(developer, folder_of(tmp_path / version, a_onnx=content))
        manifest = {"name": "m", "version": version, "kind": "onnx", "files": files}
        assert (await developer.post("/v1/bundles", json={"manifest": manifest})).status_code == 201
        row = (await developer.get("/v1/bundles")).json()[-1]
        path = await hub.services.registry.blob(row["index_sha256"])
        index = decode_index(path.read_bytes(), scan(tmp_path / version))
        packs.append(index.packs)
        assert row["role"] == "bundles"
    assert packs[0] == [packs[1][1]]
    new = await hub.services.registry.blob(packs[1][0])
    assert new.stat().st_size < 300_000
    damaged = await hub.services.registry.blob(packs[0][0])
    damaged.write_bytes(b"rot")
    files = await upload(developer, folder_of(tmp_path / "3", a_onnx=data + b"tail"))
    manifest = {"name": "m", "version": "3", "kind": "onnx", "files": files}
    assert (await developer.post("/v1/bundles", json={"manifest": manifest})).status_code == 201
    row = (await developer.get("/v1/bundles")).json()[-1]
    path = await hub.services.registry.blob(row["index_sha256"])
    assert packs[0][0] not in decode_index(path.read_bytes(), scan(tmp_path / "3")).packs


async def test_a_published_version_never_changes(hub: Hub, tmp_path: Path) -> None:
    developer = await hub.user("developer")
    files = await upload(developer, folder_of(tmp_path / "m", a_txt=b"1"))
    manifest = {"name": "m", "version": "1", "kind": "onnx", "files": files}
    assert (await developer.post("/v1/bundles", json={"manifest": manifest})).status_code == 201
    changed = await developer.post("/v1/bundles", json={"manifest": manifest | {"license": "other"}})
    assert changed.status_code == 409
    assert "new version" in changed.json()["hint"]
    assert [b["version"] for b in (await developer.get("/v1/bundles")).json()] == ["1"]


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"files": [{"path": "../evil", "size": 1, "sha256": "0" * 64}]}, 422),
        ({"files": [{"path": "a.txt", "size": 1, "sha256": "0" * 64}]}, 409),
        ({"files": []}, 422),
        ({"version": "../1"}, 422),
        ({"name": "Bad Name"}, 422),
        ({"v": 2}, 422),
    ],
)
async def test_a_manifest_that_cannot_hold_is_refused(
    hub: Hub, tmp_path: Path, change: dict[str, Any], status: int
) -> None:
    developer = await hub.user("developer")
    files = await upload(developer, folder_of(tmp_path / "m", a_txt=b"1"))
    manifest = {"name": "m", "version": "1", "kind": "onnx", "files": files} | change
    answer = await developer.post("/v1/bundles", json={"manifest": manifest})
    assert answer.status_code == status
    assert answer.json()["hint"]
    assert (await developer.get("/v1/bundles")).json() == []


async def test_a_file_of_another_size_than_its_blob_is_refused(hub: Hub, tmp_path: Path) -> None:
    developer = await hub.user("developer")
    files = await upload(developer, folder_of(tmp_path / "m", a_txt=b"123"))
    files[0]["size"] = 4
    manifest = {"name": "m", "version": "1", "kind": "onnx", "files": files}
    assert (await developer.post("/v1/bundles", json={"manifest": manifest})).status_code == 409


async def test_content_with_another_hash_is_refused_and_leaves_nothing(hub: Hub) -> None:
    developer = await hub.user("developer")
    named = hashlib.sha256(b"good").hexdigest()
    answer = await developer.put(f"/v1/blobs/{named}", content=b"evil")
    assert answer.status_code == 422
    assert (await developer.get(f"/v1/blobs/{named}")).status_code == 404
    assert list(hub.services.registry._partial.iterdir()) == []
    for bad in ("zz", "A" * 64, "%2e%2e%2fhub.key"):
        assert (await developer.put(f"/v1/blobs/{bad}", content=b"x")).status_code in (404, 422)


async def test_an_upload_that_breaks_off_or_finds_a_full_disk_leaves_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: Registry = hub.services.registry
    content = b"x" * 3_000_000
    named = hashlib.sha256(content).hexdigest()

    async def broken() -> AsyncIterator[bytes]:
        yield content[:2_000_000]
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError):
        await registry.put_blob(named, broken())
    assert list(registry._partial.iterdir()) == []

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    developer = await hub.user("developer")
    with monkeypatch.context() as patch:
        patch.setattr("hub.registry.os.fsync", full)
        answer = await developer.put(f"/v1/blobs/{named}", content=content)
    assert answer.status_code == 507
    assert "free space" in answer.json()["hint"]
    assert list(registry._partial.iterdir()) == []
    assert (await developer.put(f"/v1/blobs/{named}", content=content)).status_code == 201
    assert (await developer.put(f"/v1/blobs/{named}", content=content)).json()["size"] == len(content)


@pytest.mark.parametrize("damage", [b"eights!", b"wei"])
async def test_a_damaged_blob_is_not_handed_out_nor_signed_and_heals_by_uploading(
    hub: Hub, tmp_path: Path, damage: bytes
) -> None:
    developer = await hub.user("developer")
    folder = folder_of(tmp_path / "m", a_onnx=b"weights")
    files = await upload(developer, folder)
    url = f"/v1/blobs/{files[0]['sha256']}"
    assert (await developer.head(url)).status_code == 200
    path = await hub.services.registry.blob(files[0]["sha256"])
    before = path.stat()
    path.write_bytes(damage)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    manifest = {"name": "m", "version": "1", "kind": "onnx", "files": files}
    refused = await developer.post("/v1/bundles", json={"manifest": manifest})
    assert refused.status_code == 409
    assert files[0]["path"] in refused.json()["detail"]
    for _ in range(2):
        assert (await developer.head(url)).status_code == 404
        assert (await developer.get(url)).status_code == 404
    await upload(developer, folder)
    assert (await developer.get(url)).content == b"weights"
    assert (await developer.post("/v1/bundles", json={"manifest": manifest})).status_code == 201
