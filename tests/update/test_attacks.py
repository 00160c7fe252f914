"""What an attacker can try with a mirror, a stolen key or an old message: each is refused by its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, TargetFile

from edge_agent.errors import Refused, Retry
from edge_agent.update import download, trust
from edge_agent.update.slots import Offer
from edge_agent.wire import durable
from edge_agent.wire.bundle import Target, sha256, target_paths
from edge_agent.wire.signing import SigningKey
from hub.repository import ROLE_DAYS, load_key
from tests.update.plant_hub import PlantHub, until
from tests.update.test_update import device


@pytest.fixture
def hub() -> Iterator[PlantHub]:
    with PlantHub().serving() as hub:
        yield hub


class Asks:
    """A device's view of the repository; `resolve` as one that has just started."""

    def __init__(self, hub: PlantHub, folder: Path) -> None:
        self.hub, self.folder = hub, folder

    async def resolve(self, version: str = "1") -> Offer:
        downloads = self.hub.downloads()
        try:
            return await self.hub.known_to(self.folder, downloads, self.hub.director(self.folder)).resolve(
                "net", version
            )
        finally:
            await downloads._client.aclose()

    async def refused(self, says: str, version: str = "1") -> None:
        with pytest.raises(Retry, match=says):
            await self.resolve(version)


@pytest.fixture
def asks(hub: PlantHub, tmp_path: Path) -> Asks:
    return Asks(hub, tmp_path / "trust")


def signed_by(hub: PlantHub, role: str, signed: Any, *keys: CryptoSigner) -> bytes:
    """Metadata of a role with its own online key, or with others."""
    metadata: Metadata[Any] = Metadata(signed)
    for key in keys or [load_key(hub.repository.folder / "keys" / f"{role}.key")]:
        metadata.sign(key, append=True)
    return metadata.to_bytes()


def current(hub: PlantHub, name: str) -> Any:
    return Metadata.from_bytes(hub.repository.file(name)).signed


async def test_arbitrary_software_needs_the_keys_of_its_role_and_path(
    hub: PlantHub, asks: Asks, tmp_path: Path
) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    await asks.resolve()
    for name, signed in (
        ("2.bundles.json", current(hub, "2.bundles.json")),
        ("timestamp.json", current(hub, "timestamp.json")),
    ):
        signed.version += 5
        hub.says = {name: signed_by(hub, "", signed, CryptoSigner.generate_ed25519())}
        await Asks(hub, tmp_path / name).refused("arbitrary software")
    hub.says = {}
    hub.repository.delegate("ocr", ["bundles/ocr-*/*/*"])
    assert [hub.repository.sign("targets", key) for key in hub.offline[:2]] == [1, 0]
    stolen = current(hub, "2.bundles.json")  # the key of `bundles` signs for what is the other role's
    evil = target_paths("ocr-a", "1")[0]
    stolen.targets[evil] = TargetFile(4, {"sha256": sha256(b"evil")}, evil)
    hub.says = {"2.bundles.json": signed_by(hub, "bundles", stolen)}
    known = hub.known_to(tmp_path / "fresh", downloads := hub.downloads(), hub.director(tmp_path / "fresh"))
    with pytest.raises(Retry, match="nobody who may has signed it"):
        await known.resolve("ocr-a", "1")
    await downloads._client.aclose()


async def test_stolen_targets_keys_install_nothing_that_the_director_did_not_name(
    hub: PlantHub, tmp_path: Path
) -> None:
    good = hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    hub.publish_raw("net", "1", b'{"name":"net","version":"1","kind":"onnx","files":[],"license":"evil"}', {})
    async with device(tmp_path / "state", hub) as it:
        assert "arbitrary software" in (await it.wants(good, "failed")).error
        assert it.running == []


async def test_stolen_director_key_installs_nothing_that_is_no_target(hub: PlantHub, tmp_path: Path) -> None:
    async with device(tmp_path / "state", hub) as it:
        hub.blobs[sha256(b"evil")] = b"evil"
        report = await it.wants(Target("1", sha256(b"evil")), "failed")
        assert "nobody who may has signed it" in report.error


async def test_rollback_is_refused(hub: PlantHub, asks: Asks, tmp_path: Path) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    old = hub.repository.file("timestamp.json")
    hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    await asks.resolve("2")
    hub.says = {"timestamp.json": old}
    await asks.refused("rollback", "2")
    stamp, snapshot = current(hub, "timestamp.json"), current(hub, "3.snapshot.json")
    stamp.version, stamp.snapshot_meta = stamp.version + 1, MetaFile(snapshot.version + 1)
    snapshot.version, snapshot.meta["bundles.json"] = snapshot.version + 1, MetaFile(1)
    hub.says = {  # whoever has the online keys cannot bring an old version of a role back either
        "timestamp.json": signed_by(hub, "timestamp", stamp),
        "4.snapshot.json": signed_by(hub, "snapshot", snapshot),
    }
    await asks.refused("rollback", "2")


