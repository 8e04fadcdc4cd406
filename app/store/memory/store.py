"""The default store: one process, one event loop, nothing on disk.

It is also the reference that the other backends are tested against. No method awaits
anything, so each is one atomic step of the event loop.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import merge
from itertools import islice

from sortedcontainers import SortedDict
from typing_extensions import override

from app.domain.admission import (
    NO_SESSION,
    Admission,
    Admitted,
    Denied,
    agent_frozen,
    check_usable,
    decide,
    key_conflict,
    too_many_sessions,
)
from app.domain.capacity import TOO_MANY_CALLS, TOO_MANY_CREATIONS, StoreLimits
from app.domain.errors import SessionLimitReached
from app.domain.idempotency import (
    CREATION_REPLAY_SECS,
    ChangeKey,
    CreationKey,
    IdempotencyKey,
)
from app.domain.lifecycle import Changed, Transition, check_running, close
from app.domain.session import (
    MICROSECONDS,
    AgentState,
    ClosedBy,
    Freeze,
    Grant,
    Session,
    SessionStatus,
)
from app.domain.verbs import Swept
from app.store.clock import Clock, anchored_clock
from app.store.contract import (
    LOOKED_AT_MOST,
    FrozenAgents,
    Page,
    SessionFilter,
    SessionStore,
    Totals,
)
from app.store.cursor import FIRST, Cursor, decode_agent, frozen_page
from app.store.fair_share import FairShare
from app.store.listing import Listing
from app.store.memory.index import SessionIndex
from app.store.memory.sharded import ShardedDict

MAX_SHARED_REQUESTS = 1024

LISTED_AT_ONCE = 32
"""Sessions whose tools are looked at before other tasks get a turn."""

_Replays = dict[IdempotencyKey, tuple[Admission | str, Session]]
"""What was asked for, an admission or the digest of a change, and the session after it."""


_CreationId = tuple[str, str, str]
"""Caller, agent and key."""


@dataclass(frozen=True, slots=True)
class _Creation:
    session: Session
    request: str
    forget_at: int


class MemoryStore(SessionStore):
    """Sessions in a dict, indexed by agent and ordered by deadline."""

    waits = False

    def __init__(self, limits: StoreLimits, clock: Clock | None = None) -> None:
        self._limits = limits
        self._clock = clock or anchored_clock()
        self._sessions: ShardedDict[str, Session] = ShardedDict()
        self._open = SessionIndex()
        self._closed = SessionIndex()
        self._paused = SessionIndex()
        """Those of the open ones that are paused."""
        self._frozen: SortedDict[str, Freeze] = SortedDict()
        # In order of closing. A session closed after its deadline is removed by its deadline,
        # which comes first; its entry here is then skipped.
        self._closings: deque[tuple[int, str]] = deque()
        self._replays: ShardedDict[str, _Replays] = ShardedDict()
        self._remembered_calls = FairShare(2 * limits.max_remembered_calls)
        self._requests: dict[Admission | str, Admission | str] = {}
        self._creations: ShardedDict[_CreationId, _Creation] = ShardedDict()
        self._remembered_creations = FairShare(limits.max_remembered_creations)
        self._forgettings: deque[tuple[int, _CreationId]] = deque()

    @classmethod
    def from_url(cls, url: str, limits: StoreLimits) -> MemoryStore:
        """The store for `memory://`. Raises `ValueError` for any other URL."""
        if url != "memory://":
            raise ValueError("the memory store takes no options; write memory://")
        return cls(limits)

    @override
    async def open(self) -> None:
        """Do nothing."""

    @override
    async def aclose(self) -> None:
        """Do nothing. The sessions end with the process."""

    @override
    async def ping(self) -> None:
        """Return at once. The memory store is always available."""

    @override
    async def create(
        self, grant: Grant, idempotency: CreationKey | None = None
    ) -> Admitted | Denied:
        now = self._clock()
        if grant.agent_id in self._frozen:
            return agent_frozen()
        if idempotency is not None:
            known = self._find_creation(grant.agent_id, idempotency, now)
            if known is not None:
                return known
        if len(self._sessions) >= self._limits.max_sessions:
            raise SessionLimitReached
        remembered = self._remembered_creations
        if idempotency is not None and not remembered.has_room(idempotency.caller):
            raise SessionLimitReached(TOO_MANY_CREATIONS)
        cap = self._limits.max_active_sessions_per_agent
        if cap is not None:
            active = self._open.count_alive_of(grant.agent_id, now)
            if active >= cap:
                return too_many_sessions(cap, active)
        session = Session.opened(str(uuid.uuid4()), grant, now)
        self._sessions[session.session_id] = session
        self._open.add(session)
        if idempotency is not None:
            creation_id = idempotency.caller, grant.agent_id, idempotency.key
            if self._creations.get(creation_id) is None:
                remembered.add(idempotency.caller)
            forget_at = now + CREATION_REPLAY_SECS * MICROSECONDS
            self._creations[creation_id] = _Creation(session, idempotency.request, forget_at)
            self._forgettings.append((forget_at, creation_id))
        return Admitted(session)

    @override
    async def find_creation(
        self, agent_id: str, idempotency: CreationKey
    ) -> Admitted | Denied | None:
        return self._find_creation(agent_id, idempotency, self._clock())

    def _find_creation(
        self, agent_id: str, idempotency: CreationKey, now: int
    ) -> Admitted | Denied | None:
        known = self._creations.get((idempotency.caller, agent_id, idempotency.key))
        if known is None or now >= known.forget_at:
            return None
        if known.request != idempotency.request:
            return key_conflict(known.session.as_of)
        return Admitted(known.session, replayed=True)

    @override
    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None = None,
        *,
        dry_run: bool = False,
    ) -> Admitted | Denied:
        sessions = self._sessions.shard(session_id)
        session = sessions.get(session_id)
        if session is None:
            return NO_SESSION
        now = self._clock()
        frozen = bool(self._frozen) and session.terms.grant.agent_id in self._frozen
        if idempotency is not None:
            known = (self._replays.get(session_id) or {}).get(idempotency)
            if known is not None:
                unusable = check_usable(session, admission.agent_id, now, frozen=frozen)
                if unusable is not None:
                    return unusable
                first, answer = known
                if first != admission:
                    return key_conflict(answer.as_of)
                then = Session(session_id, session.terms, answer.usage, answer.as_of)
                return Admitted(then, replayed=True)
        decision = decide(session, admission, now, frozen=frozen)
        if isinstance(decision, Admitted) and not dry_run:
            # Repeating an empty batch costs nothing, and its keys would be unbounded.
            if idempotency is not None and admission.tool_names:
                self._remember(idempotency, admission, decision.session)
            sessions[session_id] = decision.session
        return decision

    def _remember(
        self, idempotency: IdempotencyKey, request: Admission | str, answer: Session
    ) -> None:
        remembered = self._remembered_calls
        if not remembered.has_room(idempotency.caller):
            raise SessionLimitReached(TOO_MANY_CALLS)
        remembered.add(idempotency.caller)
        # Many requests are equal. One object for all of them saves a third of the memory.
        if len(self._requests) >= MAX_SHARED_REQUESTS:
            self._requests.clear()
        request = self._requests.setdefault(request, request)
        replays = self._replays.get(answer.session_id)
        if replays is None:
            replays = self._replays[answer.session_id] = {}
        replays[idempotency] = (request, answer)

    @override
    async def change(
        self, session_id: str, transition: Transition, idempotency: ChangeKey | None = None
    ) -> Changed | Denied:
        session = self._sessions.get(session_id)
        if session is None:
            return NO_SESSION
        now = self._clock()
        if idempotency is None:
            return self._change(session, transition, now)
        key = IdempotencyKey(idempotency.caller, idempotency.key)
        known = (self._replays.get(session_id) or {}).get(key)
        if known is None:
            changed = self._change(session, transition, now, (key, idempotency.request))
        elif (ended := check_running(session, now)) is not None:
            changed = ended
        elif known[0] == idempotency.request:
            changed = Changed(session.at(now), replayed=True)
        else:
            changed = key_conflict(known[1].as_of)
        return changed

    def _change(
        self,
        session: Session,
        transition: Transition,
        now: int,
        remember: tuple[IdempotencyKey, str] | None = None,
    ) -> Changed | Denied:
        terms = transition(session, now)
        if isinstance(terms, Denied):
            return terms
        changed = session.with_terms(terms, now)
        if remember is not None:
            self._remember(*remember, changed)
        if terms is not session.terms:
            self._sessions[session.session_id] = changed
            for index in self._indexes_of(session):
                index.remove(session)
            for index in self._indexes_of(changed):
                index.add(changed)
            if terms.closed_at is not None and session.terms.closed_at is None:
                self._closings.append((terms.closed_at, session.session_id))
        return Changed(changed)

    def _indexes_of(self, session: Session) -> list[SessionIndex]:
        if session.terms.closed_at is not None:
            return [self._closed]
        if session.terms.paused_at is not None:
            return [self._open, self._paused]
        return [self._open]

    @override
    async def get(self, session_id: str) -> Session | None:
        session = self._sessions.get(session_id)
        return None if session is None else session.at(self._clock())

    @override
    async def list_all(
        self, which: SessionFilter, *, limit: int, cursor: str | None = None
    ) -> Page:
        start = FIRST if cursor is None else Cursor.decode(cursor)
        listing = Listing(which, limit)
        # To match 256 patterns takes 100 µs, and other requests must not wait for a whole page.
        at_once = LISTED_AT_ONCE if which.tool is not None else LOOKED_AT_MOST
        while True:
            now, last = self._clock(), start
            for position in islice(self._listed(which, start, now), at_once):
                last = position
                if not listing.look(position, self._sessions[position.session_id].at(now)):
                    return listing.page()
            if last == start:
                return listing.page()
            # Sessions come and go meanwhile, as they do between two pages.
            start = last
            await asyncio.sleep(0)

    def _listed(self, which: SessionFilter, start: Cursor, now: int) -> Iterator[Cursor]:
        agent_id, status = which.agent_id, which.status
        if status is SessionStatus.CLOSED:
            return self._closed.after(start, agent_id, None)
        if status is SessionStatus.EXPIRED:
            return self._open.after(start, agent_id, now)
        alive = max(start, Cursor(now + 1, ""))
        if status is SessionStatus.PAUSED:
            return self._paused.after(alive, agent_id, None)
        if status is SessionStatus.ACTIVE:
            return self._open.after(alive, agent_id, None)
        return merge(
            self._open.after(start, agent_id, None), self._closed.after(start, agent_id, None)
        )

    @override
    async def get_agent(self, agent_id: str) -> AgentState:
        now = self._clock()
        paused = self._paused.count_alive_of(agent_id, now)
        active = self._open.count_alive_of(agent_id, now) - paused
        return AgentState(active, paused, self._frozen.get(agent_id))

    @override
    async def freeze(self, agent_id: str, reason: str, actor: str) -> AgentState:
        before = self._frozen.get(agent_id)
        if before is None:
            self._frozen[agent_id] = Freeze(self._clock(), reason, actor)
        else:
            self._frozen[agent_id] = Freeze(before.frozen_at, reason, before.by)
        return await self.get_agent(agent_id)

    @override
    async def unfreeze(self, agent_id: str) -> AgentState:
        self._frozen.pop(agent_id, None)
        return await self.get_agent(agent_id)

    @override
    async def list_frozen(self, *, limit: int, cursor: str | None = None) -> FrozenAgents:
        after = decode_agent(cursor)
        some = list(islice(self._frozen.irange(after, None, (False, True)), limit + 1))
        return frozen_page([(agent_id, self._frozen[agent_id]) for agent_id in some], limit)

    @override
    async def totals(self) -> Totals:
        now = self._clock()
        paused = self._paused.count_alive(now)
        return Totals(self._open.count_alive(now) - paused, paused, len(self._frozen))

    @override
    async def close_sessions_for_agent(self, agent_id: str, actor: str) -> list[str]:
        now, transition = self._clock(), close(ClosedBy(actor, kill_switch=True))
        running = list(self._open.after(Cursor(now + 1, ""), agent_id, None))
        for position in running:
            self._change(self._sessions[position.session_id], transition, now)
        return [position.session_id for position in running]

    @override
    async def cleanup_expired(self, limit: int) -> Swept:
        now = self._clock()
        cutoff = now - self._limits.retention_secs * MICROSECONDS
        removed = {self._open: 0, self._closed: 0}
        left = limit
        while left > 0 and (due := self._next_due(cutoff)) is not None:
            session_id, index = due
            left -= self._forget_replays(session_id, left)
            if left > 0:
                session = self._sessions.pop(session_id)
                for each in self._indexes_of(session):
                    each.remove(session)
                removed[index] += 1
                left -= 1
        while left > 0 and self._forgettings and self._forgettings[0][0] <= now:
            forget_at, key = self._forgettings.popleft()
            left -= 1
            # A key that was reused after 24 hours has a later entry in the queue.
            creation = self._creations.get(key)
            if creation is not None and creation.forget_at == forget_at:
                self._creations.discard(key)
                self._remembered_creations.add(key[0], -1)
        return Swept(removed[self._open], removed[self._closed], more=left <= 0)

    def _next_due(self, cutoff: int) -> tuple[str, SessionIndex] | None:
        """A session that ended at or before `cutoff`, and the index that holds it."""
        for index in (self._open, self._closed):
            earliest = index.earliest()
            if earliest is not None and earliest.expires_at <= cutoff:
                return earliest.session_id, index
        while self._closings and self._closings[0][0] <= cutoff:
            _, session_id = self._closings[0]
            if self._sessions.get(session_id) is not None:
                return session_id, self._closed
            self._closings.popleft()
        return None

    def _forget_replays(self, session_id: str, limit: int) -> int:
        """Drop up to `limit` remembered answers of a session. Return how many were dropped.

        A busy session can have as many as its budget, too many for one slice of a sweep.
        """
        replays = self._replays.get(session_id)
        if replays is None:
            return 0
        dropped = min(limit, len(replays))
        for _ in range(dropped):
            (caller, _), _ = replays.popitem()
            self._remembered_calls.add(caller, -1)
        if not replays:
            self._replays.discard(session_id)
        return dropped
