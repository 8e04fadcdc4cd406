"""What every route demands before its function runs: a caller with the right scope, a path
and query written the one way we accept, and a body that is strictly JSON.

FastAPI's own parsing takes the last of duplicate keys, NaN, other encodings and several
spellings of one id; two readers of such a request could understand two different things.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any, ClassVar, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from typing_extensions import override

from app.api.problem_types import ProblemCode
from app.http.auth import Authenticator, Caller, Scope, Unauthenticated
from app.http.problems import Refused

MAX_BODY_BYTES = 65_536

_CHALLENGE = b"Bearer"
"""RFC 6750, section 3."""


class StrictRequest(Request):
    """A request whose body has been read and parsed by our rules."""

    async def load_body(self) -> None:
        """Read and parse the body. Raises `Refused`."""
        check_content_type(self.headers.getlist("content-type"))
        self._body = await self._read()
        if not self._body and "upgrade" in self.headers:
            raise _malformed(
                "The body was not read: send the request without an Upgrade header "
                "(curl: --http1.1)."
            )
        self._json = parse_json(self._body)

    async def _read(self) -> bytes:
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise Refused(ProblemCode.PAYLOAD_TOO_LARGE)
        chunks, size = [], 0
        async for chunk in self.stream():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise Refused(ProblemCode.PAYLOAD_TOO_LARGE)
            chunks.append(chunk)
        return b"".join(chunks)


class StrictRoute(APIRoute):
    """A route for callers with one of `scopes`; `None` is for everybody."""

    scopes: ClassVar[tuple[Scope, ...] | None] = None

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        query_names = {name for param in self._query_params() for name in param}

        async def strict(request: Request) -> Response:
            if self.scopes is not None:
                authorize(request, self.scopes)
            if b"%" in request.scope.get("raw_path", b""):
                raise Refused(ProblemCode.NOT_FOUND)
            check_query(request, query_names)
            demanding = StrictRequest(request.scope, request.receive)
            if self.body_field is not None:
                await demanding.load_body()
            return await handle(demanding)

        return strict

    def _query_params(self) -> list[list[str]]:
        pending, found = [self.dependant], []
        while pending:
            dependant = pending.pop()
            found.append([param.alias for param in dependant.query_params])
            pending += dependant.dependencies
        return found


def guarded(*scopes: Scope) -> type[StrictRoute]:
    """The route class for callers who are admin or have one of `scopes`."""

    class Guarded(StrictRoute):
        pass

    Guarded.scopes = scopes
    return Guarded


def authorize(request: Request, scopes: tuple[Scope, ...]) -> None:
    """Find out who calls, and note it in `request.state.caller`. Raises `Refused` if it is
    nobody we know or somebody who may not."""
    authenticator: Authenticator = request.app.state.authenticator
    sent = [value for name, value in request.headers.raw if name == b"authorization"]
    try:
        caller: Caller = authenticator.identify(
            sent[0] if len(sent) == 1 else None, request.scope.get("server")
        )
    except Unauthenticated as error:
        raise Refused(
            ProblemCode.UNAUTHENTICATED,
            str(error),
            headers=[(b"www-authenticate", _CHALLENGE)],
        ) from None
    if not caller.may(scopes):
        challenge = b'Bearer error="insufficient_scope", scope="%b"' % b" ".join(
            scope.encode() for scope in scopes
        )
        raise Refused(
            ProblemCode.INSUFFICIENT_SCOPE, headers=[(b"www-authenticate", challenge)]
        )
    request.state.caller = caller


def check_query(request: Request, known: set[str]) -> None:
    """Raises `Refused` for a query parameter that is unknown or given twice."""
    names = [name for name, _ in request.query_params.multi_items()]
    if unknown := set(names) - known:
        takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
        raise invalid("query", "", f"{len(unknown)} unknown parameter(s); {takes}")
    for name in known:
        if names.count(name) > 1:
            raise invalid("query", name, "must not be given more than once")


def check_content_type(values: list[str]) -> None:
    """Raises `Refused` unless exactly one header says JSON, in UTF-8 if it says a charset."""
    media_type, _, parameters = (values[0] if len(values) == 1 else "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if media_type.strip().lower() != "application/json" or charset not in {
        "",
        "charset=utf-8",
    }:
        raise Refused(ProblemCode.UNSUPPORTED_MEDIA_TYPE)


def invalid(location: str, field: str, detail: str) -> Refused:
    """The problem of one field that is not valid."""
    errors = [{"in": location, "field": field, "detail": detail}]
    return Refused(ProblemCode.VALIDATION_FAILED, errors=errors)


def parse_json(body: bytes) -> Any:
    """The value of a JSON text (RFC 8259) in UTF-8 without a byte order mark, in which no
    object has a key twice (RFC 7493, section 2.3). Raises `Refused`."""
    if not body:
        raise _malformed("The body is empty; send a JSON object.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("The body is not UTF-8.") from None
    if text.startswith("\ufeff"):
        raise _malformed("The body starts with a byte order mark.")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _malformed(f"The body is not valid JSON ({where}).") from None
    except RecursionError:
        raise _malformed("The body is nested too deeply.") from None
    except ValueError:
        # int() refuses numbers of thousands of digits, whose conversion takes seconds.
        raise _malformed("A number in the body has too many digits.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _malformed("An object in the body has a key twice.")
    return made


def _constant(_: str) -> NoReturn:
    raise _malformed("NaN and Infinity are not JSON.")


def _malformed(detail: str) -> Refused:
    return Refused(ProblemCode.MALFORMED_JSON, detail)
