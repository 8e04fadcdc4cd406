"""Routes about all sessions of an agent."""

from __future__ import annotations

from fastapi import APIRouter
from pydantic_core import to_json

from app.api.dependencies import AgentId, RequestActor, Service
from app.api.openapi import ALWAYS, problem_responses
from app.api.schemas import Agent, AgentSessionsClosed
from app.http.auth import Scope
from app.http.response import RawResponse, json_response
from app.http.route import StrictRoute, allow

router = APIRouter(route_class=StrictRoute)


@router.get(
    "/agents/{agent_id}",
    operation_id="getAgent",
    summary="Count an agent's active sessions",
    tags=["agents"],
    response_model=Agent,
    responses=problem_responses(*ALWAYS),
    openapi_extra=allow(Scope.OPERATE),
)
async def get_agent(agent_id: AgentId, service: Service) -> RawResponse:
    """Return the number of the agent's active sessions, which is 0 for an unknown agent."""
    active = await service.count_active_sessions(agent_id)
    return json_response(200, to_json({"agent_id": agent_id, "active_sessions": active}), [])


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
    """The kill switch: close all active sessions of the agent in one step."""
    closed = await service.close_agent_sessions(agent_id, actor)
    return json_response(200, to_json({"agent_id": agent_id, "closed": closed}), [])
