"""An MCP proxy that asks Arbiter before every tool call.

It sits between an MCP client, which talks to it over standard input and output, and an MCP
server, which it starts:

    python examples/mcp_proxy.py --arbiter http://127.0.0.1:8000 \\
        --agent 7c9e6679-7425-40de-944b-e07fc1f90ae7 --tool read_file --tool 'fs.*' \\
        --budget 20 -- python examples/mcp_server.py

It creates one session at start and asks for the admission of every `tools/call` in it. A
denial becomes a tool error whose text is the problem's `agent_message`. If Arbiter does not
respond, no call goes through. Set `ARBITER_TOKEN=<name>.<secret>` to send a key.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
import httpx
import mcp_types as types
from mcp import Client, StdioServerParameters, stdio_server
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server

UNREACHABLE = "The call could not be checked, so it was not made; try again later."


@dataclass
class Gate:
    """The state of the running proxy."""

    upstream: Client
    arbiter: httpx.AsyncClient
    session_id: str

    async def refusal(self, tool_name: str) -> str | None:
        """Ask for admission. Return `None` if admitted, else a sentence for the agent."""
        try:
            answer = await self.arbiter.post(
                f"/sessions/{self.session_id}/calls",
                json={"tool_name": tool_name},
                headers={"prefer": "return=minimal"},
            )
            if answer.status_code == httpx.codes.NO_CONTENT:
                return None
            return str(answer.json().get("agent_message", UNREACHABLE))
        except (httpx.HTTPError, ValueError):
            return UNREACHABLE


Context = ServerRequestContext[Gate]


async def list_tools(
    context: Context, params: types.PaginatedRequestParams | None
) -> types.ListToolsResult:
    """List the tools of the upstream server, unchanged."""
    cursor = params.cursor if params else None
    return await context.lifespan_context.upstream.list_tools(cursor=cursor)


async def call_tool(
    context: Context, params: types.CallToolRequestParams
) -> types.CallToolResult:
    """Forward the call if it is admitted."""
    gate = context.lifespan_context
    refusal = await gate.refusal(params.name)
    if refusal is not None:
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=refusal)], is_error=True
        )
    forwarded = types.CallToolRequestParams(name=params.name, arguments=params.arguments)
    # `send_request` rather than `call_tool`, which would validate the server's result.
    return await gate.upstream.session.send_request(
        types.CallToolRequest(params=forwarded), types.CallToolResult
    )


def build_proxy(options: argparse.Namespace) -> Server[Gate]:
    """Build the proxy from the command-line options."""
    token = os.environ.get("ARBITER_TOKEN")
    headers = {"authorization": f"Bearer {token}"} if token else {}
    behind = StdioServerParameters(command=options.server[0], args=options.server[1:])

    @asynccontextmanager
    async def lifespan(_: Server[Gate]) -> AsyncIterator[Gate]:
        async with (
            httpx.AsyncClient(base_url=options.arbiter, headers=headers, timeout=5) as arbiter,
            Client(behind, cache=None) as upstream,
        ):
            created = await arbiter.post(
                "/sessions",
                json={
                    "agent_id": options.agent,
                    "declared_intent": options.intent,
                    "authorized_tools": options.tool,
                    "call_budget": options.budget,
                },
            )
            yield Gate(upstream, arbiter, created.raise_for_status().json()["session_id"])

    return Server(
        "arbiter-proxy", lifespan=lifespan, on_list_tools=list_tools, on_call_tool=call_tool
    )


async def serve(options: argparse.Namespace) -> None:
    """Serve one client until it disconnects."""
    proxy = build_proxy(options)
    async with stdio_server() as (reader, writer):
        await proxy.run(reader, writer, proxy.create_initialization_options())


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="An MCP proxy that asks Arbiter first.")
    parser.add_argument("--arbiter", default="http://127.0.0.1:8000", help="URL of Arbiter")
    parser.add_argument("--agent", required=True, help="UUID of the agent")
    parser.add_argument(
        "--tool", action="append", default=[], help="a tool it may call; repeatable"
    )
    parser.add_argument("--budget", type=int, default=100, help="number of calls it may make")
    parser.add_argument("--intent", default="MCP proxy", help="declared intent of the session")
    parser.add_argument("server", nargs="+", help="command of the MCP server, after --")
    anyio.run(serve, parser.parse_args())


if __name__ == "__main__":
    main()
