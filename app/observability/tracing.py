"""OpenTelemetry traces, exported when `OTEL_EXPORTER_OTLP_ENDPOINT` is set.

FastAPI makes the spans of requests that it serves itself. This module makes the spans of all
others, the provider, and the exporter. It keeps whole session ids, which are capabilities,
out of exported spans. The SDK is an optional extra: without it, only the API is imported.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
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
"""The placeholder for removed values in OpenTelemetry's semantic conventions."""

_ID = re.compile(
    rf"(/sessions/.{{{SHORT_ID_CHARS}}})[^/]*|([0-9a-f]{{8}})-?(?:[0-9a-f]{{4}}-?){{3}}[0-9a-f]{{12}}",
    re.IGNORECASE,
)
_FAILED = 500

CLOSE_WITHIN_SECS = 2.0
"""How long the last export may take when the service stops."""


def tracing_enabled(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment names an endpoint and does not disable the SDK."""
    disabled = environment.get("OTEL_SDK_DISABLED", "").lower() == "true"
    return not disabled and any(environment.get(name) for name in ENDPOINTS)


def open_tracing(environment: Mapping[str, str] = os.environ) -> TracerProvider | None:
    """Return a tracer provider, or `None` if tracing is off or the SDK is not installed.
    OpenTelemetry's standard variables apply: `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER` and
    so on."""
    if not tracing_enabled(environment):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import (  # noqa: PLC0415
            OTLPSpanExporter,
        )
        from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import SpanProcessor  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider as SdkProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
    except ImportError:
        get_logger().warning("tracing is configured but not installed", missing_extra=EXTRA)
        return None

    class Redacting(SpanProcessor):
        @override
        def on_start(self, span: Any, parent_context: Context | None = None) -> None:
            attributes = span.attributes or {}
            if "url.path" in attributes:
                span.set_attribute("url.path", redacted(attributes["url.path"]))
            if "url.query" in attributes:
                # A cursor contains an id in encoded form.
                span.set_attribute("url.query", REDACTED)

    defaults = {"service.name": SERVICE_NAME, "service.version": __version__}
    if "OTEL_SERVICE_NAME" in environment:
        del defaults["service.name"]
    provider = SdkProvider(resource=Resource.create(defaults), shutdown_on_exit=False)
    provider.add_span_processor(Redacting())
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


async def close_tracing(provider: Any) -> None:
    """Export the spans that are left. What a collector that is away has not taken within
    `CLOSE_WITHIN_SECS` is lost: it must not hold up a stop."""
    # Not a thread of the event loop's: the process would wait for that one.
    closing = threading.Thread(target=provider.shutdown, name="tracing", daemon=True)
    closing.start()
    await asyncio.to_thread(closing.join, CLOSE_WITHIN_SECS)


def redacted(path: str) -> str:
    """Return the path with every UUID, and any segment in place of a session id, shortened."""
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
    tracer: Tracer, method: str, route: str, scope: Mapping[str, Any]
) -> Iterator[Span]:
    """Open the span of a request that is served outside FastAPI, with the names that FastAPI
    gives its own. It continues the caller's `traceparent` (W3C Trace Context)."""
    attributes = {
        "http.request.method": method,
        "http.route": route,
        "url.path": scope["path"],
    }
    if scope["query_string"]:
        attributes["url.query"] = scope["query_string"].decode("latin-1")
    span = tracer.start_span(
        f"{method} {route}",
        context=propagate.extract(dict(scope["headers"]), getter=_HEADERS),
        kind=SpanKind.SERVER,
        attributes=attributes,
    )
    with trace.use_span(span, end_on_exit=True):
        yield span


def end_with(span: Span, status: int) -> None:
    """Set the response's status on the span; 5xx marks it as failed."""
    span.set_attribute("http.response.status_code", status)
    if status >= _FAILED:
        span.set_status(StatusCode.ERROR)


def add_trace_ids(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """A structlog processor that adds the ids of the current trace and span."""
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event["trace_id"] = trace.format_trace_id(context.trace_id)
        event["span_id"] = trace.format_span_id(context.span_id)
    return event
