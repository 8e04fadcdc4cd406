"""Health, metrics, and the pages that explain the problem codes."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from app.api.openapi import problem_responses, security
from app.api.problem_types import ProblemCode, explain
from app.api.schemas import Health
from app.api.sessions import respond
from app.domain.errors import StoreUnavailable
from app.http.auth import Scope
from app.http.problems import Refused
from app.http.request import StrictRoute, guarded
from app.http.response import json_answer

public = APIRouter(route_class=StrictRoute)
operate = APIRouter(route_class=guarded(Scope.OPERATE))

_OK = json_answer(200, b'{"status":"ok"}', [])
_UNAVAILABLE: dict[int | str, dict[str, Any]] = problem_responses(
    ProblemCode.STORE_UNAVAILABLE, ProblemCode.SHUTTING_DOWN
)


# Health checkers use HEAD, which FastAPI does not answer on GET routes by itself.
@public.head("/livez", include_in_schema=False)
@public.get("/livez", operation_id="livez", tags=["operations"], response_model=Health)
async def livez() -> Response:
    """Whether the process runs. Needs no key."""
    return respond(_OK)


@public.head("/readyz", include_in_schema=False)
@public.get(
    "/readyz",
    operation_id="readyz",
    tags=["operations"],
    response_model=Health,
    responses=_UNAVAILABLE,
)
async def readyz(request: Request) -> Response:
    """Whether requests can be served: the store answers, and this process is not
    about to stop. Needs no key."""
    await request.app.state.service.ready()
    return respond(_OK)


@public.head("/healthz", include_in_schema=False)
@public.get(
    "/healthz",
    operation_id="healthz",
    tags=["operations"],
    response_model=Health,
    responses=_UNAVAILABLE,
)
async def healthz(request: Request) -> Response:
    """The same as /readyz, under its older name. Needs no key."""
    return await readyz(request)


@operate.get(
    "/metrics",
    operation_id="metrics",
    tags=["operations"],
    response_class=PlainTextResponse,
    responses=problem_responses(ProblemCode.UNAUTHENTICATED, ProblemCode.INSUFFICIENT_SCOPE),
    openapi_extra=security(Scope.OPERATE),
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


@public.get("/problems/{code}", include_in_schema=False)
async def problem_page(code: str) -> Response:
    """What a problem code means and what to do about it."""
    if code not in list(ProblemCode):
        raise Refused(ProblemCode.NOT_FOUND)
    return PlainTextResponse(explain(ProblemCode(code)))
