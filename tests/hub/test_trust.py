"""Key ceremonies from the command line: drafts, thresholds, roles of their own, and what a mistake says."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from tuf.api.metadata import Metadata
from typer.testing import CliRunner

from hub.errors import Refused
from hub.repository import Repository
from hub.trust_cli import app

PATHS = ("bundles/net/1/manifest.json", "bundles/net/1/index")


def outrider(*arguments: str | Path) -> dict[str, Any]:
    done = CliRunner().invoke(app, [str(argument) for argument in (*arguments, "--json")], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said: dict[str, Any] = json.loads(done.stdout)
    return said


@pytest.fixture
def keys(tmp_path: Path) -> list[Path]:
    made = [tmp_path / f"{name}.key" for name in "abc"]
    for path in made:
        outrider("key", path)
        assert path.stat().st_mode & 0o077 == 0
    return made


@pytest.fixture
def data(tmp_path: Path, keys: list[Path]) -> Path:
    options = [part for path in keys for part in ("--key", path)]
    shown = outrider("ceremony", "--data", tmp_path / "hub", *options)
    assert {role: it["threshold"] for role, it in shown["roles"].items()} == {
        "root": 2, "targets": 2, "snapshot": 1, "timestamp": 1, "bundles": 1
    }  # fmt: skip
    return tmp_path / "hub"


def test_a_change_waits_for_the_threshold_and_may_be_signed_on_a_copy(
    data: Path, keys: list[Path], tmp_path: Path
) -> None:
    repository, elsewhere = Repository(data / "trust"), tmp_path / "elsewhere"
    shown = outrider("rotate", "--data", data, "--sign", keys[0], "--online")
    assert (shown["drafts"], shown["roles"]["root"]["version"]) == ({"root": 1}, 1)
    repository.renew()  # goes on with the keys that devices know
    shutil.copytree(data / "trust", elsewhere / "trust", ignore=shutil.ignore_patterns("timestamp.key", "keys/*"))
    shown = outrider("sign", "root", "--data", elsewhere, "--sign", keys[2])
    assert (shown["drafts"], shown["roles"]["root"]["version"]) == ({}, 2)
    shown = outrider("sign", "root", "--data", data, "--sign", keys[1])
    root = Metadata.from_bytes(repository.root()).signed
    for role in ("timestamp", "snapshot"):
        name = "timestamp.json" if role == "timestamp" else f"{shown['roles'][role]['version']}.snapshot.json"
        metadata = Metadata.from_bytes(repository.file(name))
        root.verify_delegate(role, metadata.signed_bytes, metadata.signatures)


def test_a_role_of_its_own_signs_its_models_alone_and_its_key_may_be_elsewhere(
    data: Path, keys: list[Path], tmp_path: Path
) -> None:
    repository, both = Repository(data / "trust"), ("--sign", keys[0], "--sign", keys[1])
    outrider("delegate", "ocr", "--path", "bundles/ocr-*/*/*", "--data", data, *both)
    assert repository.publish({PATHS[0]: (1, "0" * 64)}) == "bundles"
    assert repository.publish({"bundles/ocr-a/1/index": (1, "0" * 64)}) == "ocr"
    before = outrider("show", "--data", data)["roles"]["ocr"]["keys"]
    after = outrider("delegate", "ocr", "--path", "bundles/ocr-*/*/*", "--data", data, *both)["roles"]["ocr"]["keys"]
    assert before != after
    targets = Metadata.from_bytes(repository.file("3.targets.json")).signed
    newest = Metadata.from_bytes(repository.file(f"{repository._version('ocr')}.ocr.json"))
    targets.verify_delegate("ocr", newest.signed_bytes, newest.signatures)
    outrider("key", tmp_path / "far.key")
    outrider("delegate", "far", "--path", "bundles/far/*/*", "--key", tmp_path / "far.key.pub", "--data", data, *both)
    with pytest.raises(Refused, match="the key of role far"):
        repository.publish({"bundles/far/1/index": (1, "0" * 64)})
    assert repository.publish({PATHS[1]: (1, "0" * 64)}) == "bundles"


def test_what_the_hub_signs_is_renewed_in_half_of_its_life(data: Path) -> None:
    now = time.time()
    later = Repository(data / "trust", clock=lambda: now)
    version = later._version("timestamp")
    later.renew()
    assert later._version("timestamp") == version
    now += 86400 * 0.6
    left = later.renew()
    assert later._version("timestamp") == version + 1
    assert left["timestamp"] == pytest.approx(1.0, abs=0.01)
    now += 86400 * 60
    left = later.renew()
    assert left["bundles"] == pytest.approx(90.0, abs=0.01)
    assert left["root"] == pytest.approx(365 - 60.6, abs=0.01)


def test_mistakes_say_what_to_do(data: Path, keys: list[Path], tmp_path: Path) -> None:
    repository = Repository(data / "trust")
    for call, says in (
        (lambda: repository.create([], 1, {}), "threshold of 1 of 0"),
        (lambda: repository.rotate(threshold=4), "threshold of 4 of 3"),
        (lambda: repository.delegate("root", ["*"]), "cannot be a role's name"),
        (lambda: repository.publish({"elsewhere": (1, "0" * 64)}), "no role may sign"),
        (lambda: outrider("sign", "root", "--data", data, "--sign", keys[0]), "no draft of root"),
        (lambda: outrider("sign", "root", "--data", data, "--sign", tmp_path / "none"), "is not a private key"),
        (lambda: outrider("key", keys[0]), "exists"),
        (lambda: outrider("show", "--data", tmp_path), "no metadata 0.root.json"),
        (lambda: outrider("ceremony", "--data", data, "--key", keys[0], "--threshold", "1"), "has a repository"),
    ):
        with pytest.raises(Refused, match=says) as refused:
            call()
        assert refused.value.hint
