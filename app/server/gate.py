"""How many may come in, and for how long they may keep a place: shared by the connections of
one process."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from app.observability.logs import get_logger
from app.observability.metrics import Metrics

HEALTH_PATHS = frozenset({b"/livez", b"/readyz", b"/healthz"})
"""What is answered however much there is to do."""

SURPLUS_CONNECTIONS = 64
"""Connections past the cap that may ask for their health check; a newer one takes the place
of the oldest."""

SURPLUS_CLOSINGS = 16
"""Requests past the bound that may close something: the kill switch must work when a runaway
agent is what the service is busy with."""

OTHER_FILES = 128
"""File descriptors that are needed for other things than connections."""

REAP_EVERY_SECS = 0.5
PRESSED_KEEP_ALIVE_SECS = 2.0
"""How long a connection may be idle when most places are taken."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process takes upon itself. Durations are in seconds."""

    connections: int = 4096
    requests_in_flight: int = 64
    request_timeout_secs: float = 10
    keep_alive_secs: float = 75


class Connection(Protocol):
    """What the gate knows of a connection."""

    deadline: float
    """When it is overdue, on the clock of the event loop."""

    def is_idle(self) -> bool:
        """Whether it has had a request and waits for the next."""

    def on_deadline(self) -> None:
        """Be told that the deadline has passed."""

    def drop(self) -> None:
        """Make room."""


class Gate:
    """Counts connections and requests, and ends the connections that are overdue."""

    def __init__(
        self,
        metrics: Metrics,
        limits: Limits,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.metrics = metrics
        self.request_timeout_secs = limits.request_timeout_secs
        self.keep_alive_secs = limits.keep_alive_secs
        self.draining = False
        """Whether the service is about to stop: every answer then ends its connection."""
        self.max_requests_in_flight = limits.requests_in_flight
        self._max_connections = _room_for(limits.connections)
        self._sleep = sleep
        self._connections: set[Connection] = set()
        self._surplus: dict[Connection, None] = {}

    def enter(self, connection: Connection) -> bool:
        """Note a new connection. False if it is one too many, and good for one health check
        only."""
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
        """Forget a connection that is gone."""
        self.metrics.connections -= 1
        self._connections.discard(connection)
        self._surplus.pop(connection, None)

    def has_capacity(self, method: bytes) -> bool:
        """Whether a request with this method can be served without making the others wait
        too long."""
        surplus = SURPLUS_CLOSINGS if method == b"DELETE" else 0
        return self.metrics.requests_in_flight < self.max_requests_in_flight + surplus

    def reap(self, now: float) -> None:
        """End what is overdue at `now`, on the clock of the event loop."""
        pressed = len(self._connections) > self._max_connections * 3 // 4
        hurry = max(self.keep_alive_secs - PRESSED_KEEP_ALIVE_SECS, 0) if pressed else 0
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
    """As many of `connections` as the system lets this process have open."""
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
