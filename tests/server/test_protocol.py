"""The connection alone: what happens between reading a request and running it."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.http.dispatch import WHOLE_RESPONSE
from app.http.response import RawResponse
from app.main import create_app
from app.observability.metrics import Metrics
from app.server.gate import Gate, Limits
from app.server.protocol import MIN_READ_BYTES_PER_SEC, LimitedProtocol, State
from app.server.queue import RequestQueue
from app.server.turn import Turn
from app.settings import Settings

pytestmark = pytest.mark.anyio

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class FakeTransport(asyncio.Transport):
    """Notes what is written. Its socket is connected to nothing."""

    def __init__(self, unconnected: socket.socket) -> None:
        super().__init__({"socket": unconnected})
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass

    def get_write_buffer_size(self) -> int:
        return 0

    def resume_reading(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def can_write_eof(self) -> bool:
        return False


async def waits_a_turn(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(0)
    await never_waits(scope, receive, send)


async def never_waits(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def responds_whole(scope: Scope, receive: Receive, send: Send) -> None:
    extension = scope["extensions"].get(WHOLE_RESPONSE)
    # A request may run after its client has gone. To fail then would keep the connection alive
    # in the traceback that is logged, from Python 3.12 on.
    assert extension is None or extension["respond"](RawResponse(204, []), [])


Connect = Callable[..., LimitedProtocol]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Make a connection over a fake transport."""
    with closing(socket.socket(socket.AF_UNIX)) as unconnected:

        def made(
            app: Callable[..., Any], *, tasks: bool, limits: Limits | None = None
        ) -> LimitedProtocol:
            state = {
                "gate": Gate(Metrics(), limits or Limits()),
                "turn": Turn(asyncio.get_running_loop(), tasks=tasks),
            }
            config = uvicorn.Config(app, log_config=None, access_log=False)
            connection = LimitedProtocol(config, ServerState(), state)
            connection.connection_made(FakeTransport(unconnected))
            return connection

        yield made


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


@pytest.mark.parametrize("tasks", [False, True], ids=["turns", "tasks"])
@pytest.mark.parametrize("app", [never_waits, waits_a_turn])
class TestInFlight:
    async def test_a_request_is_in_flight_until_it_is_answered(
        self, connect: Connect, app: Callable[..., Any], tasks: bool
    ) -> None:
        connection = connect(app, tasks=tasks)
        metrics = connection._gate.metrics
        connection.data_received(GET)
        assert metrics.requests_in_flight == 1
        await turns()

        assert metrics.requests_in_flight == 0
        assert connection.transport.written.startswith(b"HTTP/1.1 204 ")

    async def test_a_client_that_leaves_at_once_frees_its_place_once(
        self, connect: Connect, app: Callable[..., Any], tasks: bool
    ) -> None:
        connection = connect(app, tasks=tasks)
        metrics = connection._gate.metrics
        connection.data_received(GET)
        connection.connection_lost(None)
        assert metrics.requests_in_flight == 1
        await turns()

        assert metrics.requests_in_flight == 0
        assert connection.transport.written == b""
        assert not connection.server_state.tasks

    async def test_a_client_that_leaves_during_the_request_frees_its_place_once(
        self, connect: Connect, app: Callable[..., Any], tasks: bool
    ) -> None:
        connection = connect(app, tasks=tasks)
        metrics = connection._gate.metrics
        connection.data_received(GET)
        await asyncio.sleep(0)
        connection.connection_lost(None)
        await turns()

        assert metrics.requests_in_flight == 0
        assert not connection.server_state.tasks


@pytest.mark.parametrize("tasks", [False, True], ids=["turns", "tasks"])
@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"nonsense\r\n", [b"204", b"400"]),
        (
            GET.replace(b"Host", b"Expect: 100-continue\r\nContent-Length: 1\r\nHost"),
            [b"204", b"100"],
        ),
    ],
    ids=["a refusal", "100 Continue"],
)
async def test_nothing_overtakes_a_response_that_is_not_written_yet(
    connect: Connect, tasks: bool, sent: bytes, statuses: list[bytes]
) -> None:
    connection = connect(responds_whole, tasks=tasks)
    connection.data_received(GET)
    await asyncio.sleep(0)
    connection.data_received(sent)
    await turns()

    found = re.findall(rb"HTTP/1\.1 (\d{3}) ", connection.transport.written)
    assert found == statuses


async def test_a_response_is_written_before_the_connection_closes(connect: Connect) -> None:
    connection = connect(responds_whole, tasks=True)
    connection.data_received(GET)
    await asyncio.sleep(0)
    assert connection.transport.written == b""
    connection.shutdown()

    assert connection.transport.written.startswith(b"HTTP/1.1 204 ")


@pytest.mark.parametrize("tasks", [False, True], ids=["turns", "tasks"])
async def test_a_client_that_has_finished_sending_gets_its_response(
    connect: Connect, tasks: bool
) -> None:
    connection = connect(responds_whole, tasks=tasks)
    connection.data_received(GET)
    await asyncio.sleep(0)
    # The transport closes after this.
    assert connection.eof_received() is None

    assert connection.transport.written.startswith(b"HTTP/1.1 204 ")


