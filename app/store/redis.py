"""A store shared by many replicas: Redis, Valkey, or a cluster of them.

What changes a session is one script in the session's slot (`lua/`), so that no replica can
see or leave half of it. The indexes by agent and by deadline are in other slots, and a replica
can die between two of them. Therefore:

- The indexes are told first, for a lease of `LEASE_SECS`; then the session is written; then
  the indexes are told its deadline. If nobody goes on, the entry stops counting after the
  lease, and a sweep removes it, or gives it the right deadline if the session is there.
- A session is closed in the same way. Whatever happens it stays in the agent's index, which the
  kill switch goes through from end to end.
- A creation that took longer than the lease allows is given up before the session is written.

The time is the engine's.
"""

from __future__ import annotations

import uuid
from contextlib import suppress

from typing_extensions import override

from app.domain.admission import (
    KEY_CONFLICT,
    NO_SESSION,
    Admission,
    Admitted,
    Denied,
    too_many_sessions,
)
from app.domain.errors import Overloaded, StoreUnavailable
from app.domain.session import Grant, Session, SessionStatus
from app.store import redis_scripts as scripts
from app.store.base import (
    TOO_MANY_CREATIONS,
    IdempotencyKey,
    Page,
    SessionFilter,
    SessionStore,
    StoreLimits,
    Swept,
)
from app.store.clock import Clock
from app.store.position import FIRST, Position
from app.store.redis_engine import Engine
from app.store.redis_index import Announcement, Index
from app.store.redis_replies import ID_CHARS, READY
from app.store.redis_sessions import Sessions
from app.store.redis_url import RedisUrl
from app.store.serialisation import to_session

CLOSED_AT_ONCE = 100
"""Sessions that the kill switch closes before it tells the indexes."""


class RedisStore(SessionStore):
    """Sessions in a Redis or Valkey."""

    def __init__(self, url: RedisUrl, limits: StoreLimits, clock: Clock | None = None) -> None:
        self._cap = limits.max_active_sessions_per_agent
        self._engine = Engine(url)
        self._sessions = Sessions(self._engine, limits, clock)
        self._index = Index(self._engine, limits, self._sessions.now)
        self._replica = str(uuid.uuid4())

    @classmethod
    def from_url(cls, url: str, limits: StoreLimits) -> RedisStore:
        """The store at a URL as `RedisUrl.parse` wants it. Raises `ValueError`."""
        return cls(RedisUrl.parse(url), limits)

    @override
    async def open(self) -> None:
        await self._engine.open()

    @override
    async def aclose(self) -> None:
        # If the engine does not answer, the turn ends by itself.
        with suppress(StoreUnavailable):
            await self._index.leave(self._replica)
        await self._engine.aclose()

    @override
    async def ping(self) -> None:
        # Writing is what a replica, a full engine or a broken cluster cannot.
        await self._engine.run(scripts.READY, (READY,), "")

    @override
    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None = None,
        *,
        dry_run: bool = False,
    ) -> Admitted | Denied:
        return await self._sessions.record(session_id, admission, idempotency, dry_run=dry_run)

    @override
    async def create(
        self, session_id: str, grant: Grant, idempotency: IdempotencyKey | None = None
    ) -> Admitted | Denied:
        announced = Announcement(session_id, grant, idempotency)
        outcome, *told = await self._index.claim(announced)
        if outcome == b"conflict":
            return KEY_CONFLICT
        if outcome == b"replayed":
            return Admitted(to_session(told[0]), replayed=True)
        if outcome == b"full":
            raise Overloaded
        if outcome == b"creations_full":
            raise Overloaded(TOO_MANY_CREATIONS)
        claimed_at, entry = told
        announced = announced._replace(session_id=entry.decode()[:ID_CHARS])
        active = await self._index.claim_for_agent(announced)
        if active is not None:
            if outcome == b"new":
                await self._index.withdraw(announced)
            return too_many_sessions(self._cap or 0, active)
        session = await self._sessions.write(
            announced.session_id, grant, self._index.begin_by(claimed_at)
        )
        await self._index.confirm(announced, session)
        return Admitted(session, replayed=outcome != b"new")

    @override
    async def get(self, session_id: str) -> Session | None:
        (session,) = await self._sessions.read([session_id])
        return session

    @override
    async def close(self, session_id: str) -> Session | Denied:
        session = await self.get(session_id)
        if session is None:
            return NO_SESSION
        agent_id = session.grant.agent_id
        await self._index.begin_close(agent_id, session_id)
        found = await self._sessions.close([session_id], only_active=False)
        await self._index.end_close(agent_id, [session_id], found)
        return self._sessions.closing(session, found[0])

    @override
    async def close_sessions_for_agent(self, agent_id: str) -> int:
        closed = 0
        reachable = await self._index.begin_close(agent_id)
        for first in range(0, len(reachable), CLOSED_AT_ONCE):
            some = reachable[first : first + CLOSED_AT_ONCE]
            found = await self._sessions.close(some, only_active=True)
            await self._index.end_close(agent_id, some, found)
            closed += sum(outcome == b"closed" for outcome, *_ in found)
        return closed

    @override
    async def count_active_for_agent(self, agent_id: str) -> int:
        return await self._index.count_active_of(agent_id)

    @override
    async def count_active(self) -> int:
        return await self._index.count_active()

    @override
    async def list_all(
        self, which: SessionFilter, *, limit: int, cursor: str | None = None
    ) -> Page:
        after = FIRST if cursor is None else Position.of_cursor(cursor)
        sessions: list[Session] = []
        more = True
        while more and len(sessions) <= limit:
            positions = await self._index.positions(which, after, limit + 1)
            more = len(positions) > limit
            if positions:
                after = positions[-1]
            found = await self._sessions.read([each.session_id for each in positions])
            # An entry can be older than its session, and a session than its entry.
            sessions += [each for each in found if each and _is(each, which.status)]
        page = sessions[:limit]
        last = Position(page[-1].expires_at, page[-1].session_id) if page else FIRST
        return Page(page, last.to_cursor() if len(sessions) > limit else None)

    @override
    async def cleanup_expired(self, limit: int) -> Swept:
        entries = await self._index.due(self._replica, limit)
        if not entries:
            return Swept(0, 0, more=False)
        found = await self._sessions.sweep([entry[:ID_CHARS] for entry in entries])
        outcomes = [outcome for outcome, *_ in found]
        told = list(zip(entries, found, strict=True))
        gone = [entry for entry, (outcome, *_) in told if outcome != b"alive"]
        alive = [(entry, reply[3]) for entry, reply in told if reply[0] == b"alive"]
        await self._index.settle(gone, alive)
        closed = outcomes.count(b"closed")
        return Swept(len(gone) - closed, closed, more=len(entries) >= limit)


def _is(session: Session, status: SessionStatus | None) -> bool:
    return status is None or session.status is status
