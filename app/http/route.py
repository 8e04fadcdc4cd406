"""The route class: the checks that every request passes before the route's function runs.

A route declares in `openapi_extra` who may use it, with `allow(...)` or `PUBLIC`. That entry
both documents and enforces the access. A route without it is for admins only.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from typing_extensions import override

from app.http.auth import Authenticator, Caller, Scope, Unauthenticated
from app.http.problems import INSUFFICIENT_SCOPE, NOT_FOUND, UNAUTHENTICATED, Refused
from app.http.request import StrictRequest, check_query
from app.http.response import RawResponse

_CHALLENGE = b"Bearer"
"""RFC 6750, section 3."""

_SCOPES = "x-scopes"

PUBLIC: dict[str, Any] = {"security": []}
"""The `openapi_extra` of a route that needs no key."""


def allow(*scopes: Scope) -> dict[str, Any]:
    """Return the `openapi_extra` of a route for callers with one of `scopes`, or admin."""
    return {"security": [{"apiKey": []}], _SCOPES: [Scope.ADMIN.value, *scopes]}


class StrictRoute(APIRoute):
    """A route that checks caller, path, query and body before FastAPI parses the request."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        query_names = {name for param in self._query_params() for name in param}
        extra = self.openapi_extra or {}
        is_public = extra.get("security") == []
        scopes = tuple(Scope(scope) for scope in extra.get(_SCOPES, [Scope.ADMIN]))

        async def handle_strictly(request: Request) -> Response:
            if not is_public:
                authorize(request, scopes)
            if b"%" in request.scope.get("raw_path", b""):
                raise Refused(NOT_FOUND)
            check_query(request, query_names)
            strict = StrictRequest(request.scope, request.receive)
            if self.body_field is not None:
                await strict.load_body()
            return await handle(strict)

        return handle_strictly

    def _query_params(self) -> list[list[str]]:
        pending, found = [self.dependant], []
        while pending:
            dependant = pending.pop()
            found.append([param.alias for param in dependant.query_params])
            pending += dependant.dependencies
        return found


def authorize(request: Request, scopes: tuple[Scope, ...]) -> None:
    """Store the caller in `request.state.caller`. Raises `Refused` if the caller is unknown or
    has none of `scopes`."""
    authenticator: Authenticator = request.app.state.authenticator
    sent = [value for name, value in request.headers.raw if name == b"authorization"]
    try:
        caller: Caller = authenticator.identify(
            sent[0] if len(sent) == 1 else None, request.scope.get("server")
        )
    except Unauthenticated as error:
        raise Refused(
            UNAUTHENTICATED, str(error), headers=[(b"www-authenticate", _CHALLENGE)]
        ) from None
    if not caller.may(scopes):
        needed = [scope for scope in scopes if scope is not Scope.ADMIN]
        challenge = b'Bearer error="insufficient_scope", scope="%b"' % b" ".join(
            scope.encode() for scope in needed or scopes
        )
        raise Refused(INSUFFICIENT_SCOPE, headers=[(b"www-authenticate", challenge)])
    request.state.caller = caller


def to_starlette(response: RawResponse) -> Response:
    """Convert a response for FastAPI, with no headers but its own."""
    converted = Response(status_code=response.status)
    converted.body = response.body
    converted.raw_headers = list(response.headers)
    return converted
