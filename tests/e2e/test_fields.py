"""Header fields as clients send them: white space around a value is not part of it (RFC 9110,
section 5.5), whichever server reads it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import httpx
import pytest

from app.http.auth import Scope, new_key
from tests.services import Service, running
from tests.support import session_request

BODY = b'{"tool_name":"read_file"}'
KEY, TOKEN = new_key("gate", Scope.PROXY)

SERVERS = {
    "our server": (),
    "uvicorn": ("-m", "uvicorn", "app.main:app", "--port", "{port}", "--no-access-log"),
}


@pytest.fixture(params=SERVERS)
def service(request: pytest.FixtureRequest, free_port: int) -> Iterator[Service]:
    command = [each.format(port=free_port) for each in SERVERS[request.param]]
    port = str(free_port) if command else "0"
    with running(*command, ARBITER_PORT=port, ARBITER_API_KEYS=str(KEY)) as started:
        yield started


@pytest.fixture
def session_id(service: Service) -> str:
    headers = {"authorization": f"Bearer {TOKEN}"}
    made = httpx.post(f"{service.url}/sessions", json=session_request(), headers=headers)
    return str(made.json()["session_id"])


def request(target: str, *fields: str, body: bytes = b"") -> bytes:
    lines = [f"{target} HTTP/1.1", "Host: localhost", *fields, f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


@pytest.mark.parametrize("space", [" ", "\t", " \t  "], ids=repr)
def test_white_space_after_a_value_changes_nothing(
    service: Service, session_id: str, space: str
) -> None:
    call = f"POST /sessions/{session_id}/calls"
    fields = ["Content-Type: application/json", f"Authorization: Bearer {TOKEN}"]
    first = service.exchange(request(call, *fields, "Idempotency-Key: k1", body=BODY))
    fields = [each + space for each in fields]
    again = service.exchange(
        request(
            call,
            *fields,
            f"Idempotency-Key: k1{space}",
            f"X-Request-Id: mine{space}",
            body=BODY,
        )
    )
    asked = service.exchange(
        request(
            "GET /authz/native",
            f"X-Arbiter-Key: {TOKEN}{space}",
            f"X-Arbiter-Session: {session_id}{space}",
            f"X-Arbiter-Tool: read_file{space}",
            f"X-Arbiter-Idempotency-Key: k1{space}",
        )
    )

    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"idempotency-replayed: true" in again
    assert b"x-request-id: mine\r\n" in again
    assert b"idempotency-replayed: true" in asked


def test_host_and_expect_may_end_in_white_space() -> None:
    head = b"POST /sessions HTTP/1.1\r\nHost: localhost \r\nExpect: 100-continue\t\r\n"
    with running() as service:
        received = service.exchange(
            head + b"Connection: close \r\nContent-Length: 2 \r\n\r\n", b"{}"
        )

    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received) == [b"100", b"415"]


REQUEST_LINES = {
    b"GET * HTTP/1.1\r\nHost: localhost": 400,
    b"OPTIONS * HTTP/1.1\r\nHost: localhost": 404,
    b"GET /livez HTTP/1.1\r\nHost:": 400,
    b"GET /livez HTTP/1.1\r\nHost: \t ": 400,
    b"GET http://localhost HTTP/1.1\r\nHost: localhost": 307,
    b"GET http://localhost?a HTTP/1.1\r\nHost: localhost": 422,
    b"GET http://localhost/livez HTTP/1.1\r\nHost: localhost": 200,
}


def test_targets_and_hosts_mean_one_thing() -> None:
    found = {}
    with running(ARBITER_API_KEYS=str(KEY)) as service:
        for line in REQUEST_LINES:
            received = service.exchange(line + b"\r\nConnection: close\r\n\r\n")
            found[line] = int(received[9:12])

    assert found == REQUEST_LINES


def test_refusals_of_the_server_have_the_path_prefix(free_port: int) -> None:
    program = (
        "import uvicorn; from app.main import app; from app.cli import server_config;"
        "from app.settings import load_settings;"
        "config = server_config(app, load_settings()); config.root_path = '/team';"
        f"config.port = {free_port}; uvicorn.Server(config).run()"
    )
    with running("-c", program, ARBITER_PORT=str(free_port)) as service:
        received = service.exchange(b"GET / HTTP/1.1\r\n\r\n")

    assert b'"type":"/team/problems/malformed_request"' in received
