"""A store shared by many replicas: Redis, Valkey, or a cluster of them.

What changes a session is one script in the session's slot (`lua/`), so that no replica can
see or leave half of it. The indexes by agent and by deadline are in other slots, and a replica
can die between two of them. Therefore:

- Indexes are told first that a session is in doubt, with a lease; then it is written or closed;
  then the indexes are told how that ended. If nobody tells them, the entry counts no more when
  the lease ends, and a sweep looks at the session and sets the indexes right.
- In doubt or not, a session stays in its agent's index, which the kill switch goes through.
- A creation that took too long is given up before the session is written.

The time is the engine's.
"""

from __future__ import annotations

import uuid
from contextlib import suppress
from typing import Any

from typing_extensions import override

from app.domain.admission import (
    KEY_CONFLICT,
    NO_SESSION,
    Admission,
    Admitted,
    Denied,
    too_many_sessions,
)
from app.domain.errors import SessionLimitReached, StoreUnavailable
from app.domain.session import Grant, Session, SessionStatus
from app.store.clock import Clock
from app.store.codec import to_session
from app.store.contract import (
    TOO_MANY_CREATIONS,
    IdempotencyKey,
    Page,
    SessionFilter,
    SessionStore,
    StoreLimits,
    Swept,
)
from app.store.cursor import FIRST, Cursor
from app.store.redis import scripts
from app.store.redis.client import ScriptClient
from app.store.redis.index import Announcement, Due, Index
from app.store.redis.replies import ID_CHARS, READY
from app.store.redis.sessions import Sessions
from app.store.redis.url import RedisUrl

CLOSED_AT_ONCE = 200
"""Sessions that the kill switch closes before it tells the indexes."""

LOOK_AHEAD = 200
"""Entries that are read at once at least, in search of sessions of a status."""


class RedisStore(SessionStore):
    """Sessions in a Redis or Valkey."""

    def __init__(self, url: RedisUrl, limits: StoreLimits, clock: Clock | None = None) -> None:
        self._cap = limits.max_active_sessions_per_agent
        self._engine = ScriptClient(url)
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
            raise SessionLimitReached
        if outcome == b"creations_full":
            raise SessionLimitReached(TOO_MANY_CREATIONS)
        claimed_at, entry = told
        announced = announced._replace(session_id=entry.decode()[:ID_CHARS])
        active = await self._index.claim_for_agent(announced)
        if active is not None:
            if outcome == b"new":
                await self._index.withdraw(announced)
            return too_many_sessions(self._cap or 0, active)
        written = await self._sessions.write(
            announced.session_id, grant, self._index.begin_by(claimed_at)
        )
        # As it was when it was created, by whomever.
        session = Session.opened(written.session_id, grant, written.created_at)
        await self._index.confirm(announced, session)
        if written.closed_at is not None:
            # Meanwhile, so that it is not to be announced as open.
            await self._close([session.session_id], grant.agent_id, only_active=False)
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
        (reply,) = await self._close([session_id], agent_id, only_active=False)
        return self._sessions.closing(session, reply)

    async def _close(
        self, session_ids: list[str], agent_id: str, *, only_active: bool
    ) -> list[list[Any]]:
        await self._index.begin_close(agent_id, session_ids)
        found = await self._sessions.close(session_ids, only_active=only_active)
        await self._index.end_close(agent_id, session_ids, found)
        return found

    @override
    async def close_sessions_for_agent(self, agent_id: str) -> int:
        closed, after, more = 0, FIRST, True
        active = SessionFilter(agent_id, SessionStatus.ACTIVE)
        while more:
            some = await self._index.positions(active, after, CLOSED_AT_ONCE)
            more = len(some) == CLOSED_AT_ONCE
            if some:
                after = some[-1]
                ids = [each.session_id for each in some]
                found = await self._close(ids, agent_id, only_active=True)
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
        after = FIRST if cursor is None else Cursor.decode(cursor)
        sessions: list[Session] = []
        more = True
        while more and len(sessions) <= limit:
            most = max(limit + 1, LOOK_AHEAD)
            positions = await self._index.positions(which, after, most)
            more = len(positions) == most
            if positions:
                after = positions[-1]
            found = await self._sessions.read([each.session_id for each in positions])
            # An entry can be older than its session, and a session than its entry.
            sessions += [each for each in found if each and _is(each, which.status)]
        page = sessions[:limit]
        last = Cursor(page[-1].expires_at, page[-1].session_id) if page else FIRST
        return Page(page, last.encode() if len(sessions) > limit else None)

    @override
    async def cleanup_expired(self, limit: int) -> Swept:
        due = await self._index.due(self._replica, limit)
        found = await self._sessions.sweep([each.session_id for each in due])
        gone: list[Due] = []
        for each, reply in zip(due, found, strict=True):
            if reply[0] == b"alive":
                await self._index.end_close(each.agent_id, [each.session_id], [reply])
            else:
                gone.append(each)
        if gone:
            await self._index.forget(gone)
        kinds = [each.kind for each in gone]
        return Swept(kinds.count("expired"), kinds.count("closed"), more=len(due) >= limit)


def _is(session: Session, status: SessionStatus | None) -> bool:
    return status is None or session.status is status
