"""Where requests wait while others are in flight, and how long they may.

Overload is how long requests wait, not how many arrive at once: a burst that is served within
the delay is no overload. Under overload a queue would only add its delay to every request
served. So once a request has waited too long, none joins for as long as the delay: the queue
drains, like one under CoDel (RFC 8289), which drops while the delay stays high. Refusals do not
prolong that. Else clients that retry at once would be refused for ever after one stall.
"""

from __future__ import annotations

import math
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
    """Requests that wait for their turn, oldest first."""

    def __init__(
        self, max_delay_secs: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_delay_secs = max_delay_secs
        self._clock = clock
        self.waiting: deque[tuple[float, W]] = deque()
        """When each request joined. Some may have been given up."""
        self._late_at = -math.inf

    def has_room(self) -> bool:
        """Whether one more request may wait."""
        waiting, now = self.waiting, self._clock()
        while waiting and not waiting[0][1].is_waiting:
            waiting.popleft()
        delay = self._max_delay_secs
        is_late = bool(waiting) and now - waiting[0][0] > delay
        if is_late:
            self._late_at = now
        return now - self._late_at > delay > 0

    def join(self, waiter: W) -> None:
        """Add a request at the end."""
        self.waiting.append((self._clock(), waiter))

    def shed_overdue(self) -> None:
        """Shed what has waited longer than the maximum delay."""
        now = self._clock()
        waiting = self.waiting
        while waiting and now - waiting[0][0] > self._max_delay_secs:
            _, waiter = waiting.popleft()
            if waiter.is_waiting:
                self._late_at = now
                waiter.shed()

    def take(self) -> W | None:
        """Remove the oldest request and return its connection, after shedding what has waited
        too long. Return None if nothing waits."""
        self.shed_overdue()
        while self.waiting:
            _, waiter = self.waiting.popleft()
            if waiter.is_waiting:
                return waiter
        return None
