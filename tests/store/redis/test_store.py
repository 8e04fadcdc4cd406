"""What only the store in Redis or Valkey has: an engine that fails, and a network that loses
replies."""

from __future__ import annotations

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from hashlib import sha256
from typing import Any

import pytest

from app.domain.admission import Admitted
from app.domain.capacity import StoreLimits
from app.domain.errors import StoreUnavailable, StoreUnreachable, StoreUnusable
from app.domain.idempotency import ChangeKey, IdempotencyKey
from app.domain.session import Session, SessionStatus
from app.store.redis.client import Step
from app.store.redis.scripts import DUE
from app.store.redis.store import RedisStore
from app.store.redis.url import RedisUrl
from tests.engines import Server
from tests.faults import FaultProxy, proxied
from tests.support import (
    AGENT,
    PAUSE,
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


async def connected(url: str, **limits: Any) -> RedisStore:
    store = RedisStore(RedisUrl.parse(url), StoreLimits(**limits))
    await store.open()
    return store


@pytest.fixture
async def store(server: Server) -> AsyncIterator[RedisStore]:
    made = await connected(server.url)
    yield made
    await made.aclose()


async def recovered(store: RedisStore) -> None:
    """Ask until the store answers again, as a load balancer asks /readyz."""
    async with asyncio.timeout(20):
        while True:
            try:
                return await store.ping()
            except StoreUnavailable:
                await asyncio.sleep(0)


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "hosts", "rest"),
        [
            ("redis://localhost", (("localhost", 6379),), {"db": 0, "tls": False}),
            ("redis://h:1/2", (("h", 1),), {"db": 2}),
            ("rediss://h", (("h", 6379),), {"tls": True}),
            ("redis://[::1]:7", (("::1", 7),), {}),
            ("redis+cluster://a:1,b:2", (("a", 1), ("b", 2)), {}),
            ("redis+cluster://a?tls=true", (("a", 6379),), {"tls": True}),
            (
                "redis+sentinel://a,b:5/main/3",
                (("a", 26379), ("b", 5)),
                {"service": "main", "db": 3},
            ),
            ("redis://h?deadline_ms=500", (("h", 6379),), {"deadline_secs": 0.5}),
            ("redis://h?allow_eviction=true", (("h", 6379),), {"allow_eviction": True}),
        ],
    )
    def test_it_says_where(self, url: str, hosts: object, rest: dict[str, Any]) -> None:
        parsed = RedisUrl.parse(url)

        assert parsed.hosts == hosts
        assert {name: getattr(parsed, name) for name in rest} == rest

    @pytest.mark.parametrize(
        "url",
        [
            "redis://",
            "redis://h:0x1",
            "redis://h:99999",
            "redis://a,b",
            "redis://h/x",
            "redis://h/1/2",
            "redis://h?retry=1",
            "redis://h?tls=yes",
            "redis://h?tls=true&tls=false",
            "redis://h?deadline_ms=0",
            "redis://h?deadline_ms=1e3",
            "redis+cluster://a/1",
            "redis+sentinel://a",
            "redis://h#f",
            "redis+cluster://u:pw@a,u:pw@b",
            "redis://:secret\u2100x@h",
        ],
    )
    def test_anything_else_is_refused(self, url: str) -> None:
        with pytest.raises(ValueError, match=r".") as refused:
            RedisUrl.parse(url)

        assert "secret" not in str(refused.value)

    def test_the_password_is_used_and_not_shown(self) -> None:
        parsed = RedisUrl.parse("redis://user:p%40ss@h")

        assert parsed.credentials.password == "p@ss"
        assert "p@ss" not in f"{parsed!r} {parsed}"


class TestStart:
    async def test_an_engine_that_evicts_is_refused_unless_told_so(
        self, server: Server
    ) -> None:
        server.client.config_set("maxmemory-policy", "allkeys-lru")

        with pytest.raises(StoreUnusable, match="maxmemory-policy is allkeys-lru"):
            await connected(server.url)

        await (await connected(f"{server.url}?allow_eviction=true")).aclose()

    async def test_a_wrong_password_is_one_sentence_without_it(self, server: Server) -> None:
        server.client.config_set("requirepass", "right")
        url = f"redis://:secret@127.0.0.1:{server.port}"

        with pytest.raises(StoreUnusable, match="refused the user or the password") as raised:
            await connected(url)

        assert "secret" not in str(raised.value)

    async def test_no_engine_is_one_sentence(self, server: Server) -> None:
        server.kill()

        with pytest.raises(StoreUnusable, match=f"{server.port}: there is no connection"):
            await connected(server.url)

    async def test_a_start_survives_an_engine_that_is_slow_once(self, server: Server) -> None:
        store = RedisStore(RedisUrl.parse(server.url), StoreLimits())
        submit_all, failures = store._client.submit_all, [StoreUnavailable()]

        async def slow_once(steps: Sequence[Step]) -> list[Any]:
            if failures:
                raise failures.pop()
            return await submit_all(steps)

        store._client.submit_all = slow_once  # type: ignore[method-assign]
        await store.open()

        assert isinstance(await store.create(a_grant()), Admitted)
        await store.aclose()

    async def test_a_start_over_an_engine_that_never_answers_fails(
        self, server: Server
    ) -> None:
        store = RedisStore(RedisUrl.parse(server.url), StoreLimits())

        async def never(_: Sequence[Step]) -> list[Any]:
            raise StoreUnavailable

        store._client.submit_all = never  # type: ignore[method-assign]

        with pytest.raises(StoreUnusable, match="does not answer"):
            await store.open()


