"""Requests that one turn of the event loop has read run together, and their responses are
written together.

To read, run and write one request after the other is a third slower: the caches of the
processor start cold in each step, and every write wakes up a client. So requests are not run
where they are read, inside the parser's callback, nor responses written where they are made.

Over a store that never waits, requests need no task, which would take a twentieth of their
time. Nor do they over a store that answers many of them at once: those that wait for the same
future are kept, and go on together when it is done, as they started. Whatever else a request
waits for gives it a task. Until then `asyncio.current_task()` is `None`: code that needs a task
waits once, with `asyncio.sleep(0)`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from contextvars import Context
from typing import Any, NamedTuple, Protocol

from typing_extensions import override


class Connection(Protocol):
    """Whose request runs."""

    def on_task(self, task: asyncio.Task[None]) -> None:
        """Called when a task runs the request: `task`."""


Request = Coroutine[Any, Any, None]


class _Started(NamedTuple):
    """A request that has run until it had to wait, without a task."""

    connection: Connection
    request: Request
    context: Context


class Turn:
    """What the next turn of `loop` does. With `tasks`, every request has one from the start."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, tasks: bool) -> None:
        self._loop = loop
        self._tasks = tasks
        self._requests: list[tuple[Connection, Request]] = []
        self._waiting: dict[asyncio.Future[Any], list[_Started]] = {}
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

    def give_tasks(self, connection: Connection) -> None:
        """Give a task to each request of a connection that is kept: somebody has to wait for
        it, or to cancel it."""
        for future, waiting in self._waiting.items():
            for started in [each for each in waiting if each.connection is connection]:
                waiting.remove(started)
                future._asyncio_future_blocking = True  # noqa: SLF001 - as in `_step`
                self._give_task(started, future)

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
        requests, self._requests = self._requests, []
        # Each in a context of its own: it may be started by another request, on the same
        # connection or from a queue.
        self._go_on(_Started(*each, Context()) for each in requests)

    def _resume(self, future: asyncio.Future[Any]) -> None:
        self._go_on(self._waiting.pop(future))

    def _go_on(self, requests: Iterable[_Started]) -> None:
        """Run requests until each is done or waits, and write their responses."""
        # A request may answer its client by itself, after the response to its last one.
        self.flush()
        self._is_running = True
        try:
            for each in requests:
                self._step(each)
        finally:
            self._is_running = False
            self.flush()

    def _step(self, started: _Started) -> None:
        try:
            awaited = started.context.run(started.request.send, None)
        except (StopIteration, asyncio.CancelledError):
            return
        except Exception as error:  # noqa: BLE001 - reported, as that of a task is
            self._loop.call_exception_handler(
                {"message": "a request failed", "exception": error}
            )
            return
        if not isinstance(awaited, asyncio.Future):
            self._give_task(started, awaited)
            return
        # As a task does: the mark says that it is awaited by one (`Future.__await__`).
        awaited._asyncio_future_blocking = False  # noqa: SLF001
        if awaited in self._waiting:
            self._waiting[awaited].append(started)
        else:
            self._waiting[awaited] = [started]
            awaited.add_done_callback(self._resume)

    def _give_task(self, started: _Started, awaited: Any) -> None:
        rest = _Rest(started.request, awaited)
        started.connection.on_task(self._loop.create_task(rest, context=started.context))


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
