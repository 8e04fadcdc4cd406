"""The connection alone: what happens between reading a request and running it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from app.observability.metrics import Metrics
from app.server.gate import Gate, Limits
from app.server.protocol import LimitedProtocol
from app.server.turn import Turn

pytestmark = pytest.mark.anyio

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        pass


async def waits_a_turn(scope: Scope, receive: Receive, send: Send) -> None:
    await asyncio.sleep(0)
    await never_waits(scope, receive, send)


async def never_waits(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def connected(app: Callable[..., Any], *, tasks: bool) -> LimitedProtocol:
    turn = None if tasks else Turn(asyncio.get_running_loop())
    gate = Gate(Metrics(), Limits(), turn=turn)
    config = uvicorn.Config(app, log_config=None)
    connection = LimitedProtocol(config, ServerState(), {"gate": gate})
    connection.connection_made(FakeTransport())
    return connection


async def turns() -> None:
    for _ in range(4):
        await asyncio.sleep(0)


@pytest.mark.parametrize("tasks", [False, True], ids=["turns", "tasks"])
@pytest.mark.parametrize("app", [never_waits, waits_a_turn])
class TestInFlight:
    async def test_a_request_is_in_flight_until_it_is_answered(
        self, app: Callable[..., Any], tasks: bool
    ) -> None:
        connection = connected(app, tasks=tasks)
        metrics = connection._gate.metrics
        connection.data_received(GET)
        assert metrics.requests_in_flight == 1
        await turns()

        assert metrics.requests_in_flight == 0
        assert connection.transport.written.startswith(b"HTTP/1.1 204 ")

    async def test_a_client_that_leaves_at_once_frees_its_place_once(
        self, app: Callable[..., Any], tasks: bool
    ) -> None:
        connection = connected(app, tasks=tasks)
        metrics = connection._gate.metrics
        connection.data_received(GET)
        connection.connection_lost(None)
        assert metrics.requests_in_flight == 1
        await turns()

        assert metrics.requests_in_flight == 0
        assert connection.transport.written == b""
        assert not connection.server_state.tasks

    async def test_a_client_that_leaves_during_the_request_frees_its_place_once(
        self, app: Callable[..., Any], tasks: bool
    ) -> None:
        connection = connected(app, tasks=tasks)
        metrics = connection._gate.metrics
        connection.data_received(GET)
        await asyncio.sleep(0)
        connection.connection_lost(None)
        await turns()

        assert metrics.requests_in_flight == 0
        assert not connection.server_state.tasks
