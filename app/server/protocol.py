"""The connection of the service: uvicorn's task, with limits that uvicorn has no setting for.

It limits the size, form and duration of requests, and the number of requests in flight. A
request is served once it is whole. The checks that every request needs are in the parser's
callbacks and written for speed. Rare conditions are derived when they are needed.

A refusal is sent after the responses to earlier requests on the connection. Nothing more is
read then. The connection is half closed first and closed a moment later, because closing it
with unread data would reset it, and the client could lose the response.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Iterable
from typing import Any, NoReturn, cast

import httptools
from typing_extensions import override
from uvicorn._types import HTTPScope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.utils import get_local_addr, get_remote_addr, is_ssl
from uvicorn.server import ServerState

from app.http.dispatch import WHOLE_RESPONSE
from app.http.problems import (
    HEADERS_TOO_LARGE,
    MALFORMED_REQUEST,
    OVERLOADED,
    PAYLOAD_TOO_LARGE,
    REQUEST_TIMEOUT,
    Refused,
)
from app.http.request import MAX_BODY_BYTES
from app.http.response import Headers, RawResponse
from app.observability.metrics import Metrics
from app.server import head
from app.server.exchange import CLOSE, Exchange, encode_response
from app.server.flow import unread_bytes, unsent_bytes
from app.server.gate import HEALTH_PATHS, Gate
from app.server.refusals import LoadShedResponse, refusal
from app.server.turn import Turn

MAX_PIPELINED = 64
"""Maximum number of requests on one connection that wait for the one being served."""

MAX_MESSAGE_BYTES = 2 * MAX_BODY_BYTES
"""Maximum size of a message after its first read, with the framing of chunks and trailers."""

LINGER_SECS = 1.0
"""How long a connection stays half closed, so that the client can read the refusal."""

# Without these fields, a message that can be kept alive is HTTP/1.1. Asking the parser for the
# version would take longer.
_RARE = frozenset({b"connection", b"transfer-encoding", b"expect", b"upgrade"})
_FRAGMENT = ord("#")
_PLAIN_DIGITS = len(str(MAX_BODY_BYTES)) - 1
_load_shed_response = LoadShedResponse()


class _StopParsing(Exception):
    """Raised through the parser to stop it.

    It does not carry the reason: a stored exception would keep its frames, and with them the
    data read, alive until a garbage collection.
    """


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
                "state": app_state,
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
        self._ends = False
        self._answered = self._client_ended = False
        self._unsent_bytes = 0
        self._valid_host = b""
        self._reason: Refused | None = None
        self._refused: Refused | None = None

        self._serving: Exchange | None = None
        """The request that is being served or received, or the last one."""
        self._task: asyncio.Task[None] | None = None
        self._in_flight = False
        self._queued: Exchange | None = None
        self._pipeline: deque[Exchange] = deque()
        """Requests that wait for the one being served, the newest first."""

        self._parser = self._new_parser()
        self._piece = b""
        self._is_first = False
        """Whether the next message to begin is at the start of the piece."""
        self._message: Exchange
        """The newest."""
        self._receiving = False
        """Whether it is incomplete."""
        self._chunked_bytes: int | None = None
        self._expects_continue = False
        self._skipping = False
        self._upgrade_offered = False
        # About a message that does not arrive in one read.
        self._timed: Exchange | None = None
        self._earlier = b""
        self._later_bytes = 0

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # What follows a message that ends the connection is ignored.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

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
        self._ends = not self._within_limit
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
        self._parser = None  # type: ignore[assignment]  # not used again
        self._scope["extensions"] = {}
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
        while data and self._refused is None:
            self._piece, self._is_first = data, not self._receiving
            try:
                self._parser.feed_data(data)
                if self._receiving:
                    self._check_incomplete(self._message, data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])
                continue
            except (httptools.HttpParserError, _StopParsing):
                if self._refused is None:
                    self._refuse(self._reason or Refused(MALFORMED_REQUEST))
            return

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Return the head without its offer of an upgrade, followed by `rest`, to parse anew.

        The parser treats the bytes after an offer as another protocol. We support no other, so
        a new parser gets the same head without the offer (RFC 9110, section 7.8).
        """
        if not self._upgrade_offered:
            # CONNECT. Nothing after it can be parsed, and the response ends the connection.
            self.flow.pause_reading()
            return b""
        self._upgrade_offered = False
        message, method = self._message, self._parser.get_method()
        version = self._parser.get_http_version()
        self._parser = self._new_parser()
        return head.without_upgrade(method, message.target, version, message.headers) + rest

    def _check_incomplete(self, message: Exchange, data: bytes) -> None:
        """Check a message that is still incomplete. `data` is what arrived last."""
        if message is not self._timed:
            self._timed = message
            self._earlier = b""
            self._later_bytes = 0
            self._set_deadline(self._gate.request_timeout_secs)
        else:
            self._later_bytes += len(data)
        if not self._skipping and message.scope is None:
            self._earlier += data
            self._check_head_size(message)
        elif self._later_bytes > MAX_MESSAGE_BYTES:
            self._stop(Refused(PAYLOAD_TOO_LARGE))

    @override
    def eof_received(self) -> bool | None:
        """Return whether the connection stays open. A client that has finished sending can
        still wait for responses."""
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
        waits = self._in_flight or self._receiving or self._refused is not None
        gate = self._gate
        self._set_deadline(gate.request_timeout_secs if waits else gate.keep_alive_secs)

    # Events from the parser.

    def on_message_begin(self) -> None:
        """The first byte of a message."""
        self._message = Exchange(
            self.transport, self.flow, self.server_state, self._on_response
        )
        self._receiving = True

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self._message.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field, or one of the trailers, which we do not use."""
        headers = self._message.headers
        headers.append((name.lower(), value))
        if len(headers) > head.MAX_FIELDS:
            self._stop(Refused(HEADERS_TOO_LARGE))

    def on_headers_complete(self) -> None:
        """The end of the head."""
        message, parser = self._message, self._parser
        headers = message.headers
        fields = dict(headers)
        method, version = parser.get_method(), "1.1"
        self._chunked_bytes = None
        if (
            len(fields) != len(headers)
            or fields.get(b"host") != self._valid_host
            or not _RARE.isdisjoint(fields)
            or not parser.should_keep_alive()
        ):
            if parser.should_upgrade() and method != b"CONNECT":
                # The head is parsed again, without the offer.
                self._upgrade_offered = True
                return
            version = parser.get_http_version()
            self._check_fields(message, fields, version)
        is_late = self._timed is message
        target_end = len(method) + 1 + len(message.target)
        if (
            is_late
            or not self._is_first
            or not self._piece.startswith(b" HTTP/", target_end)
            or _FRAGMENT in message.target
        ):
            self._check_target(message)
        self._is_first = False
        length = fields.get(b"content-length")
        # The parser has ensured that it is one number.
        if length is not None and len(length) > _PLAIN_DIGITS and int(length) > MAX_BODY_BYTES:
            self._stop(Refused(PAYLOAD_TOO_LARGE))
        if is_late:
            self._check_head_size(message)
        if self._in_flight:
            self._check_pipeline()
        elif self._metrics.requests_in_flight >= self._max_in_flight and not (
            self._has_capacity(method, message.target) or self._can_wait()
        ):
            # With these it would be uncertain where the next message begins.
            ends = message.waiting_for_100_continue or b"transfer-encoding" in fields
            ends = ends or not parser.should_keep_alive()
            if not self._shed(method, headers, ends=ends):
                self._stop(Refused(OVERLOADED))
            self._skipping = True
            self._set_deadline(self._gate.request_timeout_secs)
            return
        message.complete_head(self._scope, method, version)
        if self._serving is not None and not self._serving.response_complete:
            self._pipeline.appendleft(message)
        elif message.waiting_for_100_continue:
            self._expect_body(message)
        else:
            self._serving = message

    def _check_pipeline(self) -> None:
        """Let a few messages wait for the one being served, and pause reading."""
        if len(self._pipeline) >= MAX_PIPELINED:
            self._stop(Refused(OVERLOADED))
        self.flow.pause_reading()

    def _check_target(self, message: Exchange) -> None:
        received = self._piece
        if self._timed is message:
            received = self._earlier + received
        refused = head.validate_target(message.target, received)
        if refused is not None:
            self._stop(refused)

    def _check_fields(
        self, message: Exchange, fields: dict[bytes, bytes], version: str
    ) -> None:
        refused = head.validate(message.headers, version)
        if refused is not None:
            self._stop(refused)
        self._valid_host = fields.get(b"host", b"")
        if b"transfer-encoding" in fields:
            self._chunked_bytes = 0
        # HTTP/1.0 has no 100 Continue (RFC 9110, section 10.1.1).
        expects = fields.get(b"expect", b"").lower() == b"100-continue"
        message.waiting_for_100_continue = expects and version != "1.0"
        message.keep_alive = version != "1.0" and self._parser.should_keep_alive()
        is_last = self._parser.should_upgrade() or version == "1.0"
        self._ends = self._ends or is_last

    def _check_head_size(self, message: Exchange) -> None:
        # One read can hold more than this head, so only complete fields count, and of an
        # incomplete one the bytes after the first read.
        known = head.size_bytes(message.target, message.headers)
        if max(known, self._later_bytes) > head.MAX_BYTES:
            self._stop(Refused(HEADERS_TOO_LARGE))

    def _stop(self, reason: Refused) -> NoReturn:
        """Refuse the message that is being received."""
        self._reason = reason
        raise _StopParsing

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._chunked_bytes is not None:
            self._chunked_bytes += len(body)
            if self._chunked_bytes > MAX_BODY_BYTES:
                self._stop(Refused(PAYLOAD_TOO_LARGE))
        if not self._skipping:
            self._message.body += body

    def on_message_complete(self) -> None:
        """The end of a message."""
        message = self._message
        if self._upgrade_offered:
            return
        self._receiving = False
        if self._skipping:
            self._skipping = False
            self._set_deadline(self._gate.keep_alive_secs)
            if self._gate.draining:
                self._close()
            return
        message.more_body = False
        if message is not self._serving:
            # It waits for earlier messages.
            return
        # Most requests are served at once.
        if self._metrics.requests_in_flight < self._max_in_flight:
            self._serve(message)
        elif not self._accept(message):
            self._stop(Refused(OVERLOADED))

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
        if not full or self._has_capacity_for(message):
            self._serve(message)
        elif self._can_wait():
            self._queued, self._in_flight = message, True
            self._gate.queue.join(self)
        else:
            return self._shed_whole(message)
        return True

    def start(self) -> None:
        """Serve the request that has waited for its turn."""
        message, self._queued = self._queued, None
        if message is not None:
            self._serve(message)

    def shed(self) -> None:
        """Shed the request that has waited too long."""
        message, self._queued, self._in_flight = self._queued, None, False
        if message is None or self._shed_whole(message):
            self._serve_next()
        else:
            self._end_overloaded()

    def _end_overloaded(self) -> None:
        """Close the connection: its next message can be neither served nor shed."""
        self._pipeline.clear()
        if self._refused is None:
            self._refuse(Refused(OVERLOADED))
        else:
            self._write_refusal(self._refused)

    def _serve(self, message: Exchange) -> None:
        if self._access_log:
            message.access_log = True
        self._metrics.requests_in_flight += 1
        self._in_flight = True
        if self._gate.draining or self._ends:
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
            if not self._receiving:
                self._set_deadline(self._gate.keep_alive_secs)

    def _has_capacity(self, method: bytes, target: bytes) -> bool:
        """Return whether to serve a request although the limit is reached."""
        if target.partition(b"?")[0] in HEALTH_PATHS:
            return True
        return self._within_limit and self._gate.has_capacity(method)

    def _can_wait(self) -> bool:
        return self._within_limit and self._gate.queue.has_room()

    def _has_capacity_for(self, message: Exchange) -> bool:
        return self._has_capacity(message.method, message.target)

    def _shed_whole(self, message: Exchange) -> bool:
        """Shed a complete message. Return False if the connection must be closed instead."""
        message.response_started = message.response_complete = True
        return self._shed(message.method, message.fields, ends=not message.keep_alive)

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
        # Not when the task is done: the event loop reports that one turn later, and requests
        # that it read in between would be shed.
        self._in_flight = False
        self._metrics.requests_in_flight -= 1
        if self._gate.queue.waiting:
            self._gate.start_next()
        if self.transport.is_closing():
            self._await_flushing()
        elif self._pipeline or self._refused is not None or self._client_ended:
            self._serve_next()
        else:
            if self.flow.read_paused:
                self.flow.resume_reading()
            if not self._receiving:
                self.deadline = self.loop.time() + self._gate.keep_alive_secs

    # State.

    @property
    def is_waiting(self) -> bool:
        """Whether the request waits in the gate's queue."""
        return self._queued is not None

    def is_idle(self) -> bool:
        """Return whether it has answered a request and waits for the next."""
        busy = self._in_flight or self._receiving or self._refused is not None
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
        elif self._in_flight and (self.flow.read_paused or not self._receiving):
            # The service, not the client, is taking the time.
            self._set_deadline(self._gate.request_timeout_secs)
        elif self._refused is None and self._receiving:
            self._refuse(Refused(REQUEST_TIMEOUT))
        else:
            self._await_flushing()
            self._close()

    def drop(self) -> None:
        """Close at once, to make room."""
        self.transport.abort()

    def shutdown(self) -> None:
        """Called by uvicorn when the service stops. Close once the response has been sent."""
        self._gate.draining = True
        if self._in_flight:
            if self._serving is not None:
                self._serving.keep_alive = False
            self._keep_task()
        elif not self._receiving:
            if self._answered and not unread_bytes(self.transport):
                self._close()
            else:
                # A client that has just connected, or just asked, still gets its response.
                self._set_deadline(LINGER_SECS)

    def _refuse(self, refused: Refused) -> None:
        """Respond with a problem, after the response in progress, and read nothing more."""
        self._metrics.refused[refused.kind.code] += 1
        self._refused = refused
        self.flow.pause_reading()
        # They may hold a whole read of an oversized message.
        self._piece = self._earlier = b""
        self._parser = None  # type: ignore[assignment]  # it is not used again
        if self._skipping:
            self._half_close()
            return
        if self._receiving and self._message.scope is not None:
            # The body of this message is refused.
            self._message.body = bytearray()
            if self._message in self._pipeline:
                self._pipeline.popleft()
        if not self._in_flight:
            self._write_refusal(refused)

    def _write_refusal(self, refused: Refused) -> None:
        if self.transport.is_closing():
            return
        self._answered = True
        message = self._message if self._receiving else self._serving
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
