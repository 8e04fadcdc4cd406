"""How late the event loop is, by a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from app.observability.loop_lag import SAMPLE_EVERY_SECS, watch_loop_lag
from app.observability.metrics import Metrics


def test_what_is_counted_is_how_much_later_it_woke_up() -> None:
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
