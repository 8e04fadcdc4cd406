"""Routes for health, metrics, and the pages that explain problem codes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse, RedirectResponse
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


@router.get(
    "/livez",
    operation_id="livez",
    tags=["operations"],
    response_model=Health,
    openapi_extra=PUBLIC,
)
async def livez() -> Response:
    """Check that the process is running. No key is needed."""
    return to_starlette(_OK)


@router.get(
    "/readyz",
    operation_id="readyz",
    tags=["operations"],
    response_model=Health,
    responses=_UNAVAILABLE,
    openapi_extra=PUBLIC,
)
async def readyz(request: Request) -> Response:
    """Check that requests can be served: the store responds, and this process is not shutting
    down. No key is needed."""
    await request.app.state.service.ready()
    return to_starlette(_OK)


@router.get(
    "/healthz",
    operation_id="healthz",
    tags=["operations"],
    response_model=Health,
    responses=_UNAVAILABLE,
    openapi_extra=PUBLIC,
)
async def healthz(request: Request) -> Response:
    """The same as /readyz, under its older name. No key is needed."""
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
    """Return metrics in the text format of Prometheus, even while the store is unavailable."""
    state = request.app.state
    try:
        active = await state.service.count_active()
    except StoreUnavailable:
        active = None
    text = state.shared_metrics.render(active)
    return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})


@router.get("/", include_in_schema=False, openapi_extra=PUBLIC)
async def root() -> Response:
    """Redirect to the documentation, for people who open the address from the log."""
    return RedirectResponse("/docs")


@router.get("/problems/{code}", include_in_schema=False, openapi_extra=PUBLIC)
async def problem_page(code: str) -> Response:
    """Explain a problem code and what to do about it."""
    kind = PROBLEM_TYPES.get(code)
    if kind is None:
        raise Refused(NOT_FOUND)
    return PlainTextResponse(kind.explain())
