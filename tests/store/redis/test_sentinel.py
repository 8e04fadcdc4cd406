"""A primary behind sentinels: found, failed over, and followed."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from app.domain.admission import Admitted
from app.domain.errors import StoreUnavailable, StoreUnusable
from app.domain.idempotency import IdempotencyKey
from app.domain.session import SessionStatus
from app.store.redis.store import RedisStore
from tests import engines
from tests.engines import Sentinels, until
from tests.store.redis.test_store import connected
from tests.support import a_call, a_grant, close, opened

pytestmark = pytest.mark.anyio

BUDGET = 50
FAILOVER_SECS = 30
ANSWER_SECS = 5
"""Far above the deadline of a request: a test machine may be slow."""

KEY = IdempotencyKey("proxy", "key-1")


@pytest.fixture(scope="module", params=["valkey", "redis"])
def program(request: pytest.FixtureRequest) -> str:
    if request.param == "valkey":
        return engines.binary()
    if found := engines.installed():
        return found
    pytest.skip("SENTINELS OF REDIS ARE NOT TESTED. Install redis-server.")


@pytest.fixture(scope="module")
def shared(program: str) -> Iterator[Sentinels]:
    """Sentinels that no test may change."""
    made = Sentinels(program=program)
    yield made
    made.stop()


@pytest.fixture
def sentinels(program: str) -> Iterator[Sentinels]:
    """Sentinels that this test alone uses."""
    made = Sentinels(program=program)
    yield made
    made.stop()


class TestDiscovery:
    async def test_sessions_live_in_the_primary(self, shared: Sentinels) -> None:
        store = await connected(shared.url)
        session = await opened(store)
        await store.record(session.session_id, a_call())
        await store.aclose()

        assert shared.primary.client.keys(f"*session:{session.session_id}")

        store = await connected(shared.url)
        again = await store.get(session.session_id)
        await store.aclose()
        assert again is not None
        assert again.usage.calls_made == 1

    async def test_one_living_sentinel_is_enough(self, shared: Sentinels) -> None:
        dead = f"127.0.0.1:{engines.free_port()},127.0.0.1:{engines.free_port()}"
        living = shared.sentinels[0].port
        store = await connected(f"redis+sentinel://{dead},127.0.0.1:{living}/main")

        await opened(store)

        await store.aclose()

    async def test_a_name_that_no_sentinel_knows_is_one_sentence(
        self, shared: Sentinels
    ) -> None:
        with pytest.raises(StoreUnusable, match=r"^cannot use redis\+sentinel://.+: .+$"):
            await connected(shared.url.replace("/main", "/other"))

    async def test_a_closed_store_leaves_no_connection_to_a_sentinel(
        self, shared: Sentinels
    ) -> None:
        def asked_for_the_primary() -> int:
            clients = [
                client for each in shared.sentinels for client in each.client.client_list()
            ]
            return sum(client["cmd"] == "sentinel|masters" for client in clients)

        store = await connected(shared.url)
        assert asked_for_the_primary() == 1

        await store.aclose()

        until(lambda: asked_for_the_primary() == 0)
        del store
        # An unclosed connection would warn now.
        gc.collect()


async def test_sentinels_may_have_the_password_of_the_primary_or_none(
    sentinels: Sentinels,
) -> None:
    for server in (sentinels.primary, sentinels.replica):
        server.client.config_set("masterauth", "secret")
        server.client.config_set("requirepass", "secret")
    for sentinel in sentinels.sentinels:
        sentinel.client.sentinel_set("main", "auth-pass", "secret")
    with_password = sentinels.url.replace("://", "://:secret@")

    with pytest.raises(StoreUnusable):
        await connected(sentinels.url)
    await (await connected(with_password)).aclose()

    for sentinel in sentinels.sentinels:
        sentinel.client.acl_setuser("default", enabled=True, passwords=["+secret"])
    with pytest.raises(StoreUnusable):
        await connected(sentinels.url)
    await (await connected(with_password)).aclose()


class Spending:
    """Calls that race for one budget, and what came of them."""

    def __init__(self, store: RedisStore, session_id: str) -> None:
        self.store = store
        self.session_id = session_id
        self.admitted = 0
        self.unavailable = 0

    async def call(self) -> bool | None:
        """Return whether a call is admitted, or `None` if the store cannot know."""
        try:
            async with asyncio.timeout(ANSWER_SECS):
                decision = await self.store.record(self.session_id, a_call())
        except StoreUnavailable:
            self.unavailable += 1
            return None
        self.admitted += isinstance(decision, Admitted)
        return isinstance(decision, Admitted)

    async def to_the_end(self) -> None:
        while (outcome := await self.call()) is not False:
            if outcome is None:
                await asyncio.sleep(0.02)


@pytest.mark.parametrize("failure", ["killed", "hung"])
async def test_a_failover_keeps_sessions_and_never_overspends(
    sentinels: Sentinels, failure: str
) -> None:
    store = await connected(sentinels.url)
    session = await opened(store, a_grant(call_budget=BUDGET))
    closed = await opened(store)
    await close(store, closed.session_id)
    spending = Spending(store, session.session_id)
    for _ in range(BUDGET // 2):
        assert await spending.call()
    keyed = await store.record(session.session_id, a_call(), KEY)
    assert isinstance(keyed, Admitted)
    until(sentinels.is_in_step)

    if failure == "killed":
        sentinels.primary.kill()
    else:
        sentinels.primary.pause()
    async with asyncio.timeout(FAILOVER_SECS):
        await asyncio.gather(*(spending.to_the_end() for _ in range(5)))

    assert spending.unavailable
    assert BUDGET // 2 < spending.admitted < BUDGET
    assert sentinels.replica.client.info("replication")["role"] == "master"
    again = await store.get(session.session_id)
    assert again is not None
    assert again.usage.calls_made == BUDGET
    replayed = await store.record(session.session_id, a_call(), KEY)
    assert isinstance(replayed, Admitted)
    assert replayed.replayed
    after = await store.get(closed.session_id)
    assert after is not None
    assert after.status is SessionStatus.CLOSED
    await opened(store)

    # The old primary still believes that it is one, and has half of the budget left.
    if failure == "hung":
        sentinels.primary.resume()
        assert await asyncio.gather(*(spending.call() for _ in range(5))) == [False] * 5
    await store.aclose()
