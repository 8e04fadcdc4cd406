"""Clients that stop halfway. The service is configured to wait for half a second, and the tests
wait until it ends the connection."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from tests import engines
from tests.conftest import PATIENTLY
from tests.engines import until
from tests.services import Service, StartService, received_on, running
from tests.support import session_request

HEAD = b"POST /sessions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
QUICK = {"ARBITER_REQUEST_TIMEOUT_SECS": "0.5", "ARBITER_KEEP_ALIVE_SECS": "0.5"}
ANSWERED = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"

HALF_SENT = {
    "nothing": (b"", []),
    "an empty line": (b"\r\n", []),
    "half a request line": (b"POST /sess", [408]),
    "half a header": (HEAD[:-8], [408]),
    "headers without their end": (HEAD, [408]),
    "a head without its body": (HEAD + b"Content-Length: 99\r\n\r\n", [408]),
    "half a body": (HEAD + b"Content-Length: 99\r\n\r\n{", [408]),
    "half a chunk": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n9\r\n{", [408]),
    "chunks without their end": (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", [408]),
    "a whole request and silence": (ANSWERED, [200]),
    "a whole request and half of another": (ANSWERED + b"GET /", [200, 408]),
    "half a body for an unknown path": (
        b"POST /nowhere HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n",
        [408],
    ),
    "a head with Expect: 100-continue": (
        HEAD + b"Expect: 100-continue\r\nContent-Length: 99\r\n\r\n",
        [100, 408],
    ),
}
"""What is sent, and the statuses received before the connection ends."""


def gauge(service: Service, name: str) -> float:
    """Return a metric, which includes the connection and request of this scrape."""
    text = httpx.get(f"{service.url}/metrics", timeout=30).text
    found = re.search(rf"^{name} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@contextmanager
def connections(service: Service, number: int, sent: bytes = b"") -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(number):
            stack.enter_context(service.connect()).sendall(sent)
        yield


@pytest.fixture(scope="module")
def quick() -> Iterator[Service]:
    with running(**QUICK) as service:
        yield service


@pytest.mark.parametrize(("sent", "statuses"), HALF_SENT.values(), ids=HALF_SENT)
def test_a_stalled_connection_is_ended(
    quick: Service, sent: bytes, statuses: list[int]
) -> None:
    received = quick.exchange(sent)

    assert [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)] == statuses


def test_a_half_sent_request_gets_a_problem(quick: Service) -> None:
    received = quick.exchange(HEAD + b"X-Request-Id: mine\r\nContent-Length: 99\r\n\r\n{")

    head, _, body = received.partition(b"\r\n\r\n")
    problem = httpx.Response(408, content=body).json()
    assert b"content-type: application/problem+json" in head
    assert (problem["code"], problem["request_id"]) == ("request_timeout", "mine")


@pytest.mark.parametrize(
    "piece", [b"\r\n", b"X: y\r\n"], ids=["empty lines", "endless headers"]
)
def test_trickling_bytes_does_not_extend_the_deadline(quick: Service, piece: bytes) -> None:
    with quick.connect() as connection:
        connection.sendall(b"" if piece == b"\r\n" else HEAD)
        connection.settimeout(0.05)
        ended = False
        for _ in range(200):
            try:
                connection.sendall(piece)
                ended = connection.recv(65_536) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                ended = True
            if ended:
                break

    assert ended


def test_a_client_that_does_not_read_is_disconnected(quick: Service) -> None:
    """Its responses, here about 20 MB, would fill the memory."""
    with quick.connect() as connection:
        connection.settimeout(2)
        request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
        with suppress(ConnectionError, TimeoutError):
            for _ in range(100_000):
                connection.sendall(request * 100)
        connection.settimeout(30)
        # Responses sent before the end still arrive; then the connection ends.
        received = received_on(connection)

    assert received.startswith(b"HTTP/1.1 200 ")
    assert gauge(quick, "arbiter_http_requests_in_flight") == 1


def test_clients_that_do_not_read_leave_places_for_others(start_service: StartService) -> None:
    """They need no key to ask for a large response, many times on one connection."""
    service = start_service(
        ARBITER_MAX_REQUESTS_IN_FLIGHT="2",
        ARBITER_MAX_QUEUE_DELAY_SECS="60",
        ARBITER_REQUEST_TIMEOUT_SECS="60",
    )
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connections(service, 16, request * 60), httpx.Client(base_url=service.url) as client:
        # Each has got as much as the buffers of the system hold.
        until(lambda: gauge(service, "arbiter_http_requests_in_flight") == 1)
        made = [client.post("/sessions", json=session_request()) for _ in range(50)]

    assert [each.status_code for each in made] == [201] * 50


def test_a_client_that_reads_too_slowly_is_disconnected(quick: Service) -> None:
    """It always makes progress, but so little that it could hold a connection for good."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(quick.address)
        connection.sendall(request * 60)
        # A socket that never receives anything, to wait on between reads.
        here, there = socket.socketpair()
        with here, there:
            here.settimeout(0.1)
            # What the system has buffered still arrives after that.
            while gauge(quick, "arbiter_http_connections") > 1:
                assert connection.recv(256)
                with suppress(TimeoutError):
                    here.recv(1)


