"""What uvicorn has no setting for: how large and how slow a request may be, what it must look
like, and how many are taken at once.

A subclass of uvicorn's connection over httptools. It reaches into its parent; a test holds a
digest of everything that it leans on, so that a new uvicorn is looked at before it is used.

What is refused here is answered after what came before it on the same connection, and then
nothing more is read: the connection is half closed, so that the answer is not lost by the
reset that unread data would cause, and ended a moment later.
"""

from __future__ import annotations

import asyncio
import math
import re
from typing import Any, NoReturn

import httptools
from typing_extensions import override
from uvicorn._types import ASGI3Application, ASGIReceiveCallable, ASGISendCallable, Scope
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from app.api.direct_send import CLOSE, encode_answer, send_directly
from app.api.envelope import REQUEST_ID, accept_request_id, common_headers
from app.api.problem_types import ProblemCode
from app.api.problems import Refused, refused_answer
from app.api.strict import MAX_BODY_BYTES
from app.server.gate import HEALTH_PATHS, Gate

MAX_HEADER_FIELDS = 64
MAX_HEAD_BYTES = 16_384
"""Request line and header fields together."""

LINGER_SECS = 1.0
"""How long a connection stays half closed, for the client to read why."""

_FIELD_OVERHEAD = len(b": \r\n")
_VERSIONS = frozenset({"1.0", "1.1"})
# A host, of any kind, and perhaps a port (RFC 9110, section 7.2).
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=\[\]:-]*")


class _StopParsing(Exception):
    """Raised through the parser. Says nothing itself: whoever kept it would keep its frames,
    and with them what was read, until some garbage collection."""


