"""Requests that two servers in a row could parse differently. Each hides a call, and the
session's `calls_made` shows whether it was made."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.services import Service

BODY = b'{"tool_name":"read_file"}'
JSON = b"Content-Type: application/json\r\n"
HOST = b"Host: localhost\r\n"
CLOSE = b"Connection: close\r\n"
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
CHUNKED = b"Transfer-Encoding: chunked\r\n"
IN_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)

GOOD = b"%POST HTTP/1.1\r\n" + HOST + CLOSE + JSON + LENGTH + b"\r\n" + BODY


def post(headers: bytes, body: bytes = BODY, version: bytes = b"1.1") -> bytes:
    return b"%POST HTTP/" + version + b"\r\n" + headers + b"\r\n" + body


REFUSED = {
    "CL and TE": post(HOST + JSON + LENGTH + CHUNKED, IN_CHUNKS),
    "TE and CL": post(HOST + JSON + CHUNKED + LENGTH, IN_CHUNKS),
    "TE and CL 0, a call behind": post(
        HOST + JSON + b"Content-Length: 0\r\n" + CHUNKED, b"0\r\n\r\n" + GOOD
    ),
    "two lengths that differ": post(HOST + JSON + LENGTH + b"Content-Length: 0\r\n"),
    "two lengths that agree": post(HOST + JSON + LENGTH + LENGTH),
    "a list of lengths": post(HOST + JSON + b"Content-Length: 25, 25\r\n"),
    "a length with a sign": post(HOST + JSON + b"Content-Length: +25\r\n"),
    "a negative length": post(HOST + JSON + b"Content-Length: -1\r\n"),
    "a length in hex": post(HOST + JSON + b"Content-Length: 0x19\r\n"),
    "an empty length": post(HOST + JSON + b"Content-Length: \r\n"),
    "a length past 64 bits": post(HOST + JSON + b"Content-Length: 18446744073709551641\r\n"),
    "space before the colon": post(HOST + JSON + b"Content-Length : 25\r\n"),
    "TE that is not chunked": post(HOST + JSON + b"Transfer-Encoding: xchunked\r\n", IN_CHUNKS),
    "TE chunked in the middle": post(
        HOST + JSON + b"Transfer-Encoding: chunked, gzip\r\n", IN_CHUNKS
    ),
    "TE chunked at the end": post(
        HOST + JSON + b"Transfer-Encoding: gzip, chunked\r\n", IN_CHUNKS
    ),
    "TE identity": post(HOST + JSON + b"Transfer-Encoding: identity\r\n", IN_CHUNKS),
    "TE in quotes": post(HOST + JSON + b'Transfer-Encoding: "chunked"\r\n', IN_CHUNKS),
    "TE twice": post(HOST + JSON + CHUNKED + CHUNKED, IN_CHUNKS),
    "TE behind a vertical tab": post(
        HOST + JSON + b"Transfer-Encoding:\x0bchunked\r\n", IN_CHUNKS
    ),
    "TE in HTTP/1.0": post(HOST + JSON + CHUNKED, IN_CHUNKS, b"1.0"),
    "bare LF everywhere": GOOD.replace(b"\r\n", b"\n"),
    "bare LF after the request line": GOOD.replace(b"\r\n", b"\n", 1),
    "bare LF between headers": post(b"Host: a\n" + JSON + LENGTH),
    "bare CR between headers": post(b"Host: localhost\rX: b\r\n" + JSON + LENGTH),
    "bare LF at the end of the head": b"%POST HTTP/1.1\r\n"
    + HOST
    + JSON
    + LENGTH
    + b"\n"
    + BODY,
    "a folded header": post(HOST + b"X: a\r\n b\r\n" + JSON + LENGTH),
    "a folded length": post(HOST + JSON + b"Content-Length:\r\n 25\r\n"),
    "space before the first header": post(b" " + HOST + JSON + LENGTH),
    "a header without a colon": post(HOST + b"what\r\n" + JSON + LENGTH),
    "a header without a name": post(HOST + b": what\r\n" + JSON + LENGTH),
    "NUL in a header's value": post(HOST + b"X: a\0b\r\n" + JSON + LENGTH),
    "NUL in a header's name": post(HOST + b"X\0: b\r\n" + JSON + LENGTH),
    "NUL in the path": GOOD.replace(b" HTTP", b"\0 HTTP", 1),
    "a control character in a value": post(HOST + b"X: a\x01b\r\n" + JSON + LENGTH),
    "two Hosts": post(HOST + HOST + JSON + LENGTH),
    "two Hosts that differ": post(HOST + b"Host: b\r\n" + JSON + LENGTH),
    "no Host": post(JSON + LENGTH),
    "two Hosts in HTTP/1.0": post(HOST + HOST + JSON + LENGTH, version=b"1.0"),
    "a Host with a path": post(b"Host: a/b\r\n" + JSON + LENGTH),
    "a Host with a space": post(b"Host: a b\r\n" + JSON + LENGTH),
    "a Host with a user": post(b"Host: b@a\r\n" + JSON + LENGTH),
    "bytes above ASCII in the path": GOOD.replace(b" HTTP", b"\xc3\xa9 HTTP", 1),
    "HTTP/0.9": b"%POST\r\n" + HOST + JSON + LENGTH + b"\r\n" + BODY,
    "HTTP/1.2": GOOD.replace(b"/1.1", b"/1.2", 1),
    "RTSP": GOOD.replace(b"HTTP/1.1", b"RTSP/1.0", 1),
    "RTSP 1.1": GOOD.replace(b"HTTP/1.1", b"RTSP/1.1", 1),
    "RTSP behind two spaces": GOOD.replace(b" HTTP/1.1", b"  RTSP/1.0", 1),
    "a fragment in the target": GOOD.replace(b" HTTP", b"#part HTTP", 1),
    "an empty fragment in the target": GOOD.replace(b" HTTP", b"# HTTP", 1),
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303"),
    "a method in lower case": GOOD.replace(b"POST", b"post", 1),
    "an unknown method": GOOD.replace(b"POST", b"SPEND", 1),
    "a tab behind the method": GOOD.replace(b"POST ", b"POST\t", 1),
    "CONNECT": b"CONNECT a:80 HTTP/1.1\r\n" + HOST + b"\r\n" + GOOD,
    "a length without digits": post(HOST + JSON + b"Content-Length: abc\r\n"),
}
"""Each gets 400 and ends the connection; nothing behind it is read."""

REFUSED_IN_THE_BODY = {
    "a chunk with a bare LF": b"19\n%b\r\n0\r\n\r\n" % BODY,
    "a chunk size with a sign": b"+19\r\n%b\r\n0\r\n\r\n" % BODY,
    "a negative chunk size": b"-19\r\n%b\r\n0\r\n\r\n" % BODY,
    "a chunk size with 0x": b"0x19\r\n%b\r\n0\r\n\r\n" % BODY,
    "a chunk size past 64 bits": b"ffffffffffffffff19\r\n%b\r\n0\r\n\r\n" % BODY,
    "a chunk longer than its size": b"10\r\n%b\r\n0\r\n\r\n" % BODY,
    "an empty chunk size": b"\r\n%b\r\n0\r\n\r\n" % BODY,
    "space in front of a chunk size": b" 19\r\n%b\r\n0\r\n\r\n" % BODY,
}

ONE_CALL = {
    "plain": GOOD,
    "in chunks": post(HOST + CLOSE + JSON + CHUNKED, IN_CHUNKS),
    "chunks with an extension": post(
        HOST + CLOSE + JSON + CHUNKED, b"19;a=b\r\n%b\r\n0\r\n\r\n" % BODY
    ),
    "TE in capitals": post(HOST + CLOSE + JSON + b"TRANSFER-ENCODING: CHUNKED\r\n", IN_CHUNKS),
    "a call behind Connection: close": GOOD + GOOD,
    "a target in absolute form": GOOD.replace(b"POST /", b"POST http://a/", 1),
    "CRLF in front": b"\r\n\r\n" + GOOD,
    "HTTP/1.0 without a Host": post(JSON + LENGTH, version=b"1.0"),
}
"""Each is parsed as one call; nothing behind it is read."""


def addressed(request: bytes, session_id: str) -> bytes:
    """Return the request with the path of a session's calls."""
    return request.replace(b"%POST", b"POST /sessions/%b/calls" % session_id.encode())


