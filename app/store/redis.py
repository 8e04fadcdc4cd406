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
from app.domain.errors import Overloaded, StoreUnavailable
from app.domain.session import MICROSECONDS, Grant, Session, SessionStatus
from app.store import redis_replies as replies
from app.store import redis_scripts as scripts
from app.store.base import (
    CREATION_REPLAY_SECS,
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
from app.store.redis_engine import Engine, Step
from app.store.redis_replies import ALL, CLOSED, CLOSINGS, CREATIONS, ID_CHARS, SWEEPER
from app.store.redis_url import RedisUrl
from app.store.serialisation import to_session, to_text

LEASE_SECS = 10
"""How long an announced session counts. Writing it takes half of that at most."""

SWEEP_TURN_SECS = 10
"""How long the replica that sweeps is alone with it after each slice."""

_LEASE = LEASE_SECS * MICROSECONDS
_REPLAY = CREATION_REPLAY_SECS * MICROSECONDS
_DUE_AT_ONCE = 100


class RedisStore(SessionStore):
    """Sessions in a Redis or Valkey."""

    def __init__(self, url: RedisUrl, limits: StoreLimits, clock: Clock | None = None) -> None:
        self._limits = limits
        self._clock = clock
        self._engine = Engine(url)
        self._grants = replies.Grants()
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
            await self._engine.run(scripts.INDEX_LEAVE, (SWEEPER,), "", self._replica)
        await self._engine.aclose()

    @override
    async def ping(self) -> None:
        # Writing is what a replica, a full engine or a broken cluster cannot.
        await self._engine.run(scripts.READY, (replies.READY,), self._now())

    def _now(self) -> int | str:
        """What scripts take for the time: their own, unless a test has a clock."""
        return "" if self._clock is None else self._clock()

    @override
    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None = None,
        *,
        dry_run: bool = False,
    ) -> Admitted | Denied:
        grant = self._grants.get(session_id)
        tier = admission.data_sensitivity
        reply = await self._engine.run(
            scripts.ADMIT,
            replies.session_keys(session_id),
            self._now(),
            admission.agent_id or "",
            "" if tier is None else tier.rank,
            int(dry_run),
            int(grant is None),
            "" if idempotency is None else replies.key_field(idempotency),
            "" if idempotency is None else to_text(admission),
            *admission.tool_names,
        )
        session = self._session(session_id, reply, grant)
        decision: Admitted | Denied = replies.decision(reply, session, admission)
        return decision

    def _session(
        self, session_id: str, reply: list[Any], grant: Grant | None
    ) -> Session | None:
        return self._grants.session(session_id, reply, grant) if len(reply) > 1 else None

    @override
    async def create(
        self, session_id: str, grant: Grant, idempotency: IdempotencyKey | None = None
    ) -> Admitted | Denied:
        digest, terms = replies.key_digest(idempotency), to_text(grant)
        index = (ALL, CREATIONS, replies.creation_key(digest))
        outcome, *told = await self._engine.run(
            scripts.INDEX_CLAIM,
            index,
            self._now(),
            session_id + grant.agent_id,
            _LEASE,
            self._limits.max_sessions,
            digest,
            terms,
            _REPLAY,
        )
        if outcome == b"conflict":
            return KEY_CONFLICT
        if outcome == b"replayed":
            return Admitted(to_session(told[0]), replayed=True)
        if outcome == b"full":
            raise Overloaded
        if outcome == b"creations_full":
            raise Overloaded(TOO_MANY_CREATIONS)
        claimed_at, entry = told[0], told[1].decode()
        session_id = entry[:ID_CHARS]
        denied = await self._claim_for_agent(session_id, grant)
        if denied is not None:
            if outcome == b"new":
                await self._engine.run(
                    scripts.INDEX_WITHDRAW, index, self._now(), entry, digest
                )
            return denied
        session = await self._write(session_id, grant, terms, claimed_at)
        await self._confirm(session, index, entry, digest, terms)
        return Admitted(session, replayed=outcome != b"new")

    async def _claim_for_agent(self, session_id: str, grant: Grant) -> Denied | None:
        cap = self._limits.max_active_sessions_per_agent
        outcome, *told = await self._engine.run(
            scripts.AGENT_CLAIM,
            replies.agent_keys(grant.agent_id)[:1],
            self._now(),
            session_id,
            _LEASE,
            "" if cap is None else cap,
        )
        if cap is None or outcome == b"ok":
            return None
        return too_many_sessions(cap, told[0])

    async def _write(
        self, session_id: str, grant: Grant, terms: str, claimed_at: int
    ) -> Session:
        rate, tools = grant.rate_limit_per_minute, grant.authorized_tools.entries
        reply = await self._engine.run(
            scripts.SESSION_CREATE,
            replies.session_keys(session_id)[:2],
            self._now(),
            claimed_at + _LEASE // 2,
            grant.agent_id,
            terms,
            grant.time_limit_secs,
            grant.call_budget,
            "" if rate is None else rate,
            grant.rate_limit_window_secs,
            grant.data_sensitivity_ceiling.rank,
            self._limits.retention_secs * 1000,
            " ".join(tool for tool in tools if "*" in tool),
            *(tool for tool in tools if "*" not in tool),
        )
        session = self._session(session_id, reply, grant)
        if session is None:
            raise StoreUnavailable
        self._grants.keep(session_id, grant)
        return session

    async def _confirm(
        self,
        session: Session,
        index: tuple[str, str, str],
        entry: str,
        digest: str,
        terms: str,
    ) -> None:
        agent_key = replies.agent_keys(session.grant.agent_id)[:1]
        removal = (session.grant.time_limit_secs + self._limits.retention_secs + 60) * 1000
        now, deadline = self._now(), session.expires_at
        text = to_text(session) if digest else ""
        await self._engine.run_all(
            [
                Step(
                    scripts.AGENT_CONFIRM,
                    agent_key,
                    (now, removal, session.session_id, deadline),
                ),
                Step(
                    scripts.INDEX_CONFIRM,
                    index,
                    (now, entry, deadline, removal, digest, terms, text, _REPLAY),
                ),
            ]
        )

    @override
    async def get(self, session_id: str) -> Session | None:
        (session,) = await self._read([session_id])
        return session

    async def _read(self, session_ids: list[str]) -> list[Session | None]:
        grants = [self._grants.get(session_id) for session_id in session_ids]
        found = await self._engine.run_all(
            [
                Step(
                    scripts.SESSION_READ,
                    replies.session_keys(session_id)[:2],
                    (self._now(), int(grant is None)),
                )
                for session_id, grant in zip(session_ids, grants, strict=True)
            ]
        )
        return list(map(self._session, session_ids, found, grants))

    @override
    async def close(self, session_id: str) -> Session | Denied:
        session = await self.get(session_id)
        if session is None:
            return NO_SESSION
        agent_id = session.grant.agent_id
        await self._begin_close(agent_id, session_id)
        (reply,) = await self._close([session_id], agent_id, only_active=False)
        return replies.closing(reply, self._session(session_id, reply, session.grant))

    async def _begin_close(self, agent_id: str, session_id: str) -> list[str]:
        keys = replies.agent_keys(agent_id)[:1]
        found = await self._engine.run(
            scripts.AGENT_BEGIN_CLOSE, keys, self._now(), _LEASE, session_id
        )
        return [each.decode() for each in found]

    async def _close(
        self, session_ids: list[str], agent_id: str, *, only_active: bool
    ) -> list[list[Any]]:
        """Close sessions of one agent whose entries have been shortened; the replies."""
        now, retention = self._now(), self._limits.retention_secs * 1000
        found = await self._engine.run_all(
            [
                Step(
                    scripts.SESSION_CLOSE,
                    replies.session_keys(session_id),
                    (now, int(only_active), retention),
                )
                for session_id in session_ids
            ]
        )
        by_agent: list[Any] = []
        by_deadline: list[Any] = []
        for session_id, (outcome, *told) in zip(session_ids, found, strict=True):
            if outcome in {b"closed", b"session_closed"}:
                expires_at, closed_at = told[2], told[6]
                by_agent += [session_id, expires_at]
                by_deadline += [session_id + agent_id, expires_at, closed_at]
        if by_agent:
            await self._engine.run_all(
                [
                    Step(scripts.AGENT_CLOSE, replies.agent_keys(agent_id), (now, *by_agent)),
                    Step(scripts.INDEX_CLOSE, (ALL, CLOSED, CLOSINGS), (now, *by_deadline)),
                ]
            )
        return found

    @override
    async def close_sessions_for_agent(self, agent_id: str) -> int:
        closed = 0
        reachable = await self._begin_close(agent_id, "")
        for first in range(0, len(reachable), _DUE_AT_ONCE):
            some = reachable[first : first + _DUE_AT_ONCE]
            found = await self._close(some, agent_id, only_active=True)
            closed += sum(outcome == b"closed" for outcome, *_ in found)
        return closed

    @override
    async def count_active_for_agent(self, agent_id: str) -> int:
        keys = replies.agent_keys(agent_id)[:1]
        return int(await self._engine.run(scripts.AGENT_COUNT, keys, self._now()))

    @override
    async def count_active(self) -> int:
        return int(await self._engine.run(scripts.INDEX_COUNT, (ALL, CLOSED), self._now()))

    @override
    async def list_all(
        self, which: SessionFilter, *, limit: int, cursor: str | None = None
    ) -> Page:
        after = FIRST if cursor is None else Position.of_cursor(cursor)
        sessions: list[Session] = []
        more = True
        while more and len(sessions) <= limit:
            positions = await self._positions(which, after, limit + 1)
            more = len(positions) > limit
            if positions:
                after = positions[-1]
            found = await self._read([each.session_id for each in positions])
            # An entry can be older than its session, and a session than its entry.
            sessions += [each for each in found if each and _is(each, which.status)]
        page = sessions[:limit]
        last = Position(page[-1].expires_at, page[-1].session_id) if page else FIRST
        return Page(page, last.to_cursor() if len(sessions) > limit else None)

    async def _positions(
        self, which: SessionFilter, after: Position, limit: int
    ) -> list[Position]:
        agent_id, status = which
        if agent_id is None:
            keys: tuple[str, ...] = (CLOSED,) if status is SessionStatus.CLOSED else (ALL,)
        else:
            opened, closed = replies.agent_keys(agent_id)
            keys = {None: (opened, closed), SessionStatus.CLOSED: (closed,)}.get(
                status, (opened,)
            )
        found = await self._engine.run(
            scripts.INDEX_PAGE,
            keys,
            self._now(),
            after.expires_at,
            # An entry that begins with the id is not after it.
            f"{after.session_id}~",
            int(status is SessionStatus.EXPIRED),
            int(status is SessionStatus.ACTIVE),
            limit,
        )
        positions = [
            Position(int(deadline), entry.decode()[:ID_CHARS])
            for index in found
            for entry, deadline in zip(index[::2], index[1::2], strict=True)
        ]
        return sorted(positions)[:limit]

    @override
    async def cleanup_expired(self, limit: int) -> Swept:
        now, retention = self._now(), self._limits.retention_secs * MICROSECONDS
        entries = [
            each.decode()
            for each in await self._engine.run(
                scripts.INDEX_DUE,
                (ALL, CLOSINGS, CREATIONS, SWEEPER),
                now,
                retention,
                limit,
                self._replica,
                SWEEP_TURN_SECS * 1000,
            )
        ]
        found = await self._engine.run_all(
            [
                Step(
                    scripts.SESSION_SWEEP,
                    replies.session_keys(entry[:ID_CHARS]),
                    (now, retention),
                )
                for entry in entries
            ]
        )
        gone, alive = [], []
        for entry, (outcome, *told) in zip(entries, found, strict=True):
            if outcome == b"alive":
                alive.append((entry, told[2]))
            else:
                gone.append(entry)
                self._grants.forget(entry[:ID_CHARS])
        # Agents first: while an entry is in the index of all, somebody comes to look again.
        await self._engine.run_all(
            [
                Step(
                    scripts.AGENT_FORGET,
                    replies.agent_keys(entry[ID_CHARS:]),
                    (now, entry[:ID_CHARS]),
                )
                for entry in gone
            ]
            + [
                Step(
                    scripts.AGENT_CONFIRM,
                    replies.agent_keys(entry[ID_CHARS:])[:1],
                    (now, 0, entry[:ID_CHARS], deadline),
                )
                for entry, deadline in alive
            ]
        )
        if entries:
            again = [value for pair in alive for value in pair]
            await self._engine.run(
                scripts.INDEX_SWEEP,
                (ALL, CLOSED, CLOSINGS),
                now,
                len(gone),
                *gone,
                *again,
            )
        closed = sum(outcome == b"closed" for outcome, *_ in found)
        return Swept(len(gone) - closed, closed, more=len(entries) >= limit)


def _is(session: Session, status: SessionStatus | None) -> bool:
    return status is None or session.status is status
