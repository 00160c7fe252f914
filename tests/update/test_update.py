"""The update service against a real HTTP server and a real disk."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.errors import Fatal, Refused, Retry
from edge_agent.update.machine import AFTER_RESTART, MAX_TRIALS, TRANSITIONS, Machine, State, Target
from edge_agent.update.service import MAX_ERROR, BundleReport, UpdateService
from edge_agent.update.slots import Installed
from edge_agent.update.trial import Activation, Figures, Untried
from edge_agent.wire.bundle import FileEntry, content_digest
from edge_agent.wire.chunks import MAX_CHUNK
from tests.update.plant_hub import PlantHub, ReadsGood, until

BIG = b"good" + bytes(range(256)) * 1200


@pytest.fixture
def hub() -> Iterator[PlantHub]:
    with PlantHub().serving() as hub:
        yield hub


class Device:
    """An update service with what it told the daemon."""

    def __init__(self, root: Path, hub: PlantHub, **given: Any) -> None:
        self.reports: list[BundleReport] = []
        self.running: list[str] = []
        self.refuses: set[str] = set()
        downloads = hub.downloads()
        trust = root.with_name(f"{root.name}-trust")
        self.hub, self.director = hub, hub.director(trust)
        options: dict[str, Any] = {"retry_s": (0.05, 0.2), "reserve": 0, "agent_version": "1.0.0"} | given
        prober = options.pop("prober", ReadsGood())
        self.client = downloads._client
        known = hub.known_to(trust, downloads, self.director)
        self.service = UpdateService(root, self.director, known, downloads, prober, self.switch, self.report, **options)

    async def directed(self, bundles: dict[str, Target]) -> None:
        await self.service.direct(self.hub.directs(bundles=bundles))

    async def switch(self, name: str, installed: Installed) -> None:
        if installed.manifest.version in self.refuses:
            raise Refused(f"{installed.manifest.version} does not start")
        self.running.append(installed.manifest.version)

    async def report(self, name: str, report: BundleReport) -> None:
        self.reports.append(report)

    @property
    def last(self) -> BundleReport:
        return self.reports[-1]

    async def wants(self, target: Target, state: str, name: str = "net") -> BundleReport:
        """Direct the device to a version and wait for the state it ends in."""
        await self.directed({name: target})
        await until(lambda: bool(self.reports) and (self.last.target, self.last.state) == (target.version, state))
        return self.last


@asynccontextmanager
async def device(root: Path, hub: PlantHub, **options: Any) -> AsyncIterator[Device]:
    made = Device(root, hub, **options)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(made.service.run())
        yield made
        task.cancel()
    await made.client.aclose()


async def test_assigned_bundle_is_downloaded_verified_probed_and_runs(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG, "sub/notes.txt": b"", "LICENSE": b"free"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        report = await it.wants(target, "committed")
        await until(lambda: it.running == ["1"])
        installed = it.service.slots.current("net")
    assert installed is not None
    assert (installed.folder / "model.bin").read_bytes() == BIG
    assert report.error == ""
    assert it.last.digest == installed.digest == content_digest(installed.manifest.files)
    states = [r.state for r in it.reports if r.target == "1"]
    assert list(dict.fromkeys(states)) == ["resolving", "downloading", "staged", "verifying", "trial", "committed"]


async def test_after_restart_the_installed_version_runs_without_a_hub(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(target, "committed")
        await until(lambda: it.running == ["1"])
    hub.url = "http://127.0.0.1:9"
    async with device(tmp_path / "state", hub) as it:
        await it.directed({"net": target})
        await until(lambda: it.running == ["1"] and bool(it.reports))
        assert it.last.state == "committed"


async def test_new_version_downloads_only_what_changed_and_keeps_the_previous(hub: PlantHub, tmp_path: Path) -> None:
    shared = b"same in both" * 1000
    one = hub.publish("net", "1", {"model.bin": BIG, "vocabulary.txt": shared}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": BIG + b"2", "vocabulary.txt": shared}, tmp_path)
    three = hub.publish("net", "3", {"model.bin": BIG + b"3", "vocabulary.txt": shared}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        for target in (one, two, three):
            await it.wants(target, "committed")
        await until(lambda: it.running == ["1", "2", "3"])
        slots = it.service.slots
        await until(lambda: not slots.has("net", one.manifest_sha256))
        assert slots.has("net", two.manifest_sha256)
        previous = slots.previous("net")
        assert previous is not None
        assert previous.manifest.version == "2"
        asked = len(hub.asked)
        await it.wants(two, "committed")  # back, from the disk alone
        await until(lambda: it.running[-1] == "2")
        assert len(hub.asked) == asked
    assert len(hub.fetched()) == 3


async def test_cut_download_costs_at_most_the_chunk_it_fell_in(hub: PlantHub, tmp_path: Path) -> None:
    data = b"good" + os.urandom(1_000_000)
    target = hub.publish("net", "1", {"model.bin": data}, tmp_path)
    hub.cut_at = [100_000, 300_000, 200_000]
    async with device(tmp_path / "state", hub) as it:
        await it.wants(target, "committed")
    starts = [int(path.split("bytes=")[1].split("-")[0]) for path in hub.fetched()]
    assert len(starts) == 4
    assert starts == sorted(starts)
    assert hub.sent < len(data) + 3 * MAX_CHUNK + 20_000


async def test_versions_share_their_chunks_and_only_new_ones_come(hub: PlantHub, tmp_path: Path) -> None:
    data = os.urandom(2_000_000)
    one = hub.publish("net", "1", {"model.bin": b"good" + data, "copy.bin": data}, tmp_path)
    changed = b"good, and later" + data[:900_000] + os.urandom(1000) + data[900_000:]
    two = hub.publish("net", "2", {"model.bin": changed, "copy.bin": data[5000:], "again.bin": data[5000:]}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        assert hub.sent < 2_300_000  # the copy's chunks come once
        before = hub.sent
        await it.wants(two, "committed")
        assert hub.sent - before < 8 * MAX_CHUNK
        installed = it.service.slots.current("net")
        assert installed is not None
        it.service.slots.check("net", installed.id)
        assert (installed.folder / "model.bin").read_bytes() == changed


async def test_part_damaged_on_disk_is_made_good(hub: PlantHub, tmp_path: Path) -> None:
    data = b"good" + os.urandom(400_000)
    target = hub.publish("net", "1", {"model.bin": data}, tmp_path)
    hub.gate.clear()
    async with device(tmp_path / "state", hub) as it:
        await it.wants(target, "downloading")
        await until(lambda: bool(hub.fetched()))
    part = tmp_path / f"state/net/incoming/{target.manifest_sha256}/parts/{hashlib.sha256(data).hexdigest()}"
    part.write_bytes(data[:200_000] + bytes(len(data) - 200_000))
    before = hub.sent
    hub.gate.set()
    async with device(tmp_path / "state", hub) as it:
        await it.wants(target, "committed")
    assert hub.sent - before < 200_000 + 2 * MAX_CHUNK


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "tampered chunk"),
        (lambda data: data + b"!", "endless data"),
        (lambda data: data[:-1], "the connection ended"),
    ],
)
async def test_tampered_pack_is_refused_by_name_and_the_good_version_stays(
    hub: PlantHub, tmp_path: Path, fault: Callable[[bytes], bytes], says: str
) -> None:
    one = hub.publish("net", "1", {"model.bin": b"good one"}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        hub.tamper = fault
        report = await it.wants(two, "failed")
        assert report.version == "1"
        assert says in report.error
        hub.tamper = lambda data: data
        await it.wants(two, "committed")  # whoever stood between cannot quarantine a version


@pytest.mark.parametrize("path", ["../../../evil", "/etc/evil", "a/../../evil", "a\\..\\evil", ".hidden", "a//b"])
async def test_manifest_that_leaves_its_folder_is_refused(hub: PlantHub, tmp_path: Path, path: str) -> None:
    entry = {"path": path, "size": 4, "sha256": hashlib.sha256(b"evil").hexdigest()}
    manifest = json.dumps({"name": "net", "version": "1", "kind": "onnx", "files": [entry], "v": 1}).encode()
    target = hub.publish_raw("net", "1", manifest, {path: b"evil"})
    async with device(tmp_path / "state", hub) as it:
        report = await it.wants(target, "quarantined")
    assert "plain relative path" in report.error
    assert not any("evil" in name for _, folders, files in os.walk(tmp_path) for name in folders + files)


@pytest.mark.parametrize("paths", [("a", "a/b"), ("a/b", "a")])
async def test_file_and_folder_of_one_name_are_refused(hub: PlantHub, tmp_path: Path, paths: tuple[str, str]) -> None:
    data = dict(zip(paths, (b"1", b"2"), strict=True))
    files = [{"path": p, "size": 1, "sha256": hashlib.sha256(d).hexdigest()} for p, d in data.items()]
    manifest = json.dumps({"name": "net", "version": "1", "kind": "onnx", "files": files, "v": 1}).encode()
    target = hub.publish_raw("net", "1", manifest, data)
    async with device(tmp_path / "state", hub) as it:
        assert "same name" in (await it.wants(target, "quarantined")).error


async def test_hub_not_there_is_a_failed_update_that_comes_back(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    url, hub.url = hub.url, "http://127.0.0.1:9"
    async with device(tmp_path / "state", hub) as it:
        report = await it.wants(target, "failed")
        assert "cannot be reached" in report.error
        it.client.base_url = url
        await it.wants(target, "committed")


async def test_one_failing_bundle_does_not_hold_up_the_others(hub: PlantHub, tmp_path: Path) -> None:
    good = hub.publish("zz", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        missing = Target("9", "0" * 64)
        out = Target("9", f"../../zz/versions/{good.manifest_sha256}")
        await it.directed({"aa": missing, "zz": good, "!": good, "bb": out})
        await until(lambda: it.running == ["1"])
        failed = [report for report in it.reports if report.target == "9"]
    assert "the hub has no bundles/aa/9/manifest.json" in failed[-1].error


async def test_full_disk_is_reported_and_the_update_goes_on_when_there_is_room(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub, reserve=1 << 60) as it:
        report = await it.wants(target, "failed")
        assert "the disk is full" in report.error
        assert not hub.fetched()
        it.service.staging.reserve = 0
        await it.wants(target, "committed")


async def test_disk_that_fills_while_downloading_gives_its_space_back(hub: PlantHub, tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the kernel refuses the write in the middle of the file."""
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    out = await asyncio.to_thread(_crash, "full", tmp_path, hub, target, target)
    assert out["state"] == "failed"
    assert "the disk is full" in out["error"]
    assert out["parts"] == []


