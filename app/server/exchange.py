"""One request and its response, as an ASGI application sees them.

uvicorn's `RequestResponseCycle` speaks ASGI. An `Exchange` is served once its body is whole, so
`receive` need not wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

import httptools
from typing_extensions import override
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.server import ServerState

from app.http.response import Headers, RawResponse

CLOSE = (b"connection", b"close")


def encode_response(response: RawResponse, before: Headers, after: Headers) -> bytes:
    """The bytes of a response, with headers before and after its own."""
    lines = map(b": ".join, (*before, *response.headers, *after))
    return b"%b%b\r\n\r\n%b" % (
        STATUS_LINE[response.status],
        b"\r\n".join(lines),
        response.body,
    )


class Exchange(RequestResponseCycle):
    """One request and its response, from the first byte of the request.

    The parent's constructor is not called: attributes of the class stand for what most
    exchanges never change.
    """

    access_log = False
    access_logger = logging.getLogger("uvicorn.access")
    logger = logging.getLogger("uvicorn.error")

    chunked_encoding = None
    disconnected = False
    expected_content_length = 0
    keep_alive = True
    more_body = True
    response_complete = False
    response_started = False
    scope: HTTPScope | None = None  # type: ignore[assignment]  # None until the head is whole
    method = b""
    target = b""
    waiting_for_100_continue = False

    _event: asyncio.Event | None = None
    _is_received = False

    def __init__(
        self,
        transport: asyncio.Transport,
        flow: FlowControl,
        server_state: ServerState,
        on_response: Callable[[], None],
    ) -> None:
        self.transport = transport
        self.flow = flow
        self.server_state = server_state
        self.on_response = on_response
        self.headers: list[tuple[bytes, bytes]] = []
        self.body = bytearray()

    @property
    def default_headers(self) -> Headers:  # type: ignore[override]  # it changes every second
        """What the server adds to every response."""
        return self.server_state.default_headers

    @property
    def message_event(self) -> asyncio.Event:  # type: ignore[override]  # few wait for it
        """Set when the response is complete or the client has gone."""
        if self._event is None:
            self._event = asyncio.Event()
        return self._event

    def complete_head(self, connection: HTTPScope, version: str) -> None:
        """Make the scope from that of the connection. Raises `HttpParserInvalidURLError`."""
        target = self.target
        if target.startswith(b"/") and target.isascii():
            raw_path, _, query = target.partition(b"?")
        else:
            url = httptools.parse_url(target)
            # An absolute target may have no path (RFC 9112, section 3.2.1).
            raw_path, query = url.path or b"/", url.query or b""
        path = raw_path.decode("ascii")
        self.scope = scope = connection.copy()
        scope["http_version"] = version
        scope["method"] = self.method.decode("ascii")
        scope["path"] = unquote(path) if "%" in path else path
        scope["raw_path"] = raw_path
        if root := scope["root_path"]:
            scope["path"] = root + scope["path"]
            scope["raw_path"] = root.encode("ascii") + raw_path
        scope["query_string"] = query
        scope["headers"] = self.headers
        # Trailers must not be merged into the headers (RFC 9110, section 6.5.1).
        self.headers = []

    @property
    def fields(self) -> Iterable[tuple[bytes, bytes]]:
        """The header fields that have arrived."""
        return self.headers if self.scope is None else self.scope["headers"]

    @override
    async def receive(self) -> Any:
        """The whole body, and then the end of the exchange."""
        if not self._is_received and not self.disconnected:
            self._is_received = True
            return {"type": "http.request", "body": bytes(self.body), "more_body": False}
        if not self.disconnected and not self.response_complete:
            await self.message_event.wait()
        return {"type": "http.disconnect"}

    def disconnect(self) -> None:
        """The client has gone."""
        self.disconnected = True
        self.message_event.set()