def answers_to(service: Service, session_id: str, attack: bytes) -> list[int]:
    """Send an attack and return the statuses received until the connection ends."""
    received = service.exchange(addressed(attack, session_id))
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def calls_made(service: Service, session_id: str) -> int:
    return int(httpx.get(f"{service.url}/sessions/{session_id}").json()["calls_made"])


@pytest.mark.parametrize("attack", REFUSED.values(), ids=REFUSED)
def test_ambiguous_requests_are_refused(
    service: Service, session_id: str, attack: bytes
) -> None:
    # The good call behind it must not be reached.
    assert answers_to(service, session_id, attack + GOOD) == [400]

    assert calls_made(service, session_id) == 0


@pytest.mark.parametrize("body", REFUSED_IN_THE_BODY.values(), ids=REFUSED_IN_THE_BODY)
def test_ambiguous_chunks_are_refused(service: Service, session_id: str, body: bytes) -> None:
    attack = post(HOST + JSON + CHUNKED, body)

    assert answers_to(service, session_id, attack + GOOD) == [400]

    assert calls_made(service, session_id) == 0


@pytest.mark.parametrize("request_bytes", ONE_CALL.values(), ids=ONE_CALL)
def test_unambiguous_requests_are_one_call(
    service: Service, session_id: str, request_bytes: bytes
) -> None:
    assert answers_to(service, session_id, request_bytes) == [200]

    assert calls_made(service, session_id) == 1


