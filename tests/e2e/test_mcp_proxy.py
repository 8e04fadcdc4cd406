"""A real MCP client calls a real MCP server through the example proxy: it is admitted, denied
with a reason, and stopped by the kill switch. Without Arbiter nothing goes through."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.stdio import stdio_client

from app.http.auth import Scope, new_key
from tests.services import ROOT, StartService
from tests.support import AGENT

pytestmark = pytest.mark.anyio

EXAMPLES = ROOT / "examples"
TOKEN = "MCP_ARBITER_TOKEN"


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
        env={"PATH": os.environ["PATH"]} | ({TOKEN: token} if token else {}),
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

    assert [tool.name for tool in tools] == ["list_notes", "read_note"]
    assert transcript == [
        ("admitted", "buy milk"),
        ("refused", "This tool is not available in this task; use one of the tools that are."),
        ("admitted", "buy milk"),
        ("refused", "This task has been closed; stop here."),
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
            "No more calls are possible in this task; stop here, or ask a person.",
        ),
    ]
    # A key with scope proxy may not be allowed to close the session. That is no error.
    assert (tmp_path / "log").read_text() == ""


async def test_the_session_is_closed_when_the_agent_leaves(
    start_service: StartService, tmp_path: Path
) -> None:
    service = start_service()
    async with agent_of(service.url, tmp_path / "log", "--tool", "*") as agent:
        await said(agent, "list_notes")
    async with httpx.AsyncClient(base_url=service.url) as operator:
        (session,) = (await operator.get("/sessions")).json()["items"]

    assert (session["calls_made"], session["status"]) == (1, "closed")
    assert (tmp_path / "log").read_text() == ""


async def test_a_name_that_no_tool_can_have_is_refused_in_a_sentence(
    start_service: StartService, tmp_path: Path
) -> None:
    service = start_service()
    async with agent_of(service.url, tmp_path / "log", "--tool", "*") as agent:
        names = ["read note!", "", "notiz_löschen", "x" * 129, "x" * 70_000]
        *unknown, huge = [await said(agent, name) for name in names]
        afterwards = await said(agent, "read_note", name="todo")

    sentence = "There is no tool with this name; use a tool's exact name."
    assert unknown == [("refused", sentence)] * 4
    assert huge == ("refused", "That is too much in one request; ask for less at a time.")
    assert afterwards == ("admitted", "buy milk")


async def test_without_arbiter_no_call_goes_through(
    start_service: StartService, tmp_path: Path
) -> None:
    service = start_service()
    async with agent_of(service.url, tmp_path / "log", "--tool", "*") as agent:
        assert await said(agent, "read_note", name="todo") == ("admitted", "buy milk")
        assert service.stop() == 0
        outcome, told = await said(agent, "delete_note", name="todo")
        with pytest.raises(MCPError, match="could not be checked"):
            await agent.list_tools()

    assert outcome == "refused"
    assert "could not be checked" in told
    assert "Traceback" not in (tmp_path / "log").read_text()


def started_in_vain(url: str, *options: str, **variables: str) -> str:
    """Start a proxy that cannot open a session. Return what it tells the person."""
    command = [sys.executable, str(EXAMPLES / "mcp_proxy.py"), "--arbiter", url]
    ran = subprocess.run(
        [*command, "--agent", AGENT, *options, "--", sys.executable, "-c", ""],
        env={"PATH": os.environ["PATH"]} | variables,
        capture_output=True,
        check=False,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=60,
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    (sentence,) = ran.stderr.splitlines()
    return sentence


def test_a_proxy_that_gets_no_session_says_why_in_one_sentence(
    start_service: StartService, free_port: int
) -> None:
    key, token = new_key("gate", Scope.PROXY)
    reader, reading_token = new_key("ops", Scope.OPERATE)
    url = start_service(ARBITER_API_KEYS=f"{key},{reader}").url
    nowhere = f"http://127.0.0.1:{free_port}"
    at, no_key = f"mcp_proxy: no session at {url}:", f"{TOKEN} must be a key with scope proxy"

    assert started_in_vain(url) == f"{at} {no_key} (unauthenticated)"
    for wrong in ("gate.wrong", "“gate”"):
        assert started_in_vain(url, **{TOKEN: wrong}) == f"{at} {no_key} (unauthenticated)"
    told = started_in_vain(url, **{TOKEN: reading_token})
    assert told == f"{at} {no_key} (insufficient_scope)"
    told = started_in_vain(url, "--agent", "Bob", **{TOKEN: token})
    assert told.startswith(f"{at} agent_id must be a UUID")
    told = started_in_vain(nowhere)
    assert told == f"mcp_proxy: no session at {nowhere}: it does not answer (no_answer)"
