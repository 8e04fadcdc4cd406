"""Where stores that live in one process get the time from."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Microseconds since the Unix epoch, never running backwards."""


def anchored_clock() -> Clock:
    """A clock that reads wall time now and from then on counts only time that passed, so
    that setting the wall clock neither extends nor ends a session.

    Time in which the machine is suspended passes too, where the system can tell.
    """
    source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    read = time.clock_gettime_ns
    offset = time.time_ns() - read(source)
    return lambda: (read(source) + offset) // 1000
