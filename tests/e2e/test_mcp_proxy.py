"""A real MCP client calls a real MCP server through the example proxy: it is admitted, denied
with a reason, and stopped by the kill switch."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp import Client, StdioServerParameters
from mcp.client.stdio import stdio_client

from app.http.auth import Scope, new_key
from tests.services import ROOT, StartService
from tests.support import AGENT

pytestmark = pytest.mark.anyio

EXAMPLES = ROOT / "examples"


@asynccontextmanager
async def agent_of(
    url: str, log: Path, *options: str, token: str | None = None
) -> AsyncIterator[Client]:
    """Connect the MCP client of an agent through the proxy."""
    parameters = StdioServerParameters(
        command=sys.executable,
        args=[
            str(EXAMPLES / "mcp_proxy.py"),
            *("--arbiter", url, "--agent", AGENT),
            *options,
            *("--", sys.executable, str(EXAMPLES / "mcp_server.py")),
        ],
        env={"PATH": os.environ["PATH"]} | ({"ARBITER_TOKEN": token} if token else {}),
    )
    with log.open("w") as errors:
        async with Client(stdio_client(parameters, errlog=errors)) as client:
            yield client


async def said(client: Client, tool: str, **arguments: Any) -> tuple[str, str]:
    """Call a tool and return a line of the transcript: the outcome, and the agent's text."""
    result = await client.call_tool(tool, arguments)
    (content, *_) = result.content
    return ("refused" if result.is_error else "admitted", getattr(content, "text", ""))


async def test_an_agent_works_until_it_is_stopped(
    start_service: StartService, tmp_path: Path
) -> None:
    service = start_service()
    async with (
        agent_of(
            service.url, tmp_path / "log", "--tool", "list_notes", "--tool", "read_*"
        ) as agent,
        httpx.AsyncClient(base_url=service.url) as operator,
    ):
        tools = (await agent.list_tools()).tools
        transcript = [
            await said(agent, "read_note", name="todo"),
            await said(agent, "delete_note", name="todo"),
            await said(agent, "read_note", name="todo"),
        ]
        killed = await operator.delete(f"/agents/{AGENT}/sessions")
        transcript.append(await said(agent, "read_note", name="todo"))
        (session,) = (await operator.get("/sessions")).json()["items"]

    assert [tool.name for tool in tools] == ["list_notes", "read_note", "delete_note"]
    assert transcript == [
        ("admitted", "buy milk"),
        ("refused", "This tool is not available in this task; use one of the tools that are."),
        ("admitted", "buy milk"),
        ("refused", "This task session has been closed; stop here."),
    ]
    assert killed.json()["closed"] == 1
    assert (session["calls_made"], session["status"]) == (2, "closed")


async def test_an_agent_spends_its_budget_and_no_more(
    start_service: StartService, tmp_path: Path
) -> None:
    key, token = new_key("gate", Scope.PROXY)
    service = start_service(ARBITER_API_KEYS=str(key))
    async with agent_of(
        service.url, tmp_path / "log", "--tool", "*", "--budget", "2", token=token
    ) as agent:
        transcript = [await said(agent, "read_note", name="done") for _ in range(3)]

    assert transcript == [
        ("admitted", "write the proxy"),
        ("admitted", "write the proxy"),
        (
            "refused",
            "Too few calls are left in the budget of this task; a new session is needed.",
        ),
    ]


async def test_without_arbiter_no_call_goes_through(
    start_service: StartService, tmp_path: Path
) -> None:
    service = start_service()
    async with agent_of(service.url, tmp_path / "log", "--tool", "*") as agent:
        assert service.stop() == 0
        outcome, told = await said(agent, "delete_note", name="todo")

    assert outcome == "refused"
    assert "could not be checked" in told
