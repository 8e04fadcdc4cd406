"""Requests that are cheap to send and expensive to hold. They are refused as soon as they
exceed a limit, and they leave no memory behind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import httpx
import pytest

from app.http.request import MAX_BODY_BYTES
from app.server.protocol import MAX_PIPELINED
from tests.services import Service
from tests.support import session_request

MEBIBYTE = 2**20
TIMES = 16
POST = b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"


def forever(piece: bytes, total: int = MEBIBYTE) -> list[bytes]:
    """Return repetitions of `piece`, about `total` bytes in writes of 64 KiB."""
    written = piece * (65_536 // len(piece) + 1)
    return [written] * (total // len(written))


def in_chunks(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


BOMBS: dict[str, tuple[int, Callable[[], Iterable[bytes]]]] = {
    "an endless request line": (431, lambda: [b"GET /", *forever(b"a")]),
    "an endless query": (431, lambda: [b"GET /sessions?cursor=", *forever(b"a")]),
    "an endless header name": (431, lambda: [GET, *forever(b"a")]),
    "an endless header value": (431, lambda: [GET, b"X: ", *forever(b"a")]),
    "endless headers": (431, lambda: [GET, *forever(b"X: a\r\n")]),
    "65 headers": (431, lambda: [GET, b"X: a\r\n" * 64, b"\r\n"]),
    "16 KiB of headers": (431, lambda: [GET, b"X: ", b"a" * 16_384, b"\r\n\r\n"]),
    "a declared body of 4 GiB": (413, lambda: [POST, b"Content-Length: 4294967296\r\n\r\n"]),
    "a declared body one byte too long": (
        413,
        lambda: [POST, b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1)],
    ),
    "a body declared and sent": (
        413,
        lambda: [POST, b"Content-Length: 4000000\r\n\r\n", *forever(b"[")],
    ),
    "a body behind Expect: 100-continue": (
        413,
        lambda: [POST, b"Expect: 100-continue\r\nContent-Length: 70000\r\n\r\n"],
    ),
    "endless chunks": (
        413,
        lambda: [POST, b"Transfer-Encoding: chunked\r\n\r\n", *forever(in_chunks(b"[" * 1000))],
    ),
    "one endless chunk": (
        413,
        lambda: [POST, b"Transfer-Encoding: chunked\r\n\r\nffffff\r\n", *forever(b"[")],
    ),
    "endless trailers": (
        413,
        lambda: [POST, b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", *forever(b"a")],
    ),
    "a chunk extension in one read": (
        413,
        lambda: [
            POST
            + b"Transfer-Encoding: chunked\r\n\r\n2;a="
            + b"a" * 200_000
            + b"\r\n{}\r\n0\r\n\r\n"
        ],
    ),
    "chunks of one byte": (
        413,
        lambda: [POST, b"Transfer-Encoding: chunked\r\n\r\n", *forever(in_chunks(b"["))],
    ),
    "a body on a DELETE": (
        413,
        lambda: [
            b"DELETE /sessions/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 70000\r\n\r\n",
            *forever(b"["),
        ],
    ),
}
"""The status that each gets, and the pieces it is sent in."""


def resident_bytes(service: Service) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize(("status", "pieces"), BOMBS.values(), ids=BOMBS)
def test_oversized_requests_are_refused_and_leave_no_memory_behind(
    service: Service, status: int, pieces: Callable[[], Iterable[bytes]]
) -> None:
    # The first one also allocates caches and lazy imports.
    service.exchange(*pieces())
    before = resident_bytes(service)

    answers = [service.exchange(*pieces()) for _ in range(TIMES)]

    assert resident_bytes(service) - before < MEBIBYTE
    for answer in answers:
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 %d " % status)
        assert b"connection: close" in head
        assert b"100 Continue" not in head
        problem = json.loads(body)
        code = {431: "headers_too_large", 413: "payload_too_large"}[status]
        assert (problem["status"], problem["code"]) == (status, code)


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X: " + b"a" * 16_300 + b"\r\n\r\n",
        GET + b"X: a\r\n" * 63 + b"\r\n",
        GET
        + b"X: a\r\n" * 62
        + b"Connection: close\r\n\r\n"
        + GET
        + b"X: a\r\n" * 63
        + b"\r\n",
    ],
    ids=["16 KiB", "64 headers", "the first of two"],
)
def test_requests_just_within_the_limits_are_served(service: Service, head: bytes) -> None:
    last = GET + b"Connection: close\r\n\r\n"

    assert service.exchange(head, last).startswith(b"HTTP/1.1 200 ")


def test_pipelined_requests_are_not_one_large_head(service: Service) -> None:
    last = GET + b"Connection: close\r\n\r\n"
    many = (GET + b"X: " + b"a" * 500 + b"\r\n\r\n") * 60

    received = service.exchange(many + GET[:10], GET[10:] + b"\r\n" + last)

    assert received.count(b" 200 OK") == 62


def test_endless_pipelined_requests_do_not_pile_up(service: Service) -> None:
    many = forever(GET + b"\r\n")
    service.exchange(*many)
    before = resident_bytes(service)

    for _ in range(TIMES):
        received = service.exchange(*many)

    assert resident_bytes(service) - before < MEBIBYTE
    assert received.count(b"HTTP/1.1 200 ") == MAX_PIPELINED + 1
    assert received.count(b"HTTP/1.1 503 ") == 1


NESTED = {
    "arrays": lambda depth: b"[" * depth + b"]" * depth,
    "objects": lambda depth: b'{"a":' * depth + b"1" + b"}" * depth,
    "unclosed arrays": lambda depth: b"[" * depth,
    "in a field": lambda depth: (
        b'{"tool_names":' + b"[" * (depth // 2) + b"]" * (depth // 2) + b"}"
    ),
}


@pytest.mark.parametrize("nested", NESTED.values(), ids=NESTED)
@pytest.mark.parametrize("depth", [100_000, 8_000], ids=["100000", "8000"])
def test_nested_json_is_refused(
    service: Service, session_id: str, nested: Callable[[int], bytes], depth: int
) -> None:
    body = nested(depth)
    answer = httpx.post(
        f"{service.url}/sessions/{session_id}/batch",
        content=body,
        headers={"content-type": "application/json"},
    )

    expected = {True: 413, False: 400}[len(body) > MAX_BODY_BYTES]
    assert answer.status_code == expected
    assert httpx.get(f"{service.url}/livez").status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"9" * 60_000, b"1e999999999", b'{"a":' + b"1" * 5000 + b"}", b'"' + b"\\u0000" * 10_000],
    ids=["digits", "an exponent", "digits in a field", "escapes"],
)
def test_large_json_values_are_refused(service: Service, body: bytes) -> None:
    answer = httpx.post(
        f"{service.url}/sessions", content=body, headers={"content-type": "application/json"}
    )

    assert answer.status_code in {400, 422}


def test_a_large_session_is_accepted(service: Service) -> None:
    tools = [f"{'t' * 120}{index:03}" for index in range(256)]
    created = httpx.post(
        f"{service.url}/sessions", json=session_request(authorized_tools=tools)
    )

    assert created.status_code == 201
