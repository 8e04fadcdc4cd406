"""Once a session was reported as expired, or left out as expired, no answer says otherwise, not
even after a failover to a clock that is behind."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from app.domain.admission import Admitted, Denied
from app.domain.advice import DenialCode
from app.domain.capacity import StoreLimits
from app.domain.idempotency import IdempotencyKey
from app.domain.session import SessionStatus
from app.store.contract import SessionFilter, SessionStore
from tests.conftest import STORES
from tests.support import (
    AGENT,
    ManualClock,
    a_call,
    a_grant,
    close,
    count_active,
    create,
    kill,
    opened,
)

pytestmark = pytest.mark.anyio

LIMITS = StoreLimits(max_active_sessions_per_agent=1)

TOLD: dict[str, Callable[[SessionStore, str], Awaitable[object]]] = {
    "a call": lambda store, session_id: store.record(session_id, a_call()),
    "a dry run": lambda store, session_id: store.record(session_id, a_call(), dry_run=True),
    "a retry": lambda store, session_id: store.record(
        session_id, a_call(), IdempotencyKey("proxy", "k")
    ),
    "a read": lambda store, session_id: store.get(session_id),
    "a list": lambda store, _: store.list_all(SessionFilter(), limit=9),
    "a list of the agent": lambda store, _: store.list_all(SessionFilter(AGENT), limit=9),
    "a list of expired sessions": lambda store, _: store.list_all(
        SessionFilter(None, SessionStatus.EXPIRED), limit=9
    ),
    "a count": lambda store, _: count_active(store),
    "a count of the agent": lambda store, _: count_active(store, AGENT),
    "the kill switch": lambda store, _: kill(store, AGENT),
    "a creation under the cap": lambda store, _: create(store, a_grant(time_limit_secs=1)),
}


@pytest.fixture
async def store(clock: ManualClock, tmp_path: Path) -> AsyncIterator[SessionStore]:
    made = STORES["redis"](LIMITS, clock, tmp_path)
    await made.open()
    yield made
    await made.aclose()


@pytest.mark.parametrize("tell", TOLD.values(), ids=TOLD)
async def test_an_expiry_that_was_told_is_remembered(
    store: SessionStore,
    clock: ManualClock,
    tell: Callable[[SessionStore, str], Awaitable[object]],
) -> None:
    session = await opened(store, a_grant(time_limit_secs=60))
    clock.advance(60)
    await tell(store, session.session_id)

    clock.advance(-30)

    denied = await store.record(session.session_id, a_call())
    assert isinstance(denied, Denied)
    assert denied.code is DenialCode.SESSION_EXPIRED
    seen = await store.get(session.session_id)
    assert seen is not None
    assert seen.status is SessionStatus.EXPIRED
    assert await kill(store, AGENT) <= 1
    active = await store.list_all(SessionFilter(None, SessionStatus.ACTIVE), limit=9)
    assert session.session_id not in [each.session_id for each in active.sessions]
    assert isinstance(await create(store), Admitted)


async def test_a_clock_that_goes_back_does_not_move_a_window(
    store: SessionStore, clock: ManualClock
) -> None:
    session = await opened(store, a_grant(rate_limit_per_minute=1))
    assert isinstance(await store.record(session.session_id, a_call()), Admitted)
    clock.advance(-30)

    denied = await store.record(session.session_id, a_call())

    assert isinstance(denied, Denied)
    assert denied.retry_after_secs == 60
    clock.advance(30 + 60)
    assert isinstance(await store.record(session.session_id, a_call()), Admitted)
    assert await close(store, session.session_id)
