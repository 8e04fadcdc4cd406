"""A replica that dies, or loses the reply, at any script of any verb. Nothing needs repair: the
retry, the kill switch, the counts, the lists and the cap agree with what happened."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from app.domain.admission import Admitted, Denied
from app.domain.capacity import StoreLimits
from app.domain.errors import StoreUnavailable
from app.domain.idempotency import IdempotencyKey
from app.domain.session import Session, SessionStatus
from app.store.contract import SessionFilter, SessionStore
from app.store.redis.client import Step
from app.store.redis.store import RedisStore
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

KEY = IdempotencyKey("proxy", "key-1")
CAP = 2
LIMITS = StoreLimits(max_active_sessions_per_agent=CAP, retention_secs=300)

Replicas = tuple[RedisStore, RedisStore]


class Died(BaseException):
    """The replica is gone."""


@pytest.fixture(params=["redis", "cluster"])
async def replicas(
    request: pytest.FixtureRequest, clock: ManualClock, tmp_path: Path
) -> AsyncIterator[Replicas]:
    first, second = (STORES[request.param](LIMITS, clock, tmp_path) for _ in range(2))
    assert isinstance(first, RedisStore)
    assert isinstance(second, RedisStore)
    await first.open()
    await second.open()
    yield first, second
    await first.aclose()
    await second.aclose()


class Interruption:
    """Lets a replica fail at its script number `at`: killed before it is sent, killed after it
    ran, or with the reply lost."""

    def __init__(self, at: int, how: str) -> None:
        self.at = at
        self.how = how
        self.happened = False

    def of(self, store: RedisStore, monkeypatch: pytest.MonkeyPatch) -> None:
        submit, sent = store._client.submit, 0

        def submit_or_fail(step: Step) -> Awaitable[Any]:
            nonlocal sent
            sent += 1
            if sent <= self.at:
                return submit(step)
            self.happened = True
            if self.how == "before":
                raise Died
            return self._fail_after(submit(step))

        monkeypatch.setattr(store._client, "submit", submit_or_fail)

    async def _fail_after(self, running: Awaitable[Any]) -> Any:
        await running
        raise Died if self.how == "after" else StoreUnavailable


INTERRUPTIONS = [
    pytest.param(at, how, id=f"{how}-{at}")
    for at in range(3)
    for how in ("before", "after", "reply lost")
]


async def interrupted(
    store: RedisStore,
    doing: Callable[[], Awaitable[Any]],
    at: int,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> bool:
    """Whether the verb has a script number `at`, and was interrupted there."""
    interruption = Interruption(at, how)
    with monkeypatch.context() as patched:
        interruption.of(store, patched)
        try:
            await doing()
        except (Died, StoreUnavailable):
            assert interruption.happened
        else:
            assert not interruption.happened
    return interruption.happened


async def everything(store: SessionStore) -> list[Session]:
    page = await store.list_all(SessionFilter(), limit=500)
    assert page.next_cursor is None
    return page.sessions


async def agrees(store: RedisStore, other: RedisStore) -> list[Session]:
    """Check that counts, lists and single reads tell one story on both replicas."""
    for each in (store, other):
        sessions = await everything(each)
        active = [one for one in sessions if one.status is SessionStatus.ACTIVE]
        assert await count_active(each) == len(active)
        assert await count_active(each, AGENT) == len(active) <= CAP
        of_agent = await each.list_all(SessionFilter(AGENT), limit=500)
        assert of_agent.sessions == sessions
        for status in SessionStatus:
            page = await each.list_all(SessionFilter(None, status), limit=500)
            assert page.sessions == [one for one in sessions if one.status is status]
        for one in sessions:
            assert await each.get(one.session_id) == one
    return sessions


async def fills_up_to_the_cap(store: RedisStore) -> None:
    """Check that exactly as many sessions can be created as the cap leaves."""
    active = await count_active(store, AGENT)
    for _ in range(CAP - active):
        assert isinstance(await create(store), Admitted)
    assert isinstance(await create(store), Denied)


async def kills(store: RedisStore) -> None:
    """Check that the kill switch reaches every session."""
    active = await count_active(store)
    assert await kill(store, AGENT) == active
    assert all(each.status is not SessionStatus.ACTIVE for each in await everything(store))
    assert await count_active(store) == 0


async def sweeps_everything(store: RedisStore, clock: ManualClock) -> None:
    clock.advance(24 * 3600 + 3600)
    while (await store.cleanup_expired(3)).more:
        pass
    assert await everything(store) == []
    assert store._total_sessions == store._remembered_creations.total == 0


@pytest.mark.parametrize(("at", "how"), INTERRUPTIONS)
@pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
async def test_an_interrupted_creation(
    replicas: Replicas,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    how: str,
    key: IdempotencyKey | None,
) -> None:
    dying, living = replicas
    before = await opened(living)
    failed = await interrupted(dying, lambda: create(dying, None, key), at, how, monkeypatch)

    sessions = await agrees(living, dying)
    written = not failed or how != "before"
    assert len(sessions) == 1 + written
    assert before in sessions
    clock.advance(11)
    if key is not None:
        retried = await create(living, None, key)
        assert isinstance(retried, Admitted)
        assert retried.replayed == written
        assert await create(dying, None, key) == Admitted(retried.session, replayed=True)
        assert len(await agrees(living, dying)) == CAP
    await fills_up_to_the_cap(living)
    await kills(living)
    if key is not None:
        again = await create(living, None, key)
        assert isinstance(again, Admitted)
        assert again.replayed
        assert await count_active(living) == 0
    await sweeps_everything(living, clock)


@pytest.mark.parametrize(("at", "how"), INTERRUPTIONS)
async def test_an_interrupted_close(
    replicas: Replicas,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    how: str,
) -> None:
    dying, living = replicas
    session = await opened(living)
    await opened(living)

    failed = await interrupted(
        dying, lambda: close(dying, session.session_id), at, how, monkeypatch
    )

    # The first script reads, the second changes.
    closed = not failed or (at == 1 and how != "before")
    sessions = await agrees(living, dying)
    assert [one.status for one in sessions if one.session_id == session.session_id] == [
        SessionStatus.CLOSED if closed else SessionStatus.ACTIVE
    ]
    retried = await close(living, session.session_id)
    assert isinstance(retried, Denied) == closed
    await agrees(living, dying)
    await fills_up_to_the_cap(living)
    await kills(living)
    await sweeps_everything(living, clock)


@pytest.mark.parametrize(("at", "how"), INTERRUPTIONS)
async def test_an_interrupted_kill_switch(
    replicas: Replicas,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    how: str,
) -> None:
    dying, living = replicas
    monkeypatch.setattr("app.store.redis.store.CLOSED_AT_ONCE", 1)
    for _ in range(CAP):
        await opened(living)

    failed = await interrupted(dying, lambda: kill(dying, AGENT), at, how, monkeypatch)

    closed = CAP if not failed else min(CAP, at + (how != "before"))
    sessions = await agrees(living, dying)
    assert [one.status for one in sessions].count(SessionStatus.CLOSED) == closed
    await kills(living)
    await fills_up_to_the_cap(living)
    await sweeps_everything(living, clock)


@pytest.mark.parametrize(("at", "how"), INTERRUPTIONS)
@pytest.mark.parametrize("key", [None, KEY], ids=["unkeyed", "keyed"])
async def test_an_interrupted_call(
    replicas: Replicas,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    how: str,
    key: IdempotencyKey | None,
) -> None:
    dying, living = replicas
    session = await opened(living, a_grant(call_budget=2))

    failed = await interrupted(
        dying,
        lambda: dying.record(session.session_id, a_call(), key),
        at,
        how,
        monkeypatch,
    )

    counted = not failed or how != "before"
    (seen,) = await agrees(living, dying)
    assert seen.usage.calls_made == counted
    retried = await living.record(session.session_id, a_call(), key)
    assert isinstance(retried, Admitted)
    assert retried.session.usage.calls_made == 1 + (counted and key is None)
    assert retried.replayed == (counted and key is not None)
    await agrees(living, dying)


@pytest.mark.parametrize(("at", "how"), INTERRUPTIONS)
async def test_an_interrupted_sweep(
    replicas: Replicas,
    clock: ManualClock,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
    how: str,
) -> None:
    dying, living = replicas
    await create(living, a_grant(time_limit_secs=1), KEY)
    staying = await opened(living)
    clock.advance(1 + LIMITS.retention_secs)
    await dying.cleanup_expired(0)

    await interrupted(dying, lambda: dying.cleanup_expired(10), at, how, monkeypatch)

    while (await living.cleanup_expired(10)).more:
        pass
    assert await agrees(living, dying) == [await living.get(staying.session_id)]
    again = await create(living, a_grant(time_limit_secs=1), KEY)
    assert isinstance(again, Admitted)
    assert again.replayed
    await sweeps_everything(living, clock)
