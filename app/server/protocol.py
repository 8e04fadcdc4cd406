"""The connection of the service: uvicorn's task, with limits that uvicorn has no setting for.

A reader limits the size and form of requests. The connection limits how long each may take
and how many are in flight. It serves a request once it is whole, and sheds it if that would
take too long.

The laws of a connection:

1. Responses leave in the order of their requests, and one request is served at a time. Further
   requests that have been read wait in the pipeline.
2. Only a connection that is `SERVING` has one of the places in flight, and each place is given
   up once. A client that sends or reads slowly holds a connection, never a place.
3. Nothing starts while the client does not read: `SENDING` lasts until there is room for the
   next response, so a connection holds one response at most, or two if the second was already
   being served.
4. A refusal is the last response. It is sent after those to earlier requests, and nothing more
   is read. The connection is half closed first and closed a moment later: closing it with
   unread data would reset it, and the client could lose the response.

What leads where:

| from       | event                                                     | to          |
|------------|-----------------------------------------------------------|-------------|
| `IDLE`     | a request is whole, and there is a place                  | `SERVING`   |
| `IDLE`     | a request is whole, and it may wait for a place           | `QUEUED`    |
| `IDLE`     | a request can neither be served nor wait: 503 is written  | `IDLE`      |
| `QUEUED`   | a place is free                                           | `SERVING`   |
| `QUEUED`   | it has waited too long: 503 is written                    | `IDLE`      |
| `SERVING`  | the response is written                                   | `IDLE`      |
| `SERVING`  | the response cannot be written yet                        | `SENDING`   |
| `IDLE`     | the last response fills the buffers                       | `SENDING`   |
| `SENDING`  | the client has read, and the response is written          | `IDLE`      |
| `IDLE`     | a refusal is written                                      | `LINGERING` |
| any        | `_close`: the last response is written, or the client is  |             |
|            | gone, idle for too long, or has finished sending          | `CLOSING`   |
| any        | the deadline passes without progress; the gate needs room | (aborted)   |
| any        | the transport has ended                                   | `CLOSED`    |

In `IDLE` the pipeline is empty, but within `_proceed`. Only `_close`, `_half_close`, `drop` and
`on_deadline` end a connection; uvicorn asks for it with `shutdown`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
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
from app.server.gate import HEALTH_PATHS, Gate, Limits
from app.server.reader import RequestReader
from app.server.refusals import LoadShedResponse, refusal
from app.server.turn import Turn

MAX_PIPELINED = 64
"""Maximum number of requests on one connection that wait for the one being served. Clients
that pipeline at all send a few; each of these may hold a body of 64 KiB."""

LINGER_SECS = 1.0
"""How long a connection stays half closed, so that the client can read the refusal."""

MIN_READ_BYTES_PER_SEC = 8192
"""A client that has to read before anything else can be sent must read at least this fast, on
average over the time that a request may take to arrive. It is slower than any network that a
service is used over."""

_load_shed_response = LoadShedResponse()


class State(Enum):
    """What a connection is doing about its current request. What it reads meanwhile is the
    reader's matter."""

    IDLE = auto()
    """Nothing to serve: the next request is awaited, or its body is still arriving."""
    QUEUED = auto()
    """The request is whole and waits in the gate's queue for a place."""
    SERVING = auto()
    """The request is in flight. It has a place."""
    SENDING = auto()
    """The client must read before anything else happens. There is no place, and reading is
    paused. Of a response in several parts the rest may still be to come."""
    LINGERING = auto()
    """The last response has been sent and our side is closed."""
    CLOSING = auto()
    """The transport closes once the client has read."""
    CLOSED = auto()
    """The transport has ended. The request may still be running."""


_ANSWERS_LATER = frozenset({State.QUEUED, State.SERVING, State.SENDING})


