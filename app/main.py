"""The composition root: settings -> store -> service -> application.

Importing this module opens nothing and reads no configuration. `app` is created on first use,
for `uvicorn app.main:app`.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

from fastapi import FastAPI

from app import __version__
from app.api.application import Services, build_application
from app.api.gateways import FREE_METHODS, GatewayOptions
from app.domain.capacity import StoreLimits
from app.domain.errors import Unusable
from app.gc_tuning import short_pauses
from app.http.auth import Authenticator
from app.http.dispatch import Dispatcher
from app.key_file import KeyFile
from app.observability.audit import AuditLog
from app.observability.denials import Denials
from app.observability.events import Events
from app.observability.logs import configure_logs, get_logger
from app.observability.loop_lag import watch_loop_lag
from app.observability.metrics import Metrics
from app.observability.tracing import (
    add_trace_ids,
    close_tracing,
    open_tracing,
    tracing_enabled,
)
from app.observability.workers import SharedMetrics
from app.replica import Replica
from app.server.drain import Drain, ending_at_once
from app.server.gate import Gate, Limits
from app.server.sighup import handle_sighup
from app.server.turn import Turn
from app.service import SessionService
from app.settings import BadSettings, Settings, load_settings, redact_url
from app.store import open_store
from app.store.contract import SessionStore
from app.sweeper import Sweeper


def create_app(settings: Settings, store: SessionStore | None = None) -> Dispatcher:
    """Build the service that `settings` describe, over `store` if given. The application opens
    the store when it starts and closes it when it stops."""
    open_log(settings)
    tracing = open_tracing()
    store = store or open_store(settings.store_url, _store_limits(settings))
    metrics = Metrics()
    shared_metrics = SharedMetrics(metrics, settings.metrics_dir)
    audit = AuditLog(settings.audit_log, metrics) if settings.audit_log else None
    denials = Denials()
    events = Events(
        metrics, log_admissions=settings.log_level == "debug", audit=audit, denials=denials
    )
    key_file = None
    if settings.api_keys_file is not None:
        key_file = KeyFile(settings.api_keys_file, settings.api_keys)
    authenticator = Authenticator(
        settings.load_keys(), allow_unauthenticated=settings.allow_unauthenticated
    )
    service = SessionService(store, events, settings.max_time_limit_secs)
    store_url = redact_url(settings.store_url)
    replica = Replica(service, events, store_url, started_at=time.time_ns() // 1000)
    reloads: list[Callable[[], None]] = [partial(_reload_log_level, events)]
    if audit is not None:
        reloads.append(audit.reopen)
    if key_file is not None:
        reloads.append(partial(key_file.reload_soon, authenticator))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Any]]:
        async with AsyncExitStack() as stack:
            stack.enter_context(handle_sighup(*reloads))
            with _explaining_failure():
                with ending_at_once():
                    await store.open()
                stack.push_async_callback(store.aclose)
                if audit is not None:
                    audit.open()
                    stack.push_async_callback(audit.aclose)
            if tracing is not None:
                stack.push_async_callback(close_tracing, tracing)
            get_logger().info(
                "starting",
                address=f"http://{_bracketed(settings.host)}:{settings.port}",
                store=store_url,
                authentication="on" if authenticator.enabled else "off",
                version=__version__,
            )
            events.started()
            stack.callback(events.stopped)
            gate = Gate(metrics, _limits(settings))
            turn = Turn(asyncio.get_running_loop(), tasks=store.waits_apart)
            drain = Drain(gate, service.retire, settings.shutdown_delay_secs)
            stack.enter_context(short_pauses())
            stack.enter_context(drain.handle_sigterm())
            sweeper = Sweeper(store, events, settings.cleanup_interval_secs)
            works = [sweeper.run(), shared_metrics.run(), gate.run(), watch_loop_lag(metrics)]
            if key_file is not None:
                works.append(key_file.run(authenticator))
            for work in works:
                stack.push_async_callback(_end, asyncio.create_task(work))
            yield {"gate": gate, "turn": turn}

    gateways = GatewayOptions(
        FREE_METHODS.union(settings.authz_free_methods), settings.public_url
    )
    services = Services(
        service, authenticator, shared_metrics, events, denials, replica, gateways
    )
    return build_application(services, lifespan, tracing)


def open_log(settings: Settings) -> None:
    """Send the log to standard error, as `settings` say, and begin it with what they ignore."""
    more = [add_trace_ids] if tracing_enabled() else []
    configure_logs(settings.log_format, settings.log_level, *more)
    if settings.ignored:
        get_logger().info("variables of a Kubernetes Service ignored", names=settings.ignored)


def _store_limits(settings: Settings) -> StoreLimits:
    return StoreLimits(
        retention_secs=settings.retention_secs,
        max_sessions=settings.max_sessions,
        max_active_sessions_per_agent=settings.max_active_sessions_per_agent,
        max_remembered_calls=settings.max_remembered_calls,
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        connections=settings.max_connections,
        requests_in_flight=settings.max_requests_in_flight,
        queue_delay_secs=settings.max_queue_delay_secs,
        request_timeout_secs=settings.request_timeout_secs,
        keep_alive_secs=settings.keep_alive_secs,
    )


@contextmanager
def _explaining_failure() -> Iterator[None]:
    """Print one sentence that says why the service cannot start."""
    try:
        yield
    except Unusable as error:
        print(f"arbiter: {error}", file=sys.stderr)
        # uvicorn would add a traceback to that sentence.
        logging.getLogger("uvicorn.error").disabled = True
        raise


def _reload_log_level(events: Events) -> None:
    """Read the settings again. Nothing else of them can change while the service runs."""
    try:
        level = load_settings().log_level
    except BadSettings as error:
        get_logger().error("log level not reloaded", reason=str(error))
        return
    events.apply_log_level(level)
    get_logger().info("log level reloaded", level=level)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _check_lifespan() -> None:
    """Raise `BadSettings` if uvicorn was told to skip the lifespan, which opens the store."""
    options = " ".join(sys.argv).replace("=", " ")
    if "--lifespan off" in options or os.environ.get("UVICORN_LIFESPAN") == "off":
        raise BadSettings("uvicorn cannot use --lifespan off: the lifespan opens the store")


def application() -> Dispatcher:
    """Build the service that the environment describes, for servers that call a factory. Exits
    with one sentence if the configuration cannot be used."""
    try:
        settings = load_settings()
        if multiprocessing.parent_process() is not None and "--reload" not in sys.argv:
            settings.check_workers()
        _check_lifespan()
        return create_app(settings)
    except BadSettings as error:
        print(f"arbiter: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def __getattr__(name: str) -> Any:
    """Create `app` on first use (PEP 562)."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    made = globals()["app"] = application()
    return made
