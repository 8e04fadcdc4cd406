"""The route that gateways ask before they let a request through.

Gateways can only send headers and act on a status, so this route translates: the headers to the
same use case as a call, and the answer to what the gateway can pass on.
Only the headers named here count. Path, query and body are the client's.
"""

from __future__ import annotations

import binascii
import json
import re
from base64 import b64decode
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, NamedTuple

import jiter
from fastapi import APIRouter, Depends
from pydantic_core import to_json
from starlette.types import Receive
from typing_extensions import override

from app.api.dependencies import RequestActor, Service
from app.api.encode import REPLAYED, denied_response, rate_headers
from app.api.problem_types import session_not_found
from app.api.schemas import CANONICAL_UUID
from app.domain.admission import Denied
from app.domain.idempotency import IdempotencyKey
from app.domain.session import DataSensitivity
from app.domain.tools import TOOL_NAME_PATTERN
from app.http.auth import Authenticator, Caller, Scope, Unauthenticated
from app.http.headers import idempotency_key
from app.http.problems import (
    INVALID_CHECK,
    NOT_FOUND,
    UNAUTHENTICATED,
    Refused,
    Repeat,
    invalid_field,
    invalid_fields,
    refused_response,
)
from app.http.request import StrictRequest
from app.http.response import JSON, RawResponse
from app.http.route import Handler, StrictRoute, allow

FREE_METHODS = frozenset({
    "initialize",
    "ping",
    "server/discover",
    "tools/list",
    "resources/list",
    "resources/templates/list",
    "prompts/list",
    "completion/complete",
    "logging/setLevel",
})  # fmt: skip
"""Methods of MCP that call no tool. So do all notifications."""

_NOTIFICATIONS = "notifications/"

_KEY = b"x-arbiter-key"
_SESSION = b"x-arbiter-session"
_AUTHORIZATION = b"authorization"
_TOOL = b"x-arbiter-tool"
_MCP_TOOLNAME = b"x-mcp-toolname"
_MCP_NAME = b"mcp-name"
_MCP_METHOD = b"mcp-method"
_MCP_VERSION = b"mcp-protocol-version"
_TIER = b"x-arbiter-sensitivity"
_IDEMPOTENCY = b"x-arbiter-idempotency-key"

_SPELLING = {
    _KEY: "X-Arbiter-Key",
    _SESSION: "X-Arbiter-Session",
    _AUTHORIZATION: "Authorization",
    _TOOL: "X-Arbiter-Tool",
    _MCP_TOOLNAME: "X-Mcp-Toolname",
    _MCP_NAME: "Mcp-Name",
    _MCP_METHOD: "Mcp-Method",
    _MCP_VERSION: "MCP-Protocol-Version",
    _TIER: "X-Arbiter-Sensitivity",
    _IDEMPOTENCY: "X-Arbiter-Idempotency-Key",
}
"""Every header that counts, as people write it."""

_READ = frozenset(_SPELLING.keys() - {_KEY})
"""What the route reads. The key is read before, and only if there are keys."""

_MAY_HAVE_COMMAS = frozenset({_AUTHORIZATION, _IDEMPOTENCY})

_BEARER = re.compile(rb"(?i:bearer) +(.*)", re.DOTALL)
_UUID = re.compile(rb"(?i:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})")
_VERSION = re.compile(rb"[0-9]{4}-[0-9]{2}-[0-9]{2}")
_FIRST_VERSION = b"2026-07-28"
"""The first version of MCP in which a server compares these headers with the body. Behind any
earlier one a client can say tools/list and call a tool."""

_BASE64 = re.compile(rb"=\?base64\?(.*)\?=", re.DOTALL)
_TOOL_NAME = re.compile(TOOL_NAME_PATTERN)
_TIERS = {tier.value.encode(): tier for tier in DataSensitivity}

_NO_BODY = (b"content-length", b"0")
_CHALLENGE = b"X-Arbiter-Key"
_DENIED_CODE = -32001
"""The code in a JSON-RPC error, from the range that is left to servers."""

MAX_PROBLEM_BYTES = 4096
"""Most bytes of a problem in a header. nginx and others have small buffers for headers."""

_CORE = ("type", "title", "status", "code", "request_id", "retryable", "next_action")
"""The members that stay if a problem is longer than that."""


@dataclass(frozen=True, slots=True)
class GatewayOptions:
    """What an operator decides about gateways."""

    free_methods: frozenset[str] = FREE_METHODS
    public_url: str | None = None
    """Where clients reach this service, without a slash at the end."""


class Check(NamedTuple):
    """What a gateway asks."""

    session_id: str
    tool_name: str | None
    """`None` if the method calls no tool."""
    tier: DataSensitivity | None
    idempotency: IdempotencyKey | None


