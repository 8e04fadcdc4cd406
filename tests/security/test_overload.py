"""Load shedding: more requests at once than the service accepts. A request that waits for the
store is in flight; these tests pause the store. In most of them no request waits for its turn,
so that what comes over the limit is shed at once."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest

from tests import engines
from tests.conftest import PATIENTLY
from tests.engines import until
from tests.security.test_slow_connections import gauge
from tests.services import Service, StartService, received_on
from tests.support import session_request

BOUND = 3
AGENT = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
LIST = b"GET /sessions HTTP/1.1\r\nHost: localhost\r\n\r\n"
READ = (
    b"GET /sessions/%b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    % AGENT.encode()
)


@pytest.fixture
def service(start_service: StartService, server: engines.Server) -> Service:
    return start_service(
        ARBITER_STORE_URL=server.url + PATIENTLY,
        ARBITER_MAX_REQUESTS_IN_FLIGHT=str(BOUND),
        ARBITER_MAX_QUEUE_DELAY_SECS="0",
        ARBITER_REQUEST_TIMEOUT_SECS="60",
    )


@pytest.fixture
def full(service: Service, server: engines.Server) -> Iterator[Service]:
    """A service at its limit of requests in flight."""
    with ExitStack() as stack:
        server.pause()
        held = [stack.enter_context(service.connect()) for _ in range(BOUND)]
        for connection in held:
            connection.sendall(READ)
        # Once this one is shed, the ones before it are in flight.
        until(lambda: httpx.get(f"{service.url}/sessions").status_code == 503)
        yield service
        server.resume()
        for connection in held:
            assert received_on(connection).startswith(b"HTTP/1.1 404 ")


def test_a_request_over_the_limit_is_shed_at_once(full: Service) -> None:
    refused = httpx.post(
        f"{full.url}/sessions", json=session_request(), headers={"x-request-id": "mine"}
    )

    problem = refused.json()
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["x-should-retry"] == "true"
    assert refused.headers["x-request-id"] == problem["request_id"] == "mine"
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["cache-control"] == "no-store"
    assert problem["code"] == "overloaded"
    assert (problem["retryable"], problem["next_action"]) == (True, "wait")


def test_several_request_ids_are_replaced(full: Service) -> None:
    headers = [("x-request-id", "first"), ("x-request-id", "second")]

    refused = httpx.get(f"{full.url}/sessions", headers=headers)

    assert refused.status_code == 503
    assert refused.headers["x-request-id"] == refused.json()["request_id"]
    assert refused.headers["x-request-id"] not in {"first", "second"}


def test_health_checks_are_not_shed(full: Service) -> None:
    assert httpx.get(f"{full.url}/livez?").status_code == 200


def test_shedding_keeps_the_connection_open(full: Service) -> None:
    piece = b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n"
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    received = full.exchange(piece, b"abcd", piece + b"ab", b"cd" + LIST, last)

    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", received)
    assert statuses == [b"503", b"503", b"503", b"200"]


def test_repeated_shedding_does_not_end_a_connection(full: Service) -> None:
    piece = (
        b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"
        + b"a" * 900
    )
    with full.connect() as connection:
        for _ in range(500):
            connection.sendall(piece)
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(65_536)
            assert received.startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    "request_bytes",
    [
        LIST.replace(b"1.1", b"1.0"),
        LIST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
    ],
    ids=["HTTP/1.0", "close"],
)
def test_shedding_honours_connection_close(full: Service, request_bytes: bytes) -> None:
    received = full.exchange(request_bytes)

    assert received.startswith(b"HTTP/1.1 503 ")
    assert b"connection: close" in received


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (
            (
                b"POST /x HTTP/1.1\r\nHost: localhost\r\n"
                b"Content-Length: 9\r\nExpect: 100-continue\r\n\r\n"
            ),
            503,
        ),
        (
            (
                b"POST /x HTTP/1.1\r\nHost: localhost\r\n"
                b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
            ),
            503,
        ),
        (b"GET /x HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (b"GET /x HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", 503),
        (b"POST /x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n", 413),
    ],
    ids=["expect", "chunked", "two Hosts", "HTTP/1.0", "large"],
)
def test_shedding_an_unusual_request_ends_the_connection(
    full: Service, request_bytes: bytes, status: int
) -> None:
    received = full.exchange(request_bytes + b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")

    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received) == [str(status).encode()]
    assert b"connection: close" in received


def test_a_head_request_is_shed_without_a_body(full: Service) -> None:
    head = b"HEAD /sessions HTTP/1.1\r\nHost: localhost\r\n\r\n"
    last = b"GET /livez HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

    received = full.exchange(head + last)

    assert received.startswith(b"HTTP/1.1 503 ")
    assert received.partition(b"\r\n\r\n")[2].startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("first", [b"GET /livez", b"DELETE /sessions"], ids=["health", "close"])
def test_requests_behind_an_exempt_request_are_shed(full: Service, first: bytes) -> None:
    last = READ.replace(b"Connection: close\r\n", b"")
    received = full.exchange(
        first + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" + last * 3 + b"what\r\n\r\n"
    )

    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", received)
    assert statuses[1:] == [b"503"] * 3 + [b"400"]


def test_requests_behind_a_shed_connection_close_are_not_answered(
    full: Service,
) -> None:
    """The second request is shed and asks to close the connection; a third follows it."""
    ends = LIST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    first = b"DELETE /sessions HTTP/1.1\r\nHost: localhost\r\n\r\n"

    received = full.exchange(first + ends + LIST)

    statuses = re.findall(rb"HTTP/1\.1 (\d{3}) ", received)
    assert statuses == [b"405", b"503"]
    assert received.count(b"connection: close") == 1


def test_the_kill_switch_has_reserved_capacity(full: Service, server: engines.Server) -> None:
    with full.connect() as connection:
        connection.sendall(
            b"DELETE /agents/%b/sessions HTTP/1.1\r\n" % AGENT.encode()
            + b"Host: localhost\r\nConnection: close\r\n\r\n"
        )
        assert httpx.get(f"{full.url}/sessions").status_code == 503
        server.resume()
        assert received_on(connection).startswith(b"HTTP/1.1 200 ")


def test_capacity_is_released(service: Service, server: engines.Server) -> None:
    for leave in ("answered", "given up"):
        server.pause()
        with ExitStack() as stack:
            for _ in range(BOUND):
                stack.enter_context(service.connect()).sendall(READ)
            until(lambda: httpx.get(f"{service.url}/sessions").status_code == 503)
            if leave == "answered":
                server.resume()
                until(lambda: httpx.get(f"{service.url}/sessions").status_code == 200)
        server.resume()
        until(lambda: httpx.get(f"{service.url}/sessions").status_code == 200)

    assert gauge(service, "arbiter_http_requests_in_flight") == 1


def test_a_half_sent_request_is_not_in_flight(start_service: StartService) -> None:
    service = start_service(ARBITER_MAX_REQUESTS_IN_FLIGHT="1")
    half = b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(service.connect()).sendall(half)

        assert httpx.get(f"{service.url}/sessions").status_code == 200


def test_shed_requests_are_counted(full: Service, server: engines.Server) -> None:
    for _ in range(5):
        httpx.get(f"{full.url}/sessions")
    server.resume()
    until(lambda: httpx.get(f"{full.url}/metrics").status_code == 200)

    text = httpx.get(f"{full.url}/metrics").text
    found = re.search(
        r'^arbiter_http_refused_total\{code="overloaded"\} (\S+)$', text, re.MULTILINE
    )
    assert found is not None
    assert float(found[1]) >= 5


def call_request(path: str) -> bytes:
    body = b'{"tool_name":"read_file"}'
    return (
        b"POST %b HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (path.encode(), len(body), body)
    )


def test_a_burst_is_served(start_service: StartService) -> None:
    # The longest delay there is: how fast this machine is does not matter.
    service = start_service(ARBITER_MAX_QUEUE_DELAY_SECS="60")
    created = httpx.post(f"{service.url}/sessions", json=session_request(call_budget=50))
    path = f"/sessions/{created.json()['session_id']}/calls"
    with ExitStack() as stack:
        connections = [stack.enter_context(service.connect()) for _ in range(1000)]
        for each in connections:
            each.sendall(call_request(path))
        statuses = Counter(received_on(each)[9:12] for each in connections)

    assert statuses == {b"200": 50, b"429": 950}


@pytest.fixture
def queueing(start_service: StartService, server: engines.Server) -> Service:
    """A service where requests wait for up to a minute."""
    return start_service(
        ARBITER_STORE_URL=server.url + PATIENTLY,
        ARBITER_MAX_REQUESTS_IN_FLIGHT=str(BOUND),
        ARBITER_MAX_QUEUE_DELAY_SECS="60",
    )


def test_requests_wait_for_their_turn(queueing: Service, server: engines.Server) -> None:
    keep_alive = READ.replace(b"Connection: close\r\n", b"")
    with ExitStack() as stack:
        server.pause()
        held = [stack.enter_context(queueing.connect()) for _ in range(4 * BOUND)]
        for connection in held:
            connection.sendall(keep_alive + READ)
        gone = [stack.enter_context(queueing.connect()) for _ in range(BOUND)]
        for connection in gone:
            connection.sendall(READ)
        # Once this one is answered, those before it have been read.
        assert httpx.get(f"{queueing.url}/livez").status_code == 200
        for connection in gone:
            connection.close()
        server.resume()

        statuses = [re.findall(rb"HTTP/1\.1 (\d+) ", received_on(each)) for each in held]

    assert statuses == [[b"404", b"404"]] * len(held)
    until(lambda: gauge(queueing, "arbiter_http_requests_in_flight") == 1)


def test_requests_that_wait_too_long_are_shed(
    start_service: StartService, server: engines.Server
) -> None:
    service = start_service(
        ARBITER_STORE_URL=server.url + PATIENTLY,
        ARBITER_MAX_REQUESTS_IN_FLIGHT=str(BOUND),
        ARBITER_MAX_QUEUE_DELAY_SECS="0.05",
    )
    with ExitStack() as stack:
        server.pause()
        for _ in range(BOUND):
            stack.enter_context(service.connect()).sendall(READ)
        until(lambda: httpx.get(f"{service.url}/sessions").status_code == 503)

        pipelined = service.exchange(LIST + READ)
        plain = service.exchange(READ)
        server.resume()

    assert re.findall(rb"HTTP/1\.1 (\d+) ", pipelined) == [b"503", b"503"]
    assert b'"overloaded"' in plain
    assert b"connection: close" in plain
