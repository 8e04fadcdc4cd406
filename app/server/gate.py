"""How many connections and requests a process takes, and how long each may take. One gate is
shared by all connections of the process."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from app.observability.logs import get_logger
from app.observability.metrics import Metrics
from app.server.queue import RequestQueue, Waiter

HEALTH_PATHS = frozenset({b"/livez", b"/readyz", b"/healthz"})
"""Served under any load."""

SURPLUS_CONNECTIONS = 64
"""Connections over the limit that are let in for a health check; a new one replaces the
oldest."""

SURPLUS_CLOSINGS = 16
"""DELETE requests served over the limit: the kill switch must work while a runaway agent keeps
the service busy."""

OTHER_FILES = 128
"""File descriptors reserved for everything but connections."""

REAP_EVERY_SECS = 0.5
CROWDED_KEEP_ALIVE_SECS = 2.0
"""How long a connection may be idle when three quarters of the connections are in use."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one process. Durations are in seconds."""

    connections: int = 4096
    requests_in_flight: int = 64
    queue_delay_secs: float = 0.15
    request_timeout_secs: float = 10
    keep_alive_secs: float = 75


class Connection(Waiter, Protocol):
    """A connection as the gate sees it."""

    deadline: float
    """When `on_deadline` is due, on the event loop's clock."""

    def is_idle(self) -> bool:
        """Whether it has answered a request and waits for the next."""

    def on_deadline(self) -> None:
        """Called when the deadline has passed."""

    def drop(self) -> None:
        """Close at once, to make room."""

    def start(self) -> None:
        """Serve the request that has waited for its turn."""


class Gate:
    """Counts connections and requests, and watches the deadlines of connections."""

    def __init__(
        self,
        metrics: Metrics,
        limits: Limits,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = metrics
        self.request_timeout_secs = limits.request_timeout_secs
        self.keep_alive_secs = limits.keep_alive_secs
        self.draining = False
        """Whether the service is stopping: every response then closes its connection."""
        self.max_requests_in_flight = limits.requests_in_flight
        self.queue: RequestQueue[Connection] = RequestQueue(limits.queue_delay_secs, clock)
        self._max_connections = _room_for(limits.connections)
        self._sleep = sleep
        self._connections: set[Connection] = set()
        self._surplus: dict[Connection, None] = {}

    def enter(self, connection: Connection) -> bool:
        """Register a new connection. Return False if it is over the limit: it then gets health
        checks only."""
        self.metrics.connections += 1
        if len(self._connections) < self._max_connections:
            self._connections.add(connection)
            return True
        if len(self._surplus) >= SURPLUS_CONNECTIONS:
            oldest = next(iter(self._surplus))
            del self._surplus[oldest]
            oldest.drop()
        self._surplus[connection] = None
        return False

    def leave(self, connection: Connection) -> None:
        """Forget a closed connection."""
        self.metrics.connections -= 1
        self._connections.discard(connection)
        self._surplus.pop(connection, None)

    def has_capacity(self, method: bytes) -> bool:
        """Whether one more request with this method can be served."""
        surplus = SURPLUS_CLOSINGS if method == b"DELETE" else 0
        return self.metrics.requests_in_flight < self.max_requests_in_flight + surplus

    def start_next(self) -> None:
        """Start the request that has waited longest, if there is room for it."""
        # First, because a connection that is shed may go on with its next request.
        self.queue.shed_overdue()
        if self.metrics.requests_in_flight < self.max_requests_in_flight:
            waiter = self.queue.take()
            if waiter is not None:
                waiter.start()

    def reap(self, now: float) -> None:
        """Call `on_deadline` where it is due at `now`, on the event loop's clock. Shed what
        has waited too long in the queue."""
        self.queue.shed_overdue()
        crowded = len(self._connections) > self._max_connections * 3 // 4
        hurry = max(self.keep_alive_secs - CROWDED_KEEP_ALIVE_SECS, 0) if crowded else 0
        for connection in [*self._connections, *self._surplus]:
            due = connection.deadline
            if hurry and connection.is_idle():
                due -= hurry
            if due <= now:
                connection.on_deadline()

    async def run(self) -> None:
        """Reap until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self._sleep(REAP_EVERY_SECS)
            self.reap(loop.time())


def _room_for(connections: int) -> int:
    """The number of connections, at most `connections`, for which the system allows files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + SURPLUS_CONNECTIONS + OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    room = max(wanted - SURPLUS_CONNECTIONS - OTHER_FILES, 1)
    if room < connections:
        get_logger().warning(
            "the system allows fewer open files than connections are configured",
            max_connections=connections,
            allowed=room,
        )
    return room
