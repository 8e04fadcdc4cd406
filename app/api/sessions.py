"""Routes that create, read, list, change and close sessions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from app.api.dependencies import (
    DEFAULT_PAGE,
    Digits,
    Idempotency,
    Limit,
    ListCursor,
    QueryInstant,
    RequestActor,
    Service,
    SessionId,
)
from app.api.encode import (
    changed_response,
    created_response,
    denied_response,
    page_response,
    session_response,
)
from app.api.openapi import (
    ALWAYS,
    CHANGE_BODY,
    CHANGED_HEADERS,
    CREATED_HEADERS,
    SESSION_LINKS,
    WITH_BODY,
    problem_responses,
)
from app.api.problem_types import (
    AGENT_FROZEN,
    GRANT_EXCEEDS_KEY,
    REVISION_CONFLICT,
    SESSION_CLOSED,
    SESSION_EXPIRED,
    SESSION_NOT_FOUND,
    TOO_MANY_SESSIONS,
    grant_exceeds_key,
    session_not_found,
)
from app.api.schemas import (
    NO_REASON,
    CreateSession,
    Reason,
    Session,
    SessionPage,
    ToolName,
    UpdateSession,
    UuidText,
)
from app.domain.admission import Denied
from app.domain.ceilings import GrantExceedsKey
from app.domain.session import SessionStatus
from app.http.auth import Scope
from app.http.problems import SESSION_LIMIT_REACHED, Repeat
from app.http.request import StrictRequest
from app.http.response import RawResponse
from app.http.route import StrictRoute, allow
from app.store.contract import SessionFilter

router = APIRouter(route_class=StrictRoute)

_CREATION = problem_responses(
    *WITH_BODY,
    GRANT_EXCEEDS_KEY,
    AGENT_FROZEN,
    TOO_MANY_SESSIONS,
    *ALWAYS,
    SESSION_LIMIT_REACHED,
)


@router.post(
    "/sessions",
    operation_id="createSession",
    summary="Create a session",
    tags=["sessions"],
    status_code=201,
    response_model=Session,
    responses=_CREATION
    | {201: {"description": "Created.", "headers": CREATED_HEADERS, "links": SESSION_LINKS}},
    openapi_extra=allow(Scope.PROXY),
)
async def create_session(
    request: StrictRequest,
    body: CreateSession,
    service: Service,
    actor: RequestActor,
    idempotency: Idempotency,
) -> RawResponse:
    """Issue a session for one agent and one task."""
    try:
        decision = await service.create_session(
            body.to_grant(),
            actor,
            sent=body.model_fields_set,
            ceilings=request.caller.ceilings,
            idempotency=idempotency,
        )
    except GrantExceedsKey as error:
        raise grant_exceeds_key(error.limits) from None
    if isinstance(decision, Denied):
        return denied_response(decision, request, body.agent_id)
    return created_response(decision, request)


@router.get(
    "/sessions",
    operation_id="listSessions",
    summary="List sessions",
    tags=["sessions"],
    response_model=SessionPage,
    responses=problem_responses(*ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def list_sessions(
    *,
    service: Service,
    agent_id: Annotated[
        UuidText | None, Query(description="Only sessions of this agent.")
    ] = None,
    status: Annotated[
        SessionStatus | None, Query(description="Only sessions with this status.")
    ] = None,
    limit: Limit = DEFAULT_PAGE,
    cursor: ListCursor = None,
    tool: Annotated[
        ToolName | None,
        Query(description="Only sessions that authorise this tool, by name or by pattern."),
    ] = None,
    max_calls_remaining: Annotated[
        Digits | None, Query(description="Only sessions with at most so many calls left.")
    ] = None,
    expires_before: Annotated[
        QueryInstant | None, Query(description="Only sessions with a deadline before this.")
    ] = None,
) -> RawResponse:
    """List sessions in the order of their deadlines. Ended ones stay until they are swept. A
    page looks at no more than 5,000 sessions, so with a filter it may hold fewer than `limit`,
    or none, although a cursor follows."""
    which = SessionFilter(agent_id, status, tool, max_calls_remaining, expires_before)
    page = await service.list_sessions(which, limit=limit, cursor=cursor)
    return page_response(page)


@router.get(
    "/sessions/{session_id}",
    operation_id="getSession",
    summary="Read a session",
    tags=["sessions"],
    response_model=Session,
    responses=problem_responses(SESSION_NOT_FOUND, *ALWAYS),
    openapi_extra=allow(Scope.PROXY, Scope.OPERATE),
)
async def get_session(
    request: StrictRequest, session_id: SessionId, service: Service
) -> RawResponse:
    """Return the session as it is now. Reading it changes nothing. Keys of operators also see
    who paused it, when and why."""
    session = await service.get_session(session_id)
    if session is None:
        raise session_not_found()
    return session_response(session, request.caller)


@router.delete(
    "/sessions/{session_id}",
    operation_id="closeSession",
    summary="Close a session",
    tags=["sessions"],
    response_model=Session,
    responses=problem_responses(SESSION_NOT_FOUND, SESSION_CLOSED, *ALWAYS),
    openapi_extra=allow(Scope.PROXY, Scope.OPERATE),
)
async def close_session(
    request: StrictRequest, session_id: SessionId, service: Service, actor: RequestActor
) -> RawResponse:
    """Close a session for good, even an expired one. Closing it twice is a conflict."""
    return changed_response(await service.close_session(session_id, actor), request)


_CHANGE = (SESSION_NOT_FOUND, SESSION_CLOSED, SESSION_EXPIRED)


@router.patch(
    "/sessions/{session_id}",
    operation_id="updateSession",
    summary="Change a running session",
    tags=["sessions"],
    response_model=Session,
    responses=problem_responses(
        *_CHANGE, REVISION_CONFLICT, GRANT_EXCEEDS_KEY, *WITH_BODY, *ALWAYS
    )
    | {200: {"description": "Changed.", "headers": CHANGED_HEADERS}},
    openapi_extra=allow(Scope.OPERATE),
)
async def update_session(
    *,
    request: StrictRequest,
    session_id: SessionId,
    body: UpdateSession,
    service: Service,
    actor: RequestActor,
    idempotency: Idempotency,
) -> RawResponse:
    """Change the terms of a session that has not ended. Nothing is refilled: the calls made and
    the rate window stay as they are. An Idempotency-Key makes a relative change safe to
    retry."""
    request.safety = Repeat.RELATIVE if body.is_relative else Repeat.HARMLESS
    try:
        outcome = await service.amend_session(
            session_id,
            body.to_amendment(),
            actor,
            ceilings=request.caller.ceilings,
            idempotency=idempotency,
        )
    except GrantExceedsKey as error:
        raise grant_exceeds_key(error.limits) from None
    return changed_response(outcome, request)


@router.post(
    "/sessions/{session_id}/pause",
    operation_id="pauseSession",
    summary="Pause a session",
    tags=["sessions"],
    response_model=Session,
    responses=problem_responses(*_CHANGE, *CHANGE_BODY, *ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def pause_session(
    *,
    request: StrictRequest,
    session_id: SessionId,
    service: Service,
    actor: RequestActor,
    body: Reason = NO_REASON,
) -> RawResponse:
    """Hold a session: it admits no calls until it is resumed. Its time limit keeps running.
    Pausing it twice changes nothing."""
    request.safety = Repeat.HARMLESS
    outcome = await service.pause_session(session_id, body.reason, actor)
    return changed_response(outcome, request)


@router.post(
    "/sessions/{session_id}/resume",
    operation_id="resumeSession",
    summary="Resume a session",
    tags=["sessions"],
    response_model=Session,
    responses=problem_responses(*_CHANGE, *CHANGE_BODY, *ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def resume_session(
    *,
    request: StrictRequest,
    session_id: SessionId,
    service: Service,
    actor: RequestActor,
    body: Reason = NO_REASON,
) -> RawResponse:
    """Let a paused session admit calls again. Resuming one that is not paused changes
    nothing."""
    request.safety = Repeat.HARMLESS
    outcome = await service.resume_session(session_id, body.reason, actor)
    return changed_response(outcome, request)
