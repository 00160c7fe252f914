"""An MCP server for the tests: one tool answers, one never does, one fails, one has a schema nobody can hold.

With a port as its argument it serves streamable HTTP there, to those whose token is TOKEN.
"""

import os
import sys
import time

import anyio
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

TOKEN = "the-right-one"


class Verifier:
    """mcp's TokenVerifier."""

    async def verify_token(self, token: str) -> AccessToken | None:
        return AccessToken(token=token, client_id="device", scopes=[]) if token == TOKEN else None


def made() -> MCPServer:
    if len(sys.argv) < 2:
        return MCPServer("slow")
    url = f"http://127.0.0.1:{sys.argv[1]}"
    settings = {"issuer_url": url, "resource_server_url": url, "validate_token_resource": False}
    return MCPServer("slow", auth=AuthSettings.model_validate(settings), token_verifier=Verifier())


server = made()


@server.tool()
def pid() -> int:
    """The process."""
    return os.getpid()


@server.tool()
def hang() -> str:
    """Never answers."""
    time.sleep(600)
    return ""


@server.tool()
async def late() -> str:
    """Answers after six seconds."""
    await anyio.sleep(6)
    return "at last"


@server.tool()
def fail() -> str:
    """Fails."""
    raise ToolError("the belt is torn")


@server.tool()
def odd(value: int | str | list[int]) -> str:
    """Takes anything."""
    return str(value)


@server.tool(description="long " * 1000)
def long() -> str:
    return ""


if __name__ == "__main__":
    if len(sys.argv) < 2:
        server.run()
    else:
        server.run("streamable-http", port=int(sys.argv[1]))
