"""`python -m bench.in_process SESSIONS`: measure the parts without HTTP and print JSON.

Pauses are measured in the CPU time of this thread, so that other processes on the machine do
not count.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

from app.domain.admission import Admission, Admitted, Operation
from app.domain.capacity import StoreLimits
from app.domain.session import MICROSECONDS, Grant
from app.domain.tools import AllowList
from app.gc_tuning import short_pauses
from app.observability.events import Events
from app.observability.logs import configure_logs
from app.observability.metrics import Metrics
from app.store.memory.store import MemoryStore
from app.sweeper import SLICE_SESSIONS, Sweeper

REPEATS, CALLS = 7, 20_000
CHURN_SECS, CREATED_PER_SEC = 100, 1000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Clock:
    now = 1_767_268_800 * MICROSECONDS

    def __call__(self) -> int:
        return self.now


def a_grant(number: int, tools: int = 3) -> Grant:
    return Grant(
        agent_id=_AGENTS[number // 10 % len(_AGENTS)],
        declared_intent=f"bench task {number}",
        authorized_tools=AllowList.of(f"tool_{each}" for each in range(tools)),
        time_limit_secs=1000 + number % 1000,
        call_budget=2_000_000_000,
        rate_limit_per_minute=2_000_000_000,
    )


_AGENTS = [str(uuid.uuid4()) for _ in range(100_000)]


async def micros(step: Callable[[], Awaitable[object]], times: int = CALLS) -> float:
    """Return the microseconds that a step takes: the median of several runs."""
    runs = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        for _ in range(times):
            await step()
        runs.append((time.perf_counter() - started) / times * 1e6)
    return statistics.median(runs)


async def decisions(store: MemoryStore) -> dict[str, float]:
    """Time a call and a batch at several lengths of the allow-list."""
    found = {}
    for tools in (3, 32, 256):
        created = await store.create(a_grant(0, tools))
        assert isinstance(created, Admitted)
        session_id = created.session.session_id
        last = f"tool_{tools - 1}"
        for name, admission in (
            (f"decision_{tools}_us", Admission(Operation.CALL, (last,))),
            (f"batch_16_at_{tools}_us", Admission(Operation.BATCH, (last,) * 16)),
        ):
            found[name] = await micros(partial(store.record, session_id, admission))
    return found


class Pauses:
    """The longest stretch of CPU time between two turns of the event loop."""

    def __init__(self) -> None:
        self.longest_ms = 0.0
        self._going = True

    async def watch(self) -> None:
        last = time.thread_time()
        while self._going:
            await asyncio.sleep(0)
            now = time.thread_time()
            self.longest_ms = max(self.longest_ms, (now - last) * 1000)
            last = now

    def stop(self) -> None:
        self._going = False


async def churn(store: MemoryStore, clock: Clock, sweeper: Sweeper, sessions: int) -> float:
    """Create, expire and sweep sessions; return the longest pause in milliseconds."""
    pauses = Pauses()
    watching = asyncio.create_task(pauses.watch())
    for second in range(CHURN_SECS):
        clock.now += MICROSECONDS
        for number in range(CREATED_PER_SEC):
            await store.create(a_grant(sessions + number))
            await asyncio.sleep(0)
        if second % 5 == 0:
            await sweeper.sweep()
    pauses.stop()
    await watching
    return pauses.longest_ms


async def sweep_all(store: MemoryStore, clock: Clock) -> tuple[float, float]:
    """Expire and sweep everything; return the seconds in all and the longest slice in ms."""
    clock.now += 10_000 * MICROSECONDS
    started, longest, more = time.perf_counter(), 0.0, True
    while more:
        before = time.thread_time()
        more = (await store.cleanup_expired(SLICE_SESSIONS)).more
        longest = max(longest, time.thread_time() - before)
    return time.perf_counter() - started, longest * 1000


async def measure(sessions: int) -> dict[str, float]:
    clock = Clock()
    store = MemoryStore(StoreLimits(retention_secs=0, max_sessions=10**9), clock)
    sweeper = Sweeper(store, Events(Metrics(), log_admissions=False), 60)
    found = await decisions(store)
    before, started = resident_bytes(), time.perf_counter()
    for number in range(sessions):
        await store.create(a_grant(number))
    found["creation_us"] = (time.perf_counter() - started) / sessions * 1e6
    found["bytes_per_session"] = (resident_bytes() - before) / sessions
    agent = _AGENTS[7]
    found["count_agent_us"] = await micros(lambda: store.get_agent(agent))
    found["longest_pause_ms"] = await churn(store, clock, sweeper, sessions)
    found["sweep_all_secs"], found["sweep_slice_ms"] = await sweep_all(store, clock)
    return found


if __name__ == "__main__":
    configure_logs("json", "error")
    with short_pauses():
        print(json.dumps(asyncio.run(measure(int(sys.argv[1])))))
