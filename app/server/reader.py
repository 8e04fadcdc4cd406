"""Reads requests: bytes into exchanges, within limits of size and form.

httptools parses. The checks that every request needs are in its callbacks and written for
speed. Rare conditions are derived when they are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn, Protocol

import httptools
from uvicorn._types import HTTPScope

from app.http.problems import HEADERS_TOO_LARGE, MALFORMED_REQUEST, PAYLOAD_TOO_LARGE, Refused
from app.http.request import MAX_BODY_BYTES
from app.server import head
from app.server.exchange import Exchange

MAX_MESSAGE_BYTES = 2 * MAX_BODY_BYTES
"""Maximum size of a message after its first read, with the framing of chunks and trailers."""

# Without these fields, a message that can be kept alive is HTTP/1.1. Asking the parser for the
# version would take longer.
_RARE = frozenset({b"connection", b"transfer-encoding", b"expect", b"upgrade"})
_FRAGMENT = ord("#")
_NO_HOST = b" "
"""Stands for no `Host` that has been checked. No field has this value."""
_PLAIN_DIGITS = len(str(MAX_BODY_BYTES)) - 1


class Receiver(Protocol):
    """Who gets the messages. Each method but `on_incomplete` may call `stop` of the reader."""

    def on_incomplete(self) -> None:
        """Called when a read ends within a message, once for each message."""

    def on_head(self, exchange: Exchange) -> bool:
        """Called with a message whose head is complete. Return whether to receive its body,
        which is skipped otherwise."""

    def on_request(self, exchange: Exchange) -> None:
        """Called with a complete message."""

    def on_skipped(self) -> None:
        """Called at the end of a message whose body was skipped."""


class _StopReading(Exception):
    """Raised through the parser to stop it.

    It does not carry the reason: a stored exception would keep its frames, and with them the
    data read, alive until a garbage collection.
    """


class RequestReader:
    """Reads the requests of one connection. `connection` is what the scopes of all share."""

    def __init__(
        self, receiver: Receiver, begin: Callable[[], Exchange], connection: HTTPScope
    ) -> None:
        self._receiver = receiver
        self._begin = begin
        self._connection = connection
        self._parser = self._new_parser()
        self._reason: Refused | None = None
        self._valid_host = _NO_HOST
        self._piece = b""
        self._is_first = False
        """Whether the next message to begin is at the start of the piece."""

        self.exchange: Exchange
        """The newest."""
        self.receiving = False
        """Whether it is incomplete."""
        self.skipping = False
        """Whether its body is skipped."""
        self._chunked_bytes: int | None = None
        self._upgrade_offered = False
        # About a message that does not arrive in one read.
        self._late: Exchange | None = None
        self._earlier = b""
        self._later_bytes = 0

    def _new_parser(self) -> httptools.HttpRequestParser:
        parser = httptools.HttpRequestParser(self)
        # What follows a message that ends the connection is ignored.
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
        return parser

    @property
    def is_chunked(self) -> bool:
        """Whether the newest message has a chunked body."""
        return self._chunked_bytes is not None

    def feed(self, data: bytes) -> Refused | None:
        """Read at most `head.MAX_BYTES` bytes. Return why reading ends, if it does."""
        while data:
            self._piece, self._is_first = data, not self.receiving
            try:
                self._parser.feed_data(data)
                if self.receiving:
                    self._check_incomplete(self.exchange, data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade(data[upgrade.args[0] :])
                continue
            except (httptools.HttpParserError, _StopReading):
                return self._reason or Refused(MALFORMED_REQUEST)
            break
        self._piece = b""
        return None

    def stop(self, reason: Refused) -> NoReturn:
        """Read no further, and let `feed` return the reason."""
        self._reason = reason
        raise _StopReading

    def release(self) -> None:
        """Forget what has been read, but for the newest message. Nothing is read after this."""
        # They may hold a whole read of an oversized message.
        self._piece = self._earlier = b""
        self._parser = None  # type: ignore[assignment]  # not used again

    def close(self) -> None:
        """Forget everything. Nothing is called after this."""
        self.release()
        self.exchange = self._late = None  # type: ignore[assignment]  # not used again
        self._receiver = self._begin = None  # type: ignore[assignment]

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Return the head without its offer of an upgrade, followed by `rest`, to parse anew.

        The parser treats the bytes after an offer as another protocol. We support no other, so
        a new parser gets the same head without the offer (RFC 9110, section 7.8).
        """
        if not self._upgrade_offered:
            # CONNECT. Nothing after it can be parsed, and the response ends the connection.
            self.exchange.flow.pause_reading()
            return b""
        self._upgrade_offered = False
        exchange, method = self.exchange, self._parser.get_method()
        version = self._parser.get_http_version()
        self._parser = self._new_parser()
        return head.without_upgrade(method, exchange.target, version, exchange.headers) + rest

    def _check_incomplete(self, exchange: Exchange, data: bytes) -> None:
        """Check a message that is still incomplete. `data` is what arrived last."""
        if exchange is not self._late:
            self._late = exchange
            self._earlier = b""
            self._later_bytes = 0
            self._receiver.on_incomplete()
        else:
            self._later_bytes += len(data)
        if exchange.scope is None:
            self._earlier += data
            self._check_head_size(exchange)
        elif self._later_bytes > MAX_MESSAGE_BYTES:
            self.stop(Refused(PAYLOAD_TOO_LARGE))

    # Callbacks of the parser.

    def on_message_begin(self) -> None:
        """The first byte of a message."""
        self.exchange = self._begin()
        self.receiving = True

    def on_url(self, url: bytes) -> None:
        """A part of the target."""
        self.exchange.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field, or one of the trailers, which we do not use."""
        headers = self.exchange.headers
        # The parser leaves white space at the end (RFC 9110, section 5.5).
        headers.append((name.lower(), value.rstrip(b" \t")))
        if len(headers) > head.MAX_FIELDS:
            self.stop(Refused(HEADERS_TOO_LARGE))

    def on_headers_complete(self) -> None:
        """The end of the head."""
        exchange, parser = self.exchange, self._parser
        fields = dict(exchange.headers)
        method = exchange.method = parser.get_method()
        version = "1.1"
        self._chunked_bytes = None
        if (
            len(fields) != len(exchange.headers)
            or fields.get(b"host") != self._valid_host
            or not _RARE.isdisjoint(fields)
            or not parser.should_keep_alive()
        ):
            if parser.should_upgrade() and method != b"CONNECT":
                # The head is parsed again, without the offer.
                self._upgrade_offered = True
                return
            version = parser.get_http_version()
            self._check_fields(exchange, fields, version)
        is_late = exchange is self._late
        target_end = len(method) + 1 + len(exchange.target)
        if (
            is_late
            or not self._is_first
            or not self._piece.startswith(b" HTTP/", target_end)
            or _FRAGMENT in exchange.target
            or exchange.target == b"*"
        ):
            self._check_target(exchange)
        self._is_first = False
        length = fields.get(b"content-length")
        # The parser has ensured that it is one number.
        if length is not None and len(length) > _PLAIN_DIGITS and int(length) > MAX_BODY_BYTES:
            self.stop(Refused(PAYLOAD_TOO_LARGE))
        if is_late:
            self._check_head_size(exchange)
        exchange.complete_head(self._connection, version)
        self.skipping = not self._receiver.on_head(exchange)

    def on_body(self, body: bytes) -> None:
        """A part of the body."""
        if self._chunked_bytes is not None:
            self._chunked_bytes += len(body)
            if self._chunked_bytes > MAX_BODY_BYTES:
                self.stop(Refused(PAYLOAD_TOO_LARGE))
        if not self.skipping:
            self.exchange.body += body

    def on_message_complete(self) -> None:
        """The end of a message."""
        if self._upgrade_offered:
            return
        self.receiving = False
        if self._late is not None:
            self._late, self._earlier = None, b""
        if self.skipping:
            self.skipping = False
            self._receiver.on_skipped()
        else:
            self.exchange.more_body = False
            self._receiver.on_request(self.exchange)

    # Checks.

    def _check_target(self, exchange: Exchange) -> None:
        received = self._piece
        if exchange is self._late:
            received = self._earlier + received
        refused = head.validate_target(exchange.method, exchange.target, received)
        if refused is not None:
            self.stop(refused)

    def _check_fields(
        self, exchange: Exchange, fields: dict[bytes, bytes], version: str
    ) -> None:
        refused = head.validate(exchange.headers, version)
        if refused is not None:
            self.stop(refused)
        self._valid_host = fields.get(b"host", _NO_HOST)
        if b"transfer-encoding" in fields:
            self._chunked_bytes = 0
        # HTTP/1.0 has no 100 Continue (RFC 9110, section 10.1.1).
        expects = fields.get(b"expect", b"").lower() == b"100-continue"
        exchange.waiting_for_100_continue = expects and version != "1.0"
        is_last = self._parser.should_upgrade() or version == "1.0"
        exchange.keep_alive = self._parser.should_keep_alive() and not is_last

    def _check_head_size(self, exchange: Exchange) -> None:
        # One read can hold more than this head, so only complete fields count, and of an
        # incomplete one the bytes after the first read.
        known = head.size_bytes(exchange.target, exchange.headers)
        if max(known, self._later_bytes) > head.MAX_BYTES:
            self.stop(Refused(HEADERS_TOO_LARGE))
