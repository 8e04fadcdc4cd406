"""The ASGI application in front: finds the handler of a request and runs it.

It is built from FastAPI's route table and skips Starlette's stack, nothing else. A route is
found by its method and the shape of its path; one like `/first/{name:path}` takes every method
and everything below `/first/`. FastAPI serves the rest: 404, 405, documentation, and everything
if mounted in another application. Both work inside the same frame: a request id, a check of
`Host`, errors as problems, no caching, a span and a measured duration. HEAD is served as GET,
without the body (RFC 9110, section 9.3.2).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from app.http.auth import Authenticator
from app.http.problems import (
    INTERNAL_ERROR,
    MISDIRECTED_REQUEST,
    Failure,
    Occurrence,
    Refused,
    Repeat,
    failed_response,
    problem_response,
    refused_response,
)
from app.http.request import StrictRequest
from app.http.request_id import REQUEST_ID, choose_request_id
from app.http.response import Headers, RawResponse
from app.http.route import Handler, StrictRoute

NO_STORE = (b"cache-control", b"no-store")
WHOLE_RESPONSE = "arbiter.http.response"
"""An ASGI extension. Its `respond` takes a whole `RawResponse` and more headers, and sends them
with one write. It returns `False` if the response has to be sent as ASGI messages."""
UNMATCHED = "unmatched"
"""The route label of requests that no route took."""

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_OPEN = "*"
"""Stands for the part of a path that a route leaves open."""
_PARTS_OF_A_TREE = 3
"""Nothing, the first part of the path, and at least one more."""

_NOT_STARTED = (
    "The service has not been started: the server, or the application that it is mounted in, "
    "must run its lifespan, which opens the store."
)
_NOTHING = {"outcome": "not_recorded"}

ObserveRequest = Callable[[str, str, int, float], None]
"""Called with method, path template, status and duration in seconds."""

StartSpan = Callable[[str, str, Scope], AbstractContextManager[Callable[[int], None]]]
"""Called with method, path template and scope. Gives what to call with the status."""


class Dispatcher:
    """Serves the routes of `framework`, whose state has `services`."""

    def __init__(
        self,
        framework: FastAPI,
        routes: Iterable[object],
        authenticator: Authenticator,
        observe: ObserveRequest,
        start_span: StartSpan | None,
    ) -> None:
        self.framework = framework
        self._authenticator = authenticator
        self._observe = observe
        self._start_span = start_span
        self.started = False
        """Whether the lifespan runs, which opens the store. Without it every request is
        refused."""
        self._services = framework.state.services
        self._handlers: dict[tuple[str, ...], Handler] = {}
        self._open_at: dict[int, list[int]] = {}
        """Where paths with this many parts may be open."""
        self._trees: dict[str, Handler] = {}
        for route in routes:
            if isinstance(route, StrictRoute):
                self._add(route.handler)

    def _add(self, handler: Handler) -> None:
        parts = handler.path.split("/")
        if handler.is_tree:
            _, first, _ = parts
            self._trees[first] = handler
            return
        if "{" not in handler.path:
            for method in handler.methods or ():
                self._handlers[(method, handler.path)] = handler
            return
        shape = [_OPEN if part.startswith("{") else part for part in parts]
        places = self._open_at.setdefault(len(parts), [])
        if (place := shape.index(_OPEN)) not in places:
            places.append(place)
        for method in handler.methods or ():
            self._handlers[(method, *shape)] = handler

    def _find(self, method: str, path: str) -> tuple[Handler | None, str]:
        """The handler of a request, and the part of the path that its route leaves open."""
        found = self._handlers.get((method, path))
        if found is not None:
            return found, ""
        parts = path.split("/")
        for at in self._open_at.get(len(parts), ()):
            value, parts[at] = parts[at], _OPEN
            found = self._handlers.get((method, *parts))
            if found is not None and value:
                return found, value
            parts[at] = value
        if len(parts) >= _PARTS_OF_A_TREE and (tree := self._trees.get(parts[1])):
            return tree, "/".join(parts[2:])
        return None, ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self.framework(scope, receive, send)
            return
        started = time.perf_counter()
        extension = scope.get("extensions", {}).get(WHOLE_RESPONSE)
        if extension is None:
            # Servers but ours leave white space at the end of values (RFC 9110, section 5.5).
            fields = [(name, value.strip(b" \t")) for name, value in scope["headers"]]
            scope = {**scope, "headers": fields}
        request = StrictRequest(scope, "", self._services)
        request_id = request.request_id = choose_request_id(request.header_values(REQUEST_ID))
        method = scope["method"]
        served_as = "GET" if method == "HEAD" else method
        path = scope["path"].removeprefix(request.root_path)
        handler, request.path_value = self._find(served_as, path)
        if not self.started:
            response = problem_response(INTERNAL_ERROR, request, _NOT_STARTED, _NOTHING, [])
            await _send(extension, send, response, request_id, is_head=method == "HEAD")
        elif not (handler is not None and handler.any_host) and not self._authenticator.serves(
            request.header_values(b"host"), scope.get("server")
        ):
            response = refused_response(Refused(MISDIRECTED_REQUEST), request)
            await _send(extension, send, response, request_id, is_head=method == "HEAD")
            self._observe(_label(method), UNMATCHED, response.status, _since(started))
        elif handler is None:
            scope = {**scope, "method": served_as}
            scope["state"] = {**scope.get("state", {}), "request_id": request_id}
            status = await self._fall_through(scope, receive, send, is_head=method == "HEAD")
            if status:
                route = getattr(scope.get("route"), "path", UNMATCHED)
                self._observe(_label(method), route, status, _since(started))
        else:
            try:
                if self._start_span is None:
                    response = await handler.respond(request, receive)
                else:
                    with self._start_span(method, handler.path, scope) as end:
                        response = await handler.respond(request, receive)
                        end(response.status)
            except ClientDisconnect:
                return
            echoed_id = request.echoed_id or request_id
            await _send(extension, send, response, echoed_id, is_head=method == "HEAD")
            label = _label(method) if handler.is_tree else method
            self._observe(label, handler.path, response.status, _since(started))

    async def _fall_through(
        self, scope: Scope, receive: Receive, send: Send, *, is_head: bool
    ) -> int:
        """Let FastAPI serve a request. Return the status, 0 if there was no response."""
        request_id, status = scope["state"]["request_id"], 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                echoed_id = scope["state"].get("echoed_id", request_id)
                message["headers"] = [*message["headers"], *common_headers(echoed_id)]
            elif is_head:
                message["body"] = b""
            await send(message)

        if asyncio.current_task() is None:
            # A server may start requests without a task, but FastAPI needs one.
            await asyncio.sleep(0)
        try:
            await self.framework(scope, receive, send_with_headers)
        except ClientDisconnect:
            return 0
        except Failure as error:
            # Routes answer for themselves, so nothing was recorded.
            response = failed_response(
                error, Occurrence(request_id, scope.get("root_path", "")), Repeat.READS
            )
            if status:
                raise
            status = response.status
            extension = scope.get("extensions", {}).get(WHOLE_RESPONSE)
            await _send(extension, send, response, request_id, is_head=is_head)
        return status


def common_headers(request_id: str) -> Headers:
    """The headers of every response."""
    return [(REQUEST_ID, request_id.encode()), NO_STORE]


async def _send(
    extension: Any, send: Send, response: RawResponse, request_id: str, *, is_head: bool
) -> None:
    if is_head:
        response = response._replace(body=b"")
    extra = common_headers(request_id)
    if extension is not None and extension["respond"](response, extra):
        return
    headers = [*response.headers, *extra]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


def _label(method: str) -> str:
    return method if method in _METHODS else "other"


def _since(started: float) -> float:
    return time.perf_counter() - started
