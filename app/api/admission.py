"""Routes that admit calls: decide and count in one step."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.dependencies import DryRun, Idempotency, Minimal, RequestActor, Service, SessionId
from app.api.encode import admitted_response, denied_response
from app.api.openapi import (
    ALWAYS,
    MINIMAL_HEADERS,
    RATE_HEADERS,
    WITH_BODY,
    problem_responses,
)
from app.api.problem_types import (
    AGENT_FROZEN,
    AGENT_MISMATCH,
    BUDGET_EXCEEDED,
    RATE_LIMITED,
    SENSITIVITY_EXCEEDED,
    SESSION_CLOSED,
    SESSION_EXPIRED,
    SESSION_NOT_FOUND,
    SESSION_PAUSED,
    TOOL_NOT_AUTHORIZED,
)
from app.api.schemas import RecordBatch, RecordCall, Session
from app.domain.admission import Admitted, Denied
from app.http.auth import Scope
from app.http.request import StrictRequest
from app.http.response import RawResponse
from app.http.route import StrictRoute, allow

router = APIRouter(route_class=StrictRoute)

_ADMISSION = problem_responses(
    SESSION_NOT_FOUND,
    AGENT_MISMATCH,
    SESSION_CLOSED,
    SESSION_EXPIRED,
    AGENT_FROZEN,
    SESSION_PAUSED,
    BUDGET_EXCEEDED,
    TOOL_NOT_AUTHORIZED,
    SENSITIVITY_EXCEEDED,
    RATE_LIMITED,
    *WITH_BODY,
    *ALWAYS,
) | {
    200: {"description": "Admitted and counted.", "headers": RATE_HEADERS},
    204: {
        "description": "Admitted and counted, without a body. Only with Prefer: "
        "return=minimal: a client that does not send it need not expect this.",
        "headers": MINIMAL_HEADERS,
    },
}


def _decision_response(
    request: StrictRequest, decision: Admitted | Denied, *, minimal: bool
) -> RawResponse:
    if isinstance(decision, Denied):
        return denied_response(decision, request)
    return admitted_response(decision, minimal=minimal)


@router.post(
    "/sessions/{session_id}/calls",
    operation_id="recordCall",
    summary="Admit one call",
    tags=["admission"],
    response_model=Session,
    responses=_ADMISSION,
    openapi_extra=allow(Scope.PROXY),
)
async def record_call(
    *,
    request: StrictRequest,
    session_id: SessionId,
    body: RecordCall,
    service: Service,
    actor: RequestActor,
    idempotency: Idempotency,
    minimal: Minimal,
    dry_run: DryRun = False,
) -> RawResponse:
    """Decide whether the session may call this tool now and, if so, count the call."""
    decision = await service.record_call(
        session_id,
        body.tool_name,
        actor,
        agent_id=body.agent_id,
        data_sensitivity=body.data_sensitivity,
        idempotency=idempotency,
        dry_run=dry_run,
    )
    return _decision_response(request, decision, minimal=minimal)


@router.post(
    "/sessions/{session_id}/batch",
    operation_id="recordBatch",
    summary="Admit several calls, all or none",
    tags=["admission"],
    response_model=Session,
    responses=_ADMISSION,
    openapi_extra=allow(Scope.PROXY),
)
async def record_batch(
    *,
    request: StrictRequest,
    session_id: SessionId,
    body: RecordBatch,
    service: Service,
    actor: RequestActor,
    idempotency: Idempotency,
    minimal: Minimal,
    dry_run: DryRun = False,
) -> RawResponse:
    """Decide whether the session may make all of these calls now and, if so, count them."""
    decision = await service.record_batch(
        session_id,
        tuple(body.tool_names),
        actor,
        agent_id=body.agent_id,
        data_sensitivity=body.data_sensitivity,
        idempotency=idempotency,
        dry_run=dry_run,
    )
    return _decision_response(request, decision, minimal=minimal)