async def test_the_last_of_several_requests_may_be_http_1_0(connect: Connect) -> None:
    connection = connect(responds_whole, tasks=False)
    connection.data_received(GET * 2 + GET.replace(b"1.1", b"1.0"))
    await turns()

    answers = connection.transport.written.split(b"HTTP/1.1 204 ")[1:]
    assert [b"connection: close" in each for each in answers] == [False, False, True]


POST = b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000\r\n\r\n"


@pytest.mark.parametrize("tasks", [False, True], ids=["turns", "tasks"])
@pytest.mark.parametrize(
    "sent",
    [
        [],
        [GET],
        [b"GET / HT"],
        [POST, b"-" * 100],
        [POST, b"-" * 60_000],
        [GET * 9],
        [GET, b"nonsense\r\n"],
    ],
    ids=["nothing", "a request", "half a head", "half a body", "a body", "many", "a refusal"],
)
@pytest.mark.parametrize("turns_before", [0, 1, 4])
@pytest.mark.parametrize("app", [responds_whole, never_waits, waits_a_turn])
async def test_nothing_is_left_of_a_closed_connection(
    connect: Connect, app: Callable[..., Any], turns_before: int, sent: list[bytes], tasks: bool
) -> None:
    connection = connect(app, tasks=tasks)
    left = weakref.ref(connection)
    gc.disable()
    try:
        for each in sent:
            connection.data_received(each)
        for _ in range(turns_before):
            await asyncio.sleep(0)
        connection.connection_lost(ConnectionResetError())
        del connection
        await turns()

        assert left() is None
    finally:
        gc.enable()


async def test_an_idle_connection_keeps_no_body(connect: Connect) -> None:
    connection = connect(responds_whole, tasks=False)
    connection.data_received(POST)
    connection.data_received(b"-" * 60_000)
    await turns()

    assert connection.transport.written.startswith(b"HTTP/1.1 204 ")
    kept = connection._current
    assert kept is not None
    assert kept.body == b""
    assert sys.getrefcount(kept) == 4, "the connection, its reader, the local name, the call"


async def test_without_a_lifespan_every_request_is_told_so() -> None:
    app = create_app(Settings(_env_file=None, log_format="json"))
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
    with closing(socket.socket(socket.AF_UNIX)) as unconnected:
        connection = LimitedProtocol(config, ServerState(), {})
        connection.connection_made(FakeTransport(unconnected))
        connection.data_received(GET)
        await turns()

    assert statuses(connection) == [b"500"]
    assert b"must run its lifespan" in connection.transport.written