def read_check(request: StrictRequest) -> Check:
    """Read the headers. Raises `Refused`."""
    sent = _headers(request)
    session_id = _session_id(sent)
    tool = _tool_name(sent, request.services.gateways.free_methods)
    request.records = tool is not None
    tier = None
    if _TIER in sent:
        tier = _TIERS.get(sent[_TIER])
        if tier is None:
            raise _invalid(_TIER, f"must be one of {', '.join(DataSensitivity)}")
    idempotency = None
    if _IDEMPOTENCY in sent:
        name, text = _SPELLING[_IDEMPOTENCY], sent[_IDEMPOTENCY].decode("latin-1")
        key = idempotency_key([text], name, INVALID_CHECK)
        idempotency = None if key is None else IdempotencyKey(request.caller.name, key)
    return Check(session_id, tool, tier, idempotency)


def _headers(request: StrictRequest) -> dict[bytes, bytes]:
    """The headers that count. Two values, or a list of them, could mean one thing here and
    another one behind the gateway."""
    found: dict[bytes, bytes] = {}
    for name, value in request.fields:
        if name in _READ:
            if name in found:
                raise _invalid(name, "must be sent only once")
            if b"," in value and name not in _MAY_HAVE_COMMAS:
                raise _invalid(name, "must hold one value, without commas")
            found[name] = value
    return found


def _session_id(sent: dict[bytes, bytes]) -> str:
    named = sent.get(_SESSION)
    bearer = _BEARER.fullmatch(sent.get(_AUTHORIZATION, b""))
    token = bearer[1] if bearer else None
    if token is not None and b"," in token:
        raise _invalid(_AUTHORIZATION, "must hold one value, without commas")
    if token is not None and not _UUID.fullmatch(token):
        # The client's own, for what is behind the gateway.
        token = None
    if named is None:
        named = token
    elif token is not None and token != named:
        raise _invalid(_SESSION, "names another session than Authorization")
    if not named:
        raise _invalid(_SESSION, "is missing; send it, or Authorization: Bearer <session id>")
    session_id = named.decode("latin-1")
    if not CANONICAL_UUID.fullmatch(session_id):
        raise session_not_found()
    return session_id


def _tool_name(sent: dict[bytes, bytes], free_methods: frozenset[str]) -> str | None:
    """The tool that the request calls, or `None` if its method calls none."""
    version = sent.get(_MCP_VERSION, b"")
    name = method = None
    if _VERSION.fullmatch(version) and version >= _FIRST_VERSION:
        method = sent.get(_MCP_METHOD, b"").decode("latin-1")
        name = _decoded(sent[_MCP_NAME]) if _MCP_NAME in sent else None
    toolname = sent.get(_MCP_TOOLNAME)
    if toolname is not None and name is not None and toolname != name:
        raise _invalid(_MCP_TOOLNAME, "names another tool than Mcp-Name")
    if _TOOL in sent:
        return _checked(_TOOL, sent[_TOOL])
    if toolname is not None:
        return _checked(_MCP_TOOLNAME, toolname)
    if method == "tools/call" and name is not None:
        return _checked(_MCP_NAME, name)
    if method and (method in free_methods or method.startswith(_NOTIFICATIONS)):
        return None
    raise _invalid(
        _TOOL,
        "is missing; send it, or Mcp-Method and Mcp-Name with an MCP-Protocol-Version of "
        f"{_FIRST_VERSION.decode()} or later",
    )


def _decoded(name: bytes) -> bytes:
    """A name as it is, or in the form for what does not fit into a header."""
    encoded = _BASE64.fullmatch(name)
    if encoded is None:
        return name
    try:
        return b64decode(encoded[1], validate=True)
    except binascii.Error:
        raise _invalid(_MCP_NAME, "is not valid base64") from None


def _checked(header: bytes, name: bytes) -> str:
    tool_name = name.decode("latin-1")
    if not _TOOL_NAME.fullmatch(tool_name):
        detail = "is not a tool name: 1 to 128 of A-Z a-z 0-9 _ . / : @ -"
        error = {"in": "header", "field": _SPELLING[header], "detail": detail}
        # An empty one is the gateway's mistake.
        raise invalid_fields([error], INVALID_CHECK, no_such_tool=bool(name))
    return tool_name


def _invalid(header: bytes, detail: str) -> Refused:
    return invalid_field("header", _SPELLING[header], detail, INVALID_CHECK)


def _native(response: RawResponse) -> RawResponse:
    return response


