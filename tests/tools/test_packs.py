"""Packs by their short names, from a device's settings to a runner's process, and in the check of workflows."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

from edge_agent import config
from edge_agent.agent.ports import RunnerTools
from edge_agent.agent.schedule import Entry, Schedule
from edge_agent.agent.tool import Check, Param, Tool, declare
from edge_agent.agent.toolrunner import load
from edge_agent.agent.workflow import read, sample
from edge_agent.agent.workflow_check import runs_as
from edge_agent.agent.workflow_simulate import Told, simulate
from edge_agent.errors import Fatal, Refused
from edge_agent.serving.supervisor import WorkerProcess
from edge_agent.wire.grants import Subject
from tests.e2e.daemon_process import DaemonProcess, until
from tests.tools.test_declarations import Valve
from tools import settings

ROOT = Path(__file__).parents[2]


def test_every_pack_that_is_installed_is_documented_and_loads_or_says_what_it_needs(tmp_path: Path) -> None:
    page, found = (ROOT / "docs" / "tools.md").read_text(), entry_points(group="outrider.tools")
    assert {"sim", "knowledge", "mcp", "history", "http", "schedule", "shell", "vision", "modbus", "gpio", "mqtt"} == {
        point.name for point in found
    }
    for point in found:
        assert re.search(rf"^\| `{point.name}` \|", page, re.MULTILINE), f"docs/tools.md has no row for {point.name}"
        if point.name in ("mcp", "http", "vision", "modbus", "gpio", "mqtt"):
            with pytest.raises(Fatal, match=f"the pack {point.name} needs a file: .*{point.name}.toml"):
                load(point.name, tmp_path / point.name, {})
        else:
            assert load(point.name, tmp_path / point.name, {})


def test_several_packs_load_by_name_beside_import_paths_each_with_its_options(tmp_path: Path) -> None:
    made = load("knowledge,tests.agent.plant,history", tmp_path, {"knowledge.days": "3", "plant.only": "jam"})
    assert [tool.spec.name for tool in made][4:7] == ["list_sources", "jam", "list_history"]
    with pytest.raises(Fatal, match="knowledge does not load: ValueError: the memory has no option only"):
        load("knowledge,tests.agent.plant", tmp_path, {"only": "jam"})


def test_a_name_that_is_none_says_what_is_installed(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match=r"tool pack htp does not load.*installed packs: gpio, history, http"):
        load("htp", tmp_path, {})


def test_a_devices_settings_name_its_packs(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(f'state = "{tmp_path}"\npacks = ["history", "http"]\n')
    assert config.load({}, file).packs == ["history", "http"]
    file.write_text(f'state = "{tmp_path}"\npacks = "history"\n')
    with pytest.raises(Refused, match=r"Expected `array`, got `str` - at `\$.packs`"):
        config.load({}, file)


async def test_a_runners_process_serves_packs_by_name(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "edge_agent.agent.toolrunner", "--pack", "history,schedule", "--state", str(tmp_path)]
    worker = WorkerProcess("tools", argv)
    running = asyncio.create_task(worker.run())
    tools = RunnerTools(worker)
    names = [spec.name for spec in await tools.specs()]
    assert names[:2] == ["list_history", "read_history"]
    who = {"name": "ada", "roles": ["operator"], "issued_at": 1.0}
    text = {"text": "look", "in_minutes": 5, "key": "k", "subject": who}
    made = await tools.call("schedule_request", text, 10)
    assert (await tools.call("list_schedule", {"subject": who}, 10))["scheduled"] == [made]
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running


FLOW = """
workflow: open
version: "1"
run_as: [admin]
steps:
  - {id: a, tool: set_valve, args: {valve: 1, percent: 40}}
  - {id: b, tool: set_valve, args: {valve: 2, percent: 50}, depends_on: [a]}
