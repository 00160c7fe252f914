"""What speaks for the agent: adapters beside their base, set aside with it, chosen by task or by configuration."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.agent.confidence import Calibration
from edge_agent.agent.decide import Speaker
from edge_agent.api.metrics import Metrics
from edge_agent.config import Route, Settings
from edge_agent.engines.base import Generate
from edge_agent.errors import Refused, Retry
from edge_agent.hosting import Hosting
from edge_agent.serving.frames import Served
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.update.slots import Installed
from edge_agent.wire.bundle import BundleKind, Manifest, scan
from tests.serving.test_supervisor import child, until


@asynccontextmanager
async def hosting(*chosen: str) -> AsyncIterator[tuple[Hosting, WorkerProcess]]:
    async with child() as worker:
        yield Hosting({"language": worker}, (), *chosen), worker


def installed(folder: Path, name: str, version: str, base: Installed | None = None, **meta: Any) -> Installed:
    """A bundle in `folder/name-version`, an adapter when it has a base."""
    place = folder / f"{name}-{version}"
    place.mkdir()
    (place / "file").write_text(version)
    if base is not None:
        meta = {"base": base.manifest.name, "base_digest": base.digest, "task": "tools", "prompt": "signatures"} | meta
    kind = BundleKind.LLM if base is None else BundleKind.ADAPTER
    return Installed(f"{name}{version}".ljust(64, "0"), place, Manifest(name, version, kind, scan(place), meta=meta))


async def say(host: Hosting) -> str:
    return (await host.generate(Generate("", "ADAPTERS", adapter=host.speaker().adapter), 10)).text.strip()


async def test_a_switch_leaves_one_version_loaded_and_a_new_base_none(tmp_path: Path) -> None:
    base, other = installed(tmp_path, "lm", "1"), installed(tmp_path, "lm", "2")
    one, two = (installed(tmp_path, "tools", version, base) for version in "12")
    async with hosting() as (host, worker):
        assert host.speaker() == Speaker()
        with pytest.raises(Retry, match="does not run here"):
            await host.switch("tools", one)
        await host.switch("lm", base)
        assert host.speaker() == Speaker(base.digest, model="lm")
        await host.switch("tools", one)
        spoken = host.speaker()
        assert (spoken.digest, spoken.title, spoken.shots) == (base.digest, "tools 1", False)
        await host.switch("tools", two)
        assert await say(host) == "tools-2 of 1"
        with pytest.raises(Retry, match="switched meanwhile"):
            await host.generate(Generate("", "x", adapter=spoken.adapter), 10)
        await host.switch("tools", two)
        assert worker.starts == 1

        bad = Installed(other.id, tmp_path / "absent", other.manifest)
        with pytest.raises(Refused, match="install it"):
            await host.switch("lm", bad)
        assert await say(host) == "tools-2 of 1"
        await host.switch("lm", other)
        assert host.speaker() == Speaker(other.digest, model="lm")
        assert await say(host) == "- of 0"
        with pytest.raises(Retry, match="does not run here"):
            await host.switch("tools", two)


async def test_the_task_or_the_configuration_chooses_the_adapter(tmp_path: Path) -> None:
    base = installed(tmp_path, "lm", "1")
    bundles = [
        installed(tmp_path, "chat", "1", base, task="chat", prompt=""),
        installed(tmp_path, "tools-b", "1", base),
        installed(tmp_path, "tools-a", "1", base),
    ]
    for chosen, title in (("", "tools-a 1"), ("none", ""), ("chat", "chat 1")):
        async with hosting(chosen) as (host, _):
            for bundle in (base, *bundles):
                await host.switch(bundle.manifest.name, bundle)
            assert host.speaker().title == title
            assert host.speaker().shots == (title != "tools-a 1")
    async with hosting("french") as (host, _):
        await host.switch("lm", base)
        with pytest.raises(Retry, match="french is not installed for lm"):
            host.speaker()


async def test_the_order_says_who_is_asked_and_the_hub_is_left_out_while_it_is_away(tmp_path: Path) -> None:
    one, two = installed(tmp_path, "one", "1"), installed(tmp_path, "two", "1")
    tools = installed(tmp_path, "tools", "1", two, calibration={"a": 2.0, "b": 1.0, "n": 9, "bins": []})
    order = [Route("two", cost=0.5, latency_s=9.0), Route("gone"), Route("one", connected=True)]
    async with child() as worker:
        host = Hosting({"language": worker}, order)
        assert host.speakers() == [Speaker()]
        with pytest.raises(Retry, match="two is not installed"):
            await host.generate(Generate("", "x"), 10)
        for bundle in (one, two, tools):
            await host.switch(bundle.manifest.name, bundle)
        first, second = host.speakers()
        assert (first.model, first.title, first.calibration) == ("two", "tools 1", Calibration(2.0, 1.0))
        assert (first.cost, first.latency_s) == (0.5, 9.0)
        assert second == Speaker(one.digest, model="one")
        host.connected = lambda: False
        assert host.speakers() == [first]
        said = await host.generate(Generate("", "ADAPTERS", adapter=first.adapter, model="two"), 10)
        assert said.text.strip() == "tools-1 of 1"
    assert Settings(tmp_path, models=["a", Route("b", 1.0)], model="c").order() == [Route("a"), Route("b", 1.0)]
    assert Settings(tmp_path, model="c").order() == [Route("c")]


async def test_an_adapter_that_does_not_come_back_after_a_crash_is_not_spoken_with(tmp_path: Path) -> None:
    base = installed(tmp_path, "lm", "1")
    tools = installed(tmp_path, "tools", "1", base)
    report = {"tools": {"state": "committed", "digest": tools.digest}}
    async with hosting() as (host, worker):
        await host.switch("lm", base)
        await host.switch("tools", tools)
        shown = host.show(report)["tools"]
        assert (shown["state"], shown["base"], shown["engine"]) == ("committed", "lm", "echo")
        (tools.folder / "absent").touch()
        with pytest.raises(Retry, match="died"):
            await host.generate(Generate("", "CRASH"), 10)
        await until(lambda: worker.starts == 2 and not worker.adapters)
        assert await say(host) == "- of 0"
        assert host.speaker() == Speaker(base.digest, model="lm")
        assert host.show(report)["tools"]["state"] == "loading"


async def test_a_bad_adapter_is_refused_and_the_one_before_speaks_on(tmp_path: Path) -> None:
    base = installed(tmp_path, "lm", "1")
    tools, absent, poison = (installed(tmp_path, "tools", version, base) for version in "123")
    (absent.folder / "absent").touch()
    poison = Installed(poison.id, poison.folder.rename(tmp_path / "poison"), poison.manifest)
    async with hosting() as (host, worker):
        await host.switch("lm", base)
        await host.switch("tools", tools)
        with pytest.raises(Refused, match="install it"):
            await host.switch("tools", absent)
        with pytest.raises(Refused, match="kills its worker while it loads"):
            await host.switch("tools", poison)
        assert host.speaker().title == "tools 1"
        async with asyncio.timeout(15):
            assert await say(host) == "tools-1 of 1"
        assert worker.starts == 2


async def test_a_bundle_says_how_it_is_served_and_a_wrong_word_is_named(tmp_path: Path) -> None:
    base = installed(tmp_path, "lm", "1")
    async with hosting() as (host, _):
        with pytest.raises(Refused, match="max_bach"):
            await host.switch("lm", Installed("x" * 64, base.folder, served(base.manifest, max_bach=2)))
        with pytest.raises(Refused, match="at least 1"):
            await host.switch("lm", Installed("x" * 64, base.folder, served(base.manifest, max_batch=0)))
        await host.switch("lm", Installed("x" * 64, base.folder, served(base.manifest, max_batch=2)))
        assert host.running["lm"].manifest.meta["serving"] == {"max_batch": 2}


async def test_where_memory_is_short_a_bad_version_still_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, other = installed(tmp_path, "lm", "1"), installed(tmp_path, "lm", "2")
    async with hosting() as (host, worker):
        await host.switch("lm", base)
        monkeypatch.setattr("edge_agent.hosting.available_memory", lambda: 0)
        with pytest.raises(Refused, match="install it"):
            await host.switch("lm", Installed(other.id, tmp_path / "absent", other.manifest))
        assert host.speaker().digest == base.digest
        assert await say(host) == "- of 0"
        await host.switch("lm", other)
        assert (host.speaker().digest, worker.starts) == (other.digest, 1)


def served(manifest: Manifest, **serving: Any) -> Manifest:
    return msgspec.structs.replace(manifest, meta={"serving": serving})


async def test_a_persons_task_goes_before_a_job_and_both_before_a_chat_that_came_earlier(tmp_path: Path) -> None:
    base, said = installed(tmp_path, "lm", "1"), list[str]()

    async def ask(name: str, priority: int) -> None:
        await host.generate(Generate("", name, priority=priority), 20)
        said.append(name)

    async with hosting() as (host, _):
        await host.switch("lm", base)
        tasks = []
        for name, priority in (("FOREVER", 3), ("chat", 2), ("job", 1), ("person", 0)):
            tasks.append(asyncio.create_task(ask(name, priority)))
            await asyncio.sleep(0.05)
        tasks[0].cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert said == ["person", "job", "chat"]


async def test_an_engine_that_is_built_meanwhile_is_shown_and_counted(tmp_path: Path) -> None:
    base = installed(tmp_path, "lm", "1")
    async with hosting() as (host, worker):
        await host.switch("lm", base)
        reported = {"lm": {"state": "committed", "digest": base.digest}}
        assert "engine_phase" not in host.show(reported)["lm"]
        worker.infos["lm"] = msgspec.structs.replace(worker.infos["lm"], extra={"passed_over": {"cuda": "no GPU"}})
        phase = {"engine_phase": "is being built", "engine_done": 3, "engine_of": 9, "engine_peak_mb": 120.0}
        worker.served = {"lm": Served(engine="e", provider="p", **phase)}  # type: ignore[arg-type]
        shown = host.show(reported)["lm"]
        assert phase.items() <= shown.items()
        assert (shown["engine"], shown["passed_over"]) == ("e", {"cuda": "no GPU"})
        told = Metrics().text({"language": worker}, {})
        assert 'outrider_worker_served{model="lm",what="engine_peak_mb"} 120' in told
        assert 'what="engine_done"} 3' in told
