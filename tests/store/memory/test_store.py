"""The memory store alone: its clock, and what its operations cost."""

from __future__ import annotations

import asyncio
import sys
import time
from types import FrameType

import pytest

from app.domain.admission import Admission, Admitted
from app.domain.capacity import StoreLimits
from app.domain.errors import SessionLimitReached
from app.domain.idempotency import IdempotencyKey
from app.domain.session import MICROSECONDS
from app.store.clock import anchored_clock
from app.store.contract import SessionFilter
from app.store.memory.store import LISTED_AT_ONCE, MemoryStore
from tests.support import a_batch, a_call, a_grant, close, opened


def test_setting_the_wall_clock_does_not_move_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = anchored_clock()
    wall = time.time_ns()
    for step in (-3600, 3600):
        monkeypatch.setattr(time, "time_ns", lambda step=step: wall + step * 10**9)

        assert abs(clock() - wall // 1000) < 60 * MICROSECONDS


def test_the_clock_never_runs_backwards() -> None:
    clock = anchored_clock()
    read = [clock() for _ in range(1000)]

    assert read == sorted(read)


def test_no_method_waits() -> None:
    store = MemoryStore(StoreLimits())
    assert not store.waits_apart

    for method in (
        store.ping(),
        store.create(a_grant()),
        store.record("unknown", a_call()),
        store.get("unknown"),
        store.change("unknown", close),
        store.totals(),
    ):
        with pytest.raises(StopIteration):
            method.send(None)


@pytest.mark.anyio
async def test_a_long_list_by_tool_lets_others_run() -> None:
    store = MemoryStore(StoreLimits())
    patterns = [f"team-{number}.*" for number in range(256)]
    made = [await store.create(a_grant(*patterns)) for _ in range(3 * LISTED_AT_ONCE)]
    turns = 0
    done = False

    async def others() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0)

    running = asyncio.create_task(others())
    page = await store.list_all(SessionFilter(tool="team-255.x"), limit=500)
    done = True
    await running

    assert len(page.sessions) == len(made)
    assert turns >= 3


@pytest.mark.anyio
async def test_sessions_that_come_and_go_meanwhile_disturb_no_list() -> None:
    store = MemoryStore(StoreLimits())
    made = [await opened(store, a_grant("read_file")) for _ in range(4 * LISTED_AT_ONCE)]
    listing = asyncio.create_task(store.list_all(SessionFilter(tool="read_file"), limit=500))
    await asyncio.sleep(0)
    for session in made[::2]:
        await close(store, session.session_id)
        await opened(store, a_grant("read_file", time_limit_secs=1))
    page = await listing

    found = [each.session_id for each in page.sessions]
    assert len(found) == len(set(found))
    assert {each.session_id for each in made[1::2]} <= set(found)


async def work(store: MemoryStore, session_id: str, admission: Admission) -> int:
    """The number of function calls in one decision, including built-in functions."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in {"call", "c_call"}

    sys.setprofile(count)
    try:
        await store.record(session_id, admission)
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.anyio
async def test_an_admission_scans_neither_sessions_nor_tools() -> None:
    found = set()
    for sessions, tools in ((1, 1), (3000, 1), (1, 256)):
        store = MemoryStore(StoreLimits())
        names = [f"tool_{number}" for number in range(tools)]
        for _ in range(sessions):
            session = await opened(store, a_grant(*names))
        for admission in (a_call(names[-1]), a_batch(*[names[-1]] * 16)):
            found.add(await work(store, session.session_id, admission))

    assert len(found) == 1


@pytest.mark.anyio
async def test_remembered_calls_are_bounded_and_shared_by_callers() -> None:
    store = MemoryStore(StoreLimits(retention_secs=0, max_remembered_calls=4))
    session = await opened(store, a_grant(call_budget=100))

    async def call_until_refused(caller: str) -> int:
        for number in range(9):
            key = IdempotencyKey(caller, str(number))
            try:
                await store.record(session.session_id, a_call(), key)
            except SessionLimitReached:
                return number
        raise AssertionError("never refused")

    assert await call_until_refused("greedy") == 4
    assert await call_until_refused("late") == 2

    again = await store.record(session.session_id, a_call(), IdempotencyKey("late", "0"))
    assert isinstance(again, Admitted)
    assert again.replayed
    found = await store.get(session.session_id)
    assert found is not None
    assert found.usage.calls_made == 6
    await close(store, session.session_id)
    await store.cleanup_expired(100)
    session = await opened(store)
    assert await call_until_refused("late") == 4


@pytest.mark.anyio
async def test_remembered_answers_count_towards_a_slice() -> None:
    """A busy session can have too many remembered answers for one slice of a sweep."""
    store = MemoryStore(StoreLimits(retention_secs=0))
    session = await opened(store)
    for number in range(25):
        await store.record(session.session_id, a_call(), IdempotencyKey("a", str(number)))
    await close(store, session.session_id)

    slices = [await store.cleanup_expired(10) for _ in range(3)]

    assert [each.closed for each in slices] == [0, 0, 1]