async def test_freeze_ends_when_the_metadata_expires_and_what_is_installed_goes_on(
    hub: PlantHub, asks: Asks, tmp_path: Path
) -> None:
    one = hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        stamp = current(hub, "timestamp.json")
        stamp.expires, stamp.version = stamp.expires - timedelta(days=2), stamp.version + 1
        hub.says = {"timestamp.json": signed_by(hub, "timestamp", stamp)}
        report = await it.wants(two, "failed")
        assert "freeze" in report.error
        assert (report.version, it.running) == ("1", ["1"])
        hub.says = {}
        await it.wants(two, "committed")


async def test_a_clock_set_back_does_not_unfreeze(hub: PlantHub, asks: Asks, tmp_path: Path) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    await asks.resolve()
    director = hub.director(asks.folder)
    director.accept(hub.directs(issued=time.time() + (ROLE_DAYS + 1) * 86400))
    await asks.refused("freeze")
    director.accept(hub.directs(issued=0.0))  # a later directive does not lower the floor
    await asks.refused("freeze")


async def test_mix_and_match_is_refused(hub: PlantHub, asks: Asks, tmp_path: Path) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    old = hub.repository.file("2.bundles.json")
    hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    hub.says = {"3.bundles.json": old}
    await asks.refused("mix-and-match", "2")
    hub.says = {"3.snapshot.json": hub.repository.file("2.snapshot.json")}
    await Asks(hub, tmp_path / "other").refused("mix-and-match", "2")
    hub.says, manifest = {}, hub.repository.show()
    assert manifest["drafts"] == {}
    for digest, data in list(hub.blobs.items()):
        hub.blobs[digest] = bytes(len(data))
    await asks.refused("mix-and-match", "2")


