"""The verbs of the contract as a SQLite store runs them: inside a transaction, one at a time,
on the thread that owns the connection."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

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
from app.domain.capacity import TOO_MANY_CREATIONS, StoreLimits
from app.domain.errors import SessionLimitReached
from app.domain.idempotency import (
    CREATION_REPLAY_SECS,
    ChangeKey,
    CreationKey,
    IdempotencyKey,
)
from app.domain.lifecycle import Changed, Transition, check_running
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
from app.store.clock import Clock
from app.store.codec import to_text
from app.store.contract import (
    FrozenAgents,
    Page,
    SessionFilter,
    Totals,
)
from app.store.cursor import FIRST, Cursor, decode_agent, frozen_page
from app.store.fair_share import FairShare
from app.store.listing import Listing
from app.store.sqlite.queries import Creation, Found, Kind, Queries

RESERVED_SECS = 1
"""How far ahead of the clock to reserve time in the file, and the least time between writes."""


class _Tally(NamedTuple):
    """Counts that would otherwise need a scan."""

    sessions: int
    open: int
    creations: FairShare
    """Never changed, only replaced, so that a transaction can be rolled back."""


class Transactions:
    """The verbs of the contract, as blocking calls. Each must run inside a `transaction`, and
    raises `SessionLimitReached` and `InvalidCursor` before it writes anything.

    The wall clock may go backwards while no process runs. So the file holds an instant later
    than any that the store has returned. A new process whose clock is behind that instant
    continues from it, and expired sessions stay expired.
    """

    def __init__(self, db: sqlite3.Connection, limits: StoreLimits, clock: Clock) -> None:
        self._db = db
        self._queries = tables = Queries(db)
        self._limits = limits
        self._clock = clock
        self._reserved_until = tables.reserved_until()
        self._ahead = max(0, self._reserved_until - clock())
        self._tally = _Tally(
            tables.count_sessions(),
            tables.count_open(),
            FairShare(limits.max_remembered_creations, tables.count_creations()),
        )

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all changes made inside, durably, or roll all of them back. Raises
        `sqlite3.Error` if the commit fails."""
        before = self._tally
        try:
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # The next transaction then has to write, which shows whether the file is writable.
            self._tally, self._reserved_until = before, 0
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @property
    def ahead_secs(self) -> int:
        """How far the time of the store is ahead of its clock."""
        return self._ahead // MICROSECONDS

    def now(self) -> int:
        """The time of the store. The file holds a later instant before this one is returned."""
        now = self._clock() + self._ahead
        if now >= self._reserved_until:
            self._reserve(now + RESERVED_SECS * MICROSECONDS)
        return now

    def stop_clock(self) -> None:
        """Write the current time to the file. Called last, after the last use of `now`."""
        self._reserve(self._clock() + self._ahead)

    def _reserve(self, until: int) -> None:
        self._queries.reserve(until)
        self._reserved_until = until

    def _count(self, *, sessions: int = 0, opened: int = 0) -> None:
        tally = self._tally
        self._tally = _Tally(tally.sessions + sessions, tally.open + opened, tally.creations)

    def _count_creations(self, n: int, callers: Iterable[str]) -> None:
        """Count `n` creations more for each of `callers`, or fewer if it is negative."""
        creations = self._tally.creations.copy()
        for caller in callers:
            creations.add(caller, n)
        self._tally = self._tally._replace(creations=creations)

    def create(self, grant: Grant, idempotency: CreationKey | None) -> Admitted | Denied:
        """See `SessionStore.create`."""
        now, known = self.now(), None
        if self._queries.freeze_of(grant.agent_id) is not None:
            return agent_frozen()
        if idempotency is not None:
            known = self._queries.creation(grant.agent_id, idempotency)
            if known is not None and now < known.forget_at:
                return _replay(known, idempotency)
        if self._tally.sessions >= self._limits.max_sessions:
            raise SessionLimitReached
        if idempotency is not None and not self._tally.creations.has_room(idempotency.caller):
            raise SessionLimitReached(TOO_MANY_CREATIONS)
        cap = self._limits.max_active_sessions_per_agent
        if cap is not None:
            running = self._queries.count_running_of(grant.agent_id, now)
            if running >= cap:
                return too_many_sessions(cap, running)
        session = Session.opened(str(uuid.uuid4()), grant, now)
        self._queries.insert(session)
        self._count(sessions=1, opened=1)
        if idempotency is not None:
            forget_at = now + CREATION_REPLAY_SECS * MICROSECONDS
            self._queries.remember_creation(idempotency, session, forget_at)
            # A known creation is over 24 hours old but not yet swept, and has been replaced.
            if known is None:
                self._count_creations(1, [idempotency.caller])
        return Admitted(session)

    def find_creation(
        self, agent_id: str, idempotency: CreationKey
    ) -> Admitted | Denied | None:
        """See `SessionStore.find_creation`."""
        known = self._queries.creation(agent_id, idempotency)
        if known is None or self.now() >= known.forget_at:
            return None
        return _replay(known, idempotency)

    def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None,
        *,
        dry_run: bool,
    ) -> Admitted | Denied:
        """See `SessionStore.record`."""
        now = self.now()
        found = self._queries.find(session_id, now)
        if found is None:
            return NO_SESSION
        row_id, session, frozen = found
        known = None if idempotency is None else self._queries.replay(found, idempotency)
        if known is not None:
            first, answer = known
            unusable = check_usable(session, admission.agent_id, now, frozen=frozen)
            if unusable is not None:
                return unusable
            same = first == to_text(admission)
            return Admitted(answer, replayed=True) if same else key_conflict(answer.as_of)
        decision = decide(session, admission, now, frozen=frozen)
        if isinstance(decision, Admitted) and admission.tool_names and not dry_run:
            self._queries.count_calls(row_id, decision.session.usage)
            if idempotency is not None:
                text = to_text(admission)
                self._queries.remember(row_id, idempotency, text, decision.session)
        return decision

    def change(
        self, session_id: str, transition: Transition, idempotency: ChangeKey | None
    ) -> Changed | Denied:
        """See `SessionStore.change`."""
        now = self.now()
        found = self._queries.find(session_id, now)
        if found is None:
            return NO_SESSION
        if idempotency is None:
            return self._change(found, transition, now)
        key = IdempotencyKey(idempotency.caller, idempotency.key)
        known = self._queries.replay(found, key)
        if known is None:
            changed = self._change(found, transition, now)
            if isinstance(changed, Changed):
                self._queries.remember(found.row_id, key, idempotency.request, changed.session)
        elif (ended := check_running(found.session, now)) is not None:
            changed = ended
        elif known[0] == idempotency.request:
            changed = Changed(found.session, replayed=True)
        else:
            changed = key_conflict(known[1].as_of)
        return changed

    def _change(self, found: Found, transition: Transition, now: int) -> Changed | Denied:
        session = found.session
        terms = transition(session, now)
        if isinstance(terms, Denied):
            return terms
        if terms is not session.terms:
            self._queries.change(found.row_id, session.terms, terms)
            if terms.closed_at is not None and session.terms.closed_at is None:
                self._count(opened=-1)
        return Changed(session.with_terms(terms, now))

    def get(self, session_id: str) -> Session | None:
        """See `SessionStore.get`."""
        found = self._queries.find(session_id, self.now())
        return None if found is None else found.session

    def list_all(self, which: SessionFilter, limit: int, cursor: str | None) -> Page:
        """See `SessionStore.list_all`."""
        start = FIRST if cursor is None else Cursor.decode(cursor)
        now, listing, goes_on = self.now(), Listing(which, limit), True
        while goes_on:
            wanted = listing.wanted
            sessions = self._next_sessions(which, start, wanted, now)
            goes_on = len(sessions) == wanted
            for session in sessions:
                start = _cursor(session)
                goes_on = listing.look(start, session) and goes_on
        return listing.page()

    def _next_sessions(
        self, which: SessionFilter, start: Cursor, limit: int, now: int
    ) -> list[Session]:
        """The next sessions after `start` with the agent and, nearly, the status."""
        found: list[Session] = []
        for kind, after, until in _ranges(which.status, start, now):
            found += self._queries.page(
                which=kind,
                after=after,
                until=until,
                agent_id=which.agent_id,
                limit=limit,
                now=now,
            )
        found.sort(key=_cursor)
        return found[:limit]

    def get_agent(self, agent_id: str) -> AgentState:
        """See `SessionStore.get_agent`."""
        now = self.now()
        paused = self._queries.count_paused_of(agent_id, now)
        active = self._queries.count_running_of(agent_id, now) - paused
        return AgentState(active, paused, self._queries.freeze_of(agent_id))

    def freeze(self, agent_id: str, reason: str, actor: str) -> AgentState:
        """See `SessionStore.freeze`."""
        self._queries.freeze(agent_id, Freeze(self.now(), reason, actor))
        return self.get_agent(agent_id)

    def unfreeze(self, agent_id: str) -> AgentState:
        """See `SessionStore.unfreeze`."""
        self._queries.unfreeze(agent_id)
        return self.get_agent(agent_id)

    def list_frozen(self, limit: int, cursor: str | None) -> FrozenAgents:
        """See `SessionStore.list_frozen`."""
        return frozen_page(self._queries.frozen(decode_agent(cursor), limit + 1), limit)

    def totals(self) -> Totals:
        """See `SessionStore.totals`."""
        now = self.now()
        paused = self._queries.count_paused(now)
        active = self._tally.open - self._queries.count_expired(now) - paused
        return Totals(active, paused, self._queries.count_frozen())

    def close_sessions_for_agent(self, agent_id: str, actor: str) -> list[str]:
        """See `SessionStore.close_sessions_for_agent`."""
        by = ClosedBy(actor, kill_switch=True)
        closed = self._queries.close_running_of(agent_id, self.now(), by)
        self._count(opened=-len(closed))
        return closed

    def cleanup_expired(self, limit: int) -> Swept:
        """See `SessionStore.cleanup_expired`."""
        now, left, closed_ones, expired_ones = self.now(), limit, 0, 0
        cutoff = now - self._limits.retention_secs * MICROSECONDS
        for due in self._queries.due(cutoff, limit):
            left -= self._queries.forget(due.row_id, left)
            if left <= 0:
                break
            self._queries.delete(due.row_id, due.session_id)
            closed_ones += due.closed
            expired_ones += not due.closed
            left -= 1
            if left <= 0:
                break
        self._count(sessions=-closed_ones - expired_ones, opened=-expired_ones)
        forgotten = self._queries.forget_creations(now, left)
        if forgotten:
            self._count_creations(-1, forgotten)
        return Swept(expired_ones, closed_ones, more=left - len(forgotten) <= 0)


def _replay(known: Creation, idempotency: CreationKey) -> Admitted | Denied:
    if known.request != idempotency.request:
        return key_conflict(known.session.as_of)
    return Admitted(known.session, replayed=True)


def _ranges(
    status: SessionStatus | None, start: Cursor, now: int
) -> list[tuple[Kind, Cursor, int | None]]:
    """Where to look for sessions of a status: among which, after which position, and up to
    which deadline."""
    alive = max(start, Cursor(now + 1, ""))
    match status:
        case SessionStatus.CLOSED:
            return [("closed", start, None)]
        case SessionStatus.EXPIRED:
            return [("open", start, now)]
        case SessionStatus.ACTIVE:
            return [("active", alive, None)]
        case SessionStatus.PAUSED:
            return [("paused", alive, None)]
    return [("open", start, None), ("closed", start, None)]


def _cursor(session: Session) -> Cursor:
    return Cursor(session.terms.expires_at, session.session_id)