class _Flow(FlowControl):
    """Gives up the place of a request whose response must wait for the client."""

    def __init__(self, transport: asyncio.Transport, on_blocked: Callable[[], None]) -> None:
        super().__init__(transport)
        self.on_blocked = on_blocked

    @override
    async def drain(self) -> None:
        self.on_blocked()
        await super().drain()


class LimitedProtocol(asyncio.Protocol):
    """One connection. All of them share the `gate` and the `turn` of `app_state`, which the
    lifespan provides."""

    transport: asyncio.Transport
    flow: _Flow

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
        if "gate" not in app_state:
            # There was no lifespan. The application says so in its answers.
            app_state["gate"] = Gate(Metrics(), Limits())
            app_state["turn"] = Turn(self.loop, tasks=True)
        self._gate: Gate = app_state["gate"]
        self._turn: Turn = app_state["turn"]
        self._metrics: Metrics = self._gate.metrics
        self._within_limit = True
        self._max_in_flight = 0
        """As this connection sees it: 0 if it is over the limit of connections."""

        self.state = State.IDLE
        self.deadline = math.inf
        self._unsent_bytes = 0
        """When the deadline was set for a client that has to read."""
        self._current: Exchange | None = None
        """The request that `state` is about, or the last one."""
        self._task: asyncio.Task[None] | None = None
        """What runs it, if it has a task (`app.server.turn`)."""
        self._pipeline: deque[Exchange] = deque()
        """Requests that wait for it, the oldest first. The newest may be incomplete."""
        self._refused: Refused | None = None
        """Why nothing more is read. The refusal follows the responses to earlier requests."""
        self._answered = False
        self._client_ended = False

    # Events from the transport.

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport = cast("asyncio.Transport", transport)
        self.flow = _Flow(transport, self._on_blocked)
        self._scope["server"] = get_local_addr(transport)
        self._scope["client"] = get_remote_addr(transport)
        self._scope["scheme"] = "https" if is_ssl(transport) else "http"
        self.server_state.connections.add(self)  # type: ignore[arg-type]  # uvicorn's own
        self._within_limit = self._gate.enter(self)
        self._max_in_flight = self._gate.max_requests_in_flight if self._within_limit else 0
        begin = partial(Exchange, transport, self.flow, self.server_state, self._on_response)
        self._reader = RequestReader(self, begin, self._scope)
        self._set_deadline(self._gate.request_timeout_secs)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.server_state.connections.discard(self)
        self._gate.leave(self)
        if self._current is not None and not self._current.response_complete:
            self._current.disconnect()
        self.flow.resume_writing()
        if exc is None:
            self._turn.flush()
            self.transport.close()
        is_serving, self.state = self.state is State.SERVING, State.CLOSED
        # Break reference cycles here. A cycle would survive until the next collection, or for
        # ever, because `gc_tuning` freezes survivors.
        self._scope["extensions"].clear()
        self._reader.close()
        self.flow.on_blocked = _do_nothing
        self._current = None
        self._pipeline.clear()
        if not is_serving:
            self._keep_task()
        elif self._task is None:
            # The request runs first, because its turn has been scheduled.
            self.loop.call_soon(self._give_up_place_when_done)
        else:
            self._give_up_place_when_done()

    def _give_up_place_when_done(self) -> None:
        """The client has gone, but its request stays in flight until it is done."""
        self._turn.give_tasks(self)
        if self._task is None:
            self._give_up_place()
        else:
            self._task.add_done_callback(self._give_up_place)
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
        return self.state in _ANSWERS_LATER or None

    @override
    def pause_writing(self) -> None:
        self.flow.pause_writing()
        # A client that does not read its responses must not keep them in memory.
        self.flow.pause_reading()
        if self.state is State.IDLE:
            self.state = State.SENDING
        self._await_reading()

    @override
    def resume_writing(self) -> None:
        self.flow.resume_writing()
        self._set_deadline(self._gate.request_timeout_secs)
        if self.state is State.SENDING and self._is_answered():
            self.state = State.IDLE
            self._proceed()

    def _on_blocked(self) -> None:
        """A part of the response waits for the client to read."""
        if self.state is State.SERVING:
            self.state = State.SENDING
            self._give_up_place()

    # Events from the reader.

    def on_incomplete(self) -> None:
        """The rest of a request must arrive in time."""
        self._set_deadline(self._gate.request_timeout_secs)

    def on_head(self, exchange: Exchange) -> bool:
        """Decide what happens to a request. Return False if it has been shed."""
        if self.state is not State.IDLE:
            if len(self._pipeline) >= MAX_PIPELINED:
                self._reader.stop(Refused(OVERLOADED))
            self.flow.pause_reading()
            self._pipeline.append(exchange)
            return True
        if self._metrics.requests_in_flight >= self._max_in_flight and not (
            self._has_capacity(exchange) or self._can_wait()
        ):
            # With these it would be uncertain where the next request begins.
            uncertain = exchange.waiting_for_100_continue or self._reader.is_chunked
            if uncertain or not self._shed(exchange):
                self._reader.stop(Refused(OVERLOADED))
            self._set_deadline(self._gate.request_timeout_secs)
            return False
        self._expect_body(exchange)
        return True

    def on_request(self, exchange: Exchange) -> None:
        """Serve a complete request, unless it waits for earlier ones."""
        if exchange is not self._current:
            return
        if self._metrics.requests_in_flight < self._max_in_flight:
            self._serve(exchange)
        elif not self._admit(exchange):
            self._reader.stop(Refused(OVERLOADED))

    def on_skipped(self) -> None:
        """A request that has been shed has ended."""
        if self.state is State.IDLE:
            self._set_deadline(self._gate.keep_alive_secs)
        if self._gate.draining:
            self._close()

    # Serving and shedding.

    def _expect_body(self, exchange: Exchange) -> None:
        """Serve a request next, once it is whole: a client that sends slowly uses a connection,
        but does not count among the requests in flight."""
        self._current = exchange
        if exchange.waiting_for_100_continue:
            exchange.waiting_for_100_continue = False
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _admit(self, exchange: Exchange) -> bool:
        """Serve a complete request, let it wait for a place, or shed it. Return False if the
        connection must be closed instead."""
        full = self._metrics.requests_in_flight >= self._max_in_flight
        if not full or self._has_capacity(exchange):
            self._serve(exchange)
        elif self._can_wait():
            self.state = State.QUEUED
            self._gate.queue.join(self)
        else:
            return self._shed(exchange)
        return True

    def start(self) -> None:
        """Serve the request that has waited for a place."""
        if self._current is not None:
            self._serve(self._current)

    def shed(self) -> None:
        """Shed the request that has waited too long."""
        self.state = State.IDLE
        if self._current is None or self._shed(self._current):
            self._proceed()
        else:
            self._end_overloaded()

    def _end_overloaded(self) -> None:
        """Close the connection: its current request can be neither served nor shed."""
        self._pipeline.clear()
        self._refuse(Refused(OVERLOADED), self._current)

    def _serve(self, exchange: Exchange) -> None:
        if self._access_log:
            exchange.access_log = True
        self._metrics.requests_in_flight += 1
        self.state = State.SERVING
        if self._gate.draining or not self._within_limit:
            exchange.keep_alive = False
        self._task = None
        self._turn.run(self, exchange.run_asgi(self.app))

    def on_task(self, task: asyncio.Task[None]) -> None:
        """The request that is being served has a task."""
        self._task = task
        if self._gate.draining:
            self._keep_task()

    def _keep_task(self) -> None:
        """Let uvicorn wait for the task before it stops, or cancel it if that is too long."""
        self._turn.give_tasks(self)
        task, tasks = self._task, self.server_state.tasks
        if task is not None and not task.done():
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def _give_up_place(self, _: object = None) -> None:
        self._metrics.requests_in_flight -= 1
        if self._gate.queue.waiting:
            self._gate.start_next()

    def _proceed(self) -> None:
        """Go on with what has waited for the response, if the client reads."""
        self._turn.flush()
        while self._pipeline and not self.flow.write_paused:
            exchange = self._pipeline.popleft()
            if exchange.more_body:
                self._set_deadline(self._gate.request_timeout_secs)
                self._expect_body(exchange)
                break
            self._current = exchange
            if not self._admit(exchange):
                self._end_overloaded()
                return
            if self.state is not State.IDLE:
                return
        if self.flow.write_paused:
            self.state = State.SENDING
            self._await_reading()
        elif self._refused is not None:
            self._write_refusal(self._refused)
        elif self._client_ended:
            self._close()
        else:
            self.flow.resume_reading()
            if not self._reader.receiving:
                self._set_deadline(self._gate.keep_alive_secs)

    def _has_capacity(self, exchange: Exchange) -> bool:
        """Return whether to serve a request although the limit is reached."""
        if exchange.target.partition(b"?")[0] in HEALTH_PATHS:
            return True
        return self._within_limit and self._gate.has_capacity(exchange.method)

    def _can_wait(self) -> bool:
        return self._within_limit and self._gate.queue.is_open

    def _shed(self, exchange: Exchange) -> bool:
        """Respond at once that the service is overloaded. Return False if the connection must
        be closed instead.

        This runs most often when the service has the least time, so it must cost much less than
        serving.
        """
        exchange.response_started = exchange.response_complete = True
        exchange.body.clear()
        if not exchange.keep_alive or not self._within_limit or self._gate.draining:
            return False
        self._answered = True
        self._metrics.refused[OVERLOADED.code] += 1
        response = _load_shed_response.answer(
            exchange.fields, self._scope["root_path"], self.server_state.default_headers
        )
        if exchange.method == b"HEAD":
            response = response[: response.index(b"\r\n\r\n") + 4]
        # At once: one read can hold thousands of requests, and a client that does not read the
        # responses must pause the rest.
        self._write(response)
        if not self.flow.write_paused:
            self._set_deadline(self._gate.keep_alive_secs)
        return True

    def _respond(self, response: RawResponse, headers: Headers) -> bool:
        """Send the response to the request that is being served, with more headers. Return
        False if nothing was sent, and the response has to be sent as ASGI messages.

        With messages, uvicorn checks every header against two patterns, and writes twice.
        """
        exchange = self._current
        if exchange is None or exchange.disconnected:
            return True
        if self._access_log:
            return False
        if not exchange.keep_alive:
            headers = [*headers, CLOSE]
        exchange.response_started = exchange.response_complete = True
        encoded = encode_response(response, self.server_state.default_headers, headers)
        self._turn.write(self.transport, encoded)
        self._on_response()
        return True

    def _on_response(self) -> None:
        """The response has been written, as far as the client reads."""
        self.server_state.total_requests += 1
        self._answered = True
        # Not when the task is done: the event loop reports that one turn later, and requests
        # that it read in between would be shed.
        if self.state is State.SERVING:
            self.state = State.IDLE
            self._give_up_place()
        else:
            self.state = State.IDLE
        exchange = self._current
        if exchange is not None:
            # The connection keeps it until the next one.
            exchange.body.clear()
            if not exchange.keep_alive:
                self._close()
        if self.transport.is_closing():
            self._close()
        elif self.flow.read_paused or self._refused is not None or self._client_ended:
            self._proceed()
        elif not self._reader.receiving:
            self.deadline = self.loop.time() + self._gate.keep_alive_secs

    # State.

    @property
    def is_waiting(self) -> bool:
        """Whether the request waits in the gate's queue."""
        return self.state is State.QUEUED

    def is_idle(self) -> bool:
        """Return whether it has answered a request and waits for the next."""
        return self._answered and self.state is State.IDLE and not self._reader.receiving

    def _is_answered(self) -> bool:
        """Whether no response is owed now. One is not owed to a request whose body is still
        arriving, although it may have got its 100 Continue."""
        current = self._current
        return current is None or current.response_complete or current.more_body

    # Deadlines and closing.

    def _set_deadline(self, secs: float) -> None:
        self.deadline = self.loop.time() + secs

    def _await_reading(self) -> None:
        """Give the client time to read."""
        self._unsent_bytes = unsent_bytes(self.transport)
        self._set_deadline(self._gate.request_timeout_secs)

    def on_deadline(self) -> None:
        """Refuse a request that is too slow, or close the connection."""
        state, receiving = self.state, self._reader.receiving
        if self.transport.is_closing() or self.flow.write_paused:
            read = self._unsent_bytes - unsent_bytes(self.transport)
            if read >= MIN_READ_BYTES_PER_SEC * self._gate.request_timeout_secs:
                self._await_reading()
            else:
                self.transport.abort()
        elif state is State.LINGERING and (unsent := unsent_bytes(self.transport)):
            # To close now, with unread data, would discard what the client has not read yet.
            read = self._unsent_bytes - unsent
            is_first = not self._unsent_bytes
            if is_first or read >= MIN_READ_BYTES_PER_SEC * self._gate.request_timeout_secs:
                self._await_reading()
            else:
                self._close()
        elif state in _ANSWERS_LATER and (self.flow.read_paused or not receiving):
            # The service, not the client, is taking the time.
            self._set_deadline(self._gate.request_timeout_secs)
        elif self._refused is None and receiving:
            self._refuse(Refused(REQUEST_TIMEOUT))
        else:
            self._close()

    def drop(self) -> None:
        """Close at once, to make room."""
        self._turn.flush()
        self.transport.abort()

    def shutdown(self) -> None:
        """Called by uvicorn when the service stops. Close once the response has been sent."""
        self._gate.draining = True
        if self.state in _ANSWERS_LATER and not self._is_answered():
            if self._current is not None:
                self._current.keep_alive = False
            self._keep_task()
        elif self._pipeline or self._reader.receiving:
            # They are served, and the connection is closed then.
            return
        elif self.state is State.SENDING or (
            self._answered and not unread_bytes(self.transport)
        ):
            self._close()
        else:
            # A client that has just connected, or just asked, still gets its response.
            self._set_deadline(LINGER_SECS)

    def _refuse(self, refused: Refused, exchange: Exchange | None = None) -> None:
        """Respond with a problem, after the response in progress, and read nothing more. The
        response is to `exchange`, or else to the newest."""
        self._metrics.refused[refused.kind.code] += 1
        self._refused = refused
        self.flow.pause_reading()
        self._reader.release()
        if self._reader.skipping:
            self._half_close()
            return
        if self._reader.receiving and self._reader.exchange.scope is not None:
            # The body of this request is refused.
            self._reader.exchange.body = bytearray()
            if self._reader.exchange in self._pipeline:
                self._pipeline.pop()
        if self.state is State.IDLE:
            self._write_refusal(refused, exchange)

    def _write_refusal(self, refused: Refused, exchange: Exchange | None = None) -> None:
        if self.transport.is_closing():
            return
        self._answered = True
        if exchange is None:
            exchange = self._reader.exchange if self._reader.receiving else self._current
        headers = self.server_state.default_headers
        self._write(refusal(refused, exchange, self._scope["root_path"], headers))
        self._half_close()

    def _write(self, data: bytes) -> None:
        self._turn.flush()
        self.transport.write(data)

    def _close(self) -> None:
        self._turn.flush()
        self.transport.close()
        self.state = State.CLOSING
        self._await_reading()

    def _half_close(self) -> None:
        self._turn.flush()
        self.state = State.LINGERING
        self._unsent_bytes = 0
        self._set_deadline(LINGER_SECS)
        if self.transport.can_write_eof():
            self.transport.write_eof()


def _do_nothing() -> None:
    """Stands for a callback of a connection that has ended."""
