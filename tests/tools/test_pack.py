"""The plant's tools as an agent sees them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edge_agent.agent.tool import Context, Tool, ToolError
from edge_agent.agent.toolrunner import load
from tools.sim.camera import truth
from tools.sim.pack import pack

START = 1_800_000_000.0
Call = Callable[..., Any]


def caller(tools: list[Tool], ctx: Context) -> Call:
    functions = {tool.spec.name: tool.function for tool in tools}
    return lambda name, **args: functions[name](**args, ctx=ctx)


@pytest.fixture
def call(tmp_path: Path, bare_ctx: Context) -> Call:
    return caller(pack(tmp_path, {"seed": "7", "start": str(START)}), bare_ctx)


def test_the_catalogue_is_what_the_agent_is_told(tmp_path: Path) -> None:
    specs = {tool.spec.name: tool.spec for tool in load("tools.sim.pack", tmp_path, {"seed": "7"})}
    assert {name: spec.risk for name, spec in specs.items()} == {
        "read_sensor": "read",
        "set_speed": "act",
        "stop_line": "act",
        "start_line": "act",
        "read_label": "read",
        "list_alarms": "read",
    }
    for spec in specs.values():
        assert spec.idempotent
        for _, args in spec.examples:
            assert args.keys() == {param.name for param in spec.params}
            for param in spec.params:
                value = args[param.name]
                assert value in param.choices if param.kind == "choice" else param.low <= value <= param.high


def test_sensors_answer_with_units_in_small_json(call: Call) -> None:
    for sensor, unit in {"vibration": "mm/s", "temperature": "°C", "speed": "%", "wear": "%"}.items():
        result = call("read_sensor", sensor=sensor, line=2)
        assert result.keys() == {"line", "sensor", "value", "unit"}
        assert result["unit"] == unit
        assert len(msgspec.json.encode(result)) < 100


def test_set_speed_is_reached_after_the_ramp_and_twice_is_once(call: Call, bare_ctx: Any) -> None:
    first = call("set_speed", line=2, percent=90)
    assert first == {"line": 2, "running": True, "target_percent": 90}
    assert call("set_speed", line=2, percent=90) == first
    bare_ctx.time += 60
    assert call("read_sensor", sensor="speed", line=2)["value"] == 90


def test_a_stopped_line_refuses_a_speed_and_runs_again_at_its_last_one(call: Call, bare_ctx: Any) -> None:
    call("set_speed", line=1, percent=66)
    assert call("stop_line", line=1)["running"] is False
    with pytest.raises(ToolError, match="line 1 is stopped; start it first"):
        call("set_speed", line=1, percent=20)
    bare_ctx.time += 60
    assert call("read_sensor", sensor="speed", line=1)["value"] == 0
    call("start_line", line=1)
    bare_ctx.time += 60
    assert call("read_sensor", sensor="speed", line=1)["value"] == 66


def test_alarms_come_with_limits_and_a_line_that_is_not_there_is_named(call: Call) -> None:
    (alarm,) = call("list_alarms")["alarms"]
    assert (alarm["sensor"], alarm["limit"], alarm["unit"]) == ("wear", 80.0, "%")
    with pytest.raises(ToolError, match="there is no line 9"):
        call("stop_line", line=9)


def test_a_label_is_read_from_the_pixels_of_the_product_that_is_there(tmp_path: Path, ctx: Any) -> None:
    call = caller(pack(tmp_path, {"seed": "7", "start": str(START)}), ctx)
    seen = set()
    for camera in (1, 2, 3):
        for _ in range(3):
            ctx.time += 61
            result = call("read_label", camera=camera)
            want = [line.split(" ")[1] for line in truth(7, camera, result["product"])]
            assert [result["lot"], result["serial"], result["expiry"]] == want
            seen.add(result["serial"])
    assert len(seen) == 9


def test_without_the_networks_a_label_is_an_ordinary_failure(call: Call) -> None:
    with pytest.raises(ToolError, match="ppocr-det is not installed"):
        call("read_label", camera=1)


@pytest.mark.parametrize(("options", "why"), [({"sed": "1"}, "no option sed"), ({"seed": "x"}, "seed is an integer")])
def test_a_wrong_option_is_an_error_that_names_it(tmp_path: Path, options: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        pack(tmp_path, options)
