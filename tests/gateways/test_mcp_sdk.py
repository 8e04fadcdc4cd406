"""The client and the server of the MCP SDK with a gateway between them: admitted, denied with
the sentence for the agent, and an old version of the protocol refused."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import httpx
import httpx2
import pytest
from mcp import Client, MCPError
from mcp.client.streamable_http import streamable_http_client

from tests.gateways.programs import PROGRAMS, find, free_port, running_gateway
from tests.services import ROOT, Service, StartService
from tests.support import session_request

pytestmark = pytest.mark.anyio

SERVER = """
import sys
sys.path.insert(0, "examples")
from mcp_server import server
server.run("streamable-http", port=int(sys.argv[1]), json_response=True)
"""


@pytest.fixture(scope="module")
def tools() -> Iterator[str]:
    """The example MCP server over HTTP; its address."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(port)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(400):
            try:
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(timeout=30)


@asynccontextmanager
async def agent(url: str, session: str, mode: str) -> AsyncIterator[Client]:
    headers = {"authorization": f"Bearer {session}"}
    async with httpx2.AsyncClient(headers=headers, timeout=30) as http:
        transport = streamable_http_client(f"{url}/mcp", http_client=http)
        async with Client(transport, mode=mode) as client:
            yield client


class Gate(NamedTuple):
    """A gateway between the agent and the tools."""

    name: str
    url: str
    service: Service


@pytest.fixture(params=PROGRAMS)
def gate(
    request: pytest.FixtureRequest, start_service: StartService, tools: str, tmp_path: Path
) -> Iterator[Gate]:
    kind = PROGRAMS[request.param]
    if find(kind.program) is None:
        pytest.skip(f"{kind.program} is missing: {kind.install}")
    service = start_service()
    address = service.url.removeprefix("http://")
    with running_gateway(
        request.param, tmp_path, "gate.none", address, tools, for_mcp=True
    ) as url:
        for _ in range(400):
            try:
                answer = httpx.post(url, json={})
            except httpx.ConnectError:
                answer = None
            if answer is not None and answer.status_code == 400:
                break
            time.sleep(0.05)
        yield Gate(request.param, url, service)


def opened(service: Service, budget: int) -> str:
    terms = {"authorized_tools": ["list_notes"], "call_budget": budget}
    answer = httpx.post(f"{service.url}/sessions", json=session_request(**terms))
    return str(answer.json()["session_id"])


def calls_made(service: Service, session: str) -> int:
    return int(httpx.get(f"{service.url}/sessions/{session}").json()["calls_made"])


async def test_an_agent_hears_why_it_is_denied(gate: Gate) -> None:
    _, url, service = gate
    session = opened(service, 2)

    async with agent(url, session, "2026-07-28") as client:
        listed = await client.list_tools()
        first = await client.call_tool("list_notes", {})
        with pytest.raises(MCPError) as other:
            await client.call_tool("delete_note", {"name": "todo"})
        second = await client.call_tool("list_notes", {})
        with pytest.raises(MCPError) as spent:
            await client.call_tool("list_notes", {})

    assert len(listed.tools) == 3
    assert not first.is_error
    assert not second.is_error
    assert "use one of the tools that are" in str(other.value)
    assert "stop here, or ask a person" in str(spent.value)


async def test_an_old_version_of_the_protocol_is_refused_or_read(gate: Gate) -> None:
    """Its headers prove nothing. One gateway reads the body instead, and counts the call."""
    name, url, service = gate
    session = opened(service, 2)

    if name == "envoy-mcp":
        async with agent(url, session, "legacy") as client:
            result = await client.call_tool("list_notes", {})
            assert not result.is_error
    else:
        with pytest.raises((MCPError, ExceptionGroup)):
            async with agent(url, session, "legacy") as client:
                await client.call_tool("list_notes", {})

    assert calls_made(service, session) == (1 if name == "envoy-mcp" else 0)