async def test_worse_model_is_quarantined_by_its_probe(hub: PlantHub, tmp_path: Path) -> None:
    one = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": b"bad"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        report = await it.wants(two, "quarantined")
    assert (report.version, it.running) == ("1", ["1"])
    assert "answers the probe wrongly" in report.error
    assert not it.service.slots.has("net", two.manifest_sha256)


async def test_version_that_does_not_start_gives_way_to_the_one_before(hub: PlantHub, tmp_path: Path) -> None:
    one = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        await until(lambda: it.running == ["1"])
        it.refuses = {"2"}
        report = await it.wants(two, "quarantined")
        await until(lambda: it.running[-1] == "1")
    assert "does not start" in report.error
    assert it.last.version == "1"


async def test_model_that_never_answers_its_trial_is_quarantined(hub: PlantHub, tmp_path: Path) -> None:
    class Dies:
        tries = 0

        async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
            self.tries += 1
            raise Retry("the worker died")

    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub, prober=Dies(), retry_s=(0.01, 0.01)) as it:
        report = await it.wants(target, "quarantined")
    assert "was tried" in report.error


async def test_version_that_could_not_be_tried_yet_is_not_blamed_for_it(hub: PlantHub, tmp_path: Path) -> None:
    class Crowded(ReadsGood):
        tries = 0

        async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
            self.tries += 1
            if self.tries <= 2 * MAX_TRIALS:
                raise Untried("net 1 needs 2048 MiB of memory and 100 MiB are free")
            return await super().probe(name, candidate, activation)

    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub, prober=Crowded(), retry_s=(0.01, 0.01)) as it:
        assert "100 MiB are free" in (await it.wants(target, "failed")).error
        await until(lambda: it.running == ["1"])


