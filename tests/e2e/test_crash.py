"""The promises of a durable store, tested with a real process that is killed at any moment:

- every answered admission is counted, and no session exceeds its budget;
- an answered close stays closed, and an answered creation exists;
- an idempotent retry after the restart is still a replay.
"""

from __future__ import annotations

import asyncio
import random
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.services import Service, StartService
from tests.support import session_request

pytestmark = pytest.mark.anyio

KILLS = 20
WORKERS = 12
BUDGET = 25


SEED = random.randrange(10**9)


@dataclass
class Known:
    """A session, and the answers that its clients got."""

    session_id: str
    attempts: int = 0
    told: list[int] = field(default_factory=list)
    """`calls_made` of every answered admission."""
    refused: int = 0
    close_sent: bool = False
    closed: bool = False
    keys: dict[str, int | None] = field(default_factory=dict)
    """Idempotency key -> the answered `calls_made`, or `None` if no answer came."""


class History:
    """What clients sent and were answered, over all runs of the service."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.sessions: list[Known] = []
        self.creations: dict[str, str | None] = {}
        self.answers = 0

    async def work(self, client: httpx.AsyncClient) -> None:
        """Send random requests and record the answers until the service is killed."""
        steps = [self.create, self.close, *[self.call] * 12, *[self.call_with_key] * 4]
        while True:
            # A spent session gets a few more calls, which must be denied.
            open_ones = [s for s in self.sessions if not s.close_sent and s.refused < 3]
            step = self.random.choice(steps) if len(open_ones) >= 4 else self.create
            try:
                if step == self.create:
                    await self.create(client)
                else:
                    await step(client, self.random.choice(open_ones))
            except httpx.TransportError:
                return
            self.answers += 1

    async def create(self, client: httpx.AsyncClient) -> None:
        key = str(uuid.uuid4())
        self.creations[key] = None
        session_id = (await self.create_again(client, key)).json()["session_id"]
        self.creations[key] = session_id
        self.sessions.append(Known(session_id))

    async def create_again(self, client: httpx.AsyncClient, key: str) -> httpx.Response:
        answer = await client.post(
            "/sessions",
            json=session_request(call_budget=BUDGET),
            headers={"idempotency-key": key},
        )
        assert answer.status_code == 201, answer.text
        return answer

    async def call(self, client: httpx.AsyncClient, session: Known) -> None:
        session.attempts += 1
        await self._call(client, session, None)

    async def _call(
        self, client: httpx.AsyncClient, session: Known, key: str | None
    ) -> httpx.Response:
        answer = await client.post(
            f"/sessions/{session.session_id}/calls",
            json={"tool_name": "read_file"},
            headers={} if key is None else {"idempotency-key": key},
        )
        assert answer.status_code in {200, 409, 429}, answer.text
        if answer.status_code == 429:
            session.refused += 1
        if answer.status_code == 200 and "idempotency-replayed" not in answer.headers:
            session.told.append(answer.json()["calls_made"])
        return answer

    async def call_with_key(self, client: httpx.AsyncClient, session: Known) -> None:
        key = str(uuid.uuid4())
        session.keys[key] = None
        session.attempts += 1
        answer = await self._call(client, session, key)
        if answer.status_code == 200:
            session.keys[key] = answer.json()["calls_made"]
        else:
            del session.keys[key]

    async def close(self, client: httpx.AsyncClient, session: Known) -> None:
        session.close_sent = True
        answer = await client.delete(f"/sessions/{session.session_id}")
        assert answer.status_code == 200, answer.text
        session.closed = True

    async def check(self, client: httpx.AsyncClient) -> None:
        """Check the service against every answer."""
        for key, session_id in self.creations.items():
            answer = await self.create_again(client, key)
            if session_id is None:
                self.creations[key] = answer.json()["session_id"]
                self.sessions.append(Known(answer.json()["session_id"]))
            else:
                assert answer.json()["session_id"] == session_id
                assert answer.headers["idempotency-replayed"] == "true"
        for session in self.sessions:
            await self._check_session(client, session)

    async def _check_session(self, client: httpx.AsyncClient, session: Known) -> None:
        answer = await client.get(f"/sessions/{session.session_id}")
        assert answer.status_code == 200
        state: dict[str, Any] = answer.json()
        assert len(session.told) == len(set(session.told))
        assert max(session.told, default=0) <= state["calls_made"]
        assert len(session.told) <= state["calls_made"] <= min(BUDGET, session.attempts)
        if session.refused:
            assert state["calls_made"] == BUDGET
        if session.closed:
            assert state["status"] == "closed"
        if state["status"] == "closed":
            assert session.close_sent
            return
        # An unanswered call may have been counted or not. After this retry it counts once.
        for key, told in session.keys.items():
            again = await self._call(client, session, key)
            if told is not None:
                assert again.headers["idempotency-replayed"] == "true"
                assert again.json()["calls_made"] == told
            elif again.status_code == 200:
                session.keys[key] = again.json()["calls_made"]
        session.keys = {key: told for key, told in session.keys.items() if told is not None}


async def drive_until_killed(service: Service, history: History) -> None:
    kill_after = history.answers + history.random.randrange(20, 300)
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        workers = [asyncio.create_task(history.work(client)) for _ in range(WORKERS)]
        while history.answers < kill_after:
            await asyncio.sleep(0)
            if failed := [each for each in workers if each.done()]:
                await failed[0]
        service.process.kill()
        await asyncio.gather(*workers)
    service.process.wait(timeout=30)


@pytest.mark.parametrize("seed", [SEED], ids=["random"])
async def test_twenty_kills_lose_nothing_that_was_answered(
    start_service: StartService, tmp_path: Path, seed: int
) -> None:
    history = History(seed)
    url = f"sqlite://{tmp_path}/sessions.db"
    for _ in range(KILLS):
        service = start_service(ARBITER_STORE_URL=url)
        async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
            await history.check(client)
        await drive_until_killed(service, history)
    service = start_service(ARBITER_STORE_URL=url)
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        await history.check(client)

    assert any(session.closed for session in history.sessions)
    assert sum(session.refused > 0 for session in history.sessions) > 10
    assert sum(len(session.told) for session in history.sessions) > 500
    assert service.stop() == 0
