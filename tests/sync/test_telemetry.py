"""A round of samples: one commit, and what a device knows of itself is kept whatever its tools do."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.agent.tool import ToolError, ToolSpec
from edge_agent.errors import Retry
from edge_agent.store import Store
from edge_agent.sync.outbox import Outbox
from edge_agent.telemetry import Telemetry
from tests.sync.brokers import until
from tools.sim.pack import pack


class Tools:
    """The plant's declarations; `trouble` is what happens in place of an answer."""

    def __init__(self, folder: Path, trouble: Exception | None = None, at: str = "call") -> None:
        self.known, self.trouble, self.at = [tool.spec for tool in pack(folder / "plant", {})], trouble, at

    async def specs(self) -> Sequence[ToolSpec]:
        if self.trouble and self.at == "specs":
            raise self.trouble
        return self.known

    async def read(self, calls: Sequence[tuple[str, dict[str, Any]]], timeout_s: float) -> list[Any]:
        return [self.trouble or {"of": name, **args} for name, args in calls]


async def sampled(outbox: Outbox, tools: Tools, folder: Path, said: Sequence[Any] | None = None) -> None:
    calls = [f'read_sensor(sensor="speed", line={line})' for line in (1, 2, 3)]
    last = outbox.last_seq
    task = asyncio.create_task(Telemetry(tools, outbox, folder, 60, 60, calls).run())
    await until(lambda: outbox.last_seq > last and said != [])
    task.cancel()
    await asyncio.wait([task])


async def test_a_round_of_samples_is_one_commit(outbox: Outbox, store: Store, tmp_path: Path) -> None:
    await outbox.append("note", {})  # the first commit of a minute also writes down the time
    before = await store.read(lambda db: db.total_changes)
    await sampled(outbox, Tools(tmp_path), tmp_path)
    assert outbox.last_seq == 5
    assert await store.read(lambda db: db.total_changes) - before == 1  # a block


async def test_a_sample_that_cannot_be_a_record_is_told_and_keeps_no_other_back(
    outbox: Outbox, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Long(Tools):
        async def read(self, calls: Sequence[tuple[str, dict[str, Any]]], timeout_s: float) -> list[Any]:
            return [{"line": args["line"], "x": "y" * (70_000 if args["line"] == 2 else 1)} for _, args in calls]

    await sampled(outbox, Long(tmp_path), tmp_path, caplog.records)
    kept = await outbox.batch(0)
    assert kept is not None
    assert [msgspec.json.decode(line)["body"].get("result", {}).get("line") for line in kept.lines] == [None, 1, 3]
    assert ["line=2" in each and "at most 65536" in each for each in caplog.messages] == [True]


@pytest.mark.parametrize(("trouble", "at"), [(ToolError("no"), "call"), (Retry("not up"), "specs")])
async def test_health_is_kept_when_the_tools_fail(outbox: Outbox, tmp_path: Path, trouble: Exception, at: str) -> None:
    await sampled(outbox, Tools(tmp_path, trouble, at), tmp_path)
    part = await outbox.batch(0)
    assert part is not None
    assert [b'"health"' in line for line in part.lines] == [True]


async def test_a_reading_that_is_no_record_leaves_the_others(outbox: Outbox, tmp_path: Path) -> None:
    class Large(Tools):
        async def read(self, calls: Sequence[tuple[str, dict[str, Any]]], timeout_s: float) -> list[Any]:
            return ["x" * 70_000, *(await super().read(calls, timeout_s))[1:]]

    await sampled(outbox, Large(tmp_path), tmp_path)
    assert outbox.last_seq == 3
