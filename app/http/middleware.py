"""The frame around every request that FastAPI serves.

It assigns the request id, checks `Host`, adds `Cache-Control: no-store`, measures the duration,
and turns unhandled errors into problems. HEAD is served as GET without the body (RFC 9110,
section 9.3.2).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.domain.errors import ArbiterError, ShuttingDown
from app.http.auth import Authenticator
from app.http.problems import (
    INTERNAL_ERROR,
    MISDIRECTED_REQUEST,
    Refused,
    error_response,
    refused_response,
)
from app.http.request_id import REQUEST_ID, choose_request_id
from app.http.response import Headers, RawResponse

NO_STORE = (b"cache-control", b"no-store")
UNMATCHED = "unmatched"
"""The route label of requests that match no route."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

ObserveRequest = Callable[[str, str, int, float], None]
"""Called with the method, path template, status, and duration in seconds."""

Failure = (Exception, asyncio.CancelledError)
"""Exceptions that end a request without a response. Only the server cancels requests: when it
stops and their grace period is over."""


def failed_response(error: BaseException, request_id: str) -> RawResponse:
    """Return the response to a request that ended with `error`, a `Failure`. Defects are
    logged."""
    if isinstance(error, asyncio.CancelledError):
        error = ShuttingDown()
    if isinstance(error, ArbiterError):
        return error_response(error, request_id)
    structlog.get_logger("arbiter").exception("request failed", request_id=request_id)
    return refused_response(Refused(INTERNAL_ERROR), request_id)


def common_headers(request_id: str) -> Headers:
    """Return the headers that every response has."""
    return [(REQUEST_ID, request_id.encode()), NO_STORE]


async def send_response(send: Send, response: RawResponse, extra: Headers) -> None:
    """Send a response, with the headers in `extra` after its own."""
    headers = [*response.headers, *extra]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


class RequestMiddleware:
    """The outermost ASGI layer. It stores the request id in `scope["state"]["request_id"]`."""

    def __init__(
        self, app: ASGIApp, authenticator: Authenticator, observe: ObserveRequest
    ) -> None:
        self._app = app
        self._authenticator = authenticator
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = scope["headers"]
        request_id = choose_request_id([value for name, value in headers if name == REQUEST_ID])
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0
        is_head = scope["method"] == "HEAD"

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *common_headers(request_id)]
            elif is_head:
                message["body"] = b""
            await send(message)

        # A copy, because the server reads the method from its own scope. The router adds the
        # route to `inner`.
        inner = {**scope, "method": "GET"} if is_head else scope
        try:
            hosts = [value for name, value in headers if name == b"host"]
            if self._authenticator.serves(hosts, scope.get("server")):
                await self._app(inner, receive, send_with_headers)
            else:
                response = refused_response(Refused(MISDIRECTED_REQUEST), request_id)
                await send_response(send_with_headers, response, [])
        except ClientDisconnect:
            # The client has disconnected, so there is no one to respond to.
            return
        except Failure as error:
            response = failed_response(error, request_id)
            if status:
                raise
            status = response.status
            await send_response(send, response, common_headers(request_id))
        finally:
            if status:
                method = scope["method"] if scope["method"] in _METHODS else "other"
                route = getattr(inner.get("route"), "path", UNMATCHED)
                self._observe(method, route, status, time.perf_counter() - started)
