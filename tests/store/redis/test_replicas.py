"""Replicas over one Redis or Valkey."""

from __future__ import annotations

import asyncio

import pytest

from app.domain.admission import Admitted
from app.store.contract import SessionFilter
from app.store.redis.store import RedisStore
from tests.conftest import PATIENTLY
from tests.engines import Server
from tests.store.redis.test_store import connected
from tests.support import (
    AGENT,
    a_batch,
    a_grant,
    close,
    count_active,
    kill,
    opened,
)

pytestmark = pytest.mark.anyio


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
        assert sorted(each.usage.calls_made for each in admitted) == list(range(1, 51))

    async def test_the_kill_switch_reaches_very_many(self, server: Server) -> None:
        store = await connected(server.url + PATIENTLY)
        await asyncio.gather(*(opened(store) for _ in range(1001)))

        assert await kill(store, AGENT) == 1001

        assert await count_active(store, AGENT) == await count_active(store) == 0
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
        await close(store, session.session_id)
        # As the engine does by itself when its time comes.
        server.client.delete(*server.client.keys(f"*:{session.session_id}*"))

        swept = await store.cleanup_expired(10)
        await store.aclose()

        assert (swept.expired, swept.closed) == (0, 1)

    async def test_replicas_that_sweep_together_remove_each_session_once(
        self, server: Server
    ) -> None:
        stores = [await connected(server.url + PATIENTLY, retention_secs=0) for _ in range(2)]
        for number in range(300):
            await opened(stores[number % 2], a_grant(time_limit_secs=0))

        async def sweep(store: RedisStore) -> int:
            removed, more = 0, True
            while more:
                swept = await store.cleanup_expired(7)
                removed, more = removed + swept.expired, swept.more
            return removed

        removed = await asyncio.gather(*map(sweep, stores))
        for store in stores:
            await store.aclose()

        assert sum(removed) == 300
        assert server.client.keys("*session:*") == []
