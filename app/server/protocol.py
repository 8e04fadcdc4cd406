"""The connection of the service: uvicorn's task, with limits that uvicorn has no setting for.

A reader limits the size and form of requests. The connection limits how long each may take
and how many are in flight. It serves a request once it is whole, and sheds it if that would
take too long.

A refusal is sent after the responses to earlier requests on the connection. Nothing more is
read then. The connection is half closed first and closed a moment later, because closing it
with unread data would reset it, and the client could lose the response.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from functools import partial
from types import MappingProxyType
from typing import Any, cast

from typing_extensions import override
from uvicorn._types import HTTPScope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from app.http.dispatch import WHOLE_RESPONSE
from app.http.problems import (
    OVERLOADED,
    REQUEST_TIMEOUT,
    Refused,
)
from app.http.response import Headers, RawResponse
from app.observability.metrics import Metrics
from app.server import head
from app.server.exchange import CLOSE, Exchange, encode_response
from app.server.flow import unread_bytes, unsent_bytes
from app.server.gate import HEALTH_PATHS, Gate
from app.server.reader import RequestReader
from app.server.refusals import LoadShedResponse, refusal
from app.server.turn import Turn

MAX_PIPELINED = 64
"""Maximum number of requests on one connection that wait for the one being served."""

LINGER_SECS = 1.0
"""How long a connection stays half closed, so that the client can read the refusal."""

_load_shed_response = LoadShedResponse()


class LimitedProtocol(asyncio.Protocol):
    """One connection. All of them share the `gate` and the `turn` of `app_state`, which the
    lifespan provides."""

    transport: asyncio.Transport
    flow: FlowControl

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        if not config.loaded:
            config.load()
        self.app = config.loaded_app
        self.loop = _loop or asyncio.get_event_loop()
        self.server_state = server_state
        self._scope = cast(
            "HTTPScope",
            {
                "type": "http",
                "asgi": {"version": config.asgi_version, "spec_version": "2.3"},
                "root_path": config.root_path,
                "state": MappingProxyType(app_state),
                "extensions": {WHOLE_RESPONSE: {"respond": self._respond}},
            },
        )
        self._access_log = logging.getLogger("uvicorn.access").hasHandlers()
        self._gate: Gate = app_state["gate"]
        self._turn: Turn = app_state["turn"]
        self._metrics: Metrics = self._gate.metrics
        self.deadline = math.inf
        self._within_limit = True
        self._max_in_flight = 0
        self._answered = self._client_ended = False
        self._unsent_bytes = 0
        self._refused: Refused | None = None

        self._serving: Exchange | None = None
        """The request that is being served or received, or the last one."""
        self._task: asyncio.Task[None] | None = None
        self._in_flight = False
        self._queued: Exchange | None = None
        self._pipeline: deque[Exchange] = deque()
        """Requests that wait for the one being served, the newest first."""

    # Events from the transport.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast("asyncio.Transport", transport)
        self.flow = FlowControl(transport)
        self._scope["server"] = get_local_addr(transport)
        self._scope["client"] = get_remote_addr(transport)
        self._scope["scheme"] = "https" if is_ssl(transport) else "http"
        self.server_state.connections.add(self)  # type: ignore[arg-type]  # uvicorn's own
        self._within_limit = self._gate.enter(self)
        # A connection over the limit has no capacity.
        self._max_in_flight = self._gate.max_requests_in_flight if self._within_limit else 0
        begin = partial(Exchange, transport, self.flow, self.server_state, self._on_response)
        self._reader = RequestReader(self, begin, self._scope)
        self._set_deadline(self._gate.request_timeout_secs)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(self)
        self._gate.leave(self)
        if self._serving is not None and not self._serving.response_complete:
            self._serving.disconnect()
        self.flow.resume_writing()
        if exc is None:
            self._close()
        # What refers to this in a circle would live until a garbage collection, or for good: a
        # collection freezes what it finds alive.
        self._scope["extensions"].clear()
        self._reader.close()
        self._serving = None
        self._pipeline.clear()
        if self._queued is not None:
            self._queued, self._in_flight = None, False
        elif self._in_flight:
            if self._task is None:
                # The request runs first, because its turn has been scheduled.
                self.loop.call_soon(self._release_when_done)
            else:
                self._release_when_done()

    def _release_when_done(self) -> None:
        """The client has gone, but its request stays in flight until it is done."""
        if self._task is None:
            self._release()
        else:
            self._task.add_done_callback(self._release)
            self._keep_task()

    @override
    def data_received(self, data: bytes) -> None:
        if len(data) > head.MAX_BYTES:
            # Limits are checked after each piece, so that one large read passes none of them.
            for start in range(0, len(data), head.MAX_BYTES):
                self.data_received(data[start : start + head.MAX_BYTES])
            return
        if self._refused is None:
            refused = self._reader.feed(data)
            if refused is not None and self._refused is None:
                self._refuse(refused)

    @override
    def eof_received(self) -> bool | None:
        """Return whether the connection stays open. A client that has finished sending can
        still wait for responses."""
        self._turn.flush()
        self._client_ended = True
        return self._in_flight or None

    @override
    def pause_writing(self) -> None:
        self.flow.pause_writing()
        # A client that does not read its responses must not keep them in memory.
        self._await_flushing()

    @override
    def resume_writing(self) -> None:
        self.flow.resume_writing()
        waits = self._in_flight or self._reader.receiving or self._refused is not None
        gate = self._gate
        self._set_deadline(gate.request_timeout_secs if waits else gate.keep_alive_secs)

    # Events from the reader.

    def on_incomplete(self) -> None:
        """The rest of a message must arrive in time."""
        self._set_deadline(self._gate.request_timeout_secs)

    def on_head(self, message: Exchange) -> bool:
        """Decide what happens to a message. Return False if it has been shed."""
        if self._in_flight:
            # A few messages may wait for the one being served.
            if len(self._pipeline) >= MAX_PIPELINED:
                self._reader.stop(Refused(OVERLOADED))
            self.flow.pause_reading()
        elif self._metrics.requests_in_flight >= self._max_in_flight and not (
            self._has_capacity(message) or self._can_wait()
        ):
            # With these it would be uncertain where the next message begins.
            uncertain = message.waiting_for_100_continue or self._reader.is_chunked
            if uncertain or not self._shed(message):
                self._reader.stop(Refused(OVERLOADED))
            self._set_deadline(self._gate.request_timeout_secs)
            return False
        if self._serving is not None and not self._serving.response_complete:
            self._pipeline.appendleft(message)
        else:
            self._expect_body(message)
        return True

    def on_message(self, message: Exchange) -> None:
        """Serve a complete message, unless it waits for earlier ones."""
        if message is not self._serving:
            return
        # Most requests are served at once.
        if self._metrics.requests_in_flight < self._max_in_flight:
            self._serve(message)
        elif not self._accept(message):
            self._reader.stop(Refused(OVERLOADED))

    def on_skipped(self) -> None:
        """A message that has been shed has ended."""
        self._set_deadline(self._gate.keep_alive_secs)
        if self._gate.draining:
            self._close()

    # Serving and shedding.

    def _expect_body(self, message: Exchange) -> None:
        """Serve a message next, once it is whole: a client that sends slowly uses a connection,
        but does not count among the requests in flight."""
        self._serving = message
        if message.waiting_for_100_continue:
            message.waiting_for_100_continue = False
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _accept(self, message: Exchange) -> bool:
        """Serve a complete message, let it wait for its turn, or shed it. Return False if the
        connection must be closed instead."""
        full = self._metrics.requests_in_flight >= self._max_in_flight
        if not full or self._has_capacity(message):
            self._serve(message)
        elif self._can_wait():
            self._queued, self._in_flight = message, True
            self._gate.queue.join(self)
        else:
            return self._shed(message)
        return True

    def start(self) -> None:
        """Serve the request that has waited for its turn."""
        message, self._queued = self._queued, None
        if message is not None:
            self._serve(message)

    def shed(self) -> None:
        """Shed the request that has waited too long."""
        message, self._queued, self._in_flight = self._queued, None, False
        if message is None or self._shed(message):
            self._serve_next()
        else:
            self._end_overloaded()

    def _end_overloaded(self) -> None:
        """Close the connection: its next message can be neither served nor shed."""
        self._pipeline.clear()
        self._refuse(Refused(OVERLOADED), self._serving)

    def _serve(self, message: Exchange) -> None:
        if self._access_log:
            message.access_log = True
        self._metrics.requests_in_flight += 1
        self._in_flight = True
        if self._gate.draining or not self._within_limit:
            message.keep_alive = False
        self._task = None
        self._turn.run(self, message.run_asgi(self.app))

    def on_task(self, task: asyncio.Task[None]) -> None:
        """The request that is being served has a task."""
        self._task = task
        if self._gate.draining:
            self._keep_task()

    def _keep_task(self) -> None:
        """Let uvicorn wait for the task before it stops, or cancel it if that is too long."""
        task, tasks = self._task, self.server_state.tasks
        if task is not None and not task.done():
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def _serve_next(self) -> None:
        """Continue with the messages that waited for the one that has been answered."""
        self._turn.flush()
        while self._pipeline:
            message = self._pipeline.pop()
            if message.more_body:
                self._set_deadline(self._gate.request_timeout_secs)
                self._expect_body(message)
                break
            self._serving = message
            if not self._accept(message):
                self._end_overloaded()
                return
            if self._in_flight:
                return
        if self._refused is not None:
            self._write_refusal(self._refused)
        elif self._client_ended:
            self._close()
        else:
            self.flow.resume_reading()
            if not self._reader.receiving:
                self._set_deadline(self._gate.keep_alive_secs)

    def _has_capacity(self, message: Exchange) -> bool:
        """Return whether to serve a request although the limit is reached."""
        if message.target.partition(b"?")[0] in HEALTH_PATHS:
            return True
        return self._within_limit and self._gate.has_capacity(message.method)

    def _can_wait(self) -> bool:
        return self._within_limit and self._gate.queue.has_room()

    def _shed(self, message: Exchange) -> bool:
        """Respond at once that the service is overloaded. Return False if the connection must
        be closed instead.

        This runs most often when the service has the least time, so it must cost much less than
        serving.
        """
        message.response_started = message.response_complete = True
        message.body.clear()
        ends = not message.keep_alive or not self._within_limit or self._gate.draining
        if ends or self.flow.write_paused:
            return False
        self._answered = True
        self._metrics.refused[OVERLOADED.code] += 1
        response = _load_shed_response.answer(message.fields, self.server_state.default_headers)
        if message.method == b"HEAD":
            response = response[: response.index(b"\r\n\r\n") + 4]
        # At once: one read can hold thousands of requests, and a client that does not read the
        # responses must pause the rest.
        self._write(response)
        self._set_deadline(self._gate.keep_alive_secs)
        return True

    def _release(self, _: object = None) -> None:
        if self._in_flight:
            self._in_flight = False
            self._metrics.requests_in_flight -= 1
            if self._gate.queue.waiting:
                self._gate.start_next()

    def _respond(self, response: RawResponse, headers: Headers) -> bool:
        """Send the response to the request that is being served, with more headers. Return
        False if nothing was sent, and the response has to be sent as ASGI messages.

        With messages, uvicorn checks every header against two patterns, and writes twice.
        """
        message = self._serving
        if message is None or message.disconnected:
            return True
        if self._access_log or self.flow.write_paused:
            return False
        if not message.keep_alive:
            headers = [*headers, CLOSE]
        message.response_started = message.response_complete = True
        encoded = encode_response(response, self.server_state.default_headers, headers)
        self._turn.write(self.transport, encoded)
        if not message.keep_alive:
            self._close()
        self._on_response()
        return True

    def _on_response(self) -> None:
        self.server_state.total_requests += 1
        self._answered = True
        if self._serving is not None:
            # The connection keeps the request until the next one.
            self._serving.body.clear()
        # Not when the task is done: the event loop reports that one turn later, and requests
        # that it read in between would be shed.
        self._release()
        if self.transport.is_closing():
            self._await_flushing()
        elif self._pipeline or self._refused is not None or self._client_ended:
            self._serve_next()
        else:
            if self.flow.read_paused:
                self.flow.resume_reading()
            if not self._reader.receiving:
                self.deadline = self.loop.time() + self._gate.keep_alive_secs

    # State.

    @property
    def is_waiting(self) -> bool:
        """Whether the request waits in the gate's queue."""
        return self._queued is not None

    def is_idle(self) -> bool:
        """Return whether it has answered a request and waits for the next."""
        busy = self._in_flight or self._reader.receiving or self._refused is not None
        return self._answered and not busy

    # Deadlines and closing.

    def _set_deadline(self, secs: float) -> None:
        self.deadline = self.loop.time() + secs

    def _await_flushing(self) -> None:
        """Give the client time to read the response."""
        self._unsent_bytes = unsent_bytes(self.transport)
        self._set_deadline(self._gate.request_timeout_secs)

    def on_deadline(self) -> None:
        """Refuse a request that is too slow, or close the connection."""
        if self.transport.is_closing() or self.flow.write_paused:
            if unsent_bytes(self.transport) < self._unsent_bytes:
                self._await_flushing()
            else:
                self.transport.abort()
        elif self._in_flight and (self.flow.read_paused or not self._reader.receiving):
            # The service, not the client, is taking the time.
            self._set_deadline(self._gate.request_timeout_secs)
        elif self._refused is None and self._reader.receiving:
            self._refuse(Refused(REQUEST_TIMEOUT))
        else:
            self._await_flushing()
            self._close()

    def drop(self) -> None:
        """Close at once, to make room."""
        self._turn.flush()
        self.transport.abort()

    def shutdown(self) -> None:
        """Called by uvicorn when the service stops. Close once the response has been sent."""
        self._gate.draining = True
        if self._in_flight:
            if self._serving is not None:
                self._serving.keep_alive = False
            self._keep_task()
        elif not self._reader.receiving:
            if self._answered and not unread_bytes(self.transport):
                self._close()
            else:
                # A client that has just connected, or just asked, still gets its response.
                self._set_deadline(LINGER_SECS)

    def _refuse(self, refused: Refused, message: Exchange | None = None) -> None:
        """Respond with a problem, after the response in progress, and read nothing more. The
        response is to `message`, or else to the newest."""
        self._metrics.refused[refused.kind.code] += 1
        self._refused = refused
        self.flow.pause_reading()
        self._reader.release()
        if self._reader.skipping:
            self._half_close()
            return
        if self._reader.receiving and self._reader.message.scope is not None:
            # The body of this message is refused.
            self._reader.message.body = bytearray()
            if self._reader.message in self._pipeline:
                self._pipeline.popleft()
        if not self._in_flight:
            self._write_refusal(refused, message)

    def _write_refusal(self, refused: Refused, message: Exchange | None = None) -> None:
        if self.transport.is_closing():
            return
        self._answered = True
        if message is None:
            message = self._reader.message if self._reader.receiving else self._serving
        headers = self.server_state.default_headers
        self._write(refusal(refused, message, headers))
        self._half_close()

    def _write(self, data: bytes) -> None:
        self._turn.flush()
        self.transport.write(data)

    def _close(self) -> None:
        self._turn.flush()
        self.transport.close()

    def _half_close(self) -> None:
        self._turn.flush()
        self._set_deadline(LINGER_SECS)
        if self.transport.can_write_eof():
            self.transport.write_eof()
