"""Where requests wait for a place in flight, and how long they may.

We measure overload by waiting time, not by arrivals: a burst that is served within the delay is
no overload. Under overload every request waits for the delay before it is refused. That slows
down clients that ask again at once: to refuse a request costs half as much as to admit it, and
3,000 such clients would take up all the time if each refusal were immediate.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """A connection whose request waits."""

    @property
    def is_waiting(self) -> bool:
        """False if the client has given up."""

    def shed(self) -> None:
        """Called when the request has waited too long."""


W = TypeVar("W", bound=Waiter)


class RequestQueue(Generic[W]):
    """Requests that wait for a place, oldest first."""

    def __init__(
        self, max_delay_secs: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_delay_secs = max_delay_secs
        self._clock = clock
        self.waiting: deque[tuple[float, W]] = deque()
        """When each request joined. Some may have been given up."""

    @property
    def is_open(self) -> bool:
        """Whether requests may wait at all."""
        return self._max_delay_secs > 0

    def join(self, waiter: W) -> None:
        """Add a request at the end."""
        self.waiting.append((self._clock(), waiter))

    def shed_overdue(self) -> None:
        """Shed what has waited for longer than the maximum delay."""
        now = self._clock()
        waiting = self.waiting
        while waiting and now - waiting[0][0] > self._max_delay_secs:
            _, waiter = waiting.popleft()
            if waiter.is_waiting:
                waiter.shed()

    def take(self) -> W | None:
        """Remove the oldest request and return its connection, or None if nothing waits. Shed
        what is overdue before this."""
        while self.waiting:
            _, waiter = self.waiting.popleft()
            if waiter.is_waiting:
                return waiter
        return None