def _strict(response: RawResponse) -> RawResponse:
    """For gateways that know yes, 401 and 403, and drop the body: the rest is in headers."""
    if response.status == HTTPStatus.OK:
        return response
    headers = [
        _NO_BODY,
        *_without_content(response),
        (b"x-arbiter-status", b"%d" % response.status),
        (b"x-arbiter-problem", _one_line(response.body)),
        (b"x-arbiter-message", _message(response).encode("ascii", "replace")),
    ]
    keyless = response.status == HTTPStatus.UNAUTHORIZED
    return RawResponse(response.status if keyless else HTTPStatus.FORBIDDEN.value, headers)


def _mcp(response: RawResponse) -> RawResponse:
    """For clients that speak MCP: they lose any error that is not JSON-RPC."""
    if response.status == HTTPStatus.OK:
        return response
    body = b'{"jsonrpc":"2.0","id":null,"error":{"code":%d,"message":%b,"data":%b}}' % (
        _DENIED_CODE,
        to_json(_message(response)),
        response.body,
    )
    length = (b"content-length", b"%d" % len(body))
    return RawResponse(response.status, [JSON, length, *_without_content(response)], body)


def _message(response: RawResponse) -> str:
    """What the agent may be told."""
    problem = jiter.from_json(response.body)
    return str(problem.get("agent_message", problem["title"]))


def _without_content(response: RawResponse) -> list[tuple[bytes, bytes]]:
    return [each for each in response.headers if not each[0].startswith(b"content-")]


def _one_line(problem: bytes) -> bytes:
    """A problem as the value of a header: JSON has no line breaks, only ASCII is safe."""
    if not problem.isascii():
        problem = json.dumps(jiter.from_json(problem)).encode()
    if len(problem) > MAX_PROBLEM_BYTES:
        members = jiter.from_json(problem)
        problem = to_json({name: members[name] for name in _CORE})
    return problem


_PROFILES: dict[str, Callable[[RawResponse], RawResponse]] = {
    "native": _native,
    "strict": _strict,
    "mcp": _mcp,
}
"""How an answer looks, by the first part of the path below /authz."""


class GatewayHandler(Handler):
    """Serves gateways. They have a key in a header of its own, because `Authorization` is the
    client's, and send any name as `Host`."""

    any_host = True
    invalid = INVALID_CHECK

    @override
    async def respond(self, request: StrictRequest, receive: Receive) -> RawResponse:
        profile = _PROFILES.get(request.path_value.partition("/")[0])
        if profile is None:
            return refused_response(Refused(NOT_FOUND), request)
        return profile(await super().respond(request, receive))

    @override
    def read_url(self, request: StrictRequest) -> None:
        """Read nothing: some gateways append the client's path and query."""

    @override
    def identify(self, request: StrictRequest) -> Caller:
        authenticator: Authenticator = request.services.authenticator
        token = None
        if authenticator.enabled:
            match request.header_values(_KEY):
                case [key] if b"," not in key:
                    token = b"Bearer " + key
                case []:
                    pass
                case _:
                    raise _invalid(_KEY, "must be sent only once, without commas")
        try:
            return authenticator.identify(token, request.scope.get("server"))
        except Unauthenticated as error:
            detail = "The gateway must send a valid API key: X-Arbiter-Key: <name>.<secret>"
            raise Refused(
                UNAUTHENTICATED,
                detail if authenticator.enabled else str(error),
                headers=[(b"www-authenticate", _CHALLENGE)],
            ) from None

    @override
    def repeat(self, request: StrictRequest) -> Repeat:
        # Whatever its method: a gateway may ask for a POST with a GET.
        if not request.records:
            return Repeat.READS
        return Repeat.KEYED if request.has_header(_IDEMPOTENCY) else Repeat.MAY_COUNT_TWICE


class GatewayRoute(StrictRoute):
    """A path operation for gateways."""

    handler_class = GatewayHandler


router = APIRouter(route_class=GatewayRoute)


@router.api_route(
    "/authz/{profile:path}",
    methods=[],
    operation_id="authorize",
    # A route for every method and path has no place in a document for client generators.
    include_in_schema=False,
    openapi_extra=allow(Scope.PROXY),
)
async def authorize(
    *,
    request: StrictRequest,
    check: Annotated[Check, Depends(read_check)],
    service: Service,
    actor: RequestActor,
) -> RawResponse:
    """Decide whether the gateway may let a request through, and count it if it is a call."""
    if check.tool_name is None:
        # An empty batch: is there such a session, and may it be used?
        decision = await service.record_batch(check.session_id, (), actor)
    else:
        decision = await service.record_call(
            check.session_id,
            check.tool_name,
            actor,
            data_sensitivity=check.tier,
            idempotency=check.idempotency,
        )
    if isinstance(decision, Denied):
        return denied_response(decision, request)
    headers = [_NO_BODY, *rate_headers(decision.session)]
    if decision.replayed:
        headers.append(REPLAYED)
    return RawResponse(200, headers)
