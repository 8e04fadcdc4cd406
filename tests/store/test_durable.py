"""The promises of stores that outlive the process (`DURABLE`), tested by opening a store again
after it was closed, or after its process crashed."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from app.domain.admission import Admitted, Denied
from app.domain.advice import DenialCode
from app.domain.capacity import StoreLimits
from app.domain.errors import SessionLimitReached
from app.domain.idempotency import ChangeKey, IdempotencyKey
from app.domain.lifecycle import Amendment, Changed, amend
from app.domain.session import DataSensitivity, PausedBy, Session, SessionStatus
from app.store.contract import SessionFilter, SessionStore
from tests.conftest import DURABLE, STORES
from tests.support import (
    AGENT,
    OTHER_AGENT,
    PAUSE,
    ManualClock,
    a_batch,
    a_call,
    a_grant,
    close,
    count_active,
    create,
    kill,
    opened,
)

pytestmark = pytest.mark.anyio

KEY = IdempotencyKey("proxy", "key-1")

Reopen = Callable[..., Awaitable[SessionStore]]


@pytest.fixture(params=DURABLE)
async def reopen(
    request: pytest.FixtureRequest, clock: ManualClock, tmp_path: Path
) -> AsyncIterator[Reopen]:
    """Opens the store, and closes it first if it is open. With `crash` it opens a copy of the
    open store's files instead, as if the process had been killed. The wall clock advances by
    `down_secs` in between."""
    async with AsyncExitStack() as stack:
        folder, lives = tmp_path / "0", 0
        folder.mkdir()
        current = None

        async def open_again(
            *, crash: bool = False, down_secs: int = 0, **limits: Any
        ) -> SessionStore:
            nonlocal current, folder, lives
            if crash:
                lives += 1
                left = folder
                folder = tmp_path / str(lives)
                shutil.copytree(left, folder)
                stack.push_async_callback(current.aclose)
            elif current is not None:
                await current.aclose()
            clock.advance(down_secs)
            current = STORES[request.param](StoreLimits(**limits), clock, folder)
            await current.open()
            return current

        yield open_again
        await current.aclose()


@pytest.fixture(params=["stopped", "crashed"])
def crash(request: pytest.FixtureRequest) -> bool:
    return request.param == "crashed"


async def test_a_session_survives_a_restart_unchanged(reopen: Reopen, crash: bool) -> None:
    store = await reopen()
    terms = {
        "declared_intent": "ünïcode \0 and \U0001f600",
        "delegation_chain_snapshot": ("alice", "bob"),
        "call_budget": 7,
        "rate_limit_per_minute": 5,
        "rate_limit_window_secs": 30,
        "data_sensitivity_ceiling": DataSensitivity.RESTRICTED,
    }
    session = await opened(store, a_grant("read_file", "fs.*", "*x*y", **terms))
    admitted = await store.record(session.session_id, a_batch("fs.list", "axby"))
    closed = await close(store, (await opened(store)).session_id)
    assert isinstance(admitted, Admitted)
    assert isinstance(closed, Session)

    store = await reopen(crash=crash)

    after = await store.get(session.session_id)
    assert after is not None
    assert after.at(0) == admitted.session.at(0)
    closed_after = await store.get(closed.session_id)
    assert closed_after is not None
    assert closed_after.at(0) == closed.at(0)
    page = await store.list_all(SessionFilter(AGENT, SessionStatus.ACTIVE), limit=9)
    assert [each.session_id for each in page.sessions] == [session.session_id]


async def test_a_restart_does_not_refill_a_budget(reopen: Reopen, crash: bool) -> None:
    store = await reopen()
    session = await opened(store, a_grant(call_budget=3))
    made = 0
    for _ in range(5):
        decision = await store.record(session.session_id, a_call())
        made += isinstance(decision, Admitted)
        store = await reopen(crash=crash)

    assert made == 3


async def test_a_rate_window_continues_after_a_restart(
    reopen: Reopen, clock: ManualClock
) -> None:
    store = await reopen()
    session = await opened(store, a_grant(rate_limit_per_minute=1))
    await store.record(session.session_id, a_call())

    store = await reopen()

    clock.advance(59)
    denied = await store.record(session.session_id, a_call())
    assert isinstance(denied, Denied)
    assert denied.retry_after_secs == 1
    clock.advance(1)
    assert isinstance(await store.record(session.session_id, a_call()), Admitted)


async def test_retries_are_replayed_after_a_restart(reopen: Reopen, crash: bool) -> None:
    store = await reopen()
    created = await create(store, a_grant(), KEY)
    assert isinstance(created, Admitted)
    session_id = created.session.session_id
    first = await store.record(session_id, a_call(), KEY)
    assert isinstance(first, Admitted)
    await store.record(session_id, a_call())

    store = await reopen(crash=crash)

    assert await create(store, a_grant(), KEY) == Admitted(created.session, replayed=True)
    assert await store.record(session_id, a_call(), KEY) == Admitted(
        first.session, replayed=True
    )
    for conflict in (
        await create(store, a_grant(call_budget=1), KEY),
        await store.record(session_id, a_call("list_dir"), KEY),
    ):
        assert isinstance(conflict, Denied)
        assert conflict.code is DenialCode.IDEMPOTENCY_CONFLICT
    after = await store.get(session_id)
    assert after is not None
    assert after.usage.calls_made == 2


async def test_changes_survive_a_restart(reopen: Reopen, crash: bool) -> None:
    store = await reopen()
    changed, held = await opened(store), await opened(store)
    key = ChangeKey("ops", "k", "add five")
    more = amend(Amendment(add_calls=5, remove_tools=("read_file",)), 10**6)
    await store.change(changed.session_id, more, key)
    await store.change(held.session_id, PAUSE)
    await store.freeze(OTHER_AGENT, "why", "ops")

    store = await reopen(crash=crash)

    again = await store.change(changed.session_id, more, key)
    assert isinstance(again, Changed)
    assert again.replayed
    assert again.session.grant.call_budget == changed.grant.call_budget + 5
    for session, code in (
        (changed, DenialCode.TOOL_NOT_AUTHORIZED),
        (held, DenialCode.SESSION_PAUSED),
    ):
        denied = await store.record(session.session_id, a_call())
        assert isinstance(denied, Denied)
        assert denied.code is code
        if session is held:
            assert denied.session is not None
            assert denied.session.terms.paused_by == PausedBy("ops", "looking into it")
    refused = await create(store, a_grant(agent_id=OTHER_AGENT))
    assert isinstance(refused, Denied)
    assert refused.code is DenialCode.AGENT_FROZEN
    ((frozen, freeze),) = (await store.list_frozen(limit=9)).agents
    assert (frozen, freeze.reason, freeze.by) == (OTHER_AGENT, "why", "ops")
    assert (await store.totals())[:3] == (1, 1, 1)


async def test_the_kill_switch_survives_a_restart(reopen: Reopen, crash: bool) -> None:
    store = await reopen()
    session = await opened(store)
    assert await kill(store, AGENT) == 1

    store = await reopen(crash=crash)

    denied = await store.record(session.session_id, a_call())
    assert isinstance(denied, Denied)
    assert denied.code is DenialCode.SESSION_CLOSED


async def test_caps_and_counts_survive_a_restart(reopen: Reopen, crash: bool) -> None:
    limits = {"max_sessions": 4, "max_active_sessions_per_agent": 2}
    store = await reopen(**limits)
    for _ in range(2):
        await create(store, a_grant(), None)
    closed = await opened(store, a_grant(agent_id=OTHER_AGENT))
    await close(store, closed.session_id)

    store = await reopen(crash=crash, **limits)

    assert await count_active(store) == await count_active(store, AGENT) == 2
    denied = await create(store, a_grant())
    assert isinstance(denied, Denied)
    assert denied.code is DenialCode.TOO_MANY_SESSIONS
    await opened(store, a_grant(agent_id=OTHER_AGENT))
    with pytest.raises(SessionLimitReached):
        await opened(store, a_grant(agent_id=OTHER_AGENT))


async def test_time_passes_while_the_service_is_down(
    reopen: Reopen, clock: ManualClock, crash: bool
) -> None:
    store = await reopen(retention_secs=100)
    session = await opened(store, a_grant(time_limit_secs=60))

    store = await reopen(crash=crash, down_secs=60, retention_secs=100)

    after = await store.get(session.session_id)
    assert after is not None
    assert after.status is SessionStatus.EXPIRED
    clock.advance(100)
    assert (await store.cleanup_expired(9)).expired == 1


@pytest.mark.parametrize("reopen", ["sqlite"], indirect=True)
async def test_setting_the_wall_clock_back_extends_no_session(
    reopen: Reopen, clock: ManualClock, crash: bool
) -> None:
    """Other stores use the clock of their server, which runs on while the service is down."""
    store = await reopen()
    over = await opened(store, a_grant(time_limit_secs=60))
    alive = await opened(store, a_grant(time_limit_secs=120))
    clock.advance(60)
    before = await store.get(over.session_id)
    assert before is not None
    assert before.status is SessionStatus.EXPIRED

    store = await reopen(crash=crash, down_secs=-3600)

    expired = await store.record(over.session_id, a_call())
    assert isinstance(expired, Denied)
    assert expired.code is DenialCode.SESSION_EXPIRED
    assert isinstance(await store.record(alive.session_id, a_call()), Admitted)
    clock.advance(60)
    ended = await store.get(alive.session_id)
    assert ended is not None
    assert ended.status is SessionStatus.EXPIRED


async def test_a_clean_restart_costs_no_time(reopen: Reopen, clock: ManualClock) -> None:
    store = await reopen()
    session = await opened(store, a_grant(time_limit_secs=60))
    for _ in range(10):
        store = await reopen()

    clock.advance(59)
    assert isinstance(await store.record(session.session_id, a_call()), Admitted)
