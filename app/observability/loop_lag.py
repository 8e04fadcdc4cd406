"""Event-loop lag: what every request waits for besides its own work."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from app.observability.metrics import Metrics

SAMPLE_EVERY_SECS = 0.25


async def watch_loop_lag(
    metrics: Metrics,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Measure the lag every `SAMPLE_EVERY_SECS` until cancelled."""
    while True:
        asked = clock()
        await sleep(SAMPLE_EVERY_SECS)
        metrics.loop_lag.observe(max(clock() - asked - SAMPLE_EVERY_SECS, 0.0))
