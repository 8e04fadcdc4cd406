"""AuthZEN 1.0 (OpenID Authorization API): the same decision for programs that speak it.

A subject is a session, a resource is a tool, and the one action is `tools/call`. An evaluation
counts, as a call does, so it comes in two places: `/access` counts, and `/check/access` decides
without counting. Unknown fields are ignored, as the specification demands in its section on
forward compatibility.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json
from starlette.types import Receive
from typing_extensions import override

from app.api.dependencies import RequestActor, Service
from app.api.encode import REPLAYED, denied_response, rate_headers
from app.api.schemas import CANONICAL_UUID, Tier, ToolName
from app.domain.admission import NO_SESSION, Admitted, Denied
from app.domain.idempotency import IdempotencyKey
from app.domain.tools import MAX_BATCH
from app.http.auth import Scope
from app.http.headers import idempotency_key
from app.http.problems import (
    INVALID_CHECK,
    UNSUPPORTED_MEDIA_TYPE,
    Refused,
    invalid_field,
    invalid_fields,
    refused_response,
)
from app.http.request import StrictRequest
from app.http.request_id import REQUEST_ID
from app.http.response import RawResponse, json_response
from app.http.route import PUBLIC, Handler, StrictRoute, allow, field_errors, names_no_tool
from app.service import SessionService

CALL = "tools/call"
SESSION = "session"
TOOL = "tool"

_PRINTABLE = re.compile(rb"[ -~]{1,255}")
_HOST = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class _Subject(_Part):
    type: str
    id: str


class _Action(_Part):
    name: str


class _Resource(_Part):
    type: str
    id: ToolName


class _Context(_Part):
    data_sensitivity: Tier | None = None


class Evaluation(_Part):
    """May this subject do this to this resource?"""

    subject: _Subject
    action: _Action
    resource: _Resource
    context: _Context = _Context()


class _Semantic(StrEnum):
    """When to stop."""

    EXECUTE_ALL = "execute_all"
    DENY_ON_FIRST_DENY = "deny_on_first_deny"
    PERMIT_ON_FIRST_PERMIT = "permit_on_first_permit"


_STOPS_AT = {_Semantic.DENY_ON_FIRST_DENY: False, _Semantic.PERMIT_ON_FIRST_PERMIT: True}


class _Options(_Part):
    model_config = ConfigDict(strict=False, extra="ignore")

    evaluations_semantic: _Semantic = _Semantic.EXECUTE_ALL


class Evaluations(_Part):
    """Several evaluations. What one leaves out, the whole may say."""

    subject: Any = None
    action: Any = None
    resource: Any = None
    context: Any = None
    evaluations: Annotated[list[dict[str, Any]], Field(max_length=MAX_BATCH)] = []
    options: _Options = _Options()

    def each(self) -> Iterator[dict[str, Any]]:
        """The evaluations, completed. A part replaces that of the whole, except that the
        identifiers which it lacks are taken from there."""
        for evaluation in self.evaluations:
            found = {}
            for name in ("subject", "action", "resource", "context"):
                default, part = getattr(self, name), evaluation.get(name)
                if name not in evaluation:
                    part = default
                elif name != "context" and isinstance(default, dict) and isinstance(part, dict):
                    known = {key: default[key] for key in _IDENTIFIERS if key in default}
                    part = known | part
                if part is not None or name in evaluation:
                    found[name] = part
            yield found


_IDENTIFIERS = ("type", "id", "name")


def _idempotency(request: StrictRequest) -> IdempotencyKey | None:
    texts = request.header_texts(b"idempotency-key")
    key = idempotency_key(texts, kind=INVALID_CHECK)
    return None if key is None else IdempotencyKey(request.caller.name, key)


class AuthzenHandler(Handler):
    """Serves AuthZEN: 400 for whatever is wrong, and any request id is echoed."""

    invalid = INVALID_CHECK

    @override
    async def respond(self, request: StrictRequest, receive: Receive) -> RawResponse:
        match request.header_values(REQUEST_ID):
            case [sent] if _PRINTABLE.fullmatch(sent):
                request.echoed_id = sent.decode("ascii")
        return await super().respond(request, receive)

    @override
    def read_url(self, request: StrictRequest) -> None:
        """Ignore the query, like unknown fields."""

    @override
    async def read_body(self, request: StrictRequest, receive: Receive) -> Any:
        try:
            return await super().read_body(request, receive)
        except Refused as error:
            if error.kind is not UNSUPPORTED_MEDIA_TYPE:
                raise
            raise invalid_field(
                "header",
                "Content-Type",
                "must be application/json, sent once, for a body in UTF-8 as it is",
                INVALID_CHECK,
            ) from None


class AuthzenRoute(StrictRoute):
    """A path operation of AuthZEN."""

    handler_class = AuthzenHandler


router = APIRouter(route_class=AuthzenRoute, include_in_schema=False)


async def _evaluate(
    asked: Evaluation,
    service: SessionService,
    actor: RequestActor,
    idempotency: IdempotencyKey | None,
    *,
    dry_run: bool,
) -> Admitted | Denied | Refused:
    """Decide. A question about anything but a call of a tool in a session is well formed, so
    its refusal is a value too, and the answer a denial."""
    subject, resource = asked.subject, asked.resource
    for field, found, expected in (
        ("subject/type", subject.type, SESSION),
        ("action/name", asked.action.name, CALL),
        ("resource/type", resource.type, TOOL),
    ):
        if found != expected:
            detail = f'is not known here; use "{expected}"'
            return invalid_field("body", field, detail, INVALID_CHECK)
    if not CANONICAL_UUID.fullmatch(subject.id):
        return NO_SESSION
    return await service.record_call(
        subject.id,
        resource.id,
        actor,
        data_sensitivity=asked.context.data_sensitivity,
        idempotency=idempotency,
        dry_run=dry_run,
    )


def _denial(problem: RawResponse) -> bytes:
    return b'{"decision":false,"context":%b}' % problem.body


def _problem(decision: Denied | Refused, request: StrictRequest) -> RawResponse:
    if isinstance(decision, Denied):
        return denied_response(decision, request)
    return refused_response(decision, request)


_PERMIT = b'{"decision":true}'


def _answer(decision: Admitted | Denied | Refused, request: StrictRequest) -> RawResponse:
    if not isinstance(decision, Admitted):
        problem = _problem(decision, request)
        headers = [each for each in problem.headers if not each[0].startswith(b"content-")]
        return json_response(200, _denial(problem), headers)
    headers = rate_headers(decision.session)
    if decision.replayed:
        headers.append(REPLAYED)
    return json_response(200, _PERMIT, headers)


@router.post("/access/v1/evaluation", openapi_extra=allow(Scope.PROXY))
async def evaluate(
    *,
    request: StrictRequest,
    body: Evaluation,
    service: Service,
    actor: RequestActor,
    idempotency: Annotated[IdempotencyKey | None, Depends(_idempotency)],
) -> RawResponse:
    """Decide, and count the call if it is admitted."""
    decision = await _evaluate(body, service, actor, idempotency, dry_run=False)
    return _answer(decision, request)


@router.post("/check/access/v1/evaluation", openapi_extra=allow(Scope.PROXY))
async def check(
    *, request: StrictRequest, body: Evaluation, service: Service, actor: RequestActor
) -> RawResponse:
    """Decide, and count nothing."""
    request.records = False
    decision = await _evaluate(body, service, actor, None, dry_run=True)
    return _answer(decision, request)


@router.post("/check/access/v1/evaluations", openapi_extra=allow(Scope.PROXY))
async def check_all(
    *, request: StrictRequest, body: Evaluations, service: Service, actor: RequestActor
) -> RawResponse:
    """Decide about each, and count nothing: what filters a list of tools."""
    request.records = False
    if not body.evaluations:
        whole = body.model_dump(exclude={"evaluations", "options"}, exclude_unset=True)
        asked = _validated(whole)
        return _answer(await _evaluate(asked, service, actor, None, dry_run=True), request)
    stops_at = _STOPS_AT.get(body.options.evaluations_semantic)
    found: list[bytes] = []
    for each in body.each():
        decision: Admitted | Denied | Refused
        try:
            decision = await _evaluate(_validated(each), service, actor, None, dry_run=True)
        except Refused as error:
            decision = error
        permitted = isinstance(decision, Admitted)
        found.append(
            _PERMIT if isinstance(decision, Admitted) else _denial(_problem(decision, request))
        )
        if permitted is stops_at:
            break
    return json_response(200, b'{"evaluations":[%b]}' % b",".join(found), [])


def _validated(fields: dict[str, Any]) -> Evaluation:
    try:
        return Evaluation.model_validate(fields)
    except ValidationError as error:
        raise invalid_fields(
            field_errors("body", (), error), INVALID_CHECK, no_such_tool=names_no_tool(error)
        ) from None


@router.get("/.well-known/authzen-configuration", openapi_extra=PUBLIC)
async def configuration(*, request: StrictRequest) -> RawResponse:
    """Say where the evaluation that counts is."""
    return _metadata(_base(request))


@router.get("/.well-known/authzen-configuration/check", openapi_extra=PUBLIC)
@router.get("/check/.well-known/authzen-configuration", openapi_extra=PUBLIC)
async def check_configuration(*, request: StrictRequest) -> RawResponse:
    """What does not count is here. The specification puts the path of a service after the
    well-known path; many clients put it before."""
    base = _base(request) + "/check"
    return _metadata(base, access_evaluations_endpoint=f"{base}/access/v1/evaluations")


def _metadata(base: str, **more: str) -> RawResponse:
    metadata = {
        "policy_decision_point": base,
        "access_evaluation_endpoint": f"{base}/access/v1/evaluation",
    }
    return json_response(200, to_json(metadata | more), [])


def _base(request: StrictRequest) -> str:
    """Where clients reach this service."""
    public_url: str | None = request.services.gateways.public_url
    if public_url is not None:
        return public_url
    match request.header_texts(b"host"):
        case [host] if _HOST.fullmatch(host):
            return f"{request.scope['scheme']}://{host}{request.root_path}"
    raise invalid_field("header", "Host", "must be one name or address", INVALID_CHECK)
