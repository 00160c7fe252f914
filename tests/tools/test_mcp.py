"""External MCP servers: what the file allows is a tool, and nothing else; one that hangs is ended."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_agent.agent.calls import Call, CallError, validate
from edge_agent.agent.tool import Tool, ToolError
from edge_agent.agent.toolrunner import load
from edge_agent.errors import Fatal

TOKEN = "the-right-one"  # of mcp_slow.py


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


@contextlib.contextmanager
def serving() -> Iterator[int]:
    """A server over streamable HTTP that asks for a token; its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = int(free.getsockname()[1])
    argv = [sys.executable, str(Path(__file__).with_name("mcp_slow.py")), str(port)]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            for _ in range(1000):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.02)
            yield port
        finally:
            process.kill()


def test_a_server_at_a_url_is_asked_with_its_token_and_not_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving() as port:
        text = f"[servers.far]\nurl = 'http://127.0.0.1:{port}/mcp'\ntoken_env = 'TOOL_FAR'\ntimeout_s = 15\n"
        text += "tools = { pid = 'read', fail = 'read', late = 'read' }\n"
        for token, told in (
            ("", "no tools of far: far: Refused: the variable TOOL_FAR is not set"),
            ("wrong", "it refuses the token (401): does TOOL_FAR"),
        ):
            monkeypatch.setenv("TOOL_FAR", token)
            with caplog.at_level(logging.ERROR, "outrider.mcp"):
                assert tools(tmp_path, text) == {}
            assert told in caplog.text
        monkeypatch.setenv("TOOL_FAR", TOKEN)
        made = tools(tmp_path, text)
        assert list(made) == ["far_pid", "far_fail", "far_late"]
        assert made["far_pid"].function()["result"] > 0
        with pytest.raises(ToolError, match="the belt is torn"):
            made["far_fail"].function()
        assert made["far_late"].function()["result"] == "at last", "the server's own time holds, not the client's"
    with pytest.raises(ToolError, match="far"):
        made["far_pid"].function()
