"""An MCP server for the tests: one tool answers, one never does, one fails, one has a schema nobody can hold."""

import os
import time

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("slow")


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
    server.run()