"""


async def test_a_simulation_is_held_up_by_no_rate_and_no_reading_back() -> None:
    check = Check("read_valve", {"valve": "$valve"}, equals="$percent")
    specs = [tool.spec for tool in Valve().tools(rate="1/day", check=check)]
    flow, _ = read(FLOW)
    told = await simulate(flow, FLOW, specs, Told(), runs_as(flow, 1.0), lambda *_: True)
    assert (told["state"], told["error"]) == ("succeeded", "")


@pytest.mark.parametrize(
    ("param", "value"),
    [
        (Param("x", "float", low=0.8, high=1.0), 0.8),
        (Param("x", "float", low=0.0, high=1.0), 0.5),
        (
            Param("r", "dict", fields=[Param("value", "float", unit="°C"), Param("unit", "str")]),
            {"value": 1.5, "unit": "°C"},
        ),
    ],
)
def test_a_sample_keeps_what_is_declared(param: Param, value: Any) -> None:
    assert sample(param) == value


def blocks(kind: str) -> list[str]:
    """Code of a language in the page on tools."""
    return re.findall(rf"^```{kind}\n(.*?)^```", (ROOT / "docs" / "tools.md").read_text(), re.MULTILINE | re.DOTALL)


def test_the_documented_files_are_read_by_their_packs(tmp_path: Path) -> None:
    found = dict(re.match(r"# tools/(\w+)\.toml\n(.*)", text, re.DOTALL).groups() for text in blocks("toml")[1:])  # type: ignore[union-attr]
    assert set(found) == {"history", "http", "schedule", "shell", "vision", "modbus", "gpio", "mqtt"}
    for name, text in found.items():
        (tmp_path / f"{name}.toml").write_text(text)
        kind = import_module("tools.vision.pack" if name == "vision" else f"tools.{name}").Settings
        assert settings.read(name, tmp_path, {}, kind)
    (tmp_path / "agent.toml").write_text(f'state = "x"\n{blocks("toml")[0]}')
    assert config.load({}, tmp_path / "agent.toml").packs[-1] == "acme_press.tools"


def test_the_documented_pack_loads_and_is_held_to_what_it_declares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "documented_pack.py").write_text(blocks("python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    made = load("documented_pack", tmp_path, {})
    assert [(tool.spec.name, tool.spec.risk, tool.spec.permission) for tool in made] == [
        ("read_valve", "read", ""), ("set_valve", "act", "open:valve"),
    ]  # fmt: skip
    assert made[1].function(valve=1, percent=40.0) == {"value": 40.0, "before": 0.0}


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    made = DaemonProcess(tmp_path / "press-1")
    yield made
    made.end(signal.SIGKILL)


def test_a_daemon_keeps_a_history_starts_what_is_due_and_holds_a_rate_over_a_restart(
    daemon: DaemonProcess, tmp_path: Path
) -> None:
    file = tmp_path / "etc" / "agent.toml"
    (file.parent / "tools").mkdir(parents=True)
    file.write_text('packs = ["history", "tests.e2e.daemon_pack", "schedule", "tests.tools.test_packs:rated"]\n')
    (file.parent / "tools" / "schedule.toml").write_text("least_every_minutes = 7\n")
    daemon.start("--config", str(file), TOOL_BELL="loudly", OTHER_SECRET="x")

    def ask(tool: str, **args: Any) -> Any:
        answer = daemon.ask("POST", f"/v1/tools/{tool}", {"args": args})
        told = answer.json()
        return told["result"] if answer.is_success else f"{told['detail']} {told['hint']}"

    def measured() -> Any:
        found = ask("read_history", series="read_sensor/speed/1")
        return found if isinstance(found, dict) and found["count"] >= 2 else None

    assert until("two samples", measured)["mean"] == 7.5
    assert "every 5 minutes is too often: 7 at least" in ask("schedule_request", text="look", every_minutes=5)
    assert ask("schedule_request", text="look", every_minutes=10)["what"] == "look"
    entry = Entry("later-now", Subject("ada", ["admin"], time.time()), time.time() - 1, text="look now")
    Schedule(daemon.state / "tools" / "schedule.db").add(entry)
    until("the task", lambda: "look now" in daemon.ask("GET", "/v1/tasks").text)
    assert [each["what"] for each in ask("list_schedule")["scheduled"]] == ["look"]
    assert ask("ring") == "rung loudly None", "of the environment a pack sees what is meant for it"
    daemon.end(signal.SIGKILL)
    daemon.start("--config", str(file))
    assert "ring may be called 1/day, and was" in ask("ring")


def rated(state: Path, options: dict[str, str]) -> list[Tool]:
    """A pack whose tool may be called once a day."""

    def ring() -> str:
        """Ring the bell."""
        return f"rung {os.environ.get('TOOL_BELL')} {os.environ.get('OTHER_SECRET')}"

    return [declare(ring, risk="act", rate="1/day")]
