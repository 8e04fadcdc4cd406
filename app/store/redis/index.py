"""The steps of a store in Redis or Valkey that take place in the slots of agents, and in the
one of the index of all. An entry of that index is a session id with the agent's id behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from app.domain.session import MICROSECONDS, Grant, Session, SessionStatus
from app.store.codec import to_text
from app.store.contract import CREATION_REPLAY_SECS, IdempotencyKey, SessionFilter, StoreLimits
from app.store.cursor import Cursor
from app.store.redis import scripts
from app.store.redis.client import ScriptClient, Step
from app.store.redis.replies import (
    ALL,
    CLOSED,
    CLOSINGS,
    CREATIONS,
    DOUBTFUL,
    ID_CHARS,
    SWEEPER,
    agent_keys,
    creation_key,
    key_digest,
)

LEASE_SECS = 10
"""How long an announced session counts. Writing it takes half of that at most."""

SWEEP_TURN_SECS = 10
"""How long the replica that sweeps is alone with it after each slice."""

_LEASE = LEASE_SECS * MICROSECONDS
_REPLAY = CREATION_REPLAY_SECS * MICROSECONDS
_MARGIN_SECS = 60
"""Indexes outlive what they lead to."""


class Announcement(NamedTuple):
    """A session that is about to be created."""

    session_id: str
    grant: Grant
    idempotency: IdempotencyKey | None

    @property
    def entry(self) -> str:
        """The session in the index of all."""
        return self.session_id + self.grant.agent_id

    @property
    def keys(self) -> tuple[str, ...]:
        """What the scripts about announcements work on."""
        return ALL, DOUBTFUL, CREATIONS, creation_key(key_digest(self.idempotency))

    @property
    def time_limit(self) -> int:
        """In microseconds."""
        return self.grant.time_limit_secs * MICROSECONDS


class Due(NamedTuple):
    """An entry that somebody has to look at."""

    session_id: str
    agent_id: str
    kind: str
    """`expired` or `closed`, as far as the index knows, or `doubtful`."""


class Index:
    """Which sessions there are."""

    def __init__(
        self, engine: ScriptClient, limits: StoreLimits, now: Callable[[], int | str]
    ) -> None:
        self._engine = engine
        self._limits = limits
        self._now = now

    async def claim(self, announced: Announcement) -> list[Any]:
        """Announce a session to the index of all: what `index_claim.lua` says."""
        found: list[Any] = await self._engine.run(
            scripts.INDEX_CLAIM,
            announced.keys,
            self._now(),
            announced.entry,
            announced.time_limit,
            _LEASE,
            self._limits.max_sessions,
            key_digest(announced.idempotency),
            to_text(announced.grant),
            _REPLAY,
            self._life(announced.grant),
        )
        return found

    def _life(self, grant: Grant) -> int:
        """Milliseconds after which no index needs to know of a session that begins now."""
        secs = grant.time_limit_secs + self._limits.retention_secs + _MARGIN_SECS
        return secs * 1000

    async def claim_for_agent(self, announced: Announcement) -> int | None:
        """Announce a session to its agent. How many are active if that is too many."""
        cap = self._limits.max_active_sessions_per_agent
        outcome, *told = await self._engine.run(
            scripts.AGENT_CLAIM,
            agent_keys(announced.grant.agent_id)[:2],
            self._now(),
            announced.session_id,
            announced.time_limit,
            _LEASE,
            "" if cap is None else cap,
            self._life(announced.grant),
        )
        return None if outcome == b"ok" else int(told[0])

    def begin_by(self, claimed_at: int) -> int:
        """The last instant at which an announced session may be written."""
        return claimed_at + _LEASE // 2

    async def withdraw(self, announced: Announcement) -> None:
        """The announced session was refused."""
        digest = key_digest(announced.idempotency)
        await self._engine.run(
            scripts.INDEX_WITHDRAW, announced.keys, self._now(), announced.entry, digest
        )

    async def confirm(self, announced: Announcement, session: Session) -> None:
        """The announced session was written."""
        grant, digest = announced.grant, key_digest(announced.idempotency)
        now, deadline = self._now(), session.expires_at
        text = to_text(session) if digest else ""
        terms = to_text(grant)
        await self._engine.run_all(
            [
                Step(
                    scripts.AGENT_CONFIRM,
                    agent_keys(grant.agent_id)[:2],
                    (now, session.session_id, deadline),
                ),
                Step(
                    scripts.INDEX_CONFIRM,
                    announced.keys,
                    (now, announced.entry, deadline, digest, terms, text, _REPLAY),
                ),
            ]
        )

    async def begin_close(self, agent_id: str, session_ids: list[str]) -> None:
        """Sessions of the agent are about to be closed."""
        now, entries = self._now(), [each + agent_id for each in session_ids]
        # First of all somebody has to know where to look.
        await self._engine.run(scripts.INDEX_DOUBT, (ALL, DOUBTFUL), now, _LEASE, *entries)
        await self._engine.run(
            scripts.AGENT_DOUBT, agent_keys(agent_id)[:2], now, _LEASE, *session_ids
        )

    async def end_close(
        self, agent_id: str, session_ids: list[str], found: list[list[Any]]
    ) -> None:
        """The sessions are closed, or are not: `found` is what was said of each."""
        closed: list[Any] = [self._now(), (self._limits.retention_secs + _MARGIN_SECS) * 1000]
        still_open: list[Any] = [self._now()]
        by_deadline: list[Any] = [self._now()]
        for session_id, (_, *told) in zip(session_ids, found, strict=True):
            if not told:
                # It is not there; a sweep finds out why.
                continue
            expires_at, closed_at = told[2], told[6]
            (still_open if closed_at == b"" else closed).extend((session_id, expires_at))
            by_deadline += [session_id + agent_id, expires_at, closed_at]
        # Agents first: while an entry is in doubt, somebody comes to look again.
        keys = agent_keys(agent_id)
        await self._engine.run_all(
            [
                Step(scripts.AGENT_CLOSE, keys, closed),
                Step(scripts.AGENT_CONFIRM, keys[:2], still_open),
            ]
        )
        await self._engine.run(
            scripts.INDEX_CLOSE, (ALL, DOUBTFUL, CLOSED, CLOSINGS), *by_deadline
        )

    async def count_active_of(self, agent_id: str) -> int:
        """How many sessions of the agent are active."""
        return int(
            await self._engine.run(scripts.AGENT_COUNT, agent_keys(agent_id)[:2], self._now())
        )

    async def count_active(self) -> int:
        """How many sessions are active."""
        keys = (ALL, DOUBTFUL, CLOSED)
        return int(await self._engine.run(scripts.INDEX_COUNT, keys, self._now()))

    async def positions(self, which: SessionFilter, after: Cursor, limit: int) -> list[Cursor]:
        """At most `limit` places after one, of sessions that may be of the wanted status."""
        agent_id, status = which
        opened, _, closed = (ALL, "", CLOSED) if agent_id is None else agent_keys(agent_id)
        keys: tuple[str, ...] = (closed,) if status is SessionStatus.CLOSED else (opened,)
        if status is None and agent_id is not None:
            keys = opened, closed
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
            Cursor(int(deadline), entry.decode()[:ID_CHARS])
            for index in found
            for entry, deadline in zip(index[::2], index[1::2], strict=True)
        ]
        return sorted(positions)[:limit]

    async def due(self, replica: str, limit: int) -> list[Due]:
        """Entries to look at: in doubt, or of sessions that should have ended long enough
        ago. None while it is another replica's turn."""
        found = await self._engine.run(
            scripts.INDEX_DUE,
            (ALL, DOUBTFUL, CLOSED, CLOSINGS, CREATIONS, SWEEPER),
            self._now(),
            self._limits.retention_secs * MICROSECONDS,
            limit,
            replica,
            SWEEP_TURN_SECS * 1000,
        )
        texts = [each.decode() for each in found]
        return [
            Due(entry[:ID_CHARS], entry[ID_CHARS:], kind)
            for entry, kind in zip(texts[::2], texts[1::2], strict=True)
        ]

    async def leave(self, replica: str) -> None:
        """The replica's turn to sweep is over."""
        await self._engine.run(scripts.INDEX_LEAVE, (SWEEPER,), "", replica)

    async def forget(self, gone: list[Due]) -> None:
        """The sessions are not there any more."""
        now = self._now()
        # Agents first: while an entry is in the index of all, somebody comes to look again.
        await self._engine.run_all(
            [
                Step(scripts.AGENT_FORGET, agent_keys(each.agent_id), (now, each.session_id))
                for each in gone
            ]
        )
        entries = [each.session_id + each.agent_id for each in gone]
        keys = (ALL, DOUBTFUL, CLOSED, CLOSINGS)
        await self._engine.run(scripts.INDEX_SWEEP, keys, now, *entries)
