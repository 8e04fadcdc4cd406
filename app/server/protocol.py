"""The limits that uvicorn has no setting for: the size, form and duration of requests, and the
number of requests in flight.

`LimitedProtocol` is a subclass of uvicorn's connection over httptools and uses its internals.
A test holds a digest of those internals, so a change in uvicorn is reviewed before it is used.

A refusal is sent after the responses to earlier requests on the connection. Nothing more is
read then. The connection is half closed first and closed a moment later, because closing it
with unread data would reset it, and the client could lose the response.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from typing import Any, NoReturn

import httptools
from typing_extensions import override
from uvicorn._types import ASGI3Application, HTTPScope
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.http.problems import (
    HEADERS_TOO_LARGE,
    MALFORMED_REQUEST,
    OVERLOADED,
    PAYLOAD_TOO_LARGE,
    REQUEST_TIMEOUT,
    Refused,
)
from app.http.request import MAX_BODY_BYTES
from app.observability.metrics import Metrics
from app.server import head
from app.server.flow import HoldableFlow, unread_bytes, unsent_bytes
from app.server.gate import HEALTH_PATHS, Gate
from app.server.refusals import LoadShedResponse, refusal

MAX_PIPELINED = 64
"""Maximum number of requests on one connection that wait for the one being served."""

MAX_MESSAGE_BYTES = 2 * MAX_BODY_BYTES
"""Maximum size of a message after its first read, with the framing of chunks and trailers."""

LINGER_SECS = 1.0
"""How long a connection stays half closed, so that the client can read the refusal."""

# Without these fields, a message that can be kept alive is HTTP/1.1. Asking the parser for the
# version would take longer.
_RARE = frozenset({b"connection", b"transfer-encoding", b"expect", b"upgrade"})
_PLAIN_DIGITS = len(str(MAX_BODY_BYTES)) - 1
_load_shed_response = LoadShedResponse()


class _StopParsing(Exception):
    """Raised through the parser to stop it.

    It does not carry the reason: a stored exception would keep its frames, and with them the
    data read, alive until a garbage collection.
    """


class LimitedProtocol(HttpToolsProtocol):
    """One connection. All connections share `app_state["gate"]`, which the lifespan provides.

    The checks that every request needs are in the parser's callbacks and written for speed.
    Rare conditions are derived from the parent's state when they are needed. A message is being
    received while `cycle` is still that of an earlier message, or lacks part of the body.
    """

    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # None until there is one
    scope: HTTPScope | None  # type: ignore[assignment]  # the same
    flow: HoldableFlow

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._gate: Gate = app_state["gate"]
        self._metrics: Metrics = self._gate.metrics
        self.deadline = math.inf
        self._within_limit = True
        self._max_in_flight = 0
        self._ends = False
        self._running: RequestResponseCycle | None = None
        self._task: asyncio.Task[None] | None = None
        self._in_flight = False
        self._queued: RequestResponseCycle | None = None
        self._reason: Refused | None = None
        self._refused: Refused | None = None
        self._answered = self._client_ended = False
        self._unsent_bytes = 0
        self._valid_host = b""
        self._chunked_bytes: int | None = None
        self._skipping = False
        self._upgrade_offered = False
        self._piece = b""
        # About a message that does not arrive in one read.
        self._timed: HTTPScope | None = None
        self._earlier = b""
        self._later_bytes = 0

    # Events from the transport.

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = HoldableFlow(transport)
        self._within_limit = self._gate.enter(self)
        # A connection over the limit has no capacity.
        self._max_in_flight = self._gate.max_requests_in_flight if self._within_limit else 0
        self._ends = not self._within_limit
        self._set_deadline(self._gate.request_timeout_secs)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._gate.leave(self)
        if self._running is not None:
            self._running.disconnected = True
        if self._queued is not None:
            self._queued, self._in_flight = None, False
        elif self._in_flight and self._task is not None:
            # The client has gone, but the request stays in flight until its task is done.
            self._task.add_done_callback(self._release)

    @override
    def data_received(self, data: bytes) -> None:
        if len(data) > head.MAX_BYTES:
            # Limits are checked after each piece, so that one large read passes none of them.
            for start in range(0, len(data), head.MAX_BYTES):
                self.data_received(data[start : start + head.MAX_BYTES])
            return
        while data and self._refused is None:
            data = self._parse(data)

    def _parse(self, data: bytes) -> bytes:
        """Parse `data`. Return the bytes to parse next, if any."""
        self._piece = data
        try:
            self.parser.feed_data(data)
            cycle = self.cycle
            if cycle is None or cycle.more_body or cycle.scope is not self.scope:
                self._on_incomplete(data)
        except httptools.HttpParserUpgrade as upgrade:
            return self._without_upgrade(data[upgrade.args[0] :])
        except (httptools.HttpParserError, _StopParsing):
            if self._refused is None:
                self._refuse(self._reason or Refused(MALFORMED_REQUEST))
        return b""

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Return the head without its offer of an upgrade, followed by `rest`, to parse anew.

        The parser treats the bytes after an offer as another protocol. We support no other, so
        a new parser gets the same head without the offer (RFC 9110, section 7.8).
        """
        if not self._upgrade_offered:
            # CONNECT. Nothing after it can be parsed, and the response ends the connection.
            self.flow.hold()
            return b""
        self._upgrade_offered = False
        method, version = self.parser.get_method(), self.parser.get_http_version()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return head.without_upgrade(method, self.url, version, self.headers) + rest

    def _on_incomplete(self, data: bytes) -> None:
        """Check the message that is still incomplete, if there is one. `data` is what arrived
        last."""
        if self.scope is None:
            return
        if self.scope is not self._timed:
            self._timed = self.scope
            self._earlier = b""
            self._later_bytes = 0
            self._set_deadline(self._gate.request_timeout_secs)
        else:
            self._later_bytes += len(data)
        if not (self._skipping or self._is_in_body()):
            self._earlier += data
            self._check_head_size()
        elif self._later_bytes > MAX_MESSAGE_BYTES:
            self._stop(Refused(PAYLOAD_TOO_LARGE))

    @override
    def eof_received(self) -> bool | None:  # type: ignore[override]  # as asyncio has it
        """Return whether the connection stays open. A client that has finished sending can
        still wait for responses."""
        self._client_ended = True
        return self._in_flight or None

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        # A client that does not read its responses must not keep them in memory.
        self._await_flushing()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        waits = self._in_flight or self._is_receiving() or self._refused is not None
        gate = self._gate
        self._set_deadline(gate.request_timeout_secs if waits else gate.keep_alive_secs)

    # Events from the parser.

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self.headers
        headers.append((name.lower(), value))
        if len(headers) > head.MAX_FIELDS:
            self._stop(Refused(HEADERS_TOO_LARGE))

    @override
    def on_headers_complete(self) -> None:
        fields = dict(self.headers)
        self._chunked_bytes = None
        if (
            len(fields) != len(self.headers)
            or fields.get(b"host") != self._valid_host
            or not _RARE.isdisjoint(fields)
            or not self.parser.should_keep_alive()
        ):
            if self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT":
                # The head is parsed again, without the offer.
                self._upgrade_offered = True
                return
            self._check_fields(fields)
        is_late = self._timed is self.scope
        if is_late or b"#" in self.url or b"RTSP/" in self._piece:
            self._check_target()
        length = fields.get(b"content-length")
        # The parser has ensured that it is one number.
        if length is not None and len(length) > _PLAIN_DIGITS and int(length) > MAX_BODY_BYTES:
            self._stop(Refused(PAYLOAD_TOO_LARGE))
        if is_late:
            self._check_head_size()
        if self._in_flight:
            self._check_pipeline()
        elif self._metrics.requests_in_flight >= self._max_in_flight and not (
            self._has_capacity(self.parser.get_method(), self.url) or self._can_wait()
        ):
            # With these it would be uncertain where the next message begins.
            ends = self.expect_100_continue or b"transfer-encoding" in fields
            ends = ends or not self.parser.should_keep_alive()
            if not self._shed(self.parser.get_method(), self.headers, ends=ends):
                self._stop(Refused(OVERLOADED))
            self._skipping = True
            self._set_deadline(self._gate.request_timeout_secs)
            return
        super().on_headers_complete()
        # Trailers must not be merged into the headers (RFC 9110, section 6.5.1).
        self.headers = []

    def _check_pipeline(self) -> None:
        """Let a few messages wait for the one being served, and pause reading."""
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(Refused(OVERLOADED))
        self.flow.hold()

    def _check_target(self) -> None:
        received = self._piece
        if self._timed is self.scope:
            received = self._earlier + received
        refused = head.validate_target(self.url, received)
        if refused is not None:
            self._stop(refused)

    def _check_fields(self, fields: dict[bytes, bytes]) -> None:
        refused = head.validate(self.headers, self.parser.get_http_version())
        if refused is not None:
            self._stop(refused)
        self._valid_host = fields.get(b"host", b"")
        if b"transfer-encoding" in fields:
            self._chunked_bytes = 0
        version = self.parser.get_http_version()
        # HTTP/1.0 has no 100 Continue (RFC 9110, section 10.1.1).
        expects = fields.get(b"expect", b"").lower() == b"100-continue"
        self.expect_100_continue = expects and version != "1.0"
        is_last = self.parser.should_upgrade() or version == "1.0"
        self._ends = self._ends or is_last

    def _check_head_size(self) -> None:
        # One read can hold more than this head, so only complete fields count, and of an
        # incomplete one the bytes after the first read.
        known = head.size_bytes(self.url, self.headers)
        if max(known, self._later_bytes) > head.MAX_BYTES:
            self._stop(Refused(HEADERS_TOO_LARGE))

    def _stop(self, reason: Refused) -> NoReturn:
        """Refuse the message that is being received."""
        self._reason = reason
        raise _StopParsing

    @override
    def on_body(self, body: bytes) -> None:
        if self._chunked_bytes is not None:
            self._chunked_bytes += len(body)
            if self._chunked_bytes > MAX_BODY_BYTES:
                self._stop(Refused(PAYLOAD_TOO_LARGE))
        if self.cycle is not None and not self._skipping:
            self.cycle.body += body

    @override
    def on_message_complete(self) -> None:
        cycle = self.cycle
        if self._upgrade_offered:
            return
        if self._skipping:
            self._skipping = False
            self.scope = None
            self._set_deadline(self._gate.keep_alive_secs)
            if self._gate.draining:
                self.transport.close()
        elif cycle is not None:
            cycle.more_body = False
            cycle.message_event.set()
            if cycle is not self._running:
                # It waits for earlier messages.
                return
            # Most requests are served at once.
            if self._metrics.requests_in_flight < self._max_in_flight:
                self._serve(cycle)
            elif not self._accept(cycle):
                self._stop(Refused(OVERLOADED))

    # Serving and shedding.

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Wait for the body first, so a client that sends slowly uses a connection, but does
        not count among the requests in flight."""
        self._running = cycle
        if cycle.waiting_for_100_continue:
            cycle.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _accept(self, cycle: RequestResponseCycle) -> bool:
        """Serve a complete message, let it wait for its turn, or shed it. Return False if the
        connection must be closed instead."""
        full = self._metrics.requests_in_flight >= self._max_in_flight
        if not full or self._has_capacity_for(cycle):
            self._serve(cycle)
        elif self._can_wait():
            self._queued, self._in_flight = cycle, True
            self._gate.queue.join(self)
        else:
            return self._shed_whole(cycle)
        return True

    def start(self) -> None:
        """Serve the request that has waited for its turn."""
        cycle, self._queued = self._queued, None
        if cycle is not None:
            self._serve(cycle)

    def shed(self) -> None:
        """Shed the request that has waited too long."""
        cycle, self._queued, self._in_flight = self._queued, None, False
        if cycle is None or self._shed_whole(cycle):
            self._serve_next()
        else:
            self._end_overloaded()

    def _end_overloaded(self) -> None:
        """Close the connection: its next message can be neither served nor shed."""
        self.pipeline.clear()
        if self._refused is None:
            self._refuse(Refused(OVERLOADED))
        else:
            self._write_refusal(self._refused)

    def _serve(self, cycle: RequestResponseCycle) -> None:
        if self._gate.draining or self._ends:
            cycle.keep_alive = False
        self._metrics.requests_in_flight += 1
        self._in_flight = True
        self._task = task = self.loop.create_task(cycle.run_asgi(self.app))
        task.add_done_callback(self.tasks.discard)
        self.tasks.add(task)

    def _serve_next(self) -> None:
        """Continue with the messages that waited for the one that has been answered."""
        while self.pipeline:
            cycle, app = self.pipeline.pop()
            if cycle.more_body:
                self._set_deadline(self._gate.request_timeout_secs)
                self._start_asgi_task(cycle, app)
                break
            self._running = cycle
            if not self._accept(cycle):
                self._end_overloaded()
                return
            if self._in_flight:
                return
        if self._refused is not None:
            self._write_refusal(self._refused)
        elif self._client_ended:
            self.transport.close()
        else:
            self.flow.release()
            if not self._is_receiving():
                self._set_deadline(self._gate.keep_alive_secs)

    def _has_capacity(self, method: bytes, target: bytes) -> bool:
        """Return whether to serve a request although the limit is reached."""
        if target.partition(b"?")[0] in HEALTH_PATHS:
            return True
        return self._within_limit and self._gate.has_capacity(method)

    def _can_wait(self) -> bool:
        return self._within_limit and self._gate.queue.has_room()

    def _has_capacity_for(self, cycle: RequestResponseCycle) -> bool:
        return self._has_capacity(cycle.scope["method"].encode(), cycle.scope["raw_path"])

    def _shed_whole(self, cycle: RequestResponseCycle) -> bool:
        """Shed a complete message. Return False if the connection must be closed instead."""
        cycle.response_started = cycle.response_complete = True
        method = cycle.scope["method"].encode()
        return self._shed(method, cycle.scope["headers"], ends=not cycle.keep_alive)

    def _shed(self, method: bytes, sent: Iterable[tuple[bytes, bytes]], *, ends: bool) -> bool:
        """Respond at once that the service is overloaded. Return False if the connection must
        be closed instead.

        This runs most often when the service has the least time, so it must cost much less than
        serving.
        """
        if ends or self._ends or self._gate.draining or self.flow.write_paused:
            return False
        self._answered = True
        self._metrics.refused[OVERLOADED.code] += 1
        response = _load_shed_response.answer(sent, self.server_state.default_headers)
        if method == b"HEAD":
            response = response[: response.index(b"\r\n\r\n") + 4]
        self.transport.write(response)
        self._set_deadline(self._gate.keep_alive_secs)
        return True

    def _release(self, _: object = None) -> None:
        if self._in_flight:
            self._in_flight = False
            self._metrics.requests_in_flight -= 1
            if self._gate.queue.waiting:
                self._gate.start_next()

    @override
    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._answered = True
        # Not when the task is done: the event loop reports that one turn later, and requests
        # that it read in between would be shed.
        self._release()
        if self.transport.is_closing():
            self._await_flushing()
        elif self.pipeline or self._refused is not None or self._client_ended:
            self._serve_next()
        else:
            if self.flow.read_paused:
                self.flow.release()
            cycle = self.cycle
            if cycle is None or (cycle.scope is self.scope and not cycle.more_body):
                self.deadline = self.loop.time() + self._gate.keep_alive_secs

    # State.

    def _is_in_body(self) -> bool:
        """Return whether the head of the newest message is complete."""
        return self.cycle is not None and self.cycle.scope is self.scope

    def _is_receiving(self) -> bool:
        if self.cycle is None or self.cycle.scope is not self.scope:
            return self.scope is not None
        return self.cycle.more_body

    @property
    def is_waiting(self) -> bool:
        """Whether the request waits in the gate's queue."""
        return self._queued is not None

    def is_idle(self) -> bool:
        """Return whether it has answered a request and waits for the next."""
        busy = self._in_flight or self._is_receiving() or self._refused is not None
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
        elif self._in_flight and (self.flow.read_paused or not self._is_receiving()):
            # The service, not the client, is taking the time.
            self._set_deadline(self._gate.request_timeout_secs)
        elif self._refused is None and self._is_receiving():
            self._refuse(Refused(REQUEST_TIMEOUT))
        else:
            self._await_flushing()
            self.transport.close()

    def drop(self) -> None:
        """Close at once, to make room."""
        self.transport.abort()

    @override
    def shutdown(self) -> None:
        self._gate.draining = True
        if self._in_flight:
            super().shutdown()
        elif not self._is_receiving():
            if self._answered and not unread_bytes(self.transport):
                super().shutdown()
            else:
                # A client that has just connected, or just asked, still gets its response.
                self._set_deadline(LINGER_SECS)

    def _refuse(self, refused: Refused) -> None:
        """Respond with a problem, after the response in progress, and read nothing more."""
        self._metrics.refused[refused.kind.code] += 1
        self._refused = refused
        self.flow.hold()
        # They may hold a whole read of an oversized message.
        self._piece = self._earlier = b""
        self.parser, self.url = None, b""  # type: ignore[assignment]  # as uvicorn ends it
        message = self.cycle
        if self._skipping:
            self._half_close()
            return
        if message is not None and message.more_body:
            # The body of this message is refused.
            message.body = bytearray()
            if message in (waiting for waiting, _ in self.pipeline):
                self.pipeline.popleft()
        if not self._in_flight:
            self._write_refusal(refused)

    def _write_refusal(self, refused: Refused) -> None:
        if self.transport.is_closing():
            return
        self._answered = True
        headers = self.server_state.default_headers
        self.transport.write(refusal(refused, self.scope, headers))
        self._half_close()

    def _half_close(self) -> None:
        self._set_deadline(LINGER_SECS)
        if self.transport.can_write_eof():
            self.transport.write_eof()
