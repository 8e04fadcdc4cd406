"""The route class: compiles a FastAPI path operation into a lean handler.

The path operation stays the declaration, from which FastAPI builds the documentation. What
serves requests is the handler, whichever way a request comes: from the dispatcher
(`app.http.dispatch`), or from FastAPI's own router. It checks, in this order: the key and its
scope, the spelling of the path, the query, the content type, the body, the parameters.

A route declares in `openapi_extra` who may use it, with `allow(...)` or `PUBLIC`. That entry
both documents and enforces the access. A route without it is for admins only.

The function of a route returns a `RawResponse`. Its parameters are:

- a `StrictRequest`;
- a dependency, `Annotated[T, Depends(read)]`. `read` is a plain function, called with the part
  of the path that is its parameter, or else with the `StrictRequest`. Header parameters of
  `read` are documentation and have defaults;
- a query parameter, and the body, a pydantic model. A body with a default may be left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar

from fastapi import Request, Response
from fastapi.params import Depends
from fastapi.routing import APIRoute
from pydantic import TypeAdapter, ValidationError
from starlette.requests import ClientDisconnect
from starlette.types import Receive
from typing_extensions import override

from app.http.auth import Authenticator, Caller, Scope, Unauthenticated
from app.http.problems import (
    INSUFFICIENT_SCOPE,
    NOT_FOUND,
    UNAUTHENTICATED,
    VALIDATION_FAILED,
    Failure,
    FieldError,
    ProblemType,
    Refused,
    Repeat,
    failed_response,
    invalid_fields,
    unknown_field,
)
from app.http.request import StrictRequest, parse_query
from app.http.response import RawResponse

MAX_FIELD_ERRORS = 20
"""Maximum number of field errors in one response."""

MAX_CACHED_BYTES = 64
"""Maximum length of a query whose meaning is cached."""

_PERCENT = ord("%")

_CHALLENGE = b"Bearer"
"""RFC 6750, section 3."""

_SCOPES = "x-scopes"

PUBLIC: dict[str, Any] = {"security": []}
"""The `openapi_extra` of a route that needs no key."""


def allow(*scopes: Scope) -> dict[str, Any]:
    """Return the `openapi_extra` of a route for callers with one of `scopes`, or admin."""
    return {"security": [{"apiKey": []}], _SCOPES: [Scope.ADMIN.value, *scopes]}


class Handler:
    """Serves one route. Routes that read requests by other rules have a subclass."""

    any_host: ClassVar[bool] = False
    """Whether the route is served under any `Host`, even by a service without keys."""
    invalid: ClassVar[ProblemType] = VALIDATION_FAILED
    """The problem for fields that are not valid."""

    def __init__(self, route: APIRoute) -> None:
        self.methods = route.methods
        self.path = route.path.replace(":path}", "}")
        self.is_tree = self.path != route.path
        """Whether the route takes every method and everything below its path."""
        extra = route.openapi_extra or {}
        self._is_public = extra.get("security") == []
        self._scopes = tuple(Scope(scope) for scope in extra.get(_SCOPES, [Scope.ADMIN]))
        self._run: Callable[..., Awaitable[RawResponse]] = route.endpoint
        self._read: list[tuple[str, Callable[[StrictRequest], Any]]] = []
        self._query: dict[str, TypeAdapter[Any]] = {}
        self._defaults: dict[str, Any] = {}
        """Of query parameters."""
        self._to_model: Callable[[Any], Any] | None = None
        self._known_fields: tuple[str, ...] = ()
        self._default_body: Any = inspect.Parameter.empty
        signature = inspect.signature(route.endpoint, eval_str=True)
        for name, parameter in signature.parameters.items():
            annotation = parameter.annotation
            metadata = getattr(annotation, "__metadata__", ())
            dependency = next((each for each in metadata if isinstance(each, Depends)), None)
            if annotation is StrictRequest:
                self._read.append((name, _itself))
            elif dependency is not None and dependency.dependency is not None:
                self._read.append((name, _reader(dependency.dependency)))
            elif route.body_field is not None and name == route.body_field.name:
                self._read.append((name, _body))
                self._default_body = parameter.default
                self._to_model = TypeAdapter(annotation).validator.validate_python
                self._known_fields = tuple(getattr(annotation, "model_fields", ()))
            else:
                self._defaults[name] = parameter.default
                self._query[name] = TypeAdapter(annotation)
        self._names = tuple(self._query)
        # Short query strings repeat, so parsing them is cached.
        self._parsed_query = lru_cache(maxsize=128)(self._parse_query)

    async def respond(self, request: StrictRequest, receive: Receive) -> RawResponse:
        """Serve a request. Everything that fails becomes a problem; only `ClientDisconnect` is
        raised, when there is no one to answer."""
        scope = request.scope
        try:
            if not self._is_public:
                self._authorize(request)
            self.read_url(request)
            if self._to_model is not None:
                if self._default_body is inspect.Parameter.empty or request.has_body:
                    request.body = await self.read_body(request, receive)
                else:
                    request.body = self._default_body
            self._validate(request)
            arguments = self._defaults.copy()
            for name, read in self._read:
                arguments[name] = read(request)
            if request.query:
                arguments.update(request.query)
            return await self._run(**arguments)
        except ClientDisconnect:
            raise
        except Failure as error:
            if isinstance(error, Refused):
                request.services.report_refused(
                    error.kind.code, request.caller.name, request.request_id, _client(scope)
                )
            return failed_response(error, request, self.repeat(request))

    def read_url(self, request: StrictRequest) -> None:
        """Check the spelling of the path, and read the query. Raises `Refused`."""
        if _PERCENT in request.scope.get("raw_path", b""):
            raise Refused(NOT_FOUND)
        sent = request.scope["query_string"]
        if sent:
            parse = self._parsed_query if len(sent) <= MAX_CACHED_BYTES else self._parse_query
            request.query, request.query_errors = parse(sent)

    def read_body(self, request: StrictRequest, receive: Receive) -> Awaitable[Any]:
        """Read and parse the body. Raises `Refused`, or `ClientDisconnect`."""
        return request.read_json(receive)

    def repeat(self, request: StrictRequest) -> Repeat:
        """What happens if the request is repeated."""
        return request.repeat

    def identify(self, request: StrictRequest) -> Caller:
        """Find out who sent the request. Raises `Refused` if the caller is unknown."""
        authenticator: Authenticator = request.services.authenticator
        sent = request.header_values(b"authorization")
        try:
            return authenticator.identify(
                sent[0] if len(sent) == 1 else None, request.scope.get("server")
            )
        except Unauthenticated as error:
            raise Refused(
                UNAUTHENTICATED, str(error), headers=[(b"www-authenticate", _CHALLENGE)]
            ) from None

    def _authorize(self, request: StrictRequest) -> None:
        """Find out who sent the request. Raises `Refused` if the caller is unknown or has none
        of the scopes."""
        caller = request.caller = self.identify(request)
        if not caller.may(self._scopes):
            needed = [scope for scope in self._scopes if scope is not Scope.ADMIN]
            challenge = b'Bearer error="insufficient_scope", scope="%b"' % b" ".join(
                scope.encode() for scope in needed or self._scopes
            )
            raise Refused(
                INSUFFICIENT_SCOPE,
                members={"needed_scopes": [scope.value for scope in needed or self._scopes]},
                headers=[(b"www-authenticate", challenge)],
            )

    def _validate(self, request: StrictRequest) -> None:
        """Replace the body by what it means. Raises `Refused` with all that is wrong about it
        and the query."""
        errors = request.query_errors
        no_such_tool = False
        if self._to_model is not None and request.body is not self._default_body:
            try:
                request.body = self._to_model(request.body)
            except ValidationError as error:
                no_such_tool = not errors and names_no_tool(error)
                errors = [*errors, *field_errors("body", (), error, self._known_fields)]
        if errors:
            # A path or a header that is not valid comes first.
            for _, read in self._read:
                read(request)
            raise invalid_fields(
                [*errors[:MAX_FIELD_ERRORS]], self.invalid, no_such_tool=no_such_tool
            )

    def _parse_query(self, sent: bytes) -> tuple[Mapping[str, Any], Sequence[FieldError]]:
        """The valid parameters of a query, and what is wrong with others. Raises `Refused`."""
        valid, errors = {}, []
        for name, text in parse_query(sent, self._names).items():
            try:
                valid[name] = self._query[name].validate_python(text)
            except ValidationError as error:
                errors += field_errors("query", (name,), error)
        return valid, errors


def _client(scope: Mapping[str, Any]) -> str:
    client = scope.get("client")
    return client[0] if client else ""


def _body(request: StrictRequest) -> Any:
    return request.body


def _reader(dependency: Callable[..., Any]) -> Callable[[StrictRequest], Any]:
    first = next(iter(inspect.signature(dependency, eval_str=True).parameters.values()))
    if first.annotation is StrictRequest:
        return dependency
    return lambda request: dependency(request.path_value)


def _itself(request: StrictRequest) -> StrictRequest:
    return request


_NAMES_OF_TOOLS = {"tool_name", "tool_names", "resource"}
"""Fields that hold what an agent chose."""


def names_no_tool(error: ValidationError) -> bool:
    """Return whether all that is wrong are names of tools, which are text but no name."""
    return all(
        each["type"] == "string_pattern_mismatch" and each["loc"][0] in _NAMES_OF_TOOLS
        for each in error.errors(include_url=False, include_context=False, include_input=False)
    )


def field_errors(
    where: str,
    start: tuple[str, ...],
    error: ValidationError,
    known: Sequence[str] = (),
) -> list[FieldError]:
    """Where and why fields are invalid, without the input. `known` are the names of the fields
    there are."""
    found = []
    for each in error.errors(include_url=False, include_context=False, include_input=False):
        path, detail = [*start, *map(str, each["loc"])], each["msg"]
        if each["type"] == "extra_forbidden":
            found.append(unknown_field(where, path[-1], known))
        else:
            detail = detail.removeprefix("Value error, ")
            found.append({"in": where, "field": "/".join(path), "detail": detail})
        if len(found) == MAX_FIELD_ERRORS:
            break
    return found


class StrictRoute(APIRoute):
    """A path operation that is served by its handler."""

    handler_class: ClassVar[type[Handler]] = Handler
    handler: Handler

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        self.handler = handler = self.handler_class(self)

        async def handle(request: Request) -> Response:
            strict = StrictRequest(
                request.scope, request.state.request_id, request.app.state.services
            )
            strict.path_value = next(iter(request.path_params.values()), "")
            response = await handler.respond(strict, request.receive)
            if strict.echoed_id:
                request.state.echoed_id = strict.echoed_id
            return to_starlette(response)

        return handle


def to_starlette(response: RawResponse) -> Response:
    """Convert a response for FastAPI, with no headers but its own."""
    converted = Response(status_code=response.status)
    converted.body = response.body
    converted.raw_headers = list(response.headers)
    return converted
