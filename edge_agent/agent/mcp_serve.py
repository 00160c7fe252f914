"""`outrider mcp serve`: the device's tools for MCP clients, over stdio or streamable HTTP.

Invariants: this is a process of its own beside the daemon, which it asks as any client of the local API does, with the
caller's own token: so grants, interlocks, approvals and the audit log are the daemon's, and nothing is decided here.
Over HTTP each request carries its token, which the daemon verifies first; over stdio the token is the process's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, Any

import httpx
import mcp_types as types
import msgspec
import typer
import uvicorn
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import AccessToken
from mcp.server.auth.settings import AuthSettings
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

from edge_agent.agent.chat import schema_of
from edge_agent.agent.prompt import result_text
from edge_agent.agent.tool import ToolSpec
from edge_agent.config import address
from edge_agent.errors import OutriderError, Refused, Retry
from edge_agent.sync.https import problem

CALL_S = 300.0
app = typer.Typer(no_args_is_help=True, help="The device's tools for MCP clients.")


class Device:
    """The local API of a device."""

    def __init__(self, api: str) -> None:
        base = api if "://" in api else f"http://{api}"
        self._client = httpx.AsyncClient(base_url=base, timeout=CALL_S)

    async def verify_token(self, token: str) -> AccessToken | None:
        """mcp's TokenVerifier."""
        try:
            await self.tools(token)
        except Refused:
            return None
        return AccessToken(token=token, client_id="outrider", scopes=[])

    async def tools(self, token: str) -> list[ToolSpec]:
        """Those the token's subject may use. Raises Refused, Retry."""
        return msgspec.json.decode(await self._ask("GET", "/v1/tools", token), type=list[ToolSpec])

    async def call(self, token: str, name: str, args: dict[str, Any]) -> Any:
        """The result. Raises Refused, Retry."""
        return msgspec.json.decode(await self._ask("POST", f"/v1/tools/{name}", token, {"args": args}))["result"]

    async def _ask(self, method: str, path: str, token: str, body: Any = None) -> bytes:
        try:
            answer = await self._client.request(method, path, json=body, headers={"Authorization": f"Bearer {token}"})
        except httpx.HTTPError as error:
            raise Retry(f"the device does not answer: {error}", "is `outrider agent` running there?") from error
        if answer.is_error:
            raise (Retry if answer.status_code in (429, 503) else Refused)(*problem(answer))
        return answer.content


def server(device: Device, token: Callable[[], str]) -> Server[Any]:
    """An MCP server whose tools are the device's; `token` is of the request that is served."""

    async def tools(_: Any, __: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=[_tool(spec) for spec in await device.tools(token())])

    async def call(_: Any, asked: types.CallToolRequestParams) -> types.CallToolResult:
        try:
            result = await device.call(token(), asked.name, asked.arguments or {})
        except OutriderError as error:
            return types.CallToolResult(content=[types.TextContent(text=str(error))], is_error=True)
        structured = result if isinstance(result, dict) else {"result": result}
        return types.CallToolResult(
            content=[types.TextContent(text=result_text(result))], structured_content=structured
        )

    return Server("outrider", on_list_tools=tools, on_call_tool=call)


def _tool(spec: ToolSpec) -> types.Tool:
    hints = types.ToolAnnotations(
        read_only_hint=spec.risk == "read", destructive_hint=spec.risk == "danger", idempotent_hint=spec.idempotent
    )
    schema = schema_of(spec.params)
    return types.Tool(name=spec.name, description=spec.description, input_schema=schema, annotations=hints)


@app.callback()
def _root() -> None:
    """The device's tools for MCP clients."""


@app.command()
def serve(
    api: Annotated[str, typer.Option(envvar="OUTRIDER_API", help="The device's local API.")] = "127.0.0.1:8471",
    token: Annotated[str, typer.Option(envvar="OUTRIDER_TOKEN", help="Access token, for stdio.")] = "",
    http: Annotated[str, typer.Option(help="HOST:PORT for streamable HTTP at /mcp, each request with its token.")] = "",
) -> None:
    """Serve until the client leaves (stdio) or for ever (--http)."""
    device = Device(api)
    if not http:
        if not token:
            raise Refused("there is no token", "--token or OUTRIDER_TOKEN: an access token from the hub's /v1/login")
        asyncio.run(_stdio(server(device, lambda: token)))
        return
    host, port = address(http)
    url = f"http://{http}"
    settings = {"issuer_url": url, "resource_server_url": url, "validate_token_resource": False}
    auth = AuthSettings.model_validate(settings)
    served = server(device, lambda: getattr(get_access_token(), "token", ""))
    site = served.streamable_http_app(
        json_response=True, stateless_http=True, host=host, auth=auth, token_verifier=device
    )
    uvicorn.run(site, host=host, port=port, log_level="warning", ws="none")


async def _stdio(served: Server[Any]) -> None:
    async with stdio_server() as (reads, writes):
        await served.run(reads, writes, served.create_initialization_options())
