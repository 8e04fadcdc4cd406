"""Traces, as a collector receives them from a running service."""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app.observability.tracing import redacted
from tests.services import ROOT, StartService
from tests.support import session_request

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


class Collector:
    """Receives spans as OTLP over HTTP."""

    def __init__(self) -> None:
        arrived: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._arrived = arrived

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                    for scope in resource.scope_spans:
                        for span in scope.spans:
                            arrived.put((resource.resource, span))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = Thread(target=self._server.serve_forever)
        self._thread.start()

    def span(self) -> Any:
        return self._arrived.get(timeout=30)[1]

    def service_name(self) -> str:
        resource, _ = self._arrived.get(timeout=30)
        return str(attributes(resource)["service.name"])

    def is_empty(self) -> bool:
        return self._arrived.empty()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def attributes(of: Any) -> dict[str, Any]:
    values = {each.key: each.value for each in of.attributes}
    return {key: getattr(value, value.WhichOneof("value")) for key, value in values.items()}


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


def test_a_call_is_a_span_in_the_callers_trace(
    start_service: StartService, collector: Collector
) -> None:
    service = start_service(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
    )
    path = httpx.post(f"{service.url}/sessions", json=session_request()).headers["location"]
    created = collector.span()
    denied = httpx.post(
        f"{service.url}{path}/calls",
        json={"tool_name": "rm"},
        headers={"traceparent": TRACEPARENT},
    )
    span = collector.span()

    assert created.name == "POST /sessions"
    assert denied.status_code == 403
    assert span.name == "POST /sessions/{session_id}/calls"
    assert span.kind == span.SPAN_KIND_SERVER
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    told = attributes(span)
    assert told["http.route"] == "/sessions/{session_id}/calls"
    assert told["http.request.method"] == "POST"
    assert told["http.response.status_code"] == 403
    # The id is a capability, so only its beginning leaves the service.
    assert told["url.path"] == path[:18] + "/calls"
    lines = [json.loads(line) for line in service.log]
    (line,) = [each for each in lines if each["event"] == "calls denied"]
    assert (line["trace_id"], line["span_id"]) == (TRACE, span.span_id.hex())


def test_health_checks_and_scrapes_make_no_spans(
    start_service: StartService, collector: Collector
) -> None:
    service = start_service(OTEL_EXPORTER_OTLP_ENDPOINT=collector.url)
    for path in ("/livez", "/readyz", "/healthz", "/metrics"):
        httpx.get(f"{service.url}{path}")
    httpx.get(f"{service.url}/sessions")
    # Stopping flushes the pending spans.
    assert service.stop() == 0

    assert collector.service_name() == "arbiter"
    assert collector.is_empty()


def test_without_an_endpoint_there_are_no_traces(start_service: StartService) -> None:
    service = start_service()
    httpx.post(f"{service.url}/sessions", json=session_request())

    assert not any("trace_id" in line for line in service.log)


def test_an_unreachable_collector_fails_no_request(start_service: StartService) -> None:
    service = start_service(
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9",
        OTEL_EXPORTER_OTLP_TIMEOUT="1",
        OTEL_BSP_SCHEDULE_DELAY="10",
    )

    assert httpx.post(f"{service.url}/sessions", json=session_request()).status_code == 201


def test_a_collector_that_does_not_answer_holds_up_no_stop(
    start_service: StartService,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        service = start_service(OTEL_EXPORTER_OTLP_ENDPOINT=url)
        httpx.post(f"{service.url}/sessions", json=session_request())
        service.process.terminate()

        # Alone the export of OpenTelemetry may take 30 s.
        assert service.process.wait(timeout=15) == 0


def test_a_missing_extra_is_logged_and_not_fatal() -> None:
    without = "import sys; sys.modules['opentelemetry.sdk'] = None\n"
    said = subprocess.run(
        [sys.executable, "-c", without + "import app.__main__ as a; a.main(['openapi'])"],
        cwd=ROOT,
        env=os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        capture_output=True,
        check=True,
        text=True,
    )

    assert json.loads(said.stdout)["openapi"]
    assert json.loads(said.stderr)["missing_extra"] == "opentelemetry"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/sessions/5e1c7a7e-6f0c-4c39-9c57-4a83a9b2f0b1", "/sessions/5e1c7a7e"),
        ("/sessions/5e1c7a7e-6f0c-4c39-9c57-4a83a9b2f0b1/calls", "/sessions/5e1c7a7e/calls"),
        ("/sessions", "/sessions"),
        ("/agents/5e1c7a7e-6f0c-4c39-9c57-4a83a9b2f0b1", "/agents/5e1c7a7e"),
        ("/session/5e1c7a7e-6f0c-4c39-9c57-4a83a9b2f0b1/x", "/session/5e1c7a7e/x"),
        ("/5E1C7A7E6F0C4C399C574A83A9B2F0B1", "/5E1C7A7E"),
        ("/problems/rate_limited", "/problems/rate_limited"),
    ],
)
def test_ids_are_shortened_anywhere_in_a_path(path: str, expected: str) -> None:
    assert redacted(path) == expected


def test_a_cursor_which_contains_an_id_is_redacted(
    start_service: StartService, collector: Collector
) -> None:
    service = start_service(
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url, OTEL_BSP_SCHEDULE_DELAY="100"
    )
    httpx.get(f"{service.url}/sessions?limit=1&cursor=secret")

    assert attributes(collector.span())["url.query"] == "REDACTED"
