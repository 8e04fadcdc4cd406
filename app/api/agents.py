"""Routes about agents: freeze them, and close all of their sessions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BeforeValidator
from pydantic_core import to_json

from app.api.dependencies import (
    DEFAULT_PAGE,
    AgentId,
    Limit,
    ListCursor,
    RequestActor,
    Service,
    flag,
)
from app.api.encode import agent_response, agents_response
from app.api.openapi import ALWAYS, CHANGE_BODY, problem_responses
from app.api.schemas import NO_REASON, Agent, AgentPage, AgentSessionsClosed, Reason
from app.http.auth import Scope
from app.http.problems import invalid_field
from app.http.response import RawResponse, json_response
from app.http.route import StrictRoute, allow

router = APIRouter(route_class=StrictRoute)


@router.get(
    "/agents/{agent_id}",
    operation_id="getAgent",
    summary="Read an agent",
    tags=["agents"],
    response_model=Agent,
    responses=problem_responses(*ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def get_agent(agent_id: AgentId, service: Service) -> RawResponse:
    """Return how many of the agent's sessions are active and paused, and whether it is frozen.
    An unknown agent has none and is not."""
    return agent_response(agent_id, await service.get_agent(agent_id))


@router.get(
    "/agents",
    operation_id="listAgents",
    summary="List frozen agents",
    tags=["agents"],
    response_model=AgentPage,
    responses=problem_responses(*ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def list_agents(
    *,
    service: Service,
    frozen: Annotated[
        bool, BeforeValidator(flag), Query(description="Must be true: others are not listed.")
    ] = True,
    limit: Limit = DEFAULT_PAGE,
    cursor: ListCursor = None,
) -> RawResponse:
    """List the frozen agents in the order of their ids."""
    if not frozen:
        raise invalid_field("query", "frozen", "must be true; only frozen agents are listed")
    agents, next_cursor = await service.list_frozen_agents(limit=limit, cursor=cursor)
    return agents_response(agents, next_cursor)


@router.put(
    "/agents/{agent_id}/freeze",
    operation_id="freezeAgent",
    summary="Freeze an agent",
    tags=["agents"],
    response_model=Agent,
    responses=problem_responses(*CHANGE_BODY, *ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def freeze_agent(
    agent_id: AgentId,
    service: Service,
    actor: RequestActor,
    body: Reason = NO_REASON,
) -> RawResponse:
    """Deny everything to the agent, from the moment of this answer until it is unfrozen: new
    sessions, and calls in all of its sessions. Nothing is closed."""
    state = await service.freeze_agent(agent_id, body.reason, actor)
    return agent_response(agent_id, state)


@router.delete(
    "/agents/{agent_id}/freeze",
    operation_id="unfreezeAgent",
    summary="Unfreeze an agent",
    tags=["agents"],
    response_model=Agent,
    responses=problem_responses(*ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def unfreeze_agent(
    agent_id: AgentId, service: Service, actor: RequestActor
) -> RawResponse:
    """Lift the freeze of an agent. One that is not frozen stays as it is."""
    return agent_response(agent_id, await service.unfreeze_agent(agent_id, actor))


@router.delete(
    "/agents/{agent_id}/sessions",
    operation_id="closeAgentSessions",
    summary="Close all sessions of an agent",
    tags=["agents"],
    response_model=AgentSessionsClosed,
    responses=problem_responses(*ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def close_agent_sessions(
    agent_id: AgentId, service: Service, actor: RequestActor
) -> RawResponse:
    """The kill switch: close all active and paused sessions of the agent in one step."""
    closed = await service.close_agent_sessions(agent_id, actor)
    return json_response(200, to_json({"agent_id": agent_id, "closed": closed}), [])