class TestSlowReaders:
    """Clients that do not read, so that nothing more can be written."""

    @pytest.mark.parametrize("tasks", [False, True], ids=["turns", "tasks"])
    async def test_no_request_starts_before_the_client_has_read(
        self, connect: Connect, tasks: bool
    ) -> None:
        connection = connect(responds_whole, tasks=tasks)
        metrics = connection._gate.metrics
        connection.pause_writing()
        connection.data_received(GET * 3)
        await turns()
        assert (connection.transport.written, metrics.requests_in_flight) == (b"", 0)

        for answered in (1, 2, 3):
            connection.resume_writing()
            if answered < 3:
                connection.pause_writing()
            await turns()
            assert statuses(connection) == [b"204"] * answered
            assert metrics.requests_in_flight == 0
        assert connection.state is State.IDLE

    async def test_a_response_in_parts_waits_without_a_place(self, connect: Connect) -> None:
        blocked = asyncio.Event()

        async def streams(scope: Scope, receive: Receive, send: Send) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            connection.pause_writing()
            blocked.set()
            await send({"type": "http.response.body", "body": b"late"})

        connection = connect(streams, tasks=True)
        metrics = connection._gate.metrics
        connection.data_received(GET + GET)
        await blocked.wait()
        assert (connection.state, metrics.requests_in_flight) == (State.SENDING, 0)
        assert b"late" not in connection.transport.written

        connection.resume_writing()
        blocked.clear()
        await blocked.wait()

        assert b"late" in connection.transport.written
        assert (connection.state, metrics.requests_in_flight) == (State.SENDING, 0)
        connection.connection_lost(None)
        await turns()
        assert metrics.requests_in_flight == 0

    @pytest.mark.parametrize("before", [b"", GET], ids=["first", "pipelined"])
    async def test_a_body_is_awaited_although_100_continue_fills_the_buffer(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch, before: bytes
    ) -> None:
        connection = connect(responds_whole, tasks=False)
        write = connection.transport.write

        def pausing(data: bytes) -> None:
            write(data)
            if b" 100 " in data:
                connection.pause_writing()

        monkeypatch.setattr(connection.transport, "write", pausing)
        head = GET.replace(b"GET", b"POST").replace(
            b"Host", b"Expect: 100-continue\r\nContent-Length: 1\r\nHost"
        )
        connection.data_received(before + head)
        await turns()
        assert connection.state is State.SENDING
        connection.resume_writing()
        assert (connection.state, connection.flow.read_paused) == (State.IDLE, False)

        connection.data_received(b"x")
        await turns()

        assert statuses(connection)[-2:] == [b"100", b"204"]

    async def test_a_refusal_waits_for_what_the_client_has_not_read_yet(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        unsent = 200_000
        monkeypatch.setattr("app.server.protocol.unsent_bytes", lambda _: unsent)
        connection = connect(responds_whole, tasks=False)
        connection.data_received(b"nonsense\r\n")
        assert connection.state is State.LINGERING

        for _ in range(2):
            connection.on_deadline()
            assert connection.state is State.LINGERING
            unsent -= 90_000
        unsent = 0
        connection.on_deadline()

        assert connection.state is State.CLOSING

    async def test_a_client_must_read_fast_enough(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        aborted = []
        unsent = 1_000_000
        monkeypatch.setattr("app.server.protocol.unsent_bytes", lambda _: unsent)
        connection = connect(responds_whole, tasks=False)
        monkeypatch.setattr(connection.transport, "abort", lambda: aborted.append(unsent))
        connection.pause_writing()
        enough = int(MIN_READ_BYTES_PER_SEC * connection._gate.request_timeout_secs)

        unsent -= enough
        connection.on_deadline()
        assert aborted == []
        unsent -= enough - 1
        connection.on_deadline()

        assert aborted == [unsent]


def statuses(connection: LimitedProtocol) -> list[bytes]:
    return re.findall(rb"HTTP/1\.1 (\d{3}) ", connection.transport.written)


FULL = Limits(requests_in_flight=0, queue_delay_secs=0)


class TestShedding:
    async def test_a_shed_request_leaves_no_body(self, connect: Connect) -> None:
        connection = connect(responds_whole, tasks=False, limits=Limits(queue_delay_secs=0))
        connection.data_received(POST)
        connection._gate.metrics.requests_in_flight = Limits().requests_in_flight
        connection.data_received(b"-" * 60_000)
        await turns()

        assert statuses(connection) == [b"503"]
        assert connection._current is not None
        assert connection._current.body == b""

    async def test_a_client_that_does_not_read_is_not_answered_without_end(
        self, connect: Connect, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connection = connect(responds_whole, tasks=False, limits=FULL)
        write = connection.transport.write

        def pausing(data: bytes) -> None:
            write(data)
            if len(connection.transport.written) > 65_536 and not connection.flow.write_paused:
                connection.pause_writing()

        monkeypatch.setattr(connection.transport, "write", pausing)
        connection.data_received(GET * 10_000)
        await turns()

        assert 65_536 < len(connection.transport.written) < 2 * 65_536

    async def test_a_request_is_not_refused_for_the_mistake_of_the_next(
        self, connect: Connect
    ) -> None:
        connection = connect(responds_whole, tasks=False)
        second = GET.replace(b"GET", b"HEAD").replace(b"Host", b"X-Request-Id: two\r\nHost")
        connection.data_received(GET + second + b"nonsense\r\n")
        # Its response ends the connection, so it cannot be shed.
        connection._pipeline[-1].keep_alive = False
        connection._max_in_flight = connection._gate.max_requests_in_flight = 0
        connection._gate.queue = RequestQueue(0)
        await turns()

        assert statuses(connection) == [b"204", b"503"]
        assert b"x-request-id: two" in connection.transport.written

    async def test_a_shed_request_lets_no_more_in_flight_than_allowed(
        self, connect: Connect
    ) -> None:
        """Its connection goes on with the next request, into the place that has become free."""
        first = connect(waits_a_turn, tasks=True, limits=Limits(requests_in_flight=1))
        gate = first._gate
        now = 0.0
        gate.queue = RequestQueue(0.25, lambda: now)
        others = [connect(waits_a_turn, tasks=True) for _ in range(2)]
        for each in others:
            each._gate, each._metrics, each._max_in_flight = gate, gate.metrics, 1
        first.data_received(GET)
        others[0].data_received(GET * 2)
        now = 0.2
        others[1].data_received(GET)
        now = 0.3
        most = 0
        for _ in range(12):
            await asyncio.sleep(0)
            most = max(most, gate.metrics.requests_in_flight)

        assert most == 1
        assert [statuses(each) for each in (first, *others)] == [
            [b"204"],
            [b"503", b"204"],
            [b"204"],
        ]

    async def test_nothing_overtakes_a_response_in_one_turn(self, connect: Connect) -> None:
        connection = connect(never_waits, tasks=False)
        turn = connection._turn
        turn.write(connection.transport, b"HTTP/1.1 200 OK\r\n\r\n")
        connection.data_received(GET)
        turn._run()

        assert statuses(connection) == [b"200", b"204"]