class TestKeys:
    async def test_everything_ends_by_itself(self, server: Server) -> None:
        store = await connected(server.url, retention_secs=100)
        closed = await opened(store, a_grant(time_limit_secs=1000))
        session = await create(store, a_grant(time_limit_secs=50), KEY)
        assert isinstance(session, Admitted)
        await store.record(session.session.session_id, a_call(), KEY)
        await close(store, closed.session_id)
        await store.ping()
        await store.cleanup_expired(10)
        await store.aclose()

        lives = {key.decode(): server.client.ttl(key) for key in server.client.scan_iter()}
        del lives["arbiter:layout"]

        assert all(life > 0 for life in lives.values()), lives
        for session_id, life in ((closed.session_id, 100), (session.session.session_id, 150)):
            own = [each for key, each in lives.items() if key.endswith(session_id)]
            assert len(own) >= 1
            assert all(life - 5 <= each <= life for each in own)

    async def test_a_session_closed_long_after_its_end_waits_for_the_sweep(
        self, server: Server, clock: ManualClock
    ) -> None:
        limits = StoreLimits(retention_secs=300)
        store = RedisStore(RedisUrl.parse(server.url), limits, clock)
        await store.open()
        session = await opened(store, a_grant(time_limit_secs=1))
        clock.advance(24 * 3600)

        await close(store, session.session_id)

        (key,) = server.client.keys("*:session:*")
        assert server.client.ttl(key) > 30
        await store.aclose()

    async def test_everything_of_an_agent_is_in_one_cell(self, server: Server) -> None:
        store = await connected(server.url, max_active_sessions_per_agent=9)
        session = await create(store, a_grant(), KEY)
        assert isinstance(session, Admitted)
        await store.record(session.session.session_id, a_call(), KEY)
        await close(store, (await opened(store)).session_id)
        await store.aclose()
        cell = sha256(AGENT.encode()).hexdigest()[:2]

        keys = server.client.keys()

        assert len(keys) >= 8
        assert session.session.session_id.startswith(cell)
        assert {key for key in keys if f"{{c{cell}}}".encode() not in key} == {
            b"arbiter:layout"
        }

    async def test_a_session_id_is_a_random_uuid(self, server: Server) -> None:
        store = await connected(server.url)
        made = {(await opened(store)).session_id for _ in range(50)}
        await store.aclose()

        assert len(made) == 50
        assert {uuid.UUID(each).version for each in made} == {4}


class TestRoundTrips:
    @pytest.mark.parametrize(
        ("verb", "most"),
        [
            (lambda store, at: store.record(at, a_call()), 1),
            (lambda store, at: store.change(at, PAUSE), 2),
            (lambda store, at: store.change(at, PAUSE, ChangeKey("a", "b", "c")), 2),
            (lambda store, _: store.freeze(AGENT, "", "ops"), 1),
            (lambda store, _: store.unfreeze(AGENT), 1),
            (lambda store, _: create(store), 1),
        ],
        ids=["call", "change", "keyed change", "freeze", "unfreeze", "creation"],
    )
    async def test_a_verb_takes_no_more_scripts_than_promised(
        self,
        store: RedisStore,
        monkeypatch: pytest.MonkeyPatch,
        verb: Callable[[RedisStore, str], Awaitable[object]],
        most: int,
    ) -> None:
        session = await opened(store)
        submit, sent = store._client.submit, []

        def count(step: Step) -> asyncio.Future[Any]:
            sent.append(step)
            return submit(step)

        monkeypatch.setattr(store._client, "submit", count)
        await verb(store, session.session_id)
        # The regular survey asks every cell for what is due.
        scripts = [step.script for step in sent if step.script is not DUE]

        assert len(scripts) == most


