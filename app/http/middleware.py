"""The outermost layer of the framework lane: every answer gets a request id and
`Cache-Control: no-store`, every request is timed, and nothing that fails inside leaves
as anything but a problem."""

from __future__ import annotations

import asyncio
import re
import time
from itertools import count
from secrets import token_hex

from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.problem_types import ProblemCode
from app.domain.errors import ArbiterError, ShuttingDown
from app.http.problems import Refused, error_answer, refused_answer
from app.http.response import Answer, Headers
from app.observability.logs import get_logger
from app.observability.metrics import Metrics

NO_STORE = (b"cache-control", b"no-store")
REQUEST_ID = b"x-request-id"
UNMATCHED = "unmatched"
"""The route label of requests that no route took."""

_ACCEPTED_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# Random once and counted from there: unique, and much cheaper than random every time.
_prefix = token_hex(6)
_serial = count(1)


def accept_request_id(sent: bytes | None) -> str:
    """The id that the client sent, if it is one we accept, or else a new one that this
    service has not used before."""
    if sent is not None and _ACCEPTED_ID.fullmatch(sent):
        return sent.decode("ascii")
    return f"{_prefix}-{next(_serial):x}"


Failure = (Exception, asyncio.CancelledError)
"""What ends a request without an answer of its own. Only the server cancels, when it has to
stop and waits no longer; what is cancelled is answered and is then over."""


def failed_answer(error: BaseException, request_id: str) -> Answer:
    """The answer to a request during which `error`, a `Failure`, was raised. A defect is
    logged."""
    if isinstance(error, asyncio.CancelledError):
        error = ShuttingDown()
    if isinstance(error, ArbiterError):
        return error_answer(error, request_id)
    get_logger().exception("request failed", request_id=request_id)
    return refused_answer(Refused(ProblemCode.INTERNAL_ERROR), request_id)


def common_headers(request_id: str) -> Headers:
    """What every answer has."""
    return [(REQUEST_ID, request_id.encode()), NO_STORE]


async def send_answer(send: Send, answer: Answer, extra: Headers) -> None:
    """Send a whole answer with its headers and `extra`."""
    headers = [*answer.headers, *extra]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


class Envelope:
    """ASGI middleware. The request id is in `scope["state"]["request_id"]`."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        sent = [value for name, value in scope["headers"] if name == REQUEST_ID]
        request_id = accept_request_id(sent[0] if len(sent) == 1 else None)
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_wrapped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], *common_headers(request_id)]
            await send(message)

        try:
            await self._app(scope, receive, send_wrapped)
        except ClientDisconnect:
            # Nobody is left to answer.
            return
        except Failure as error:
            answer = failed_answer(error, request_id)
            if status:
                raise
            status = answer.status
            await send_answer(send, answer, common_headers(request_id))
        finally:
            if status:
                method = scope["method"] if scope["method"] in _METHODS else "other"
                route = getattr(scope.get("route"), "path", UNMATCHED)
                elapsed = time.perf_counter() - started
                self._metrics.request(method, route, status).observe(elapsed)
