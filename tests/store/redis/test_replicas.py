"""Replicas over one Redis or Valkey: sharing, and dying between two slots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest

from app.domain.admission import Admitted, DenialCode, Denied
from app.domain.errors import StoreUnavailable
from app.domain.session import SessionStatus
from app.store.contract import IdempotencyKey, SessionFilter, StoreLimits
from app.store.redis.index import LEASE_SECS, Announcement
from app.store.redis.store import RedisStore
from tests.conftest import PATIENTLY, redis_store
from tests.engines import Server, single
from tests.store.redis.test_store import connected
from tests.support import AGENT, ManualClock, a_batch, a_call, a_grant, new_id, opened

pytestmark = pytest.mark.anyio

KEY = IdempotencyKey("proxy", "key-1")


class Died(BaseException):
    """The replica is gone."""


class TestReplicasThatDie:
    """A creation or a closing touches three slots. Wherever its replica dies, the kill switch
    reaches every session, and no cap stays used up."""

    @pytest.fixture
    async def replicas(
        self, clock: ManualClock, tmp_path: Path
    ) -> AsyncIterator[tuple[RedisStore, RedisStore]]:
        limits = StoreLimits(max_active_sessions_per_agent=1, retention_secs=20)
        first, second = (redis_store(limits, clock, tmp_path) for _ in range(2))
        assert isinstance(first, RedisStore)
        assert isinstance(second, RedisStore)
        await first.open()
        await second.open()
        yield first, second
        await first.aclose()
        await second.aclose()

    async def die_at(
        self,
        store: RedisStore,
        step: int,
        doing: Awaitable[object],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Let the replica die before it sends its script number `step`."""
        sent, submit = 0, store._engine._submit

        def submit_or_die(each: Any) -> Any:
            nonlocal sent
            sent += 1
            if sent > step:
                raise Died
            return submit(each)

        monkeypatch.setattr(store._engine, "_submit", submit_or_die)
        with pytest.raises(Died):
            await doing
        monkeypatch.undo()

    @pytest.mark.parametrize("step", range(5))
    @pytest.mark.parametrize("key", [None, KEY])
    async def test_during_a_creation(
        self,
        replicas: tuple[RedisStore, RedisStore],
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
        step: int,
        key: IdempotencyKey | None,
    ) -> None:
        dying, living = replicas
        session_id = new_id()
        await self.die_at(dying, step, dying.create(session_id, a_grant(), key), monkeypatch)

        exists = await living.get(session_id) is not None
        assert await living.close_sessions_for_agent(AGENT) == exists
        after = await living.get(session_id)
        assert after is None or after.status is SessionStatus.CLOSED
        clock.advance(LEASE_SECS)
        assert await living.count_active_for_agent(AGENT) == 0
        assert await living.count_active() == 0
        assert isinstance(await living.create(new_id(), a_grant()), Admitted)
        clock.advance(3600 + 20)
        while (await living.cleanup_expired(10)).more:
            pass
        assert single().client.keys("*open") == []
        assert single().client.keys("*:sessions") == []

    @pytest.mark.parametrize("step", range(5))
    async def test_during_a_creation_that_somebody_repeats(
        self,
        replicas: tuple[RedisStore, RedisStore],
        monkeypatch: pytest.MonkeyPatch,
        step: int,
    ) -> None:
        dying, living = replicas
        await self.die_at(dying, step, dying.create(new_id(), a_grant(), KEY), monkeypatch)

        first = await living.create(new_id(), a_grant(), KEY)
        again = await living.create(new_id(), a_grant(), KEY)

        assert isinstance(first, Admitted)
        assert again == Admitted(first.session, replayed=True)
        assert len((await living.list_all(SessionFilter(), limit=9)).sessions) == 1
        assert await living.count_active_for_agent(AGENT) == 1

    @pytest.mark.parametrize("step", range(5))
    async def test_a_session_that_was_written_is_found_again(
        self,
        replicas: tuple[RedisStore, RedisStore],
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
        step: int,
    ) -> None:
        dying, living = replicas
        session_id = new_id()
        await self.die_at(dying, step, dying.create(session_id, a_grant()), monkeypatch)
        exists = await living.get(session_id) is not None

        clock.advance(LEASE_SECS)
        swept = await living.cleanup_expired(10)

        assert (swept.expired, swept.closed) == (0, 0)
        assert await living.count_active() == exists
        assert await living.count_active_for_agent(AGENT) == exists
        page = await living.list_all(SessionFilter(AGENT, SessionStatus.ACTIVE), limit=9)
        assert [each.session_id for each in page.sessions] == [session_id] * exists

    @pytest.mark.parametrize("step", range(7))
    @pytest.mark.parametrize("how", ["close", "kill switch"])
    async def test_during_a_closing(
        self,
        replicas: tuple[RedisStore, RedisStore],
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
        step: int,
        how: str,
    ) -> None:
        dying, living = replicas
        session = await opened(living)
        closing = {
            "close": lambda: dying.close(session.session_id),
            "kill switch": lambda: dying.close_sessions_for_agent(AGENT),
        }
        await self.die_at(dying, step, closing[how](), monkeypatch)

        await living.close_sessions_for_agent(AGENT)
        after = await living.get(session.session_id)
        assert after is not None
        assert after.status is SessionStatus.CLOSED
        clock.advance(LEASE_SECS)
        assert isinstance(await living.create(new_id(), a_grant()), Admitted)

    @pytest.mark.parametrize("step", range(7))
    async def test_a_session_that_was_not_closed_counts_again(
        self,
        replicas: tuple[RedisStore, RedisStore],
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
        step: int,
    ) -> None:
        dying, living = replicas
        session = await opened(living)
        await self.die_at(dying, step, dying.close(session.session_id), monkeypatch)

        clock.advance(LEASE_SECS)
        await living.cleanup_expired(10)

        after = await living.get(session.session_id)
        assert after is not None
        active = after.status is SessionStatus.ACTIVE
        assert await living.count_active() == active
        assert await living.count_active_for_agent(AGENT) == active
        refused = await living.create(new_id(), a_grant())
        assert isinstance(refused, Denied) == active

    async def test_the_indexes_live_as_long_as_a_session_nobody_confirmed(
        self,
        replicas: tuple[RedisStore, RedisStore],
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        dying, living = replicas
        week = 7 * 24 * 3600
        await self.die_at(
            dying, 3, dying.create(new_id(), a_grant(time_limit_secs=week)), monkeypatch
        )
        clock.advance(LEASE_SECS)
        await living.cleanup_expired(10)

        for key in (*single().client.keys("*:open"), *single().client.keys("*:sessions")):
            assert single().client.ttl(key) > week

    async def test_a_session_closed_before_its_creation_is_repeated_stays_closed(
        self,
        replicas: tuple[RedisStore, RedisStore],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        dying, living = replicas
        session_id = new_id()
        await self.die_at(dying, 3, dying.create(session_id, a_grant(), KEY), monkeypatch)
        assert await living.close_sessions_for_agent(AGENT) == 1

        again = await living.create(new_id(), a_grant(), KEY)

        assert isinstance(again, Admitted)
        assert again.session.session_id == session_id
        assert again.session.status is SessionStatus.ACTIVE
        assert await living.count_active_for_agent(AGENT) == 0
        page = await living.list_all(SessionFilter(AGENT), limit=9)
        assert [each.status for each in page.sessions] == [SessionStatus.CLOSED]
        assert isinstance(await living.create(new_id(), a_grant()), Admitted)

    async def test_a_sweep_that_looked_too_early_does_not_lose_a_session(
        self,
        replicas: tuple[RedisStore, RedisStore],
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sweeping, living = replicas
        await self.die_at(sweeping, 2, sweeping.create(new_id(), a_grant(), KEY), monkeypatch)
        clock.advance(LEASE_SECS)
        look = sweeping._sessions.sweep

        async def look_and_wait(session_ids: list[str]) -> list[list[Any]]:
            found = await look(session_ids)
            # Just then the client comes again.
            with pytest.raises(StoreUnavailable):
                await living.create(new_id(), a_grant(), KEY)
            return found

        monkeypatch.setattr(sweeping._sessions, "sweep", look_and_wait)
        await sweeping.cleanup_expired(10)

        assert (await living.list_all(SessionFilter(), limit=9)).sessions == []
        assert await living.count_active_for_agent(AGENT) == 0

    async def test_a_replica_that_slept_does_not_write_a_session_nobody_knows(
        self,
        replicas: tuple[RedisStore, RedisStore],
        clock: ManualClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        sleeping, living = replicas
        claim, session_id = sleeping._index.claim_for_agent, new_id()

        async def sleep(announced: Announcement) -> int | None:
            active = await claim(announced)
            clock.advance(LEASE_SECS)
            return active

        monkeypatch.setattr(sleeping._index, "claim_for_agent", sleep)

        with pytest.raises(StoreUnavailable):
            await sleeping.create(session_id, a_grant())

        assert await living.get(session_id) is None


class TestReplicas:
    async def test_two_replicas_share_one_budget(self, server: Server) -> None:
        store, other = [await connected(server.url + PATIENTLY) for _ in range(2)]
        session = await opened(store, a_grant(call_budget=50))

        decisions = await asyncio.gather(
            *(
                (store, other)[number % 2].record(session.session_id, a_batch("read_file"))
                for number in range(500)
            )
        )
        await store.aclose()
        await other.aclose()

        admitted = [each.session for each in decisions if isinstance(each, Admitted)]
        assert sorted(each.calls_made for each in admitted) == list(range(1, 51))

    async def test_the_kill_switch_reaches_very_many(self, server: Server) -> None:
        store = await connected(server.url + PATIENTLY)
        await asyncio.gather(*(opened(store) for _ in range(1001)))

        assert await store.close_sessions_for_agent(AGENT) == 1001

        assert await store.count_active_for_agent(AGENT) == await store.count_active() == 0
        await store.aclose()

    async def test_pages_go_on_whatever_language_the_engine_speaks(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("LC_ALL", "en_US.UTF-8")
        server = Server()
        store = await connected(server.url)
        made = [(await opened(store)).session_id for _ in range(3)]
        found, cursor = [], None
        for _ in made:
            page = await store.list_all(SessionFilter(), limit=1, cursor=cursor)
            found += [each.session_id for each in page.sessions]
            cursor = page.next_cursor
        await store.aclose()
        server.stop()

        assert (sorted(found), cursor) == (sorted(made), None)

    async def test_a_closed_session_is_swept_as_closed(self, server: Server) -> None:
        store = await connected(server.url, retention_secs=0)
        session = await opened(store)
        await store.close(session.session_id)
        # As the engine does by itself when its time comes.
        server.client.delete(*server.client.keys(f"*:{session.session_id}*"))

        swept = await store.cleanup_expired(10)
        await store.aclose()

        assert (swept.expired, swept.closed) == (0, 1)

    async def test_one_replica_sweeps_at_a_time(
        self, server: Server, clock: ManualClock
    ) -> None:
        store = await connected(server.url, retention_secs=0)
        other = await connected(server.url, retention_secs=0)
        for _ in range(3):
            await opened(store, a_grant(time_limit_secs=0))

        assert (await store.cleanup_expired(1)).expired == 1
        assert (await other.cleanup_expired(1)).expired == 0
        await store.aclose()
        assert (await other.cleanup_expired(10)).expired == 2
        await other.aclose()

    async def test_a_clock_that_goes_back_after_a_failover_revives_nothing(
        self, clock: ManualClock, tmp_path: Path
    ) -> None:
        store = redis_store(StoreLimits(), clock, tmp_path)
        await store.open()
        session = await opened(store, a_grant(time_limit_secs=60))
        clock.advance(60)
        for _ in range(2):
            refused = await store.record(session.session_id, a_call())
            assert isinstance(refused, Denied)
            assert refused.code is DenialCode.SESSION_EXPIRED
            clock.advance(-30)
        await store.aclose()
