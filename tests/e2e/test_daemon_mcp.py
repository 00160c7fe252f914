"""The device's tools over MCP, by the SDK's own client: the caller's token decides, on both transports."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import httpx2
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client

from tests.e2e.daemon_process import ROOT, DaemonProcess, free_port, until

GUARD = """
[[interlocks]]
name = "never-3"
tools = ["stamp"]
never = "args.text == 'evil'"
"""


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[DaemonProcess]:
    made = DaemonProcess(tmp_path / "press-1")
    (made.state / "policy.toml").write_text(GUARD)
    made.start()
    yield made
    made.end(signal.SIGKILL)


def serve(daemon: DaemonProcess, *more: str) -> list[str]:
    return ["-m", "edge_agent.cli", "mcp", "serve", "--api", daemon.url, *more]


@pytest.mark.slow
async def test_a_client_over_stdio_has_its_tools_and_meets_the_policy(daemon: DaemonProcess) -> None:
    argv = serve(daemon, "--token", daemon.token("operator"))
    async with Client(StdioServerParameters(command=sys.executable, args=argv, cwd=ROOT)) as client:
        tools = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert set(tools) == {"read_sensor", "stamp", "jam", "hang"}
        assert tools["read_sensor"].annotations is not None
        assert tools["read_sensor"].annotations.read_only_hint
        assert tools["read_sensor"].input_schema["required"] == ["sensor", "line"]
        result = await client.call_tool("read_sensor", {"sensor": "speed", "line": 1})
        assert result.structured_content == {"sensor": "speed", "line": 1, "value": 7.5}
        for args, told in (({"sensor": "speed", "line": 9}, "out of range"), ({"sensor": "x"}, "is one of")):
            refused = await client.call_tool("read_sensor", args)
            assert refused.is_error
            assert told in refused.content[0].text  # type: ignore[union-attr]
        held = await client.call_tool("stamp", {"text": "evil"})
        assert "the interlock never-3 forbids it" in held.content[0].text  # type: ignore[union-attr]


@pytest.fixture
def served(daemon: DaemonProcess) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/mcp"
    process = subprocess.Popen([sys.executable, *serve(daemon, "--http", f"127.0.0.1:{port}")], cwd=ROOT)
    until("MCP over HTTP", lambda: _answers(url), 60)
    yield url
    process.terminate()
    process.wait(20)


@pytest.mark.slow
async def test_over_http_each_request_has_its_own_token_and_none_gets_nothing(
    daemon: DaemonProcess, served: str
) -> None:
    for headers in ({}, {"Authorization": "Bearer forged"}):
        async with httpx.AsyncClient(headers=headers) as nobody:
            assert (await nobody.post(served, json={})).status_code == 401
    for role in ("operator", "auditor"):
        headers = {"Authorization": f"Bearer {daemon.token(role)}"}
        async with (
            httpx2.AsyncClient(headers=headers) as http,
            Client(streamable_http_client(served, http_client=http)) as client,
        ):
            names = {tool.name for tool in (await client.list_tools()).tools}
            assert names == {"read_sensor", "jam", "hang"} | ({"stamp"} if role == "operator" else set())
            done = await client.call_tool("stamp", {"text": "x"})
            assert done.is_error == (role == "auditor")


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).status_code > 0
    except httpx.TransportError:
        return False
