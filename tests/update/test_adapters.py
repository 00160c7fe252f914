"""An adapter and its base model: installed in any order, switched apart, never together with another base."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.update.machine import Target
from edge_agent.update.slots import Installed
from edge_agent.update.trial import Activation, Figures
from edge_agent.wire.bundle import BundleKind, FileEntry, Manifest, content_digest
from edge_agent.wire.messages import decode
from tests.update.plant_hub import PlantHub, until
from tests.update.test_update import Device, device


@pytest.fixture
def hub() -> Iterator[PlantHub]:
    with PlantHub().serving() as hub:
        yield hub


def digest(data: bytes) -> str:
    return content_digest([FileEntry("model.bin", len(data), hashlib.sha256(data).hexdigest())])


def adapter(hub: PlantHub, version: str, base: bytes, scratch: Path, data: bytes = b"good adapter") -> Target:
    """`all-tools`, which sorts before the base model `net`."""
    files, meta = {"model.bin": data + version.encode()}, {"base": "net", "base_digest": digest(base)}
    return hub.publish("all-tools", version, files, scratch, kind=BundleKind.ADAPTER, meta=meta)


async def desire(it: Device, **targets: Target) -> None:
    await it.directed({name.replace("_", "-"): target for name, target in targets.items()})


async def test_an_adapter_waits_for_its_base_is_never_quarantined_for_it_and_follows(
    hub: PlantHub, tmp_path: Path
) -> None:
    one, two = b"good one", b"good two"
    first, second = (hub.publish("net", v, {"model.bin": data}, tmp_path) for v, data in (("1", one), ("2", two)))
    tools = adapter(hub, "a", one, tmp_path)
    async with device(tmp_path / "state", hub, retry_s=(0.01, 60.0)) as it:
        await desire(it, all_tools=tools)
        await until(lambda: bool(it.reports) and it.last.state == "failed" and it.running == [])
        assert "is for net" in it.last.error
        assert "assign it too" in it.last.error
        assert not hub.fetched()
        await desire(it, all_tools=tools, net=first)
        await until(lambda: it.running == ["1", "a"] and it.last.state == "committed")
        assert it.last.kind == "adapter"
        await desire(it, all_tools=tools, net=second)
        await until(lambda: it.running == ["1", "a", "2"] and it.last.state == "failed")
        assert (it.last.target, it.last.version) == ("a", "a")
        assert f"installed is 2 of {digest(two)[:12]}" in it.last.error
        fitting = adapter(hub, "b", two, tmp_path)
        await desire(it, all_tools=fitting, net=second)
        await until(lambda: it.running[3:] == ["b"])
        await desire(it, all_tools=fitting, net=hub.publish("net", "3", {"model.bin": two}, tmp_path))
        await until(lambda: it.running[4:] == ["3", "b"])  # the same bytes under another version: reloaded with it
        await desire(it, all_tools=tools, net=first)
        await until(lambda: it.running[-2:] == ["1", "a"])
    hub.url = "http://127.0.0.1:9"
    async with device(tmp_path / "state", hub) as it:  # after a restart with no hub: the base before its adapter
        await until(lambda: len(it.reports) == 2)
        assert it.running == ["1", "a"]
        assert [report.state for report in it.reports] == ["committed", "committed"]


async def test_a_worse_adapter_is_quarantined_and_the_one_before_goes_on(hub: PlantHub, tmp_path: Path) -> None:
    one = b"good one"
    base = hub.publish("net", "1", {"model.bin": one}, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await desire(it, net=base, all_tools=adapter(hub, "a", one, tmp_path))
        await until(lambda: it.running == ["1", "a"])
        worse = adapter(hub, "b", one, tmp_path, b"bad")
        await desire(it, net=base, all_tools=worse)
        await until(lambda: it.last.state == "quarantined")
        assert (it.last.version, it.running) == ("a", ["1", "a"])
        it.refuses = {"c"}
        await desire(it, net=base, all_tools=adapter(hub, "c", one, tmp_path))
        await until(lambda: (it.last.target, it.last.state, it.last.version) == ("c", "quarantined", "a"))
        assert "does not start" in it.last.error
        assert it.running == ["1", "a"]


async def test_a_base_that_is_refused_gives_way_and_takes_its_adapter_along(hub: PlantHub, tmp_path: Path) -> None:
    one = b"good one"
    base, tools = hub.publish("net", "1", {"model.bin": one}, tmp_path), adapter(hub, "a", one, tmp_path)
    async with device(tmp_path / "state", hub) as it:
        await desire(it, net=base, all_tools=tools)
        await until(lambda: it.running == ["1", "a"])
        it.refuses = {"2"}
        await desire(it, net=hub.publish("net", "2", {"model.bin": b"good two"}, tmp_path), all_tools=tools)
        await until(lambda: it.running == ["1", "a", "a"])


async def test_waiting_for_the_base_uses_up_no_trials(hub: PlantHub, tmp_path: Path) -> None:
    class Once:
        async def probe(self, name: str, candidate: Installed, activation: Activation) -> Figures:
            tried.append(candidate.manifest.version)
            return Figures("probe")

    one, tried = b"good one", list[str]()
    tools = adapter(hub, "a", one, tmp_path)
    async with device(tmp_path / "state", hub, prober=Once(), retry_s=(0.001, 0.001)) as it:
        await desire(it, all_tools=tools)
        await until(lambda: sum(report.state == "failed" for report in it.reports) > 8)
        await desire(it, all_tools=tools, net=hub.publish("net", "1", {"model.bin": one}, tmp_path))
        await until(lambda: it.running == ["1", "a"])
    assert tried == ["1", "a"]


@pytest.mark.parametrize("meta", [{}, {"base": "net"}, {"base": "net", "base_digest": "x"}, {"base_digest": "0" * 64}])
def test_an_adapter_names_its_base(meta: dict[str, Any]) -> None:
    entry = FileEntry("adapter.npz", 1, "0" * 64)
    with pytest.raises(ValueError, match="names no base"):
        Manifest("tools", "1", BundleKind.ADAPTER, [entry], meta=meta)
    raw = msgspec.json.encode({"name": "tools", "version": "1", "kind": "adapter", "files": [entry], "meta": meta})
    with pytest.raises(Exception, match="names no base"):
        decode(Manifest, raw)
    assert Manifest("net", "1", BundleKind.LLM, [entry], meta=meta).base is None
