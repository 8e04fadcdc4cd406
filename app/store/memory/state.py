"""The state of a store that one process holds in memory: sessions and what belongs to them.

Verbs see it (`app.domain.verbs.View`), and `put` applies their writes. Nothing else changes
it. Every value is immutable, so what `put` returns undoes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import merge
from itertools import chain, islice
from typing import Any

from sortedcontainers import SortedDict, SortedList
from typing_extensions import override

from app.domain.admission import Admission
from app.domain.capacity import StoreLimits
from app.domain.idempotency import IdempotencyKey
from app.domain.session import Freeze, Session, SessionStatus
from app.domain.verbs import (
    CallId,
    CallWrite,
    CreationId,
    CreationWrite,
    FreezeWrite,
    RememberedCall,
    RememberedCreation,
    SessionWrite,
    View,
    Write,
)
from app.store.contract import SessionFilter, Totals
from app.store.cursor import FIRST, Cursor
from app.store.fair_share import FairShare
from app.store.memory.index import SessionIndex
from app.store.memory.sharded import ShardedDict

MAX_SHARED_REQUESTS = 1024


class State(View):
    """Sessions in a dict, indexed by agent and ordered by deadline."""

    def __init__(self, limits: StoreLimits) -> None:
        self._sessions: ShardedDict[str, Session] = ShardedDict()
        self._open = SessionIndex()
        self._closed = SessionIndex()
        self._paused = SessionIndex()
        """Those of the open ones that are paused."""
        self._closings: SortedList[tuple[int, str]] = SortedList()
        """When each closed session ended: at its deadline, if it was closed after that."""
        self._frozen: SortedDict[str, Freeze] = SortedDict()
        self._calls: ShardedDict[str, dict[IdempotencyKey, RememberedCall]] = ShardedDict()
        self.room_for_calls = FairShare(2 * limits.max_remembered_calls)
        self._requests: dict[Admission, Admission] = {}
        self._creations: ShardedDict[CreationId, RememberedCreation] = ShardedDict()
        self.room_for_creations = FairShare(limits.max_remembered_creations)
        self._forgettings: SortedList[tuple[int, CreationId]] = SortedList()
        self._puts: dict[type, Callable[[Any, Any], Any]] = {
            SessionWrite: self._put_session,
            CallWrite: self._put_call,
            CreationWrite: self._put_creation,
            FreezeWrite: self._put_freeze,
        }

    # Writes

    def put(self, write: Write) -> Any:
        """Apply a write. Return the value before it: a write of that undoes this one."""
        return self._puts[write.__class__](write.key, write.value)

    def _put_session(self, session_id: str, session: Session | None) -> Session | None:
        shard = self._sessions.shard(session_id)
        before = shard.get(session_id)
        if session is not None and before is not None and before.terms is session.terms:
            shard[session_id] = session
            return before
        if before is not None:
            self._remove_from_indexes(before)
        if session is None:
            self._sessions.discard(session_id)
        else:
            self._sessions[session_id] = session
            self._add_to_indexes(session)
        return before

    def _add_to_indexes(self, session: Session) -> None:
        for index in self._indexes_of(session):
            index.add(session)
        if session.terms.closed_at is not None:
            self._closings.add(_closing(session))

    def _remove_from_indexes(self, session: Session) -> None:
        for index in self._indexes_of(session):
            index.remove(session)
        if session.terms.closed_at is not None:
            self._closings.remove(_closing(session))

    def _indexes_of(self, session: Session) -> list[SessionIndex]:
        if session.terms.closed_at is not None:
            return [self._closed]
        if session.terms.paused_at is not None:
            return [self._open, self._paused]
        return [self._open]

    def _put_call(self, call_id: CallId, call: RememberedCall | None) -> RememberedCall | None:
        session_id, key = call_id
        calls = self._calls.get(session_id)
        if calls is None:
            calls = self._calls[session_id] = {}
        before = calls.pop(key, None)
        if call is not None:
            calls[key] = call
        if not calls:
            self._calls.discard(session_id)
        self.room_for_calls.add(key.caller, (call is not None) - (before is not None))
        return before

    def _put_creation(
        self, creation_id: CreationId, creation: RememberedCreation | None
    ) -> RememberedCreation | None:
        before = self._creations.get(creation_id)
        if before is not None:
            self._forgettings.remove((before.forget_at, creation_id))
        if creation is None:
            self._creations.discard(creation_id)
        else:
            self._creations[creation_id] = creation
            self._forgettings.add((creation.forget_at, creation_id))
        more = (creation is not None) - (before is not None)
        self.room_for_creations.add(creation_id[0], more)
        return before

    def _put_freeze(self, agent_id: str, freeze: Freeze | None) -> Freeze | None:
        before: Freeze | None = self._frozen.pop(agent_id, None)
        if freeze is not None:
            self._frozen[agent_id] = freeze
        return before

    # What verbs see

    @override
    def session(self, session_id: str) -> Session | None:
        return self._sessions.get(session_id)

    @override
    def freeze_of(self, agent_id: str) -> Freeze | None:
        freeze: Freeze | None = self._frozen.get(agent_id)
        return freeze

    @override
    def call(self, session_id: str, key: IdempotencyKey) -> RememberedCall | None:
        calls = self._calls.get(session_id)
        return None if calls is None else calls.get(key)

    @override
    def creation(self, creation_id: CreationId) -> RememberedCreation | None:
        return self._creations.get(creation_id)

    @override
    def count_sessions(self) -> int:
        return len(self._sessions)

    @override
    def count_running(self, agent_id: str, now: int) -> int:
        return self._open.count_alive_of(agent_id, now)

    @override
    def count_paused(self, agent_id: str, now: int) -> int:
        return self._paused.count_alive_of(agent_id, now)

    @override
    def running(self, agent_id: str, now: int) -> Iterator[str]:
        alive = self._open.after(Cursor(now + 1, ""), agent_id, None)
        return (position.session_id for position in alive)

    @override
    def ended(self, cutoff: int) -> Iterator[tuple[str, bool]]:
        expired = self._open.after(FIRST, None, cutoff)
        closed = self._closings.irange(None, (cutoff + 1, ""), (True, False))
        return chain(
            ((session_id, False) for _, session_id in expired),
            ((session_id, True) for _, session_id in closed),
        )

    @override
    def keys_of(self, session_id: str) -> Iterable[IdempotencyKey]:
        return self._calls.get(session_id) or ()

    @override
    def forgettable(self, now: int) -> Iterator[CreationId]:
        due = self._forgettings.irange(None, (now + 1, ("", "", "")), (True, False))
        return (creation_id for _, creation_id in due)

    @override
    def has_room_for_call(self, caller: str) -> bool:
        return self.room_for_calls.has_room(caller)

    @override
    def has_room_for_creation(self, caller: str) -> bool:
        return self.room_for_creations.has_room(caller)

    # What else a store reads

    def totals(self, now: int) -> Totals:
        """How many sessions are active and paused, and how many agents are frozen."""
        paused = self._paused.count_alive(now)
        return Totals(self._open.count_alive(now) - paused, paused, len(self._frozen))

    def positions(self, which: SessionFilter, start: Cursor, now: int) -> Iterator[Cursor]:
        """The positions after `start` of the sessions with the agent and the status. The state
        must not change meanwhile."""
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

    def frozen(self, after: str, limit: int) -> list[tuple[str, Freeze]]:
        """At most `limit` frozen agents whose ids come after `after`, in order."""
        some = islice(self._frozen.irange(after, None, (False, True)), limit)
        return [(agent_id, self._frozen[agent_id]) for agent_id in some]

    def shared(self, request: Admission) -> Admission:
        """An equal request. Many that are remembered are equal, and one object for all of them
        saves a third of the memory."""
        if len(self._requests) >= MAX_SHARED_REQUESTS:
            self._requests.clear()
        return self._requests.setdefault(request, request)


def _closing(session: Session) -> tuple[int, str]:
    terms = session.terms
    ended = (
        terms.expires_at if terms.closed_at is None else min(terms.closed_at, terms.expires_at)
    )
    return ended, session.session_id
