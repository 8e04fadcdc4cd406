"""Health, metrics, and the pages that explain the problem codes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app.api.openapi import problem_responses
from app.api.problem_types import PROBLEM_TYPES
from app.api.schemas import Health
from app.domain.errors import StoreUnavailable
from app.http.auth import Scope
from app.http.problems import (
    INSUFFICIENT_SCOPE,
    NOT_FOUND,
    SHUTTING_DOWN,
    STORE_UNAVAILABLE,
    UNAUTHENTICATED,
    Refused,
)
from app.http.response import json_response
from app.http.route import PUBLIC, StrictRoute, allow, to_starlette

router = APIRouter(route_class=StrictRoute)

_OK = json_response(200, b'{"status":"ok"}', [])
_UNAVAILABLE: dict[int | str, dict[str, Any]] = problem_responses(
    STORE_UNAVAILABLE, SHUTTING_DOWN
)


# Health checkers use HEAD, which FastAPI does not answer on GET routes by itself.
@router.head("/livez", include_in_schema=False, openapi_extra=PUBLIC)
@router.get(
    "/livez",
    operation_id="livez",
    tags=["operations"],
    response_model=Health,
    openapi_extra=PUBLIC,
)
async def livez() -> Response:
    """Whether the process runs. Needs no key."""
    return to_starlette(_OK)


@router.head("/readyz", include_in_schema=False, openapi_extra=PUBLIC)
@router.get(
    "/readyz",
    operation_id="readyz",
    tags=["operations"],
    response_model=Health,
    responses=_UNAVAILABLE,
    openapi_extra=PUBLIC,
)
async def readyz(request: Request) -> Response:
    """Whether requests can be served: the store answers, and this process is not
    about to stop. Needs no key."""
    await request.app.state.service.ready()
    return to_starlette(_OK)


@router.head("/healthz", include_in_schema=False, openapi_extra=PUBLIC)
@router.get(
    "/healthz",
    operation_id="healthz",
    tags=["operations"],
    response_model=Health,
    responses=_UNAVAILABLE,
    openapi_extra=PUBLIC,
)
async def healthz(request: Request) -> Response:
    """The same as /readyz, under its older name. Needs no key."""
    return await readyz(request)


@router.get(
    "/metrics",
    operation_id="metrics",
    tags=["operations"],
    response_class=PlainTextResponse,
    responses=problem_responses(UNAUTHENTICATED, INSUFFICIENT_SCOPE),
    openapi_extra=allow(Scope.OPERATE),
)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format, also while the store does not answer."""
    state = request.app.state
    try:
        active = await state.service.count_active()
    except StoreUnavailable:
        active = None
    text = state.shared_metrics.render(active)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/problems/{code}", include_in_schema=False, openapi_extra=PUBLIC)
async def problem_page(code: str) -> Response:
    """What a problem code means and what to do about it."""
    kind = PROBLEM_TYPES.get(code)
    if kind is None:
        raise Refused(NOT_FOUND)
    return PlainTextResponse(kind.explain())