def test_a_refusal_is_a_problem(service: Service) -> None:
    received = service.exchange(b"GET / HTTP/1.1\r\nX-Request-Id: mine\r\n\r\n")

    head, _, body = received.partition(b"\r\n\r\n")
    problem = httpx.Response(400, content=body).json()
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    assert b"cache-control: no-store" in head
    assert (problem["code"], problem["status"]) == ("malformed_request", 400)
    assert problem["request_id"] == "mine"
    assert "Host" in problem["detail"]


def test_an_answer_comes_before_the_refusal_behind_it(
    service: Service, session_id: str
) -> None:
    good = post(HOST + JSON + LENGTH)

    assert answers_to(service, session_id, good + good + b"what\r\n\r\n") == [200, 200, 400]

    assert calls_made(service, session_id) == 2


def test_trailers_are_not_headers(service: Service, session_id: str) -> None:
    # A chunk of size zero ends the body; the fields that follow are trailers.
    body = IN_CHUNKS.removesuffix(b"\r\n") + b"Idempotency-Key: k\r\n\r\n"
    attack = post(HOST + CLOSE + JSON + CHUNKED, body)

    assert answers_to(service, session_id, attack) == [200]
    assert answers_to(service, session_id, attack) == [200]

    assert calls_made(service, session_id) == 2


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
"""What the JDK's HTTP client and `curl --http2` send without TLS."""

UPGRADES = {
    "h2c": post(HOST + JSON + LENGTH + OFFER),
    "h2c before the length": post(HOST + OFFER + JSON + LENGTH),
    "h2c in chunks": post(HOST + JSON + CHUNKED + OFFER, IN_CHUNKS),
    "websocket": post(HOST + JSON + LENGTH + b"Connection: upgrade\r\nUpgrade: websocket\r\n"),
    "upgrade and keep-alive": post(
        HOST + JSON + LENGTH + b"Connection: keep-alive, Upgrade\r\nUpgrade: h2c\r\n"
    ),
}


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
def test_an_offered_upgrade_is_ignored(
    service: Service, session_id: str, upgrade: bytes
) -> None:
    assert answers_to(service, session_id, upgrade + upgrade + GOOD) == [200, 200, 200]

    assert calls_made(service, session_id) == 3


def test_an_offered_upgrade_is_ignored_byte_by_byte(service: Service, session_id: str) -> None:
    request = UPGRADES["h2c"].replace(
        b"%POST", b"POST /sessions/%b/calls" % session_id.encode()
    )
    last = b"GET /livez HTTP/1.1\r\n" + HOST + CLOSE + b"\r\n"

    received = service.exchange(*(bytes([byte]) for byte in request), last)

    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received) == [b"200", b"200"]
    assert calls_made(service, session_id) == 1


def test_an_upgrade_hides_no_ambiguity(service: Service, session_id: str) -> None:
    attack = post(HOST + JSON + LENGTH + CHUNKED + OFFER, IN_CHUNKS)

    assert answers_to(service, session_id, attack + GOOD) == [400]

    assert calls_made(service, session_id) == 0


def test_rtsp_is_refused_byte_by_byte(service: Service, session_id: str) -> None:
    request = REFUSED["RTSP"].replace(
        b"%POST", b"POST /sessions/%b/calls" % session_id.encode()
    )

    received = service.exchange(*(bytes([byte]) for byte in request))

    assert received.startswith(b"HTTP/1.1 400 ")
    assert calls_made(service, session_id) == 0


def test_rtsp_is_refused_behind_a_request_of_the_same_shape(
    service: Service, session_id: str
) -> None:
    good = post(HOST + JSON + LENGTH)

    assert answers_to(service, session_id, good + good.replace(b"HTTP", b"RTSP", 1)) == [
        200,
        400,
    ]

    assert calls_made(service, session_id) == 1


def test_rtsp_is_refused_behind_a_body_that_looks_like_http(
    service: Service, session_id: str
) -> None:
    rtsp = REFUSED["RTSP 1.1"].replace(
        b"%POST", b"POST /sessions/%b/calls" % session_id.encode()
    )
    rest = b"-" * rtsp.index(b" RTSP") + b" HTTP/1.1"
    first = b"GET /livez HTTP/1.1\r\n" + HOST + b"Content-Length: %d\r\n\r\n-" % (len(rest) + 1)

    received = service.exchange(first, rest + rtsp)

    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received) == [b"200", b"400"]
    assert calls_made(service, session_id) == 0


def test_a_body_may_mention_rtsp(service: Service) -> None:
    body = b"{} RTSP/1.0"

    received = service.exchange(
        b"POST /sessions HTTP/1.1\r\n%bContent-Length: %d\r\n%b%b\r\n%b"
        % (HOST, len(body), JSON, CLOSE, body)
    )

    assert b'"code":"malformed_json"' in received


def test_http_1_0_gets_no_100_continue(service: Service, session_id: str) -> None:
    # RFC 9110, section 10.1.1.
    expecting = post(HOST + JSON + LENGTH + b"Expect: 100-continue\r\n", version=b"1.0")

    assert answers_to(service, session_id, expecting) == [200]
