"""Traces by OpenTelemetry, when `OTEL_EXPORTER_OTLP_ENDPOINT` says where they go.

FastAPI makes the spans of its own lane and the exporter; this makes the provider that both
lanes use, and keeps whole session ids, which are capabilities, out of what is exported. The
SDK is an optional extra: without it nothing here but its small API is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from opentelemetry import propagate, trace
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, TracerProvider
from structlog.typing import EventDict, WrappedLogger
from typing_extensions import override

from app import __version__
from app.observability.logs import SHORT_ID_CHARS, get_logger

if TYPE_CHECKING:
    from opentelemetry.context import Context

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SERVICE_NAME = "arbiter"
EXTRA = "opentelemetry"

REDACTED = "REDACTED"
"""The value that OpenTelemetry's conventions give to what is left out."""

_ID = re.compile(
    rf"(/sessions/.{{{SHORT_ID_CHARS}}})[^/]*|([0-9a-f]{{8}})-?(?:[0-9a-f]{{4}}-?){{3}}[0-9a-f]{{12}}",
    re.IGNORECASE,
)
_FAILED = 500


def tracing_enabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment says where traces go."""
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and any(environment.get(name) for name in ENDPOINTS)


def open_tracing(environment: Mapping[str, str] = os.environ) -> TracerProvider | None:
    """The provider of traces, or `None` if they are not asked for or cannot be made. The
    standard variables of OpenTelemetry hold: `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and
    so on."""
    if not tracing_enabled(environment):
        return None
    try:
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import SpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider as SdkProvider  # noqa: PLC0415
    except ImportError:
        get_logger().warning("traces are asked for but cannot be made", missing_extra=EXTRA)
        return None

    class Redacting(SpanProcessor):
        @override
        def on_start(self, span: Any, parent_context: Context | None = None) -> None:
            attributes = span.attributes or {}
            if "url.path" in attributes:
                span.set_attribute("url.path", redacted(attributes["url.path"]))
            if "url.query" in attributes:
                # A cursor has an id in it, and not as one would see it.
                span.set_attribute("url.query", REDACTED)

    defaults = {"service.name": SERVICE_NAME, "service.version": __version__}
    if "OTEL_SERVICE_NAME" in environment:
        del defaults["service.name"]
    provider = SdkProvider(resource=Resource.create(defaults), shutdown_on_exit=False)
    provider.add_span_processor(Redacting())
    return provider


def redacted(path: str) -> str:
    """The path with everything shortened that is an id or stands where one should."""
    return _ID.sub(lambda found: found[1] or found[2], path)


class _Headers(Getter[Mapping[bytes, bytes]]):
    @override
    def get(self, carrier: Mapping[bytes, bytes], key: str) -> list[str] | None:
        value = carrier.get(key.lower().encode())
        return None if value is None else [value.decode("latin-1")]

    @override
    def keys(self, carrier: Mapping[bytes, bytes]) -> list[str]:
        return [name.decode("latin-1") for name in carrier]


_HEADERS = _Headers()


@contextmanager
def server_span(
    tracer: Tracer, method: str, route: str, path: str, headers: Mapping[bytes, bytes]
) -> Iterator[Span]:
    """The span of a request that is served outside of FastAPI, with the names that FastAPI
    gives its own. It goes on from the caller's `traceparent` (W3C Trace Context)."""
    span = tracer.start_span(
        f"{method} {route}",
        context=propagate.extract(headers, getter=_HEADERS),
        kind=SpanKind.SERVER,
        attributes={"http.request.method": method, "http.route": route, "url.path": path},
    )
    with trace.use_span(span, end_on_exit=True):
        yield span


def end_with(span: Span, status: int) -> None:
    """Note how the request ended."""
    span.set_attribute("http.response.status_code", status)
    if status >= _FAILED:
        span.set_status(StatusCode.ERROR)


def add_trace_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A processor of structlog: which trace a line belongs to."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event