class LimitedProtocol(HttpToolsProtocol):
    """One connection. `app_state["gate"]`, from the lifespan, is shared by all of them."""

    cycle: RequestResponseCycle | None  # type: ignore[assignment]  # None until there is one

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._gate: Gate = app_state["gate"]
        self.deadline = math.inf
        self._invited = False
        self._running: RequestResponseCycle | None = None
        self._reason: Refused | None = None
        self._refused: Refused | None = None
        # The message that is being received.
        self._receiving = self._in_head = False
        self._read_bytes = self._first_read_bytes = self._head_read_bytes = 0
        self._hosts = 0
        self._upgrades = False
        self._chunked_bytes: int | None = None

    # What the transport tells.

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._invited = self._gate.enter(self)
        self.deadline = self.loop.time() + self._gate.request_timeout_secs

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._gate.leave(self)

    @override
    def data_received(self, data: bytes) -> None:
        if self._refused is not None:
            return
        self._read_bytes = len(data)
        if self._in_head:
            self._head_read_bytes += len(data)
        try:
            self.parser.feed_data(data)
            if self._in_head:
                self._check_head_size()
        except httptools.HttpParserUpgrade:
            # Not offered, so passed over (RFC 9110, section 7.8). What follows cannot be
            # parsed any more, and the answer ends the connection.
            self.flow.pause_reading()
        except (httptools.HttpParserError, _StopParsing):
            self._refuse(self._reason or Refused(ProblemCode.MALFORMED_REQUEST))

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        # A client that does not read its answers must not keep them in memory.
        self.deadline = self.loop.time() + self._gate.request_timeout_secs

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._set_deadline()

    # What the parser tells.

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._receiving = self._in_head = True
        self._first_read_bytes = self._head_read_bytes = self._read_bytes
        self._hosts = 0
        self._upgrades = False
        self._chunked_bytes = None
        self.deadline = self.loop.time() + self._gate.request_timeout_secs

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            # Trailers are not merged into the headers (RFC 9110, section 6.5.1).
            return
        name = name.lower()
        if name in _WATCHED:
            self._watch(name, value)
        self.headers.append((name, value))
        if len(self.headers) > MAX_HEADER_FIELDS:
            self._stop(ProblemCode.HEADERS_TOO_LARGE)

    def _watch(self, name: bytes, value: bytes) -> None:
        match name:
            case b"host":
                self._hosts += 1
                if not _HOST.fullmatch(value):
                    self._stop(ProblemCode.MALFORMED_REQUEST, "The Host is not valid.")
            case b"content-length":
                # The parser has seen to it that this is one number.
                if int(value) > MAX_BODY_BYTES:
                    self._stop(ProblemCode.PAYLOAD_TOO_LARGE)
            case b"transfer-encoding":
                if value.strip().lower() != b"chunked":
                    self._stop(
                        ProblemCode.MALFORMED_REQUEST,
                        "The only Transfer-Encoding that is understood is: chunked",
                    )
                self._chunked_bytes = 0
            case b"expect":
                self.expect_100_continue |= value.lower() == b"100-continue"
            case b"upgrade":
                self._upgrades = True

    @override
    def on_headers_complete(self) -> None:
        self._in_head = False
        version = self.parser.get_http_version()
        if self._hosts != 1 and not (version == "1.0" and self._hosts == 0):
            self._stop(
                ProblemCode.MALFORMED_REQUEST, "Send exactly one Host (RFC 9112, section 3.2)."
            )
        if version not in _VERSIONS or (self._chunked_bytes is not None and version == "1.0"):
            self._stop(ProblemCode.MALFORMED_REQUEST)
        self._check_head_size()
        if self._upgrades:
            self._upgrades = self.parser.should_upgrade()
        super().on_headers_complete()

    def _check_head_size(self) -> None:
        """Stops the parsing if the head is too large, as far as it has come."""
        if self._head_read_bytes <= MAX_HEAD_BYTES:
            return
        # The reads hold more than this head. Its fields count as far as they are complete,
        # and of one that is not, what came after the first read.
        size = len(self.url)
        for name, value in self.headers:
            size += len(name) + len(value) + _FIELD_OVERHEAD
        if self._in_head:
            size = max(size, self._head_read_bytes - self._first_read_bytes)
        if size > MAX_HEAD_BYTES:
            self._stop(ProblemCode.HEADERS_TOO_LARGE)

    def _stop(self, code: ProblemCode, detail: str | None = None) -> NoReturn:
        """Refuse what is being received."""
        self._reason = Refused(code, detail)
        raise _StopParsing

    @override
    def on_body(self, body: bytes) -> None:
        if self._chunked_bytes is not None:
            self._chunked_bytes += len(body)
            if self._chunked_bytes > MAX_BODY_BYTES:
                self._stop(ProblemCode.PAYLOAD_TOO_LARGE)
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._receiving = False
        self._set_deadline()

    # What the application does.

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        gate = self._gate
        if gate.draining or self._upgrades or not self._invited:
            cycle.keep_alive = False
        path = cycle.scope["path"]
        # Pipelined requests wait for one another; only the first of them is turned away.
        if cycle is self.cycle and not (
            gate.has_room(cycle.scope["method"], path)
            and (self._invited or path in HEALTH_PATHS)
        ):
            self._turn_away(cycle)
            return
        gate.metrics.requests_in_flight += 1
        super()._start_asgi_task(cycle, self._counted)

    async def _counted(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        try:
            await self.app(scope, receive, send)
        finally:
            # Here and not when the task is done, which the event loop tells a turn later,
            # when it has read, and would have turned away, what came meanwhile.
            self._gate.metrics.requests_in_flight -= 1

    def _turn_away(self, cycle: RequestResponseCycle) -> None:
        """Answer at once that there is too much to do."""
        self._gate.metrics.refused[ProblemCode.OVERLOADED] += 1
        request_id = _request_id(self.headers)
        answer = refused_answer(Refused(ProblemCode.OVERLOADED), request_id)
        if not send_directly(cycle.send, answer, common_headers(request_id)):
            self.drop()

    @override
    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            self.deadline = self.loop.time() + LINGER_SECS
            return
        if self._refused is None:
            self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        elif self._refused is not None:
            self._write_refusal(self._refused)
        else:
            self._set_deadline()

    # Ends.

    def _is_busy(self) -> bool:
        return self._running is not None and not self._running.response_complete

    def _set_deadline(self) -> None:
        """The deadline when nothing is overdue by itself."""
        if self._receiving or self._refused is not None:
            return
        if self._is_busy():
            self.deadline = math.inf
        else:
            self.deadline = self.loop.time() + self._gate.keep_alive_secs

    def is_idle(self) -> bool:
        """Whether it waits for the next request."""
        return not self._receiving and self._refused is None and not self._is_busy()

    def overdue(self) -> None:
        """Be told that the deadline has passed."""
        if self.transport.is_closing() or self.flow.write_paused:
            self.transport.abort()
        elif self._refused is not None or not self._receiving:
            self.deadline = self.loop.time() + LINGER_SECS
            self.transport.close()
        elif self.flow.read_paused and self._is_busy():
            # It is we who do not read: the requests before this one come first.
            self.deadline = self.loop.time() + self._gate.request_timeout_secs
        else:
            self._refuse(Refused(ProblemCode.REQUEST_TIMEOUT))

    def drop(self) -> None:
        """Make room."""
        self.transport.abort()

    @override
    def shutdown(self) -> None:
        self._gate.draining = True
        # What is being received is still answered; its deadline sees to it.
        if not self._receiving or self._is_busy():
            super().shutdown()

    def _refuse(self, refused: Refused) -> None:
        """Answer with a problem, after what is being answered, and read no more."""
        self._gate.metrics.refused[refused.code] += 1
        self._refused = refused
        self.flow.pause_reading()
        # They may hold a whole read of what is too large.
        self.parser, self.url = None, b""  # type: ignore[assignment]  # as uvicorn ends it
        message, running = self.cycle, self._running
        if message is not None and message.more_body:
            # It is the body of this message that is refused.
            if message is not running:
                self.pipeline.popleft()
            elif running.response_complete:
                self._half_close()
                return
            else:
                running.disconnected = True
                running.body = bytearray()
                running.message_event.set()
                self._running = None
        if not self._is_busy():
            self._write_refusal(refused)

    def _write_refusal(self, refused: Refused) -> None:
        if self.transport.is_closing():
            return
        request_id = _request_id(self.headers)
        answer = refused_answer(refused, request_id)
        after = [*common_headers(request_id), CLOSE]
        self.transport.write(encode_answer(answer, self.server_state.default_headers, after))
        self._half_close()

    def _half_close(self) -> None:
        self.deadline = self.loop.time() + LINGER_SECS
        if self.transport.can_write_eof():
            self.transport.write_eof()


_WATCHED = frozenset({b"host", b"content-length", b"transfer-encoding", b"expect", b"upgrade"})


def _request_id(headers: list[tuple[bytes, bytes]] | None) -> str:
    """The id that the client sent, as far as its headers have come, or a new one."""
    sent = [value for name, value in headers or () if name == REQUEST_ID]
    return accept_request_id(sent[0] if len(sent) == 1 else None)
