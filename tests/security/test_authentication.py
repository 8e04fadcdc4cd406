"""Keys and scopes, tested on a running service over raw connections."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import httpx
import pytest

from app.http.auth import Authenticator, Scope, Unauthenticated, new_key
from tests.services import Service, StartService, running
from tests.support import session_request

GATE, GATE_TOKEN = new_key("gate", Scope.PROXY)
OPS, OPS_TOKEN = new_key("ops", Scope.OPERATE)
_, REVOKED_TOKEN = new_key("old", Scope.ADMIN)
SECRET = GATE_TOKEN.partition(".")[2]
CALL = b'{"tool_name":"read_file"}'

WRONG = {
    "missing": b"",
    "empty": b"Authorization: \r\n",
    "a scheme alone": b"Authorization: Bearer\r\n",
    "no secret": b"Authorization: Bearer gate.\r\n",
    "no name": b"Authorization: Bearer .%s\r\n",
    "the secret alone": b"Authorization: Bearer %s\r\n",
    "no scheme": b"Authorization: gate.%s\r\n",
    "another scheme": b"Authorization: Basic gate.%s\r\n",
    "a wrong secret": b"Authorization: Bearer gate." + b"A" * 43 + b"\r\n",
    "one character too many": b"Authorization: Bearer gate.%sx\r\n",
    "a name in another case": b"Authorization: Bearer GATE.%s\r\n",
    "an unknown name": b"Authorization: Bearer nobody.%s\r\n",
    "the secret of another key": b"Authorization: Bearer ops.%s\r\n",
    "a revoked key": b"Authorization: Bearer " + REVOKED_TOKEN.encode() + b"\r\n",
    "the digest instead": b"Authorization: Bearer gate." + GATE.digest.encode() + b"\r\n",
    "sent twice": b"Authorization: Bearer gate.%s\r\n" * 2,
    "a wrong token first": b"Authorization: Bearer gate.x\r\nAuthorization: Bearer gate.%s\r\n",
    "a list": b"Authorization: Bearer gate.%s, Bearer gate.%s\r\n",
    "bytes above ASCII": b"Authorization: Bearer gate.\xff\xfe\r\n",
    "in a trailer": b"Transfer-Encoding: chunked\r\nTrailer: Authorization\r\n",
    "in another header": b"X-Authorization: Bearer gate.%s\r\n",
    "as a cookie": b"Cookie: authorization=Bearer gate.%s\r\n",
    "as Proxy-Authorization": b"Proxy-Authorization: Bearer gate.%s\r\n",
    "a forwarded address": b"X-Forwarded-For: 127.0.0.1\r\nForwarded: for=127.0.0.1\r\n",
}

ROUTES = {
    "create": (b"POST /sessions", {"proxy"}),
    "call": (b"POST %session/calls", {"proxy"}),
    "batch": (b"POST %session/batch", {"proxy"}),
    "read": (b"GET %session", {"proxy", "operate"}),
    "list": (b"GET /sessions", {"operate"}),
    "close": (b"DELETE %session", {"proxy", "operate"}),
    "agent": (b"GET /agents/7c9e6679-7425-40de-944b-e07fc1f90ae7", {"operate"}),
    "kill": (b"DELETE /agents/7c9e6679-7425-40de-944b-e07fc1f90ae7/sessions", {"operate"}),
    "metrics": (b"GET /metrics", {"operate"}),
    "denials": (b"GET /denials", {"operate"}),
    "replica": (b"GET /replica", {"operate"}),
    "update": (b"PATCH /replica", set()),
}
"""Request lines, and the scopes that may send them."""


@pytest.fixture(scope="module")
def guarded() -> Iterator[Service]:
    with running(ARBITER_API_KEYS=f"{GATE},{OPS}") as service:
        yield service


def as_gate(service: Service, method: str, path: str, body: Any = None) -> httpx.Response:
    headers = {"authorization": f"Bearer {GATE_TOKEN}"}
    return httpx.request(method, service.url + path, json=body, headers=headers)


@pytest.fixture
def session_id(guarded: Service) -> str:
    created = as_gate(guarded, "POST", "/sessions", session_request())
    return str(created.json()["session_id"])


def send(service: Service, line: bytes, session_id: str, headers: bytes) -> tuple[int, str]:
    """Send a request and return the status and the problem code."""
    body = CALL if line.startswith(b"POST") else b""
    length = b"Content-Length: %d\r\n" % len(body)
    if b"chunked" in headers:
        length = b""
        secret = b"Authorization: Bearer gate." + SECRET.encode()
        body = b"%x\r\n%b\r\n0\r\n%b\r\n\r\n" % (len(CALL), CALL, secret)
    received = service.exchange(
        line.replace(b"%session", b"/sessions/" + session_id.encode()),
        b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n",
        b"Content-Type: application/json\r\n",
        length + headers.replace(b"%s", SECRET.encode()) + b"\r\n" + body,
    )
    status = re.match(rb"HTTP/1\.1 (\d{3}) ", received)
    code = re.search(rb'"code":"(\w+)"', received)
    assert status is not None
    assert SECRET.encode() not in received
    return int(status[1]), "" if code is None else code[1].decode()


@pytest.mark.parametrize("headers", WRONG.values(), ids=WRONG)
def test_invalid_credentials_are_refused(
    guarded: Service, session_id: str, headers: bytes
) -> None:
    for line, _ in ROUTES.values():
        assert send(guarded, line, session_id, headers) == (401, "unauthenticated")

    assert as_gate(guarded, "GET", f"/sessions/{session_id}").json()["calls_made"] == 0


@pytest.mark.parametrize("scope", ["proxy", "operate"])
@pytest.mark.parametrize(("line", "scopes"), ROUTES.values(), ids=ROUTES)
def test_a_key_is_held_to_its_scope(
    guarded: Service, session_id: str, line: bytes, scopes: set[str], scope: str
) -> None:
    token = {"proxy": GATE_TOKEN, "operate": OPS_TOKEN}[scope]
    status, code = send(
        guarded, line, session_id, b"Authorization: Bearer %b\r\n" % token.encode()
    )

    if scope in scopes:
        assert status not in {401, 403}
    else:
        assert (status, code) == (403, "insufficient_scope")


def test_a_revoked_key_is_refused_after_a_restart(start_service: StartService) -> None:
    both = start_service(ARBITER_API_KEYS=f"{GATE},{OPS}")
    assert as_gate(both, "POST", "/sessions", session_request()).status_code == 201
    both.stop()

    without = start_service(ARBITER_API_KEYS=str(OPS))

    assert as_gate(without, "POST", "/sessions", session_request()).status_code == 401


def test_wrong_keys_get_the_same_answer(guarded: Service, session_id: str) -> None:
    """The answer does not reveal whether a name exists."""
    answers = set()
    for token in ("gate.x", "nobody.x", f"nobody.{SECRET}", "gate." + "A" * 43):
        answer = httpx.get(
            f"{guarded.url}/sessions/{session_id}",
            headers={"authorization": f"Bearer {token}", "x-request-id": "same"},
        )
        headers = [item for item in answer.headers.items() if item[0] != "date"]
        answers.add((answer.status_code, str(headers), answer.text))

    assert len(answers) == 1


def lines_run(authenticator: Authenticator, authorization: bytes) -> list[tuple[str, int]]:
    """Return every line of ours that runs to check a header: they determine its timing."""
    ran: list[tuple[str, int]] = []

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            ran.append((frame.f_code.co_name, frame.f_lineno))
        return trace

    sys.settrace(trace)
    try:
        authenticator.identify(authorization, None)
    except Unauthenticated:
        pass
    finally:
        sys.settrace(None)
    return ran


def test_every_guess_runs_the_same_lines() -> None:
    """Time is not measured. All guesses run the same lines, and the comparison itself is
    constant-time (`test_secrets_are_compared_in_constant_time`)."""
    rotated, _ = new_key("ops", Scope.OPERATE)
    authenticator = Authenticator([GATE, OPS, rotated], allow_unauthenticated=False)
    # The valid token is cached, which must not change what a guess runs.
    authenticator.identify(f"Bearer {GATE_TOKEN}".encode(), None)

    ways = [
        lines_run(authenticator, b"Bearer " + token.encode())
        for token in (
            f"gate.{'A' * 43}",
            f"gate.{SECRET[:-1]}{'A' if SECRET[-1] != 'A' else 'E'}",
            f"gate.{SECRET[0]}{'A' * 42}",
            f"nobody.{SECRET}",
            f"nobody.{'A' * 43}",
            f"ops.{'A' * 43}",
        )
    ]

    assert ways[0]
    assert all(way == ways[0] for way in ways)