class TestLayout:
    async def test_another_version_is_refused(self, server: Server) -> None:
        server.client.set("arbiter:layout", "2")

        with pytest.raises(StoreUnusable, match="another version of this program"):
            await connected(server.url)

    async def test_its_own_version_is_accepted(self, server: Server) -> None:
        await (await connected(server.url)).aclose()

        store = await connected(server.url)

        assert server.client.get("arbiter:layout") == b"1"
        await store.aclose()


class TestFailures:
    async def unavailable(self, store: RedisStore, session_id: str) -> None:
        for attempt in (
            store.record(session_id, a_call()),
            create(store),
            close(store, session_id),
            store.ping(),
        ):
            with pytest.raises(StoreUnavailable):
                async with asyncio.timeout(5):
                    await attempt

    async def test_a_killed_engine(self, server: Server, store: RedisStore) -> None:
        session = await opened(store)
        server.kill()
        await self.unavailable(store, session.session_id)

        server.start()
        await recovered(store)

        # It has forgotten everything, its scripts too.
        again = await opened(store)
        assert isinstance(await store.record(again.session_id, a_call()), Admitted)

    async def test_what_was_never_sent_is_certain(
        self, server: Server, store: RedisStore
    ) -> None:
        session = await opened(store)
        server.kill()
        # A connection that was open shows only in use that it is not.
        with pytest.raises(StoreUnavailable):
            await store.record(session.session_id, a_call())

        with pytest.raises(StoreUnreachable):
            await store.record(session.session_id, a_call())

    async def test_what_an_engine_that_hangs_was_sent_is_unknown(
        self, server: Server, store: RedisStore
    ) -> None:
        session = await opened(store)
        server.pause()
        with pytest.raises(StoreUnavailable) as raised:
            await store.record(session.session_id, a_call())
        server.resume()
        await recovered(store)

        after = await store.get(session.session_id)

        assert raised.value.outcome_unknown
        assert after is not None
        assert after.usage.calls_made == 1

    async def test_a_change_that_could_not_be_read_is_certain(
        self, server: Server, store: RedisStore
    ) -> None:
        session = await opened(store)
        server.pause()

        with pytest.raises(StoreUnreachable):
            await close(store, session.session_id)

    async def test_an_engine_that_hangs(self, server: Server, store: RedisStore) -> None:
        session = await opened(store)
        server.pause()
        await self.unavailable(store, session.session_id)

        server.resume()
        await recovered(store)

        assert isinstance(await store.record(session.session_id, a_call()), Admitted)

    async def test_an_engine_out_of_memory(self, server: Server, store: RedisStore) -> None:
        session = await opened(store)
        server.client.config_set("maxmemory", 1)
        for attempt in (
            store.record(session.session_id, a_call()),
            create(store),
            store.ping(),
        ):
            with pytest.raises(StoreUnreachable):
                await attempt

        server.client.config_set("maxmemory", 0)
        await recovered(store)

        decision = await store.record(session.session_id, a_call())
        assert isinstance(decision, Admitted)
        assert decision.session.usage.calls_made == 1

    async def test_an_engine_out_of_memory_can_still_stop_an_agent(
        self, server: Server, store: RedisStore
    ) -> None:
        closing, killed = await opened(store), await opened(store)
        server.client.config_set("maxmemory", 1)

        closed = await close(store, closing.session_id)
        number = await kill(store, AGENT)

        server.client.config_set("maxmemory", 0)
        await recovered(store)
        assert isinstance(closed, Session)
        assert number == 1
        for each in (closing, killed):
            after = await store.get(each.session_id)
            assert after is not None
            assert after.status is SessionStatus.CLOSED
        assert await count_active(store, AGENT) == 0

    async def test_a_read_only_replica(self, server: Server, store: RedisStore) -> None:
        session = await opened(store)
        server.client.replicaof("127.0.0.1", 1)
        await self.unavailable(store, session.session_id)

        server.client.replicaof("NO", "ONE")
        await recovered(store)

        assert isinstance(await store.record(session.session_id, a_call()), Admitted)

    async def test_a_password_that_was_changed(self, server: Server, store: RedisStore) -> None:
        session = await opened(store)
        server.client.config_set("requirepass", "new")
        server.client.client_kill_filter(_type="normal", skipme=True)
        await self.unavailable(store, session.session_id)

        server.client.config_set("requirepass", "")
        await recovered(store)

        assert isinstance(await store.record(session.session_id, a_call()), Admitted)

    async def test_scripts_that_were_forgotten_are_sent_again(
        self, server: Server, store: RedisStore
    ) -> None:
        session = await opened(store)
        await store.record(session.session_id, a_call())
        server.client.script_flush()

        decisions = await asyncio.gather(
            *(store.record(session.session_id, a_call()) for _ in range(20))
        )

        assert sorted(
            each.session.usage.calls_made for each in decisions if each.session
        ) == list(range(2, 22))


