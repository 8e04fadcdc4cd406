"""The background task that removes ended sessions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from app.observability.events import Events
from app.store.contract import SessionStore

SLICE_SESSIONS = 200
"""Sessions removed before other tasks get a turn: a few milliseconds of work."""


class Sweeper:
    """Sweeps `store` every `interval_secs`."""

    def __init__(
        self,
        store: SessionStore,
        events: Events,
        interval_secs: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._store = store
        self._events = events
        self._interval_secs = interval_secs
        self._sleep = sleep

    async def run(self) -> None:
        """Sweep until cancelled. A sweep that fails is logged, and the next one still runs."""
        while True:
            await self._sleep(self._interval_secs)
            try:
                await self.sweep()
            except Exception:  # noqa: BLE001 - logged; the next sweep must run
                self._events.sweep_failed()

    async def sweep(self) -> int:
        """Remove every session that is due, in slices that let other tasks run in between.
        Return the number of sessions removed."""
        started = time.perf_counter()
        removed, more = 0, True
        while more:
            swept = await self._store.cleanup_expired(SLICE_SESSIONS)
            self._events.swept(swept)
            removed += swept.expired + swept.closed
            more = swept.more
            await self._sleep(0)
        self._events.sweep_finished(removed, time.perf_counter() - started)
        return removed
