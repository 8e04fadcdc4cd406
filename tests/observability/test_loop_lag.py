"""Event-loop lag, measured with the test's clock."""

from __future__ import annotations

import asyncio

import pytest

from app.observability.loop_lag import SAMPLE_EVERY_SECS, watch_loop_lag
from app.observability.metrics import Metrics


def test_lag_is_the_delay_beyond_the_sleep() -> None:
    metrics, now = Metrics(), 0.0
    late = iter([0.0, 0.003, 0.3])

    async def sleep(secs: float) -> None:
        nonlocal now
        assert secs == SAMPLE_EVERY_SECS
        try:
            now += secs + next(late)
        except StopIteration:
            raise asyncio.CancelledError from None

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(watch_loop_lag(metrics, sleep, lambda: now))

    assert sum(metrics.loop_lag.counts) == 3
    assert metrics.loop_lag.total == pytest.approx(0.303)