class TestNetwork:
    @pytest.fixture
    async def proxy(self, server: Server) -> AsyncIterator[FaultProxy]:
        async with proxied(server.port) as made:
            yield made

    @pytest.fixture
    async def store(self, proxy: FaultProxy) -> AsyncIterator[RedisStore]:
        made = await connected(f"redis://127.0.0.1:{proxy.port}")
        yield made
        await made.aclose()

    async def in_use(self, store: RedisStore) -> Session:
        """A session with one call, after which the engine knows the script."""
        session = await opened(store)
        await store.record(session.session_id, a_call())
        return session

    async def test_an_admission_whose_reply_is_lost_is_not_tried_twice(
        self, store: RedisStore, proxy: FaultProxy
    ) -> None:
        session = await self.in_use(store)
        proxy.drop_replies = True
        with pytest.raises(StoreUnavailable):
            await store.record(session.session_id, a_call())
        proxy.drop_replies = False
        await proxy.reset()
        await recovered(store)

        after = await store.get(session.session_id)

        assert after is not None
        assert after.usage.calls_made == 2

    async def test_a_retry_by_key_after_a_lost_reply_is_charged_once(
        self, store: RedisStore, proxy: FaultProxy
    ) -> None:
        session = await self.in_use(store)
        proxy.drop_replies = True
        with pytest.raises(StoreUnavailable):
            await store.record(session.session_id, a_call(), KEY)
        proxy.drop_replies = False
        await proxy.reset()
        await recovered(store)

        again = await store.record(session.session_id, a_call(), KEY)

        assert isinstance(again, Admitted)
        assert again.replayed
        assert again.session.usage.calls_made == 2

    async def test_what_is_counted_is_explained_by_the_outcomes(
        self, store: RedisStore, proxy: FaultProxy
    ) -> None:
        session = await opened(store, a_grant(call_budget=10_000))
        admitted = unknown = 0
        for fault in ("none", "lost", "reset", "slow", "none") * 4:
            proxy.drop_replies = fault == "lost"
            proxy.delay_secs = 0.4 if fault == "slow" else 0
            attempts = [store.record(session.session_id, a_call()) for _ in range(20)]
            racing = asyncio.gather(*attempts, return_exceptions=True)
            if fault == "reset":
                await asyncio.sleep(0)
                await proxy.reset()
            for outcome in await racing:
                admitted += isinstance(outcome, Admitted)
                unknown += isinstance(outcome, StoreUnavailable) and outcome.outcome_unknown
            proxy.drop_replies, proxy.delay_secs = False, 0
            await proxy.reset()
            await recovered(store)

        after = await store.get(session.session_id)

        assert after is not None
        assert admitted <= after.usage.calls_made <= admitted + unknown
        assert unknown

    async def test_a_slow_reply_is_not_waited_for(
        self, store: RedisStore, proxy: FaultProxy
    ) -> None:
        session = await self.in_use(store)
        proxy.delay_secs = 0.4

        with pytest.raises(StoreUnavailable):
            await store.record(session.session_id, a_call())

        proxy.delay_secs = 0
        await recovered(store)
        # The late reply has reached nobody else.
        decision = await store.record(session.session_id, a_call())
        assert isinstance(decision, Admitted)
        assert decision.session.usage.calls_made == 3

    async def test_a_reset_connection_is_replaced(
        self, store: RedisStore, proxy: FaultProxy
    ) -> None:
        session = await opened(store)
        for _ in range(3):
            await proxy.reset()
            await recovered(store)
            assert isinstance(await store.record(session.session_id, a_call()), Admitted)

    async def test_cancelled_requests_never_mix_up_replies(
        self, store: RedisStore, proxy: FaultProxy
    ) -> None:
        chance = random.Random(7)
        sessions = [await opened(store, a_grant(call_budget=10_000)) for _ in range(20)]
        proxy.delay_secs = 0.001
        asked = [chance.choice(sessions) for _ in range(1000)]
        answered = 0

        async def call(session_id: str) -> None:
            nonlocal answered
            decision = await store.record(session_id, a_call())
            assert isinstance(decision, Admitted)
            assert decision.session.session_id == session_id
            answered += 1

        for first in range(0, len(asked), 50):
            some = asked[first : first + 50]
            tasks = [asyncio.create_task(call(each.session_id)) for each in some]
            for _ in range(chance.randrange(20)):
                await asyncio.sleep(0)
            for task in tasks:
                if chance.random() < 0.5:
                    task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert outcome is None or isinstance(outcome, asyncio.CancelledError)

        proxy.delay_secs = 0
        made = [await store.get(session.session_id) for session in sessions]
        assert answered <= sum(each.usage.calls_made for each in made if each) <= len(asked)
