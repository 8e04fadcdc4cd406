"""The bytes on the wire, from real servers. A response sent in one write must be what uvicorn
makes of ASGI messages."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from collections.abc import Iterator

import httpx
import pytest

from tests.services import Service, StartService, running
from tests.support import session_request

LAST = (
    b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx-request-id: r-2\r\n\r\n"
)


def exchange(service: Service, *requests: bytes) -> bytes:
    """Send the requests in one piece, with a last one that ends the connection, and return
    everything received."""
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(b"".join([*requests, LAST]))
        while chunk := connection.recv(65_536):
            received += chunk
    return received


def call(
    session_id: str, *headers: bytes, tool: str = "read_file", version: bytes = b"1.1"
) -> bytes:
    body = json.dumps({"tool_name": tool}).encode()
    lines = [
        b"POST /sessions/%b/calls HTTP/%b" % (session_id.encode(), version),
        b"host: localhost",
        b"content-type: application/json",
        b"content-length: %d" % len(body),
        b"x-request-id: r-1",
        *headers,
        b"",
        body,
    ]
    return b"\r\n".join(lines)


def settled(received: bytes) -> bytes:
    received = re.sub(rb"date: [^\r]*", b"date: DATE", received)
    received = re.sub(rb"[0-9a-f-]{36}", b"ID", received)
    received = re.sub(rb'(?<="session_ref":")[0-9a-f]{8}', b"REF", received)
    received = re.sub(rb";t=\d+", b";t=T", received)
    return re.sub(rb"\d{4}-\d\d-\d\dT[0-9:.]*Z", b"INSTANT", received)


@pytest.fixture
def services(start_service: StartService, free_port: int) -> Iterator[list[Service]]:
    port = str(free_port)
    server = ["-m", "uvicorn", "tests.asgi_way:app", "--no-server-header", "--port", port]
    protocol = ["--http", "app.server.protocol:LimitedProtocol"]
    with running(*server, *protocol, ARBITER_PORT=port) as asgi_way:
        yield [start_service(), asgi_way]


@pytest.mark.parametrize(
    ("name", "headers", "version"),
    [
        ("plain", [], b"1.1"),
        ("minimal", [b"prefer: return=minimal"], b"1.1"),
        ("close", [b"connection: close"], b"1.1"),
        ("keep", [b"connection: keep-alive"], b"1.1"),
        ("HTTP/1.0", [], b"1.0"),
        ("continue", [b"expect: 100-continue"], b"1.1"),
    ],
)
def test_a_call_is_answered_as_by_asgi_messages(
    services: list[Service], name: str, headers: list[bytes], version: bytes
) -> None:
    seen = []
    for service in services:
        created = httpx.post(f"{service.url}/sessions", json=session_request(call_budget=2))
        session_id = created.json()["session_id"]
        for tool in ("read_file", "rm"):
            request = call(session_id, *headers, tool=tool, version=version)
            seen.append(settled(exchange(service, request)))

    assert seen[0] == seen[2]
    assert seen[1] == seen[3]
    ends, continues = name in {"close", "HTTP/1.0"}, name == "continue"
    assert seen[0].count(b"HTTP/1.1 ") == 2 - ends + continues


def test_pipelined_calls_are_answered_as_by_asgi_messages(services: list[Service]) -> None:
    seen = []
    for service in services:
        created = httpx.post(
            f"{service.url}/sessions",
            json=session_request(call_budget=3, rate_limit_per_minute=9),
        )
        session_id = created.json()["session_id"]
        requests = [call(session_id, tool=tool) for tool in ("read_file", "rm", "list_dir")] * 2
        seen.append(settled(exchange(service, *requests)))

    assert seen[0] == seen[1]
    assert seen[0].count(b"HTTP/1.1 ") == 7


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="curl is missing: apt-get install curl"
)
def test_curl_may_offer_http2(start_service: StartService) -> None:
    """`curl --http2` asks for an upgrade, and goes on in HTTP/1.1 on the same connection."""
    service = start_service()
    made = httpx.post(f"{service.url}/sessions", json=session_request()).json()
    body = (
        "--data",
        '{"tool_name": "read_file"}',
        "--header",
        "content-type: application/json",
    )
    report = ("--silent", "--write-out", "%{http_code} %{http_version} %{num_connects}\n")
    ask = ("--http2", *body, *report, "--output", os.devnull)
    url = f"{service.url}/sessions/{made['session_id']}/calls"

    typed = subprocess.run(
        ["curl", *ask, url, "--next", *ask, "--header", "transfer-encoding: chunked", url],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )

    assert typed.stdout.splitlines() == ["200 1.1 1", "200 1.1 0"]
    session = httpx.get(f"{service.url}/sessions/{made['session_id']}").json()
    assert session["calls_made"] == 2


def check(
    session_id: str, *headers: bytes, body: bytes = b"", path: bytes = b"native"
) -> bytes:
    lines = [
        b"PUT /authz/%b HTTP/1.1" % path,
        b"host: api.example.com",
        b"x-arbiter-session: %b" % session_id.encode(),
        b"x-arbiter-tool: read_file",
        b"x-request-id: r-1",
        *headers,
        b"",
        body,
    ]
    return b"\r\n".join(lines)


@pytest.mark.parametrize("size", [0, 10, 60_000])
@pytest.mark.parametrize("headers", [[], [b"expect: 100-continue"]])
def test_a_gateway_is_answered_at_once_whatever_the_body(
    services: list[Service], size: int, headers: list[bytes]
) -> None:
    """The body is not read, and the connection goes on after it."""
    seen = []
    for service in services:
        created = httpx.post(f"{service.url}/sessions", json=session_request(call_budget=2))
        session_id = created.json()["session_id"]
        length = b"content-length: %d" % size
        question = check(session_id, length, *headers, body=b"x" * size)
        denied = check(session_id, path=b"strict/a%20b")
        received = settled(exchange(service, question, question, denied))
        # It is left out where the body has come by then (RFC 9110, section 10.1.1).
        seen.append(received.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b""))

    assert seen[0] == seen[1]
    assert seen[0].count(b"HTTP/1.1 200 ") == 3
    assert seen[0].count(b"HTTP/1.1 403 ") == 1
    assert b"x-arbiter-status: 429" in seen[0]
