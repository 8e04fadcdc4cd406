"""Routes for health, metrics, denials, the process itself, and the pages that explain problem
codes."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app.api.dependencies import (
    DEFAULT_PAGE,
    Limit,
    ProblemCodeInPath,
    QueryInstant,
    RequestActor,
)
from app.api.encode import denials_response, replica_response
from app.api.openapi import WITHOUT_STORE, problem_responses
from app.api.problem_types import PROBLEM_TYPES
from app.api.schemas import (
    DenialPage,
    Health,
    Replica,
    RequestIdText,
    SessionIdText,
    UpdateReplica,
    UuidText,
)
from app.domain.advice import DenialCode
from app.domain.errors import StoreUnavailable
from app.http.auth import Scope
from app.http.problems import (
    INSUFFICIENT_SCOPE,
    MALFORMED_JSON,
    NOT_FOUND,
    PAYLOAD_TOO_LARGE,
    SHUTTING_DOWN,
    STORE_UNAVAILABLE,
    UNAUTHENTICATED,
    UNSUPPORTED_MEDIA_TYPE,
    Refused,
)
from app.http.request import StrictRequest
from app.http.response import RawResponse, json_response
from app.http.route import PUBLIC, StrictRoute, allow
from app.observability.denials import Denials

router = APIRouter(route_class=StrictRoute)

_OK = json_response(200, b'{"status":"ok"}', [])
_UNAVAILABLE: dict[int | str, dict[str, Any]] = problem_responses(
    STORE_UNAVAILABLE, SHUTTING_DOWN
)


@router.get(
    "/livez",
    operation_id="livez",
    summary="Check that the process runs",
    tags=["operations"],
    response_model=Health,
    responses=problem_responses(),
    openapi_extra=PUBLIC,
)
async def livez() -> RawResponse:
    """Check that the process is running. No key is needed."""
    return _OK


@router.get(
    "/readyz",
    operation_id="readyz",
    summary="Check that requests can be served",
    tags=["operations"],
    response_model=Health,
    responses=_UNAVAILABLE,
    openapi_extra=PUBLIC,
)
async def readyz(request: StrictRequest) -> RawResponse:
    """Check that requests can be served: the store responds, and this process is not draining.
    No key is needed."""
    await request.services.service.ready()
    return _OK


@router.get(
    "/healthz",
    operation_id="healthz",
    summary="Check that requests can be served, by another name",
    tags=["operations"],
    response_model=Health,
    responses=_UNAVAILABLE,
    openapi_extra=PUBLIC,
)
async def healthz(request: StrictRequest) -> RawResponse:
    """The same as /readyz, under the name that some platforms expect. No key is needed."""
    return await readyz(request)


@router.get(
    "/metrics",
    operation_id="metrics",
    summary="Read the metrics",
    tags=["operations"],
    response_class=PlainTextResponse,
    response_model=None,
    responses=problem_responses(UNAUTHENTICATED, INSUFFICIENT_SCOPE)
    | {
        200: {
            "description": "The metrics.",
            "content": {"text/plain": {"example": "arbiter_store_up 1.0\n"}},
        }
    },
    openapi_extra=allow(Scope.OPERATE),
)
async def metrics(request: StrictRequest) -> RawResponse:
    """Return metrics in the text format of Prometheus, even while the store is unavailable."""
    services = request.services
    try:
        totals = await services.service.totals()
    except StoreUnavailable:
        totals = None
    return _text(services.metrics.render(totals), CONTENT_TYPE_LATEST)


@router.get(
    "/denials",
    operation_id="listDenials",
    summary="List the latest denials",
    tags=["operations"],
    response_model=DenialPage,
    responses=problem_responses(*WITHOUT_STORE),
    openapi_extra=allow(Scope.OPERATE),
)
async def list_denials(
    *,
    request: StrictRequest,
    session_id: Annotated[
        SessionIdText | None, Query(description="Only denials in this session.")
    ] = None,
    agent_id: Annotated[
        UuidText | None, Query(description="Only denials of this agent.")
    ] = None,
    code: Annotated[
        DenialCode | None, Query(description="Only denials with this code.")
    ] = None,
    request_id: Annotated[
        RequestIdText | None, Query(description="Only the denial of this request.")
    ] = None,
    since: Annotated[
        QueryInstant | None, Query(description="Only denials at or after this.")
    ] = None,
    limit: Limit = DEFAULT_PAGE,
) -> RawResponse:
    """List the latest denials of creations, calls, batches and changes, newest first.

    Each process remembers the last 10,000 that it gave itself, fewer if they are large batches,
    until it ends. The audit log has all of them.
    """
    denials: Denials = request.services.denials
    return denials_response(
        denials.latest(
            limit=limit,
            session_id=session_id,
            agent_id=agent_id,
            code=code,
            request_id=request_id,
            since=since,
        )
    )


@router.get(
    "/replica",
    operation_id="getReplica",
    summary="Describe this process",
    tags=["operations"],
    response_model=Replica,
    responses=problem_responses(*WITHOUT_STORE),
    openapi_extra=allow(Scope.OPERATE),
)
async def get_replica(request: StrictRequest) -> RawResponse:
    """Return the state of the process that answers. With several workers that is one of them;
    `pid` tells which."""
    return replica_response(request.services.replica.state())


@router.patch(
    "/replica",
    operation_id="updateReplica",
    summary="Drain this process, or change its log level",
    tags=["operations"],
    response_model=Replica,
    responses=problem_responses(
        MALFORMED_JSON, PAYLOAD_TOO_LARGE, UNSUPPORTED_MEDIA_TYPE, *WITHOUT_STORE
    ),
    openapi_extra=allow(),
)
async def update_replica(
    request: StrictRequest, body: UpdateReplica, actor: RequestActor
) -> RawResponse:
    """Change the process that answers, until it ends. An empty object changes nothing.

    With several workers it changes one of them; `pid` tells which.
    """
    state = request.services.replica.update(actor, draining=body.draining, level=body.log_level)
    return replica_response(state)


@router.get("/", include_in_schema=False, response_model=None, openapi_extra=PUBLIC)
async def root(request: StrictRequest) -> RawResponse:
    """Redirect to the documentation, for people who open the address from the log."""
    location = f"{request.root_path}/docs".encode()
    return RawResponse(307, [(b"location", location), (b"content-length", b"0")])


@router.get(
    "/problems/{code}", include_in_schema=False, response_model=None, openapi_extra=PUBLIC
)
async def problem_page(code: ProblemCodeInPath) -> RawResponse:
    """Explain a problem code and what to do about it."""
    kind = PROBLEM_TYPES.get(code)
    if kind is None:
        raise Refused(NOT_FOUND)
    return _text(kind.explain().encode(), "text/plain; charset=utf-8")


def _text(body: bytes, content_type: str) -> RawResponse:
    headers = [
        (b"content-type", content_type.encode()),
        (b"content-length", b"%d" % len(body)),
    ]
    return RawResponse(200, headers, body)