@pytest.mark.parametrize("ending", [b"", b"Connection: close\r\n"], ids=["keep", "close"])
def test_a_client_that_reads_slowly_gets_its_answer(quick: Service, ending: bytes) -> None:
    """It takes longer than any timeout, but never stalls."""
    tools = [f"{'t' * 120}{index:03}" for index in range(256)]
    with httpx.Client(base_url=quick.url) as client:
        for _ in range(100):
            client.post("/sessions", json=session_request(authorized_tools=tools))
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65_536)
        connection.connect(quick.address)
        connection.sendall(
            b"GET /sessions?limit=500 HTTP/1.1\r\nHost: localhost\r\n" + ending + b"\r\n"
        )
        received = b""
        # A socket that never receives anything, to wait on between reads.
        here, there = socket.socketpair()
        with here, there:
            here.settimeout(0.04)
            while chunk := connection.recv(65_536):
                received += chunk
                with suppress(TimeoutError):
                    here.recv(1)

    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    assert len(body) == int(length[1]) > 3_000_000


@pytest.mark.parametrize("request_bytes", [ANSWERED, ANSWERED * 3], ids=["one", "three"])
def test_a_half_closed_client_gets_its_answers(quick: Service, request_bytes: bytes) -> None:
    body = json.dumps(session_request()).encode()
    created = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    with quick.connect() as connection:
        connection.sendall(created + request_bytes)
        connection.shutdown(socket.SHUT_WR)
        received = received_on(connection)

    assert received.startswith(b"HTTP/1.1 201 ")
    assert received.count(b"HTTP/1.1 200 ") == request_bytes.count(b"GET ")


@pytest.mark.parametrize(
    ("behind", "status"), [(b"what\r\n\r\n", b"400"), (b"GET /li", b"408")]
)
def test_a_slow_answer_is_not_lost_to_a_bad_request_behind_it(
    start_service: StartService, server: engines.Server, behind: bytes, status: bytes
) -> None:
    service = start_service(ARBITER_STORE_URL=server.url + PATIENTLY, **QUICK)
    with service.connect() as connection:
        server.pause()
        connection.sendall(ANSWERED.replace(b"/livez", b"/sessions") + behind)
        connection.settimeout(2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        server.resume()
        connection.settimeout(30)
        received = received_on(connection)

    assert re.findall(rb"HTTP/1\.1 (\d{3}) ", received) == [b"200", status]


@pytest.mark.anyio
async def test_500_idle_connections_do_no_harm_and_are_ended(
    start_service: StartService,
) -> None:
    service = start_service(ARBITER_KEEP_ALIVE_SECS="2", ARBITER_REQUEST_TIMEOUT_SECS="2")
    with connections(service, 250), connections(service, 250, HEAD):
        async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
            created = await client.post("/sessions", json=session_request(call_budget=99))
            path = f"/sessions/{created.json()['session_id']}/calls"
            calls = [client.post(path, json={"tool_name": "read_file"}) for _ in range(50)]
            answers = await asyncio.gather(*calls)
        assert {answer.status_code for answer in answers} == {200}
        assert gauge(service, "arbiter_http_connections") > 500

        # The client closes nothing.
        while gauge(service, "arbiter_http_connections") > 1:
            pass


CAP = 20


@pytest.fixture
def capped(start_service: StartService) -> Service:
    return start_service(ARBITER_MAX_CONNECTIONS=str(CAP), ARBITER_REQUEST_TIMEOUT_SECS="60")


@pytest.mark.parametrize("held", [CAP, CAP + 200], ids=["full", "flooded"])
def test_health_is_still_answered_at_the_connection_limit(capped: Service, held: int) -> None:
    with connections(capped, held):
        for path in ("/livez", "/readyz", "/healthz"):
            assert httpx.get(f"{capped.url}{path}").status_code == 200
            assert httpx.head(f"{capped.url}{path}").status_code == 200

        refused = httpx.get(f"{capped.url}/sessions")

    assert refused.status_code == 503
    assert refused.json()["code"] == "overloaded"
    assert refused.headers["retry-after"] == "1"
    assert refused.headers["connection"] == "close"


def test_closed_connections_make_room(capped: Service) -> None:
    with connections(capped, CAP + 5):
        assert httpx.get(f"{capped.url}/sessions").status_code == 503

    statuses = (httpx.get(f"{capped.url}/sessions").status_code for _ in range(1000))
    assert 200 in statuses


def test_idle_connections_make_room_near_the_limit(
    start_service: StartService,
) -> None:
    service = start_service(ARBITER_MAX_CONNECTIONS=str(CAP))
    with ExitStack() as stack:
        idle = [stack.enter_context(service.connect()) for _ in range(CAP)]
        for connection in idle:
            connection.sendall(ANSWERED)

        # Ended after 2 s, not after the usual 75 s.
        assert received_on(idle[0]).startswith(b"HTTP/1.1 200 ")


def test_a_connection_limit_above_the_file_limit_is_logged(start_service: StartService) -> None:
    service = start_service(ARBITER_MAX_CONNECTIONS="10000000")

    assert any("fewer open files" in line for line in service.log)


def test_a_reset_connection_leaves_nothing_behind(quick: Service) -> None:
    for sent in (b"", HEAD, HEAD + b"Content-Length: 99\r\n\r\n{", ANSWERED):
        connection = quick.connect()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(sent)
        connection.close()

    while gauge(quick, "arbiter_http_connections") > 1:
        pass
    assert gauge(quick, "arbiter_http_requests_in_flight") == 1
