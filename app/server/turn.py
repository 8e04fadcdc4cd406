"""Requests that one turn of the event loop has read run together, and their responses are
written together.

To read, run and write one request after the other is a third slower: the caches of the
processor start cold in each step, and every write wakes up a client. So requests are not run
where they are read, inside the parser's callback, nor responses written where they are made.

Over a store that never waits, requests need no task, which would take a twentieth of their
time. They start without one and get one when they first wait. Until then
`asyncio.current_task()` is `None`: code that needs a task waits once, with `asyncio.sleep(0)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import Context
from typing import Any, Protocol

from typing_extensions import override


class Connection(Protocol):
    """Whose request runs."""

    def on_task(self, task: asyncio.Task[None]) -> None:
        """Called when a task runs the request: `task`."""


Request = Coroutine[Any, Any, None]


class Turn:
    """What the next turn of `loop` does. With `tasks`, every request has one from the start."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, tasks: bool) -> None:
        self._loop = loop
        self._tasks = tasks
        self._requests: list[tuple[Connection, Request]] = []
        self._responses: list[tuple[asyncio.Transport, bytes]] = []
        self._is_running = False

    def run(self, connection: Connection, request: Request) -> None:
        """Run a request in the next turn, after those before it."""
        if self._tasks:
            connection.on_task(self._loop.create_task(request, context=Context()))
            return
        self._requests.append((connection, request))
        if len(self._requests) == 1:
            self._loop.call_soon(self._run)

    def write(self, transport: asyncio.Transport, response: bytes) -> None:
        """Write a response at the end of this turn. Call `flush` before anything else is done
        with the transport."""
        self._responses.append((transport, response))
        if len(self._responses) == 1 and not self._is_running:
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write the responses."""
        if self._responses:
            responses, self._responses = self._responses, []
            for transport, response in responses:
                if not transport.is_closing():
                    transport.write(response)

    def _run(self) -> None:
        # A request may answer its client by itself, after the response to its last one.
        self.flush()
        requests, self._requests = self._requests, []
        self._is_running = True
        try:
            for connection, request in requests:
                self._start(connection, request)
        finally:
            self._is_running = False
            self.flush()

    def _start(self, connection: Connection, request: Request) -> None:
        # Its own: it may be started by another request, on the same connection or from a queue.
        context = Context()
        try:
            awaited = context.run(request.send, None)
        except StopIteration:
            return
        except Exception as error:  # noqa: BLE001 - reported, as that of a task is
            self._loop.call_exception_handler(
                {"message": "a request failed", "exception": error}
            )
            return
        rest = _Rest(request, awaited)
        connection.on_task(self._loop.create_task(rest, context=context))


class _Rest(Request):
    """A coroutine that has started and waits for `awaited`, for a task to continue."""

    def __init__(self, started: Request, awaited: Any) -> None:
        self._started = started
        self._awaited = awaited
        self._is_handed_over = False

    @override
    def send(self, value: Any) -> Any:
        if self._is_handed_over:
            return self._started.send(value)
        self._is_handed_over = True
        return self._awaited

    @override
    def throw(self, *error: Any) -> Any:
        self._is_handed_over = True
        return self._started.throw(*error)

    @override
    def close(self) -> None:
        self._started.close()

    @override
    def __await__(self) -> Any:
        return self._started.__await__()
