"""Runs the requests that one turn of the event loop has read, without a task for each.

A task takes a twentieth of the time of a call, and over a store that never waits no call needs
one. So a request starts without a task and gets one when it first waits. Until then
`asyncio.current_task()` is `None`: code that needs a task waits once, with `asyncio.sleep(0)`.

Requests are not run where they are read, inside the parser's callback. Reading 32 requests and
then running them took 37 µs each, running each at once 46.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import copy_context
from typing import Any, Protocol

from typing_extensions import override


class Connection(Protocol):
    """Whose request runs."""

    def on_task(self, task: asyncio.Task[None]) -> None:
        """Called when the request waits: `task` continues it."""


class Turn:
    """The requests to run in the next turn of `loop`, oldest first."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._requests: list[tuple[Connection, Coroutine[Any, Any, None]]] = []

    def join(self, connection: Connection, request: Coroutine[Any, Any, None]) -> None:
        """Run `request` in the next turn."""
        self._requests.append((connection, request))
        if len(self._requests) == 1:
            self._loop.call_soon(self._run)

    def _run(self) -> None:
        requests, self._requests = self._requests, []
        for connection, request in requests:
            context = copy_context()
            try:
                awaited = context.run(request.send, None)
            except StopIteration:
                continue
            except Exception as error:  # noqa: BLE001 - reported, as that of a task is
                self._loop.call_exception_handler(
                    {"message": "a request failed", "exception": error}
                )
                continue
            rest = _Rest(request, awaited)
            connection.on_task(self._loop.create_task(rest, context=context))


class _Rest(Coroutine[Any, Any, None]):
    """A coroutine that has started and waits for `awaited`, for a task to continue."""

    def __init__(self, started: Coroutine[Any, Any, None], awaited: Any) -> None:
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
