"""The engine cache: built once, whole or not at all, never another's, within its bytes."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from edge_agent.engines.engine_cache import EngineCache, Key
from edge_agent.engines.tensorrt_build import Report
from edge_agent.errors import Refused, Retry

KEY = Key("d" * 64, "fp16", "tensorrt-rtx", "1.7.1.116", "sm86", {"x": ((1, 4), (2, 4), (8, 4))})


def writes(engine: bytes, calls: list[str] | None = None) -> Callable[[Path], Report]:
    """A builder of `engine` that counts its calls."""

    def build(path: Path) -> Report:
        if calls is not None:
            calls.append(path.name)
        path.write_bytes(engine)
        digest = hashlib.sha256(engine).hexdigest()
        return Report("tensorrt-rtx", "1.7.1.116", "sm86", KEY.profile, len(engine), digest, 1.0, 100.0)

    return build


def refuses(path: Path) -> Report:
    path.write_bytes(b"half")
    raise Refused("no such op")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock"}


def test_an_engine_is_built_once(tmp_path: Path) -> None:
    calls: list[str] = []
    for _ in range(3):
        assert EngineCache(tmp_path / "engines").get(KEY, writes(b"engine", calls)) == b"engine"
    assert len(calls) == 1
    assert files(tmp_path / "engines") == {f"{KEY.name}.engine", f"{KEY.name}.json"}


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "e" * 64}, {"precision": "int8"}, {"runtime": "tensorrt"}, {"version": "1.7.1.117"},
        {"device": "sm89"}, {"profile": {"x": ((1, 4), (2, 4), (9, 4))}}, {"profile": {}},
    ],
)  # fmt: skip
def test_every_part_of_the_key_asks_for_another_engine(tmp_path: Path, change: dict[str, object]) -> None:
    cache, other = EngineCache(tmp_path), msgspec.structs.replace(KEY, **change)
    assert cache.get(KEY, writes(b"one")) == b"one"
    assert cache.get(other, writes(b"two")) == b"two"
    assert cache.get(KEY, refuses) == b"one"


def test_the_order_of_the_inputs_is_no_part_of_the_key() -> None:
    one, two = ((1,), (1,), (1,)), ((2,), (2,), (2,))
    keys = [msgspec.structs.replace(KEY, profile=profile) for profile in ({"a": one, "b": two}, {"b": two, "a": one})]
    assert keys[0].name == keys[1].name


@pytest.mark.parametrize(
    ("suffix", "content"),
    [
        (".engine", b"eng"),
        (".engine", b"Engine"),
        (".engine", None),
        (".json", b"{"),
        (".json", b"{}"),
        (".json", None),
    ],
)
def test_what_is_damaged_is_built_again(tmp_path: Path, suffix: str, content: bytes | None) -> None:
    cache = EngineCache(tmp_path)
    cache.get(KEY, writes(b"engine"))
    path = tmp_path / f"{KEY.name}{suffix}"
    path.unlink() if content is None else path.write_bytes(content)
    assert cache.get(KEY, writes(b"engine")) == b"engine"
    assert cache.get(KEY, refuses) == b"engine"


def test_an_entry_that_is_anothers_is_built_again(tmp_path: Path) -> None:
    cache, other = EngineCache(tmp_path), msgspec.structs.replace(KEY, device="sm89")
    cache.get(other, writes(b"foreign"))
    for suffix in (".engine", ".json"):
        (tmp_path / f"{KEY.name}{suffix}").write_bytes((tmp_path / f"{other.name}{suffix}").read_bytes())
    assert cache.get(KEY, writes(b"mine")) == b"mine"


def test_a_build_that_fails_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    cache = EngineCache(tmp_path)
    with pytest.raises(Refused, match="no such op"):
        cache.get(KEY, refuses)
    assert files(tmp_path) == set()
    assert cache.get(KEY, writes(b"engine")) == b"engine"


@pytest.mark.parametrize("before", [None, b"old"])
@pytest.mark.parametrize("step", range(8))
def test_killed_at_any_step_of_a_publication_the_next_run_has_a_whole_engine(
    tmp_path: Path, step: int, before: bytes | None
) -> None:
    cache = EngineCache(tmp_path)
    if before is not None:
        cache.get(KEY, writes(before))
        (tmp_path / f"{KEY.name}.engine").write_bytes(b"damaged")
    program = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_engine_cache import EngineCache, KEY, writes
left = [{step}]
def dying(real):
    def call(*args, **kwargs):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return real(*args, **kwargs)
    return call
os.fsync, Path.replace, Path.unlink = dying(os.fsync), dying(Path.replace), dying(Path.unlink)
EngineCache(Path({str(tmp_path)!r})).get(KEY, writes(b"new engine"))
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=60, stderr=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL, done.stderr
    calls: list[str] = []
    assert EngineCache(tmp_path, wait_s=1).get(KEY, writes(b"new engine", calls)) == b"new engine"
    assert EngineCache(tmp_path).get(KEY, refuses) == b"new engine"
    other = msgspec.structs.replace(KEY, device="sm89")
    EngineCache(tmp_path).get(other, writes(b"another"))  # the next build clears what is left
    assert files(tmp_path) == {f"{key.name}{end}" for key in (KEY, other) for end in (".engine", ".json")}


def test_the_engine_used_longest_ago_goes_first(tmp_path: Path) -> None:
    keys = [msgspec.structs.replace(KEY, device=f"sm{n}") for n in range(70, 75)]
    cache = EngineCache(tmp_path, max_bytes=4 * 10_000)
    for number, key in enumerate(keys[:3]):
        cache.get(key, writes(bytes(10_000)))
        os.utime(tmp_path / f"{key.name}.json", (number, number))
    assert cache.get(keys[0], refuses)  # now the second is the oldest
    cache.get(keys[3], writes(bytes(10_000)))
    cache.get(keys[4], writes(bytes(10_000)))
    assert {key.device for key in keys if (tmp_path / f"{key.name}.engine").exists()} == {"sm70", "sm73", "sm74"}
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 40_000


def test_an_engine_larger_than_the_cache_is_served_and_evicts_nothing(tmp_path: Path) -> None:
    cache, large = EngineCache(tmp_path, max_bytes=5000), msgspec.structs.replace(KEY, device="sm89")
    cache.get(KEY, writes(b"small"))
    assert cache.get(large, writes(bytes(5000))) == bytes(5000)
    assert files(tmp_path) == {f"{KEY.name}.engine", f"{KEY.name}.json"}


def test_two_who_ask_at_once_build_once(tmp_path: Path) -> None:
    calls: list[str] = []
    building, go_on = threading.Event(), threading.Event()

    def slow(path: Path) -> Report:
        building.set()
        assert go_on.wait(30)
        return writes(b"engine", calls)(path)

    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(EngineCache(tmp_path).get(KEY, slow))) for _ in range(2)]
    threads[0].start()
    assert building.wait(30)
    threads[1].start()
    with pytest.raises(Retry, match="another engine is being built"):
        EngineCache(tmp_path, wait_s=0.2).get(KEY, refuses)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert found == [b"engine", b"engine"]
    assert len(calls) == 1


def test_a_disk_that_takes_nothing_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(Retry, match="cannot be kept"):
        EngineCache(tmp_path / "file" / "engines").get(KEY, writes(b"engine"))
