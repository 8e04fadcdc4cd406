"""The FastAPI application: routes, middleware, and the conversion of errors to problems."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi_offline import FastAPIOffline
from opentelemetry.trace import TracerProvider
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from app import __version__
from app.api import admission, agents, operations, sessions
from app.api.openapi import build_document
from app.domain.errors import ArbiterError
from app.http.auth import Authenticator
from app.http.middleware import RequestMiddleware
from app.http.problems import (
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    Refused,
    error_response,
    invalid_fields,
    refused_response,
)
from app.http.route import to_starlette
from app.observability.workers import SharedMetrics
from app.service import SessionService

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[dict[str, Any]]]

_ROUTERS = (sessions.router, admission.router, agents.router, operations.router)

_UNTRACED = {"/livez", "/readyz", "/healthz", "/metrics"}
"""Paths that machines request all the time."""

MAX_FIELD_ERRORS = 20
"""Maximum number of field errors in one response."""


def build_application(
    service: SessionService,
    authenticator: Authenticator,
    metrics: SharedMetrics,
    lifespan: Lifespan | None = None,
    tracing: TracerProvider | None = None,
) -> FastAPI:
    """Build the FastAPI application that serves `service`."""
    app = FastAPIOffline(
        title="Arbiter",
        version=__version__,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
        telemetry={
            "tracer_provider": tracing,
            "tracing": tracing is not None,
            "auto_configure": tracing is not None,
            # Prometheus has the metrics, and the log has the errors.
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "exclude": lambda scope: scope.get("path") in _UNTRACED,
        },
    )
    app.state.tracing = tracing
    app.state.service = service
    app.state.authenticator = authenticator
    app.state.metrics = metrics.own
    app.state.shared_metrics = metrics
    for router in _ROUTERS:
        app.include_router(router)
    for kind in (Refused, ArbiterError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(
        RequestMiddleware, authenticator=authenticator, observe=metrics.own.observe_request
    )

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = build_document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way
    return app


def _on_error(request: Request, error: Exception) -> Response:
    """Return the problem for an error. Raises `error` itself if it is a defect."""
    request_id = request.state.request_id
    match error:
        case ArbiterError():
            return to_starlette(error_response(error, request_id))
        case Refused():
            refused = error
        case RequestValidationError():
            errors = [_field_error(each) for each in error.errors()[:MAX_FIELD_ERRORS]]
            refused = invalid_fields(errors)
        case HTTPException(status_code=404):
            refused = Refused(NOT_FOUND)
        case HTTPException(status_code=405):
            allow = ", ".join(_allowed_methods(request)).encode()
            refused = Refused(METHOD_NOT_ALLOWED, headers=[(b"allow", allow)])
        case _:
            raise error
    return to_starlette(refused_response(refused, request_id))


def _field_error(error: dict[str, Any]) -> dict[str, str]:
    """Return where and why a field is invalid, without the input. The name of an unknown field
    is input too."""
    location, *path = map(str, error["loc"])
    detail = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        path, detail = path[:-1], "has an unknown field; /docs lists the fields"
    return {"in": location, "field": "/".join(path), "detail": detail}


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes with this path. Starlette's own `Allow` header has only
    those of the first."""
    methods: set[str] = set()
    routes = [*request.app.routes, *(each for router in _ROUTERS for each in router.routes)]
    for route in routes:
        if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods or set()
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods)
