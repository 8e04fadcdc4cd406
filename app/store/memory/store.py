"""The default store: one process, one event loop, nothing on disk.

It is also the reference that the other backends are tested against. No method awaits
anything, so each is one atomic step of the event loop.
"""

from __future__ import annotations

import asyncio
from itertools import islice

from typing_extensions import override

from app.domain import verbs
from app.domain.admission import Admission, Admitted, Denied
from app.domain.capacity import StoreLimits
from app.domain.idempotency import ChangeKey, CreationKey, IdempotencyKey
from app.domain.lifecycle import Changed, Transition
from app.domain.session import AgentState, Grant, Session
from app.domain.verbs import Swept, Writes
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
from app.store.listing import Listing
from app.store.memory.state import State

LISTED_AT_ONCE = 32
"""Sessions whose tools are looked at before other tasks get a turn."""


class MemoryStore(SessionStore):
    """A state and a clock. The verbs decide (`app.domain.verbs`)."""

    waits_apart = False

    def __init__(self, limits: StoreLimits, clock: Clock | None = None) -> None:
        self._limits = limits
        self._clock = clock or anchored_clock()
        self._state = State(limits)

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

    def _write(self, writes: Writes) -> None:
        for write in writes:
            self._state.put(write)

    @override
    async def create(
        self, grant: Grant, idempotency: CreationKey | None = None
    ) -> Admitted | Denied:
        decision, writes = verbs.create(
            self._state, self._clock(), self._limits, grant, idempotency
        )
        self._write(writes)
        return decision

    @override
    async def find_creation(
        self, agent_id: str, idempotency: CreationKey
    ) -> Admitted | Denied | None:
        return verbs.find_creation(self._state, self._clock(), agent_id, idempotency)

    @override
    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None = None,
        *,
        dry_run: bool = False,
    ) -> Admitted | Denied:
        if idempotency is not None:
            admission = self._state.shared(admission)
        decision, writes = verbs.record(
            self._state, self._clock(), session_id, admission, idempotency, dry_run=dry_run
        )
        self._write(writes)
        return decision

    @override
    async def change(
        self, session_id: str, transition: Transition, idempotency: ChangeKey | None = None
    ) -> Changed | Denied:
        outcome, writes = verbs.change(
            self._state, self._clock(), session_id, transition, idempotency
        )
        self._write(writes)
        return outcome

    @override
    async def get(self, session_id: str) -> Session | None:
        session = self._state.session(session_id)
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
            for position in islice(self._state.positions(which, start, now), at_once):
                session = self._state.session(position.session_id)
                last = position
                if not listing.look(position, session and session.at(now)):
                    return listing.page()
            if last == start:
                return listing.page()
            # Sessions come and go meanwhile, as they do between two pages.
            start = last
            await asyncio.sleep(0)

    @override
    async def get_agent(self, agent_id: str) -> AgentState:
        return verbs.agent_state(self._state, self._clock(), agent_id)

    @override
    async def freeze(self, agent_id: str, reason: str, actor: str) -> AgentState:
        agent, writes = verbs.freeze(self._state, self._clock(), agent_id, reason, actor)
        self._write(writes)
        return agent

    @override
    async def unfreeze(self, agent_id: str) -> AgentState:
        agent, writes = verbs.unfreeze(self._state, self._clock(), agent_id)
        self._write(writes)
        return agent

    @override
    async def list_frozen(self, *, limit: int, cursor: str | None = None) -> FrozenAgents:
        return frozen_page(self._state.frozen(decode_agent(cursor), limit + 1), limit)

    @override
    async def totals(self) -> Totals:
        return self._state.totals(self._clock())

    @override
    async def close_sessions_for_agent(self, agent_id: str, actor: str) -> list[str]:
        closed, writes = verbs.close_agent(self._state, self._clock(), agent_id, actor)
        self._write(writes)
        return closed

    @override
    async def cleanup_expired(self, limit: int) -> Swept:
        swept, writes = verbs.sweep(self._state, self._clock(), self._limits, limit)
        self._write(writes)
        return swept