@pytest.mark.parametrize("hashes", [{"sha512": "0" * 128}, {"sha256": "../../v1/trust"}])
async def test_a_target_that_names_no_sha256_fails_its_update_alone(
    hub: PlantHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashes: dict[str, str]
) -> None:
    one = hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    with monkeypatch.context() as signs:
        signs.setattr("hub.repository.TargetFile", lambda length, _, path: TargetFile(length, hashes, path))
        two = hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    other = hub.publish("other", "1", {"model.bin": b"good other"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        report = await it.wants(two, "failed")
        assert "bundles/net/2/manifest.json is signed with no SHA-256" in report.error
        assert report.version == "1"
        await it.directed({"net": two, "other": other})
        await until(lambda: it.running == ["1", "1"])
        hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
        await it.wants(two, "committed")


async def test_endless_data_is_refused(hub: PlantHub, asks: Asks, tmp_path: Path) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    hub.says = {"timestamp.json": bytes(1 << 20)}
    await asks.refused("endless data")
    hub.says = {"timestamp.json": bytes(trust.MAX_METADATA + 1)}
    await asks.refused("endless data")
    hub.says = {}
    hub.blobs = {digest: data + b"!" for digest, data in hub.blobs.items()}
    await asks.refused("endless data")


@pytest.mark.parametrize("which", [0, 1], ids=["manifest", "index"])
async def test_a_target_signed_longer_than_one_can_be_is_not_fetched_and_fails_its_update_alone(
    hub: PlantHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """Whoever has the keys of targets could else fill a device's memory."""
    one = hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    long, path = trust.LONGEST[which] + 1, target_paths("net", "2")[which]

    def signs(length: int, hashes: dict[str, str], name: str) -> TargetFile:
        return TargetFile(long if name == path else length, hashes, name)

    with monkeypatch.context() as signing:
        signing.setattr("hub.repository.TargetFile", signs)
        two = hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    other = hub.publish("other", "1", {"model.bin": b"good other"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        report = await it.wants(two, "failed")
        assert f"endless data: {path} is signed with {long} bytes" in report.error
        assert report.version == "1"
        await it.directed({"net": two, "other": other})
        await until(lambda: it.running == ["1", "1"])
        hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
        await it.wants(two, "committed")


async def test_slow_retrieval_is_refused(
    hub: PlantHub, asks: Asks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = hub.publish("net", "1", {"model.bin": bytes(range(256)) * 400}, tmp_path)
    monkeypatch.setattr(download, "PATIENCE_S", -1.0)
    monkeypatch.setattr(download, "SLOWEST", 1e12)
    await asks.refused("slow retrieval")
    monkeypatch.setattr(download, "SLOWEST", 0.0)
    hub.gate.clear()
    async with device(tmp_path / "state", hub) as it:
        await it.directed({"net": two})
        await until(lambda: bool(hub.fetched()))
        monkeypatch.setattr(download, "SLOWEST", 1e12)
        hub.gate.set()
        await until(lambda: bool(it.reports) and it.last.state == "failed")
        assert "slow retrieval" in it.last.error


async def test_fast_forward_is_recovered_from_by_new_online_keys(hub: PlantHub, asks: Asks, tmp_path: Path) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    stamp, snapshot = current(hub, "timestamp.json"), current(hub, "2.snapshot.json")
    stamp.version = snapshot.version = 2**31
    stamp.snapshot_meta, snapshot.meta["bundles.json"] = MetaFile(2**31), MetaFile(2)
    hub.says = {
        "timestamp.json": signed_by(hub, "timestamp", stamp),
        f"{2**31}.snapshot.json": signed_by(hub, "snapshot", snapshot),
    }
    await asks.resolve()
    hub.says = {}
    await asks.refused("rollback")
    hub.repository.rotate(online=True)
    assert [hub.repository.sign("root", key) for key in hub.offline[1:]] == [1, 0]
    await asks.resolve()


async def test_fewer_root_keys_than_the_threshold_change_nothing(hub: PlantHub, asks: Asks, tmp_path: Path) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    await asks.resolve()
    root = current(hub, "1.root.json")
    root.version, root.roles["root"].threshold = 2, 1
    hub.says = {"2.root.json": signed_by(hub, "", root, hub.offline[0])}
    await asks.refused("arbitrary software")
    hub.says = {"root": signed_by(hub, "", root, hub.offline[0])}
    hub.key, enrolled_with = SigningKey.generate(), hub.key
    known = trust.Repository(tmp_path / "x", downloads := hub.downloads(), hub.director(tmp_path), enrolled_with.public)
    with pytest.raises(Retry, match="the first root is not the hub's"):
        await known.resolve("net", "1")
    await downloads._client.aclose()


async def test_root_keys_change_by_ceremony_and_devices_follow_from_any_version(
    hub: PlantHub, asks: Asks, tmp_path: Path
) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    await asks.resolve()
    new = [CryptoSigner.generate_ed25519() for _ in range(4)]
    hub.repository.rotate([key.public_key for key in new], threshold=3)
    assert [hub.repository.sign("root", key) for key in (*new[:3], *hub.offline[:2])] == [2, 2, 2, 1, 0]
    hub.repository.prolong()
    assert [hub.repository.sign("targets", key) for key in new[1:]] == [2, 1, 0]
    hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    await asks.resolve("2")


Change = Callable[[PlantHub], dict[str, Any]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda hub: hub.directs(device="line-2"), "another device's directive"),
        (lambda hub: hub.directs(fleet="elsewhere"), "another device's directive"),
        (lambda hub: hub.directs(hardware="aarch64"), "wrong hardware"),
        (lambda hub: hub.directs(counter=1), "replayed directive: number 1 after 2"),
        (lambda hub: hub.directs(counter=2, bundles={"evil": Target("1", "0" * 64)}), "replayed directive"),
        (lambda hub: hub.directs() | {"signature": "x"}, "arbitrary software"),
        (lambda hub: {"text": "{}"}, "arbitrary software"),
    ],
)
async def test_a_directive_that_is_not_this_devices_next_one_is_refused(
    hub: PlantHub, tmp_path: Path, change: Change, says: str
) -> None:
    good = hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        hub.directs()
        await it.wants(good, "committed")
        with pytest.raises(Refused, match=says):
            await it.service.direct(change(hub))
    last = hub.director(tmp_path / "state-trust")  # and after a restart
    with pytest.raises(Refused, match=says):
        last.accept(change(hub))


async def test_a_bundle_for_other_hardware_is_refused(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": b"good"}, tmp_path, meta={"hardware": ["aarch64"]})
    async with device(tmp_path / "state", hub) as it:
        assert "wrong hardware" in (await it.wants(target, "quarantined")).error
        assert hub.fetched() == []


async def test_what_trust_remembers_is_on_disk_before_it_counts(
    hub: PlantHub, asks: Asks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.publish("net", "1", {"model.bin": b"good"}, tmp_path)
    synced: list[str] = []
    write = durable.write
    monkeypatch.setattr(durable, "write", lambda path, *more: (synced.append(Path(path).name), write(path, *more)))
    await asks.resolve()
    hub.director(asks.folder).accept(hub.directs())
    files = {"1.root.json", "timestamp.json", "snapshot.json", "targets.json", "bundles.json", "first-root.json"}
    assert {*synced} >= files | {"director.json"}


def test_a_damaged_record_of_the_director_is_not_forgotten(hub: PlantHub, tmp_path: Path) -> None:
    (tmp_path / "director.json").write_bytes(b"{")
    with pytest.raises(Refused, match="is damaged"):
        hub.director(tmp_path).accept(hub.directs())
