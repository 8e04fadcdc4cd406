"""The application: FastAPI with all routes, and the dispatcher in front of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from opentelemetry.trace import TracerProvider
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route
from starlette.types import Scope

from app import __version__
from app.api import admission, agents, authzen, gateways, operations, sessions
from app.api.document import build_document
from app.api.gateways import GatewayOptions
from app.api.problem_types import DENIALS
from app.http.auth import Authenticator
from app.http.dispatch import Dispatcher, StartSpan
from app.http.problems import (
    METHOD_NOT_ALLOWED,
    NOT_FOUND,
    Occurrence,
    Refused,
    refused_response,
)
from app.http.route import to_starlette
from app.observability.audit import Actor
from app.observability.denials import Denials
from app.observability.events import Events
from app.observability.tracing import end_with, server_span
from app.observability.workers import SharedMetrics
from app.replica import Replica
from app.service import SessionService

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[dict[str, Any]]]

_ROUTERS = (
    sessions.router,
    admission.router,
    agents.router,
    operations.router,
    gateways.router,
    authzen.router,
)

DENIAL_CODES = frozenset(kind.code for kind in DENIALS.values())

_UNTRACED = {"/livez", "/readyz", "/healthz", "/metrics"}
"""Paths that machines request all the time."""


@dataclass(frozen=True, slots=True)
class Services:
    """What routes work with."""

    service: SessionService
    authenticator: Authenticator
    metrics: SharedMetrics
    events: Events
    denials: Denials
    replica: Replica
    gateways: GatewayOptions

    def report_refused(self, code: str, caller: str, request_id: str, client: str) -> None:
        """Report a request that was refused before it reached the service. A session that does
        not exist is a denial like others."""
        if code not in DENIAL_CODES:
            self.events.refused(code, Actor(caller, request_id), client)


def build_application(
    services: Services,
    lifespan: Lifespan,
    tracing: TracerProvider | None = None,
) -> Dispatcher:
    """Build the ASGI application. It serves while its lifespan runs."""

    @asynccontextmanager
    async def running(app: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with lifespan(app) as state:
            dispatcher.started = True
            try:
                yield state
            finally:
                dispatcher.started = False

    app = FastAPIOffline(
        title="Arbiter",
        version=__version__,
        lifespan=running,
        redirect_slashes=False,
        redoc_url=None,
        telemetry={
            "tracer_provider": tracing,
            "tracing": tracing is not None,
            "auto_configure": False,
            # Prometheus has the metrics, and the log has the errors.
            "metrics": False,
            "logs": False,
            "operation_spans": False,
            "exclude": lambda scope: scope.get("path") in _UNTRACED,
        },
    )
    app.state.services = services
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _on_error)

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = build_document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way
    dispatcher = Dispatcher(
        app,
        [route for router in _ROUTERS for route in router.routes],
        services.authenticator,
        services.metrics.own.observe_request,
        None if tracing is None else _spans(tracing),
    )
    return dispatcher


def _spans(tracing: TracerProvider) -> StartSpan:
    """Spans like those that FastAPI makes of the requests it serves."""
    tracer = tracing.get_tracer("arbiter", __version__)

    @contextmanager
    def start(method: str, route: str, scope: Scope) -> Iterator[Callable[[int], None]]:
        if route in _UNTRACED:
            yield lambda _: None
            return
        with server_span(tracer, method, route, scope) as span:
            yield lambda status: end_with(span, status)

    return start


def _on_error(request: Request, error: Exception) -> Response:
    """Return the problem for a path that no route takes. Raises `error` if it is a defect."""
    match error:
        case HTTPException(status_code=404):
            refused = Refused(NOT_FOUND)
        case HTTPException(status_code=405):
            allow = ", ".join(_allowed_methods(request)).encode()
            refused = Refused(METHOD_NOT_ALLOWED, headers=[(b"allow", allow)])
        case _:
            raise error
    occurrence = Occurrence(request.state.request_id, request.scope.get("root_path", ""))
    return to_starlette(refused_response(refused, occurrence))


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