async def test_newer_wish_ends_a_running_download(hub: PlantHub, tmp_path: Path) -> None:
    one = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    hub.gate.clear()
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "downloading")
        await until(lambda: bool(hub.fetched()))
        await it.directed({"net": two})
        hub.gate.set()
        await until(lambda: it.running == ["2"])
    assert not (tmp_path / "state/net/incoming" / one.manifest_sha256).exists()


async def test_what_a_withdrawn_version_took_of_the_disk_is_given_back(hub: PlantHub, tmp_path: Path) -> None:
    one = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": b"good" + os.urandom(2_000_000)}, tmp_path)
    new = hub.publish("new", "1", {"model.bin": b"good" + os.urandom(2_000_000)}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        hub.gate.clear()
        await it.wants(two, "downloading")
        await until(lambda: (tmp_path / f"state/net/incoming/{two.manifest_sha256}/parts").is_dir())
        await it.directed({"net": one, "new": new})
        hub.gate.set()
        await until(lambda: "1" in {report.version for report in it.reports if report.kind and report.target == "1"})
        await until(lambda: it.running == ["1", "1"])
        await it.directed({"net": one})
        await until(lambda: not (tmp_path / f"state/net/incoming/{two.manifest_sha256}").exists())


@pytest.mark.parametrize("manifest", [b'{"manifest":', b'{"manifest":1}', b"[" * 99_999])
async def test_a_signed_manifest_that_is_none_fails_its_update_alone(
    hub: PlantHub, tmp_path: Path, manifest: bytes
) -> None:
    target, good = hub.publish_raw("net", "1", manifest, {}), hub.publish("zz", "1", {"model.bin": BIG}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.directed({"net": target, "zz": good})
        await until(lambda: it.running == ["1"] and any(report.target == "1" and report.error for report in it.reports))


async def test_version_for_a_newer_agent_waits(hub: PlantHub, tmp_path: Path) -> None:
    target = hub.publish("net", "1", {"model.bin": BIG}, tmp_path, min_agent_version="1.1")
    never = hub.publish("net", "2", {"model.bin": BIG}, tmp_path, min_agent_version="9" * 50_000)
    async with device(tmp_path / "state", hub) as it:
        assert "needs agent 1.1" in (await it.wants(target, "failed")).error
        error = (await it.wants(never, "failed")).error
        assert "needs agent 999" in error
        assert len(error) <= MAX_ERROR, "what is too long for the reported document would tell the hub nothing"


async def two_versions(hub: PlantHub, tmp_path: Path) -> tuple[Target, Target]:
    """The one before and the one that runs, of a device that has ended."""
    one = hub.publish("net", "1", {"model.bin": BIG}, tmp_path)
    two = hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await it.wants(one, "committed")
        await it.wants(two, "committed")
        await until(lambda: it.running == ["1", "2"])
    return one, two


@pytest.mark.parametrize("damage", ["current", "both"])
async def test_damaged_version_gives_way_at_start_and_is_fetched_again(
    hub: PlantHub, tmp_path: Path, damage: str
) -> None:
    one, two = await two_versions(hub, tmp_path)
    for target in [two] if damage == "current" else [one, two]:
        (tmp_path / f"state/net/versions/{target.manifest_sha256}/files/model.bin").write_bytes(b"good rot")
    async with device(tmp_path / "state", hub) as it:
        if damage == "current":
            await until(lambda: it.running == ["1"])
        await it.wants(two, "committed")
        await until(lambda: it.running[-1] == "2")


def _no_bytes(version: Path) -> None:
    """The file is there and reading it is an I/O error, as with a bad block."""
    (version / "files/model.bin").unlink()
    (version / "files/model.bin").symlink_to("/proc/self/mem")


def _no_record(version: Path) -> None:
    """So is the update machine's."""
    (version.parents[1] / "update.json").unlink(missing_ok=True)
    (version.parents[1] / "update.json").symlink_to("/proc/self/mem")
    _no_bytes(version)


def _no_manifest(version: Path, left: bytes = b"{") -> None:
    (version / "manifest.json").write_bytes(left)


@pytest.mark.parametrize("damage", [_no_bytes, _no_record, _no_manifest, partial(_no_manifest, left=b'{"manifest":')])
@pytest.mark.parametrize("both", [False, True])
async def test_bad_block_in_a_version_costs_that_version_alone(
    hub: PlantHub, tmp_path: Path, damage: Callable[[Path], object], both: bool
) -> None:
    one, two = await two_versions(hub, tmp_path)
    for target in [one, two] if both else [two]:
        damage(tmp_path / f"state/net/versions/{target.manifest_sha256}")
    url, hub.url = hub.url, "http://127.0.0.1:9"
    async with device(tmp_path / "state", hub) as it:
        if not both:
            await until(lambda: it.running == ["1"])  # with no network
        await it.wants(two, "failed")
        it.client.base_url = url
        await it.wants(two, "committed")
        await until(lambda: it.running[-1] == "2")


def _crash(mode: str, tmp_path: Path, hub: PlantHub, old: Target, new: Target, **more: Any) -> dict[str, Any]:
    hub.device_key.save(tmp_path / "device.key")
    setup = more | {
        "mode": mode, "url": hub.url, "hub_key": hub.key.public.text, "device_key": str(tmp_path / "device.key"),
        "state": str(tmp_path / "crash"),
        "old": {"version": old.version, "director": hub.directs(bundles={"net": old})},
        "new": {"version": new.version, "director": hub.directs(bundles={"net": new})},
    }  # fmt: skip
    command = [sys.executable, "-W", "error", "-m", "tests.update.crash", json.dumps(setup)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.timeout(600)
async def test_kill_at_any_point_leaves_one_good_version_and_then_converges(hub: PlantHub, tmp_path: Path) -> None:
    old = hub.publish("net", "1", {"model.bin": BIG, "same.txt": b"same"}, tmp_path)
    new = hub.publish("net", "2", {"model.bin": BIG + b"2", "same.txt": b"same", "sub/more": b"x" * 9000}, tmp_path)
    out = await asyncio.to_thread(_crash, "sweep", tmp_path, hub, old, new)
    kills = out["kills"]
    assert len(kills) > 30
    for kill in kills:
        assert kill["current"] in ("1", "2"), kill
        assert kill["after"] == "2", kill
    wanted = {"resolving", "downloading", "staged", "verifying", "trial", "committed"}
    assert {kill["state"] for kill in kills} >= wanted
    assert {kill["current"] for kill in kills} == {"1", "2"}


@given(st.sampled_from(list(State)), st.sampled_from(list(State)))
def test_machine_saves_a_state_before_it_is_entered_and_takes_no_other_way(tmp_path_factory, start, end) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path_factory.mktemp("machine") / "update.json"
    machine = Machine(path)
    machine.update.state, machine.update.manifest_sha256 = start, "a" * 64
    if end not in TRANSITIONS[start]:
        with pytest.raises(Fatal):
            machine.to(end)
        assert not path.exists()
        return
    machine.to(end, "why")
    again = Machine(path)
    assert again.load() == end
    assert again.update.state == AFTER_RESTART[end]
    assert again.update.error == "why"


@pytest.mark.parametrize("content", [b"", b"{", b'{"state": "from-the-future"}', b"\xff\x00", b"[]"])
def test_unreadable_record_goes_back_to_idle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "update.json").write_bytes(content)
    machine = Machine(tmp_path / "update.json")
    assert machine.load() is State.UNKNOWN
    assert machine.update.state is State.IDLE


def test_full_disk_keeps_no_record_from_being_read_at_a_start(tmp_path: Path) -> None:
    """It was the full disk that failed the update: what is installed is to start all the same."""
    Machine(tmp_path / "update.json").aim(Target("1", "0" * 64), State.FAILED, "the disk is full")
    limits, again = resource.getrlimit(resource.RLIMIT_FSIZE), Machine(tmp_path / "update.json")
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        assert again.load() is State.FAILED
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert again.update.state is State.IDLE


def test_trials_are_counted_before_they_begin(tmp_path: Path) -> None:
    target = Target("1", "a" * 64)
    for _ in range(MAX_TRIALS):
        machine = Machine(tmp_path / "update.json")
        machine.load()
        machine.aim(target, State.RESOLVING)
        machine.to(State.VERIFYING)
        machine.to(State.TRIAL)
    machine.load()
    machine.aim(target, State.RESOLVING)
    machine.to(State.VERIFYING)
    with pytest.raises(Refused, match="tried 5 times"):
        machine.to(State.TRIAL)


def test_file_entry_is_what_the_digest_covers() -> None:
    one, two = FileEntry("a", 1, "0" * 64), FileEntry("b", 1, "1" * 64)
    assert content_digest([one, two]) == content_digest([two, one])
