"""External MCP servers: what the file allows is a tool, and nothing else; one that hangs is ended."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path

import pytest

from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.tool import Tool, ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.errors import Fatal


def tools(tmp_path: Path, text: str) -> dict[str, Tool]:
    file = tmp_path / "servers.toml"
    file.write_text(text)
    found = load("tests.agent.plant,tools.mcp", tmp_path / "state", {"only": "jam", "mcp.config": str(file)})
    return {tool.spec.name: tool for tool in found[1:]}


def test_a_public_server_is_a_pack_whose_listed_tools_alone_are_there(tmp_path: Path) -> None:
    made = tools(
        tmp_path,
        f"[servers.time]\ncommand = [{sys.executable!r}, '-m', 'mcp_server_time', '--local-timezone', 'UTC']\n"
        "tools = { convert_time = 'read' }\ntimeout_s = 60\n",
    )
    assert list(made) == ["time_convert_time"]
    spec = made["time_convert_time"].spec
    assert (spec.risk, spec.idempotent, spec.returns) == ("read", True, None)
    given = {"source_timezone": "Europe/Berlin", "time": "12:00", "target_timezone": "Asia/Tokyo"}
    call = validate(Call(spec.name, given), [spec])
    result = made["time_convert_time"].function(**call.args)
    assert result["target"]["timezone"] == "Asia/Tokyo"
    assert result["time_difference"] in ("+7.0h", "+8.0h")
    with pytest.raises(CallError, match="needs the argument"):
        validate(Call(spec.name, {"time": "12:00"}), [spec])
    with pytest.raises(ToolError, match="timezone"):
        made["time_convert_time"].function(**given | {"target_timezone": "Nowhere/Land"})


def test_one_that_hangs_is_ended_with_its_process_and_started_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "outrider.mcp"):
        made = tools(
            tmp_path,
            f"[servers.slow]\ncommand = [{sys.executable!r}, {str(Path(__file__).with_name('mcp_slow.py'))!r}]\n"
            "tools = { pid = 'read', hang = 'act', fail = 'read', odd = 'read', long = 'read', gone = 'danger' }\n"
            "timeout_s = 3\n[servers.absent]\ncommand = ['/nonexistent/server']\ntools = { x = 'read' }\n",
        )
    assert list(made) == ["slow_pid", "slow_hang", "slow_fail"]
    assert (made["slow_hang"].spec.risk, made["slow_hang"].spec.idempotent) == ("act", False)
    for told in (
        "odd of slow is left out: anyOf",
        "long of slow is left out: its signature",
        "gone of slow is left out",
    ):
        assert told in caplog.text
    assert "no tools of absent" in caplog.text
    with pytest.raises(ToolError, match="the belt is torn"):
        made["slow_fail"].function()
    before = made["slow_pid"].function()["result"]
    began = time.monotonic()
    with pytest.raises(ToolError, match="did not answer within 3 s and was ended"):
        made["slow_hang"].function()
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(before, 0)
    assert made["slow_pid"].function()["result"] != before


def test_a_file_that_says_nothing_clear_loads_no_pack(tmp_path: Path) -> None:
    for text, told in (("[servers.a]\ntools = {}", "a command or a url"), ("[servers.a]\ncommand=['x']", "tools")):
        with pytest.raises(Fatal, match=told):
            tools(tmp_path, text)
