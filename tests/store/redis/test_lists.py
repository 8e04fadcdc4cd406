"""Lists over all cells while sessions come and go."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from app.domain.session import Session
from app.store.contract import SessionFilter
from app.store.redis.pages import FIRST_READ
from app.store.redis.store import RedisStore
from tests.conftest import PATIENTLY
from tests.engines import Server
from tests.faults import proxied
from tests.store.redis.test_store import connected
from tests.support import a_grant, close, new_id, opened

pytestmark = pytest.mark.anyio


@pytest.fixture
async def store(server: Server) -> AsyncIterator[RedisStore]:
    made = await connected(server.url + PATIENTLY)
    yield made
    await made.aclose()


async def pages(store: RedisStore, limit: int) -> AsyncIterator[list[Session]]:
    cursor, more = None, True
    while more:
        page = await store.list_all(SessionFilter(), limit=limit, cursor=cursor)
        yield page.sessions
        cursor, more = page.next_cursor, page.next_cursor is not None


async def test_no_session_is_missed_while_others_are_created_and_closed(
    server: Server, store: RedisStore
) -> None:
    there = [
        await opened(store, a_grant(agent_id=new_id(), time_limit_secs=secs))
        for secs in range(1000, 1200)
    ]

    async def come_and_go(secs: int) -> None:
        for _ in range(100):
            grant = a_grant(agent_id=new_id(), time_limit_secs=secs)
            await close(store, (await opened(store, grant)).session_id)

    async with proxied(server.port) as proxy:
        # The reader's replies are slow, so that much happens between an index and its sessions.
        proxy.delay_secs = 0.02
        reader = await connected(f"redis://127.0.0.1:{proxy.port}{PATIENTLY}")
        busy = [asyncio.create_task(come_and_go(secs)) for secs in (900, 1050, 1100, 1300)]
        seen = [each async for some in pages(reader, limit=17) for each in some]
        await asyncio.gather(*busy)
        await reader.aclose()

    order = [(each.terms.expires_at, each.session_id) for each in seen]
    ids = [each.session_id for each in seen]
    assert order == sorted(order)
    assert len(ids) == len(set(ids))
    assert {each.session_id for each in there} <= set(ids)
    assert len(ids) > len(there)


async def test_many_sessions_in_one_cell_are_listed_in_order(store: RedisStore) -> None:
    many = [await opened(store, a_grant(time_limit_secs=900 + n)) for n in range(40)]
    few = [
        await opened(store, a_grant(agent_id=new_id(), time_limit_secs=905 + n))
        for n in range(10)
    ]
    assert len(many) > 4 * FIRST_READ

    seen = [each async for some in pages(store, limit=9) for each in some]

    expected = sorted([*many, *few], key=lambda each: (each.terms.expires_at, each.session_id))
    assert [each.session_id for each in seen] == [each.session_id for each in expected]
