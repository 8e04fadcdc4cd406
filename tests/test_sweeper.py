"""The sweeper, without real waiting."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

import pytest

from app.domain.capacity import StoreLimits
from app.domain.verbs import Swept
from app.observability.events import Events
from app.observability.logs import configure_logs
from app.observability.metrics import Metrics
from app.store.memory.store import MemoryStore
from app.sweeper import SLICE_SESSIONS, Sweeper
from tests.conftest import MakeStore
from tests.support import ManualClock, a_grant, close, create, opened

pytestmark = pytest.mark.anyio


class FakeSleep:
    """Sleeps that take no time. After `limit` of them the sweeper is cancelled."""

    def __init__(self, limit: int) -> None:
        self.intervals: list[float] = []
        self._limit = limit

    async def __call__(self, secs: float) -> None:
        if secs:
            self.intervals.append(secs)
            if len(self.intervals) > self._limit:
                raise asyncio.CancelledError


async def test_a_sweep_removes_every_due_session_in_slices(make_store: MakeStore) -> None:
    store = await make_store(retention_secs=0)
    due = 2 * SLICE_SESSIONS + 1
    for _ in range(due):
        await opened(store, a_grant(time_limit_secs=0))
    alive = await opened(store)
    metrics = Metrics()
    yields = 0

    async def count(secs: float) -> None:
        nonlocal yields
        yields += secs == 0

    sweeper = Sweeper(store, Events(metrics, log_admissions=False), 60, count)

    assert await sweeper.sweep() == due
    assert yields >= 3
    assert metrics.ended["expired"] == due
    assert sum(metrics.sweeps.counts) == 1
    assert await store.get(alive.session_id) is not None


async def test_sweeps_continue_at_their_interval_after_one_fails(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("json", "info")

    class Flaky(MemoryStore):
        sweeps = 0

        async def cleanup_expired(self, limit: int) -> Swept:
            self.sweeps += 1
            if self.sweeps == 1:
                raise RuntimeError("disk on fire")
            return await super().cleanup_expired(limit)

    store, sleep = Flaky(StoreLimits()), FakeSleep(3)
    sweeper = Sweeper(store, Events(Metrics(), log_admissions=False), 60, sleep)

    with pytest.raises(asyncio.CancelledError):
        await sweeper.run()

    assert sleep.intervals == [60, 60, 60, 60]
    assert store.sweeps == 3
    assert "disk on fire" in capsys.readouterr().err


@pytest.mark.parametrize("make_store", ["memory", "sqlite"], indirect=True)
async def test_swept_sessions_leave_no_memory_behind(
    make_store: MakeStore, clock: ManualClock
) -> None:
    """Only for stores that keep sessions, or decide about them, in this process."""
    store = await make_store(retention_secs=0)
    sweeper = Sweeper(store, Events(Metrics(), log_admissions=False), 60)

    async def generation(sessions: int) -> None:
        for number in range(sessions):
            session = await create(store, a_grant(time_limit_secs=10))
            if number % 2:
                await close(store, session.session.session_id)  # type: ignore[union-attr]
        clock.advance(10)
        assert await sweeper.sweep() == sessions

    tracemalloc.start()
    await generation(5_000)
    gc.collect()
    before, _ = tracemalloc.get_traced_memory()
    await generation(5_000)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert after - before < 100_000
