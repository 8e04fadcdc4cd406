"""The clock of stores that belong to one process."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Returns microseconds since the Unix epoch and never runs backwards."""


def anchored_clock() -> Clock:
    """A clock that reads wall time once and from then on counts elapsed time only.

    So setting the wall clock neither extends nor ends a session. Time during which the
    machine is suspended counts where the system has `CLOCK_BOOTTIME`.
    """
    source = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    read = time.clock_gettime_ns
    offset = time.time_ns() - read(source)
    return lambda: (read(source) + offset) // 1000
