"""The framework lane: sessions, admission and agents, and what OpenAPI says of them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response
from pydantic_core import to_json

from app.api.dependencies import (
    DEFAULT_PAGE,
    AgentId,
    Asker,
    DryRun,
    Idempotency,
    Limit,
    Minimal,
    Service,
    SessionId,
)
from app.api.openapi import (
    CREATED_HEADERS,
    RATE_HEADERS,
    SESSION_LINKS,
    problem_responses,
    security,
)
from app.api.problem_types import ProblemCode
from app.api.schemas import (
    Agent,
    AgentSessionsClosed,
    CreateSession,
    RecordBatch,
    RecordCall,
    Session,
    SessionPage,
    UuidText,
)
from app.domain.admission import Admitted, Denied
from app.domain.session import SessionStatus
from app.http.auth import Scope
from app.http.problems import Refused, denied_answer
from app.http.request import guarded
from app.http.response import (
    Answer,
    admitted_answer,
    created_answer,
    encode_session,
    json_answer,
    page_answer,
)
from app.store.contract import SessionFilter

proxy = APIRouter(route_class=guarded(Scope.PROXY))
reading = APIRouter(route_class=guarded(Scope.PROXY, Scope.OPERATE))
operate = APIRouter(route_class=guarded(Scope.OPERATE))

FOR_PROXY = security(Scope.PROXY)
FOR_READING = security(Scope.PROXY, Scope.OPERATE)
FOR_OPERATE = security(Scope.OPERATE)


_ALWAYS = (
    ProblemCode.VALIDATION_FAILED,
    ProblemCode.UNAUTHENTICATED,
    ProblemCode.INSUFFICIENT_SCOPE,
    ProblemCode.STORE_UNAVAILABLE,
    ProblemCode.INTERNAL_ERROR,
)
_BODY = (
    ProblemCode.MALFORMED_JSON,
    ProblemCode.PAYLOAD_TOO_LARGE,
    ProblemCode.UNSUPPORTED_MEDIA_TYPE,
    ProblemCode.IDEMPOTENCY_CONFLICT,
)
_CREATION = problem_responses(
    *_BODY, ProblemCode.TOO_MANY_SESSIONS, *_ALWAYS, ProblemCode.OVERLOADED
)
_ADMISSION = problem_responses(
    ProblemCode.SESSION_NOT_FOUND,
    ProblemCode.AGENT_MISMATCH,
    ProblemCode.SESSION_CLOSED,
    ProblemCode.SESSION_EXPIRED,
    ProblemCode.BUDGET_EXCEEDED,
    ProblemCode.TOOL_NOT_AUTHORIZED,
    ProblemCode.SENSITIVITY_EXCEEDED,
    ProblemCode.RATE_LIMITED,
    *_BODY,
    *_ALWAYS,
) | {
    200: {"description": "Admitted and counted.", "headers": RATE_HEADERS},
    204: {"description": "Admitted and counted; no body asked for.", "headers": RATE_HEADERS},
}


def respond(answer: Answer) -> Response:
    """The answer as FastAPI wants it, its headers untouched."""
    response = Response(status_code=answer.status)
    response.body = answer.body
    response.raw_headers = list(answer.headers)
    return response


def _decided(request: Request, decision: Admitted | Denied, *, minimal: bool) -> Response:
    if isinstance(decision, Denied):
        return respond(denied_answer(decision, request.state.request_id))
    return respond(admitted_answer(decision, minimal=minimal))


@proxy.post(
    "/sessions",
    operation_id="createSession",
    summary="Create a session",
    tags=["sessions"],
    status_code=201,
    response_model=Session,
    responses=_CREATION
    | {201: {"description": "Created.", "headers": CREATED_HEADERS, "links": SESSION_LINKS}},
    openapi_extra=FOR_PROXY,
)
async def create_session(
    request: Request,
    body: CreateSession,
    service: Service,
    origin: Asker,
    idempotency: Idempotency,
) -> Response:
    """Issue a session for one agent and one task. What it allows cannot be changed later."""
    decision = await service.create_session(
        body.to_grant(),
        origin,
        time_limit_secs=body.requested_time_limit_secs,
        idempotency=idempotency,
    )
    if isinstance(decision, Denied):
        return respond(denied_answer(decision, request.state.request_id))
    return respond(created_answer(decision))


@operate.get(
    "/sessions",
    operation_id="listSessions",
    summary="List sessions",
    tags=["sessions"],
    response_model=SessionPage,
    responses=problem_responses(*_ALWAYS),
    openapi_extra=FOR_OPERATE,
)
async def list_sessions(
    service: Service,
    agent_id: Annotated[UuidText | None, Query(description="Only this agent's.")] = None,
    status: Annotated[SessionStatus | None, Query(description="Only these.")] = None,
    limit: Limit = DEFAULT_PAGE,
    cursor: Annotated[str | None, Query(description="next_cursor of the page before.")] = None,
) -> Response:
    """Sessions in the order of their deadline, ended ones included until they are swept."""
    page = await service.list_sessions(
        SessionFilter(agent_id, status), limit=limit, cursor=cursor
    )
    return respond(page_answer(page))


@reading.get(
    "/sessions/{session_id}",
    operation_id="getSession",
    summary="Read a session",
    tags=["sessions"],
    response_model=Session,
    responses=problem_responses(ProblemCode.SESSION_NOT_FOUND, *_ALWAYS),
    openapi_extra=FOR_READING,
)
async def get_session(session_id: SessionId, service: Service) -> Response:
    """The session as it is now. Reading it changes nothing."""
    session = await service.get_session(session_id)
    if session is None:
        raise Refused(ProblemCode.SESSION_NOT_FOUND)
    return respond(json_answer(200, encode_session(session), []))


@operate.delete(
    "/sessions/{session_id}",
    operation_id="closeSession",
    summary="Close a session",
    tags=["sessions"],
    response_model=Session,
    responses=problem_responses(
        ProblemCode.SESSION_NOT_FOUND, ProblemCode.SESSION_CLOSED, *_ALWAYS
    ),
    openapi_extra=FOR_OPERATE,
)
async def close_session(
    request: Request, session_id: SessionId, service: Service, origin: Asker
) -> Response:
    """End a session for good, an expired one too. A second time is a conflict."""
    outcome = await service.close_session(session_id, origin)
    if isinstance(outcome, Denied):
        return respond(denied_answer(outcome, request.state.request_id))
    return respond(json_answer(200, encode_session(outcome), []))


@proxy.post(
    "/sessions/{session_id}/calls",
    operation_id="recordCall",
    summary="Admit one call",
    tags=["admission"],
    response_model=Session,
    responses=_ADMISSION,
    openapi_extra=FOR_PROXY,
)
async def record_call(
    *,
    request: Request,
    session_id: SessionId,
    body: RecordCall,
    service: Service,
    origin: Asker,
    idempotency: Idempotency,
    minimal: Minimal,
    dry_run: DryRun = False,
) -> Response:
    """Decide whether the session may call this tool now and, if yes, count the call."""
    decision = await service.record_call(
        session_id,
        body.tool_name,
        origin,
        agent_id=body.agent_id,
        data_sensitivity=body.data_sensitivity,
        idempotency=idempotency,
        dry_run=dry_run,
    )
    return _decided(request, decision, minimal=minimal)


@proxy.post(
    "/sessions/{session_id}/batch",
    operation_id="recordBatch",
    summary="Admit several calls, all or none",
    tags=["admission"],
    response_model=Session,
    responses=_ADMISSION,
    openapi_extra=FOR_PROXY,
)
async def record_batch(
    *,
    request: Request,
    session_id: SessionId,
    body: RecordBatch,
    service: Service,
    origin: Asker,
    idempotency: Idempotency,
    minimal: Minimal,
    dry_run: DryRun = False,
) -> Response:
    """Decide about all of the calls and, if every one may be made, count them all."""
    decision = await service.record_batch(
        session_id,
        tuple(body.tool_names),
        origin,
        agent_id=body.agent_id,
        data_sensitivity=body.data_sensitivity,
        idempotency=idempotency,
        dry_run=dry_run,
    )
    return _decided(request, decision, minimal=minimal)


@operate.get(
    "/agents/{agent_id}",
    operation_id="getAgent",
    summary="Count an agent's active sessions",
    tags=["agents"],
    response_model=Agent,
    responses=problem_responses(ProblemCode.NOT_FOUND, *_ALWAYS),
    openapi_extra=FOR_OPERATE,
)
async def get_agent(agent_id: AgentId, service: Service) -> Response:
    """How many sessions of the agent are active; 0 for an agent never seen."""
    active = await service.count_active_sessions(agent_id)
    return respond(
        json_answer(200, to_json({"agent_id": agent_id, "active_sessions": active}), [])
    )


@operate.delete(
    "/agents/{agent_id}/sessions",
    operation_id="closeAgentSessions",
    summary="Close all sessions of an agent",
    tags=["agents"],
    response_model=AgentSessionsClosed,
    responses=problem_responses(ProblemCode.NOT_FOUND, *_ALWAYS),
    openapi_extra=FOR_OPERATE,
)
async def close_agent_sessions(agent_id: AgentId, service: Service, origin: Asker) -> Response:
    """The kill switch: close every active session of the agent in one step."""
    closed = await service.close_agent_sessions(agent_id, origin)
    return respond(json_answer(200, to_json({"agent_id": agent_id, "closed": closed}), []))
