"""Memory: what is free within the cgroups, what the kernel killed; a model that does not fit says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent import hosting
from edge_agent.errors import Refused
from edge_agent.hosting import Hosting
from edge_agent.machine import UNBOUND, available_memory, ending, memory, oom_kills
from edge_agent.serving import supervisor
from edge_agent.update.slots import Installed
from edge_agent.update.trial import Untried
from edge_agent.wire.bundle import BundleKind, Manifest, scan
from tests.serving.test_supervisor import child

MIB = 2**20


def cgroup(root: Path, name: str, limit: str, used: int = 0, cache: int = 0, kills: int = 0) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\n")
    (folder / "memory.events").write_text(f"low 0\noom 9\noom_kill {kills}\n")
    (root / "own").write_text(f"0::/{name}\n")
    return folder


def test_the_smallest_cgroup_bounds_what_is_free(tmp_path: Path) -> None:
    cgroup(tmp_path, "a", str(8 * MIB), 3 * MIB, 1 * MIB)
    cgroup(tmp_path, "a/b", "max")
    assert available_memory(tmp_path, tmp_path / "own") == 6 * MIB
    cgroup(tmp_path, "a/b", str(4 * MIB), 5 * MIB)
    assert available_memory(tmp_path, tmp_path / "own") == 0
    cgroup(tmp_path, "a", "max")
    cgroup(tmp_path, "a/b", str(UNBOUND))
    assert 0 < available_memory(tmp_path, tmp_path / "own") <= memory()["MemTotal"] * 1024
    assert 0 < available_memory(tmp_path, tmp_path / "absent") <= memory()["MemTotal"] * 1024


def test_what_the_kernel_killed_is_counted_where_it_says(tmp_path: Path) -> None:
    cgroup(tmp_path, "a", "max", kills=2)
    assert oom_kills(tmp_path, tmp_path / "own") == 2
    assert oom_kills(tmp_path, tmp_path / "absent") is None
    assert oom_kills(tmp_path / "a", tmp_path / "own") is None


@pytest.mark.parametrize(
    ("status", "before", "after", "said"),
    [
        (-9, 1, 2, "for lack of memory"),
        (137, 0, 1, "for lack of memory"),
        (-9, 1, 1, r"was killed \(signal 9\)$"),
        (-9, None, None, "as the kernel does when memory is short"),
        (9, 1, 2, "status 9"),
    ],
)
def test_an_ending_says_what_is_known_of_it(status: int, before: int | None, after: int | None, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        raise ValueError(ending(status, before, after))


def bundle(folder: Path, name: str, **serving: Any) -> Installed:
    folder.mkdir(exist_ok=True)
    (folder / "file").write_bytes(b"x" * 1000)
    manifest = Manifest(name, "1", BundleKind.LLM, scan(folder), meta={"serving": serving})
    return Installed("0" * 64, folder, manifest)


async def test_a_worker_killed_for_memory_while_it_loads_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter(range(100))
    monkeypatch.setattr(supervisor, "oom_kills", lambda: next(kills))
    async with child() as worker:
        host = Hosting({"language": worker})
        with pytest.raises(Refused, match="while it loads: the kernel killed it for lack of memory") as e:
            await host.switch("big", bundle(tmp_path / "glutton", "big"))
        assert "MiB are free now" in e.value.hint
        await host.switch("small", bundle(tmp_path / "small", "small"))


async def test_a_worker_that_ends_while_it_loads_tells_its_status(tmp_path: Path) -> None:
    async with child() as worker:
        with pytest.raises(Refused, match="it ended with status 9"):
            await Hosting({"language": worker}).switch("bad", bundle(tmp_path / "poison", "bad"))


async def test_a_model_that_does_not_fit_says_both_sizes_and_is_not_quarantined_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hosting, "available_memory", lambda: 100 * MIB)
    async with child() as worker:
        host = Hosting({"language": worker})
        with pytest.raises(Untried, match="m 1 needs 200 MiB of memory and 100 MiB are free") as e:
            await host.switch("m", bundle(tmp_path / "m", "m", memory_mb=200))
        assert "MemoryMax" in e.value.hint
        await host.switch("m", bundle(tmp_path / "m", "m", memory_mb=99))
        other = bundle(tmp_path / "other", "m", memory_mb=200)
        await host.switch("m", msgspec.structs.replace(other, id="1" * 64))
        with pytest.raises(Refused, match="says wrongly how it is served"):
            await host.switch("n", bundle(tmp_path / "n", "n", queue=0))
