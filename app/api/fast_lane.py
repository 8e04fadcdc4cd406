"""The fast lane: calls and batches that are written the plain way, without the framework.

It takes exactly what the patterns below describe, from a caller who may. Every other request
goes on to the framework lane with its body replayed, so that all that can be wrong with a
request is judged in one place. Both lanes answer with the same functions.
"""

from __future__ import annotations

import re
import time
from typing import NamedTuple

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import auth
from app.api.answers import Answer, admitted_answer
from app.api.envelope import accept_request_id, failed_answer, send_answer
from app.api.problems import denied_answer
from app.domain.admission import Denied
from app.domain.session import DataSensitivity
from app.domain.tools import MAX_BATCH
from app.observability.metrics import Metrics
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


class _Request(NamedTuple):
    """A request that the fast lane takes, but for its body."""

    session_id: str
    is_batch: bool
    caller: auth.Caller
    request_id: str
    minimal: bool


class FastLane:
    """An ASGI application in front of `framework`, with the same service and keys."""

    def __init__(self, framework: FastAPI) -> None:
        self._app: ASGIApp = framework
        self._service: SessionService = framework.state.service
        self._authenticator: auth.Authenticator = framework.state.authenticator
        self._metrics: Metrics = framework.state.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or hand it on."""
        request = self._plain(scope)
        if request is None:
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        message = await receive()
        body = message.get("body", b"")
        pattern = _BATCH_BODY if request.is_batch else _CALL_BODY
        match = None if message.get("more_body") else pattern.fullmatch(body)
        names = () if match is None else _names(match)
        if match is None or len(names) > MAX_BATCH:
            await self._app(scope, _replay(message, receive), send)
            return
        answer = await self._answer(request, names, match)
        await send_answer(send, answer, request.request_id)
        route = BATCH if request.is_batch else CALLS
        durations = self._metrics.request("POST", route, answer.status)
        durations.observe(time.perf_counter() - started)

    def _plain(self, scope: Scope) -> _Request | None:
        """The request, if there is nothing about it that the framework should judge."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["query_string"]:
            return None
        path = _PATH.fullmatch(scope["path"])
        if path is None or len(scope["raw_path"]) != len(scope["path"]):
            return None
        headers = dict(scope["headers"])
        prefer = headers.get(b"prefer")
        if (
            len(headers) != len(scope["headers"])
            or headers.get(b"content-type") != b"application/json"
            or b"content-length" not in headers
            or b"idempotency-key" in headers
            or prefer not in _PREFERENCES
        ):
            return None
        try:
            caller = self._authenticator.identify(
                headers.get(b"authorization"), scope.get("server")
            )
        except auth.Unauthenticated:
            return None
        if not caller.may(_SCOPES):
            return None
        request_id = accept_request_id(headers.get(b"x-request-id"))
        return _Request(path[1], path[2] == "batch", caller, request_id, prefer is not None)

    async def _answer(
        self, request: _Request, names: tuple[str, ...], match: re.Match[bytes]
    ) -> Answer:
        agent = match[2] and match[2].decode().lower()
        tier = match[3] and _TIERS[match[3]]
        session_id, service = request.session_id, self._service
        try:
            if request.is_batch:
                decision = await service.record_batch(
                    session_id, names, agent_id=agent, data_sensitivity=tier
                )
            else:
                decision = await service.record_call(
                    session_id, names[0], agent_id=agent, data_sensitivity=tier
                )
        except Exception as error:  # noqa: BLE001 - every failure has an answer
            return failed_answer(error, request.request_id)
        if isinstance(decision, Denied):
            return denied_answer(decision, request.request_id)
        return admitted_answer(decision, minimal=request.minimal)


_PREFERENCES = (None, b"return=minimal")
_SCOPES = (auth.Scope.PROXY,)


def _names(match: re.Match[bytes]) -> tuple[str, ...]:
    """The tool names. Names have no quotes in them, so that quotes only delimit them."""
    return tuple(match[1].decode("ascii").split('"')[1::2])


def _replay(message: Message, receive: Receive) -> Receive:
    """A `receive` that gives `message` first."""
    unread = [message]

    async def replayed() -> Message:
        return unread.pop() if unread else await receive()

    return replayed
