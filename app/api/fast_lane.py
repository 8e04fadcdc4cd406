"""The fast lane: calls and batches that are written the plain way, without the framework.

It takes exactly what the patterns below describe, from a caller who may. Every other request
goes on to the framework lane with its body replayed, so that all that can be wrong with a
request is judged in one place. Both lanes answer with the same functions.
"""

from __future__ import annotations

import re
import time

from fastapi import FastAPI
from opentelemetry.trace import TracerProvider
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import __version__
from app.api.encode import admitted_response, denied_response
from app.domain.admission import Denied
from app.domain.session import DataSensitivity
from app.domain.tools import MAX_BATCH
from app.http import auth
from app.http.direct_send import send_directly
from app.http.middleware import (
    Failure,
    common_headers,
    failed_response,
    send_response,
)
from app.http.request import MAX_BODY_BYTES
from app.http.request_id import REQUEST_ID, choose_request_id
from app.http.response import RawResponse
from app.observability.audit import Actor
from app.observability.metrics import Metrics
from app.observability.tracing import end_with, server_span
from app.service import SessionService

CALLS = "/sessions/{session_id}/calls"
BATCH = "/sessions/{session_id}/batch"

_PATH = re.compile(r"/sessions/([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/(calls|batch)")

# White space as JSON has it (RFC 8259, section 2). Possessive, so that nothing can be read
# in two ways and no input makes the pattern try many.
_WS = rb"[ \t\n\r]*+"
_NAME = rb'"[A-Za-z0-9_./:@-]{1,128}"'
_UUID = rb"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"
_TIERS = {tier.encode(): tier for tier in DataSensitivity}


def _spaced(*tokens: bytes) -> bytes:
    """The tokens with white space where JSON allows it."""
    return _WS.join(tokens)


def _body(field: bytes, value: bytes) -> re.Pattern[bytes]:
    """An object with `field`, then perhaps the agent, then perhaps the tier."""
    agent = _spaced(b"(?:,", b'"agent_id"', b":", b'"(%b)"' % _UUID, b")?+")
    tier = _spaced(b"(?:,", b'"data_sensitivity"', b":", b'"(%b)"' % b"|".join(_TIERS), b")?+")
    return re.compile(_spaced(b"", rb"\{", field, b":", value, agent + tier + rb"\}", b""))


_NAMES = _spaced(_NAME, b"(?:%b)*+" % _spaced(b",", _NAME, b""))
_CALL_BODY = _body(b'"tool_name"', b"(%b)" % _NAME)
_BATCH_BODY = _body(b'"tool_names"', _spaced(rb"\[", b"((?:%b)?+)" % _NAMES, rb"\]"))


class FastLane:
    """An ASGI application in front of `framework`, with the same service and keys."""

    def __init__(self, framework: FastAPI) -> None:
        self._app: ASGIApp = framework
        self._service: SessionService = framework.state.service
        self._authenticator: auth.Authenticator = framework.state.authenticator
        self._metrics: Metrics = framework.state.metrics
        tracing: TracerProvider | None = framework.state.tracing
        self._tracer = None if tracing is None else tracing.get_tracer("arbiter", __version__)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or hand it on."""
        started = time.perf_counter()
        path = _plain_path(scope)
        headers = {} if path is None else dict(scope["headers"])
        caller = None if path is None else self._caller(scope, headers)
        if path is None or caller is None:
            await self._app(scope, receive, send)
            return
        message = await receive()
        body, read = message.get("body", b""), [message]
        while message.get("more_body") and len(body) <= MAX_BODY_BYTES:
            message = await receive()
            body += message.get("body", b"")
            read.append(message)
        is_batch = path[2] == "batch"
        match = (_BATCH_BODY if is_batch else _CALL_BODY).fullmatch(body)
        if (
            match is None
            or message["type"] != "http.request"
            or len(body) > MAX_BODY_BYTES
            or match[1].count(b",") >= MAX_BATCH
        ):
            await self._app(scope, _replay(read, receive), send)
            return
        request_id = choose_request_id([headers[REQUEST_ID]] if REQUEST_ID in headers else ())
        route = BATCH if is_batch else CALLS
        if self._tracer is None:
            answer = await self._answer(path[1], match, headers, caller.name, request_id)
        else:
            with server_span(self._tracer, "POST", route, path[0], headers) as span:
                answer = await self._answer(path[1], match, headers, caller.name, request_id)
                end_with(span, answer.status)
        common = common_headers(request_id)
        if not send_directly(send, answer, common):
            await send_response(send, answer, common)
        durations = self._metrics.request("POST", route, answer.status)
        durations.observe(time.perf_counter() - started)

    def _caller(self, scope: Scope, headers: dict[bytes, bytes]) -> auth.Caller | None:
        """Who asks, if there is nothing about the headers that the framework should judge."""
        if (
            len(headers) != len(scope["headers"])
            or headers.get(b"content-type") != b"application/json"
            or b"content-length" not in headers
            or b"content-encoding" in headers
            or b"idempotency-key" in headers
            or headers.get(b"prefer") not in _PREFERENCES
        ):
            return None
        server = scope.get("server")
        hosts = (headers[b"host"],) if b"host" in headers else ()
        if not self._authenticator.serves(hosts, server):
            return None
        try:
            caller = self._authenticator.identify(headers.get(b"authorization"), server)
        except auth.Unauthenticated:
            return None
        return caller if caller.may(_SCOPES) else None

    async def _answer(
        self,
        session_id: str,
        match: re.Match[bytes],
        headers: dict[bytes, bytes],
        caller: str,
        request_id: str,
    ) -> RawResponse:
        listed, agent_id, tier = match.groups()
        agent = None if agent_id is None else agent_id.decode("ascii").lower()
        data_sensitivity = None if tier is None else _TIERS[tier]
        # Names have no quotes in them, so that quotes only delimit them.
        names = listed.decode("ascii").split('"')[1::2]
        actor = Actor(caller, request_id)
        try:
            if match.re is _BATCH_BODY:
                decision = await self._service.record_batch(
                    session_id,
                    tuple(names),
                    actor,
                    agent_id=agent,
                    data_sensitivity=data_sensitivity,
                )
            else:
                decision = await self._service.record_call(
                    session_id,
                    names[0],
                    actor,
                    agent_id=agent,
                    data_sensitivity=data_sensitivity,
                )
        except Failure as error:
            return failed_response(error, request_id)
        if isinstance(decision, Denied):
            return denied_response(decision, request_id)
        return admitted_response(decision, minimal=b"prefer" in headers)


def _plain_path(scope: Scope) -> re.Match[str] | None:
    """The path of a call or batch that has no query and nothing percent-encoded."""
    if scope["type"] != "http" or scope["method"] != "POST" or scope["query_string"]:
        return None
    # Where something was percent-encoded the raw path is longer.
    if len(scope["raw_path"]) != len(scope["path"]):
        return None
    return _PATH.fullmatch(scope["path"])


_PREFERENCES = (None, b"return=minimal")
_SCOPES = (auth.Scope.PROXY,)


def _replay(read: list[Message], receive: Receive) -> Receive:
    """A `receive` that gives first what was read already."""
    unread = iter(read)

    async def replayed() -> Message:
        return next(unread, None) or await receive()

    return replayed
