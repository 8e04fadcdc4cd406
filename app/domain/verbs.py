"""The verbs of the service, as pure functions.

A verb takes a view of the state, the instant and the request, and returns its outcome and its
writes. It changes nothing itself: a store applies the writes, all of them or none, before the
next verb sees the state. A denial or an exception has no writes.

Instants are integer microseconds since the Unix epoch.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple, Protocol

import msgspec

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
from app.domain.errors import SessionLimitReached, StoreUnreachable
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
    Usage,
)

CallId = tuple[str, IdempotencyKey]
"""Session and key."""

CreationId = tuple[str, str, str]
"""Caller, agent and key."""


class RememberedCall(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """An admission or a change that had an idempotency key."""

    request: Admission | str
    """What was asked for: the admission, or the digest of the change."""
    usage: Usage
    """Of the session, after it."""
    as_of: int


class RememberedCreation(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """A creation that had an idempotency key."""

    request: str
    """A digest of it."""
    session_id: str
    grant: Grant
    created_at: int

    @property
    def session(self) -> Session:
        """The session as it was created."""
        return Session.opened(self.session_id, self.grant, self.created_at)

    @property
    def forget_at(self) -> int:
        """When the key may be used again."""
        return self.created_at + CREATION_REPLAY_SECS * MICROSECONDS


class SessionWrite(msgspec.Struct, frozen=True, gc=False):
    """Put or, with `None`, remove a session."""

    key: str
    value: Session | None


class CallWrite(msgspec.Struct, frozen=True, gc=False):
    """Remember or, with `None`, forget a call."""

    key: CallId
    value: RememberedCall | None


class CreationWrite(msgspec.Struct, frozen=True, gc=False):
    """Remember or, with `None`, forget a creation."""

    key: CreationId
    value: RememberedCreation | None


class FreezeWrite(msgspec.Struct, frozen=True, gc=False):
    """Freeze or, with `None`, unfreeze an agent."""

    key: str
    value: Freeze | None


Write = SessionWrite | CallWrite | CreationWrite | FreezeWrite
Writes = tuple[Write, ...]

NONE: Writes = ()
"""No writes."""


class Swept(NamedTuple):
    """What one slice of a sweep removed."""

    expired: int
    """Removed sessions that expired without being closed."""
    closed: int
    """Removed sessions that had been closed."""
    more: bool
    """Whether to sweep another slice at once."""


class View(Protocol):
    """What a verb sees of the state."""

    def session(self, session_id: str) -> Session | None:
        """The session, or `None`. Raises `StoreUnreachable` if it cannot be read."""

    def freeze_of(self, agent_id: str) -> Freeze | None:
        """The freeze of an agent, or `None`."""

    def call(self, session_id: str, key: IdempotencyKey) -> RememberedCall | None:
        """The call remembered with this key, or `None`."""

    def creation(self, creation_id: CreationId) -> RememberedCreation | None:
        """The creation remembered with this key, or `None`."""

    def count_sessions(self) -> int:
        """The number of sessions, ended ones too."""

    def count_running(self, agent_id: str, now: int) -> int:
        """The number of active and paused sessions of an agent."""

    def count_paused(self, agent_id: str, now: int) -> int:
        """The number of paused sessions of an agent."""

    def running(self, agent_id: str, now: int) -> Iterable[str]:
        """The ids of the active and paused sessions of an agent."""

    def ended(self, cutoff: int) -> Iterable[tuple[str, bool]]:
        """The ids of the sessions that ended at or before `cutoff`, and whether each was
        closed."""

    def keys_of(self, session_id: str) -> Iterable[IdempotencyKey]:
        """The keys of the calls remembered with a session."""

    def forgettable(self, now: int) -> Iterable[CreationId]:
        """The creations that may be forgotten."""

    def has_room_for_call(self, caller: str) -> bool:
        """Whether one more call of the caller can be remembered."""

    def has_room_for_creation(self, caller: str) -> bool:
        """Whether one more creation of the caller can be remembered."""


def create(
    view: View, now: int, limits: StoreLimits, grant: Grant, idempotency: CreationKey | None
) -> tuple[Admitted | Denied, Writes]:
    """Create a session (`SessionStore.create`)."""
    if view.freeze_of(grant.agent_id) is not None:
        return agent_frozen(), NONE
    if idempotency is not None:
        known = find_creation(view, now, grant.agent_id, idempotency)
        if known is not None:
            return known, NONE
    if view.count_sessions() >= limits.max_sessions:
        raise SessionLimitReached
    if idempotency is not None and not view.has_room_for_creation(idempotency.caller):
        raise SessionLimitReached(TOO_MANY_CREATIONS)
    cap = limits.max_active_sessions_per_agent
    if cap is not None:
        running = view.count_running(grant.agent_id, now)
        if running >= cap:
            return too_many_sessions(cap, running), NONE
    session = Session.opened(str(uuid.uuid4()), grant, now)
    put = SessionWrite(session.session_id, session)
    if idempotency is None:
        return Admitted(session), (put,)
    creation = RememberedCreation(idempotency.request, session.session_id, grant, now)
    creation_id = idempotency.caller, grant.agent_id, idempotency.key
    return Admitted(session), (put, CreationWrite(creation_id, creation))


def find_creation(
    view: View, now: int, agent_id: str, idempotency: CreationKey
) -> Admitted | Denied | None:
    """What `create` answers to a key that it remembers, or `None`."""
    known = view.creation((idempotency.caller, agent_id, idempotency.key))
    if known is None or now >= known.forget_at:
        return None
    if known.request != idempotency.request:
        return key_conflict(known.created_at)
    return Admitted(known.session, replayed=True)


def record(
    view: View,
    now: int,
    session_id: str,
    admission: Admission,
    idempotency: IdempotencyKey | None,
    *,
    dry_run: bool,
) -> tuple[Admitted | Denied, Writes]:
    """Decide and count calls (`SessionStore.record`)."""
    session = view.session(session_id)
    if session is None:
        return NO_SESSION, NONE
    frozen = view.freeze_of(session.terms.grant.agent_id) is not None
    if idempotency is not None:
        known = view.call(session_id, idempotency)
        if known is not None:
            unusable = check_usable(session, admission.agent_id, now, frozen=frozen)
            return unusable or _replay(known, session, admission), NONE
    decision = decide(session, admission, now, frozen=frozen)
    # An empty batch counts nothing: repeating it is free, and its keys would be unbounded.
    if dry_run or not admission.tool_names or isinstance(decision, Denied):
        return decision, NONE
    put = SessionWrite(session_id, decision.session)
    if idempotency is None:
        return decision, (put,)
    return decision, (put, _remember(view, idempotency, admission, decision.session))


def _replay(known: RememberedCall, session: Session, admission: Admission) -> Admitted | Denied:
    if known.request != admission:
        return key_conflict(known.as_of)
    then = Session(session.session_id, session.terms, known.usage, known.as_of)
    return Admitted(then, replayed=True)


def _remember(
    view: View, key: IdempotencyKey, request: Admission | str, after: Session
) -> CallWrite:
    if not view.has_room_for_call(key.caller):
        raise SessionLimitReached(TOO_MANY_CALLS)
    call = RememberedCall(request, after.usage, after.as_of)
    return CallWrite((after.session_id, key), call)


def change(
    view: View,
    now: int,
    session_id: str,
    transition: Transition,
    idempotency: ChangeKey | None,
) -> tuple[Changed | Denied, Writes]:
    """Change the terms of a session (`SessionStore.change`)."""
    session = view.session(session_id)
    if session is None:
        return NO_SESSION, NONE
    if idempotency is None:
        return _change(session, transition, now)
    key = IdempotencyKey(idempotency.caller, idempotency.key)
    known = view.call(session_id, key)
    if known is None:
        changed, writes = _change(session, transition, now)
        if isinstance(changed, Changed):
            writes += (_remember(view, key, idempotency.request, changed.session),)
        return changed, writes
    ended = check_running(session, now)
    if ended is not None:
        return ended, NONE
    if known.request != idempotency.request:
        return key_conflict(known.as_of), NONE
    return Changed(session.at(now), replayed=True), NONE


def _change(
    session: Session, transition: Transition, now: int
) -> tuple[Changed | Denied, Writes]:
    terms = transition(session, now)
    if isinstance(terms, Denied):
        return terms, NONE
    changed = session.with_terms(terms, now)
    if terms is session.terms:
        return Changed(changed), NONE
    return Changed(changed), (SessionWrite(session.session_id, changed),)


def close_agent(view: View, now: int, agent_id: str, actor: str) -> tuple[list[str], Writes]:
    """The kill switch (`SessionStore.close_sessions_for_agent`). A session that cannot be read
    is left out: it admits nothing either, and must not protect the others."""
    transition = close(ClosedBy(actor, kill_switch=True))
    writes: list[Write] = []
    for session in _readable(view, view.running(agent_id, now)):
        _, closed = _change(session, transition, now)
        writes += closed
    return [write.key for write in writes if isinstance(write, SessionWrite)], (*writes,)


def _readable(view: View, session_ids: Iterable[str]) -> Iterator[Session]:
    for session_id in session_ids:
        try:
            session = view.session(session_id)
        except StoreUnreachable:
            continue
        if session is not None:
            yield session


def agent_state(view: View, now: int, agent_id: str) -> AgentState:
    """The agent as it is now (`SessionStore.get_agent`)."""
    paused = view.count_paused(agent_id, now)
    active = view.count_running(agent_id, now) - paused
    return AgentState(active, paused, view.freeze_of(agent_id))


def freeze(
    view: View, now: int, agent_id: str, reason: str, actor: str
) -> tuple[AgentState, Writes]:
    """Freeze an agent (`SessionStore.freeze`)."""
    state = agent_state(view, now, agent_id)
    if state.freeze is None:
        after = Freeze(now, reason, actor)
    else:
        after = Freeze(state.freeze.frozen_at, reason, state.freeze.by)
    frozen = AgentState(state.active_sessions, state.paused_sessions, after)
    return frozen, (FreezeWrite(agent_id, after),)


def unfreeze(view: View, now: int, agent_id: str) -> tuple[AgentState, Writes]:
    """Lift the freeze of an agent (`SessionStore.unfreeze`)."""
    state = agent_state(view, now, agent_id)
    if state.freeze is None:
        return state, NONE
    unfrozen = AgentState(state.active_sessions, state.paused_sessions)
    return unfrozen, (FreezeWrite(agent_id, None),)


def sweep(view: View, now: int, limits: StoreLimits, limit: int) -> tuple[Swept, Writes]:
    """Remove ended sessions and forget old keys, up to `limit` of both together
    (`SessionStore.cleanup_expired`)."""
    writes: list[Write] = []
    removed = {False: 0, True: 0}
    for session_id, closed in view.ended(now - limits.retention_secs * MICROSECONDS):
        # A busy session can have as many as its budget, too many for one slice.
        keys = islice(view.keys_of(session_id), limit - len(writes))
        writes += [CallWrite((session_id, key), None) for key in keys]
        if len(writes) >= limit:
            break
        writes.append(SessionWrite(session_id, None))
        removed[closed] += 1
    due = islice(view.forgettable(now), limit - len(writes))
    writes += [CreationWrite(creation_id, None) for creation_id in due]
    swept = Swept(removed[False], removed[True], more=len(writes) >= limit)
    return swept, tuple(writes)
