"""An MCP proxy that asks Arbiter before every tool call.

It sits between an MCP client, which talks to it over standard input and output, and an MCP
server, which it starts:

    python examples/mcp_proxy.py --arbiter http://127.0.0.1:8000 \\
        --agent 7c9e6679-7425-40de-944b-e07fc1f90ae7 --tool read_file --tool 'fs.*' \\
        --budget 20 -- python examples/mcp_server.py

It opens one session at start and closes it at the end. The agent sees only the tools that the
session allows, and every `tools/call` is admitted first. A denial becomes a tool error whose
text is the problem's `agent_message`. If Arbiter does not respond, no call goes through. Set
`MCP_ARBITER_TOKEN=<name>.<secret>` to send a key. Without a session the exit code is 2.
"""

from __future__ import annotations

import argparse
import os
import sys

import anyio
import httpx
import mcp_types as types
from mcp import Client, MCPError, StdioServerParameters, stdio_server
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel import Server

from arbiter_guard import Arbiter, NotAdmitted, Session

TOKEN = "MCP_ARBITER_TOKEN"  # noqa: S105  # The name of a variable.
DENIED = -32001
"""A JSON-RPC error code of the range left to servers."""

Context = ServerRequestContext[object]


def sentence_for_agent(refused: NotAdmitted) -> str:
    """Return what the agent may know about a refusal."""
    return refused.agent_message or refused.title


def build_proxy(session: Session, upstream: Client) -> Server[object]:
    """Build the server that the agent talks to."""

    async def list_tools(
        _: Context, params: types.PaginatedRequestParams | None
    ) -> types.ListToolsResult:
        """List those tools of the upstream server that the session may call."""
        listed = await upstream.list_tools(cursor=params.cursor if params else None)
        try:
            allowed = await session.allowed(tool.name for tool in listed.tools)
        except NotAdmitted as refused:
            raise MCPError(DENIED, sentence_for_agent(refused)) from refused
        tools = [tool for tool in listed.tools if tool.name in allowed]
        return listed.model_copy(update={"tools": tools})

    async def call_tool(
        _: Context, params: types.CallToolRequestParams
    ) -> types.CallToolResult:
        """Forward the call if it is admitted."""
        forwarded = types.CallToolRequestParams(name=params.name, arguments=params.arguments)
        try:
            async with session.call(params.name):
                # `send_request` rather than `call_tool`, which would validate the result.
                return await upstream.session.send_request(
                    types.CallToolRequest(params=forwarded), types.CallToolResult
                )
        except NotAdmitted as refused:
            text = types.TextContent(type="text", text=sentence_for_agent(refused))
            return types.CallToolResult(content=[text], is_error=True)

    return Server("arbiter-proxy", on_list_tools=list_tools, on_call_tool=call_tool)


async def serve(options: argparse.Namespace) -> None:
    """Serve one client until it disconnects. Raises `NotAdmitted` if there is no session."""
    token = os.fsencode(os.environ.get(TOKEN, "").strip())
    headers = {b"authorization": b"Bearer " + token} if token else {}
    behind = StdioServerParameters(command=options.server[0], args=options.server[1:])
    async with (
        httpx.AsyncClient(base_url=options.arbiter, headers=headers, timeout=5) as client,
        Arbiter(client).session(
            agent_id=options.agent,
            declared_intent=options.intent,
            authorized_tools=options.tool,
            call_budget=options.budget,
        ) as session,
        Client(behind, cache=None) as upstream,
    ):
        proxy = build_proxy(session, upstream)
        async with stdio_server() as (reader, writer):
            await proxy.run(reader, writer, proxy.create_initialization_options())
        # Before the upstream server is stopped: that can take longer than a client waits.
        await session.close()


def reason(refused: NotAdmitted) -> str:
    """Return why there is no session, for the person who started the proxy."""
    if refused.code in ("unauthenticated", "insufficient_scope"):
        return f"{TOKEN} must be a key with scope proxy"
    if refused.code == "no_answer":
        return "it does not answer"
    errors = refused.problem.get("errors", [])
    return "; ".join(f"{each['field']} {each['detail']}" for each in errors) or refused.title


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
    options = parser.parse_args()
    try:
        anyio.run(serve, options)
    except NotAdmitted as refused:
        why = f"{reason(refused)} ({refused.code})"
        print(f"mcp_proxy: no session at {options.arbiter}: {why}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
