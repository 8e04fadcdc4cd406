"""What every request served by FastAPI gets: a request id, `Cache-Control: no-store`, a
measured duration, and a problem in place of anything that fails inside."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.domain.errors import ArbiterError, ShuttingDown
from app.http.problems import INTERNAL_ERROR, Refused, error_response, refused_response
from app.http.request_id import REQUEST_ID, choose_request_id
from app.http.response import Headers, RawResponse

NO_STORE = (b"cache-control", b"no-store")
UNMATCHED = "unmatched"
"""The route label of requests that no route took."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

ObserveRequest = Callable[[str, str, int, float], None]
"""Called with method, path template, status and duration in seconds."""

Failure = (Exception, asyncio.CancelledError)
"""What ends a request without a response. Only the server cancels, when it stops and the time
for requests in flight is over."""


def failed_response(error: BaseException, request_id: str) -> RawResponse:
    """The response to a request that ended with `error`, a `Failure`. Defects are logged."""
    if isinstance(error, asyncio.CancelledError):
        error = ShuttingDown()
    if isinstance(error, ArbiterError):
        return error_response(error, request_id)
    structlog.get_logger("arbiter").exception("request failed", request_id=request_id)
    return refused_response(Refused(INTERNAL_ERROR), request_id)


def common_headers(request_id: str) -> Headers:
    """The headers of every response."""
    return [(REQUEST_ID, request_id.encode()), NO_STORE]


async def send_response(send: Send, response: RawResponse, extra: Headers) -> None:
    """Send a whole response with its own headers and `extra`."""
    headers = [*response.headers, *extra]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


class RequestMiddleware:
    """The outermost ASGI layer. Puts the request id into `scope["state"]["request_id"]`."""

    def __init__(self, app: ASGIApp, observe: ObserveRequest) -> None:
        self._app = app
        self._observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        sent = [value for name, value in scope["headers"] if name == REQUEST_ID]
        request_id = choose_request_id(sent)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *common_headers(request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except ClientDisconnect:
            # The client has gone; there is no one to answer.
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
                route = getattr(scope.get("route"), "path", UNMATCHED)
                self._observe(method, route, status, time.perf_counter() - started)
