"""Every statement of a SQLite store that reads or writes sessions (`app.store.sqlite.schema`).

Sessions are addressed by row number. SQLite reuses the number of a removed session, so
nothing may be cached by row number alone.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

from msgspec.structs import astuple, replace

from app.domain.idempotency import CreationKey, IdempotencyKey
from app.domain.session import ClosedBy, Freeze, Grant, Marks, Session, Terms, Usage
from app.store.codec import marks_of, to_grant, to_marks, to_text
from app.store.cursor import Cursor
from app.store.sqlite.file import DAMAGED

GRANTS_KEPT = 16_384
"""How many decoded grants to cache."""

_COUNTERS = "calls_made, rate_window_start, rate_window_calls"
_SESSION = (
    f"id, session_id, created_at, expires_at, {_COUNTERS}, closed_at, revision, marks,"
    " paused_at"
)
_FREEZE = "frozen_at, reason, by"
_OPEN, _CLOSED = "closed_at IS NULL", "closed_at IS NOT NULL"
_COUNT = "SELECT count(*) FROM sessions"
_PAUSED = f"paused_at IS NOT NULL AND {_OPEN}"


Kind = Literal["open", "paused", "active", "closed"]
_KINDS: dict[Kind, str] = {
    "open": _OPEN,
    "paused": _PAUSED,
    "active": f"{_OPEN} AND paused_at IS NULL",
    "closed": _CLOSED,
}


class Found(NamedTuple):
    """A session and its row number."""

    row_id: int
    session: Session
    frozen: bool
    """Whether its agent is frozen."""


class Due(NamedTuple):
    """A session to remove."""

    row_id: int
    session_id: str
    closed: bool


class Creation(NamedTuple):
    """A creation remembered by its idempotency key."""

    session: Session
    """As it was created."""
    request: str
    forget_at: int


class Queries:
    """The sessions in an open database. Every method may raise `sqlite3.Error`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        # Keyed by session id; good for one revision of the terms.
        self._grants: OrderedDict[str, tuple[int, Grant]] = OrderedDict()

    # Sessions

    def find(self, session_id: str, now: int) -> Found | None:
        """The session as of `now`, or `None` if it does not exist."""
        row = self._db.execute(_FIND, (session_id,)).fetchone()
        if row is None:
            return None
        *fields, frozen = row
        return Found(row[0], self._session(fields, now), bool(frozen))

    def _session(self, row: Sequence[Any], now: int) -> Session:
        row_id, session_id, created_at, expires_at, made, start, calls, *terms_fields = row
        closed_at, rev, marked, paused_at = terms_fields
        grant = self._grant(session_id, row_id, rev)
        marks = to_marks(marked)
        terms = Terms(
            grant,
            created_at,
            expires_at,
            closed_at,
            rev,
            marks.closed_by,
            paused_at,
            marks.paused_by,
        )
        return Session(session_id, terms, Usage(made, start, calls), now)

    def _grant(self, session_id: str, row_id: int, rev: int) -> Grant:
        known = self._grants.get(session_id)
        if known is not None and known[0] == rev:
            return known[1]
        grant = to_grant(self._one("SELECT terms FROM grants WHERE id = ?", row_id))
        self._grants[session_id] = rev, grant
        if len(self._grants) > GRANTS_KEPT:
            self._grants.popitem(last=False)
        return grant

    def insert(self, session: Session) -> None:
        """Insert a new session."""
        row_id = self._db.execute(
            "INSERT INTO sessions VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, NULL, 1, '', NULL)",
            (
                session.session_id,
                session.grant.agent_id,
                session.terms.created_at,
                session.terms.expires_at,
                session.grant.call_budget,
                *astuple(session.usage),
            ),
        ).lastrowid
        self._db.execute("INSERT INTO grants VALUES (?, ?)", (row_id, to_text(session.grant)))

    def count_calls(self, row_id: int, usage: Usage) -> None:
        """Update the usage of a session."""
        self._db.execute(
            "UPDATE sessions SET calls_made = ?, rate_window_start = ?, rate_window_calls = ?"
            " WHERE id = ?",
            (*astuple(usage), row_id),
        )

    def change(self, row_id: int, before: Terms, after: Terms) -> None:
        """Replace the terms of a session."""
        # The table refuses calls past the budget, but a budget may be lowered below them.
        self._db.execute(
            "UPDATE sessions SET expires_at = ?, closed_at = ?, marks = ?, paused_at = ?,"
            " revision = ?, call_budget = max(?, calls_made) WHERE id = ?",
            (
                after.expires_at,
                after.closed_at,
                marks_of(after),
                after.paused_at,
                after.rev,
                after.grant.call_budget,
                row_id,
            ),
        )
        if after.grant is not before.grant:
            self._db.execute(
                "UPDATE grants SET terms = ? WHERE id = ?", (to_text(after.grant), row_id)
            )

    def close_running_of(self, agent_id: str, now: int, by: ClosedBy) -> list[str]:
        """Close the active and paused sessions of an agent. Return their ids."""
        closed = self._db.execute(
            "UPDATE sessions SET closed_at = ?, marks = ?, revision = revision + 1"
            f" WHERE {_OPEN} AND agent_id = ? AND expires_at > ? RETURNING session_id",
            (now, to_text(Marks(closed_by=by)), agent_id, now),
        )
        return [session_id for (session_id,) in closed]

    def delete(self, row_id: int, session_id: str) -> None:
        """Delete a session."""
        self._grants.pop(session_id, None)
        self._db.execute("DELETE FROM sessions WHERE id = ?", (row_id,))
        self._db.execute("DELETE FROM grants WHERE id = ?", (row_id,))

    # Counts and lists

    def count_sessions(self) -> int:
        """The number of sessions, found by a scan."""
        return self._number(_COUNT)

    def count_open(self) -> int:
        """The number of sessions that are not closed, found by a scan."""
        return self._number(f"{_COUNT} WHERE {_OPEN}")

    def count_expired(self, now: int) -> int:
        """The number of sessions that expired without being closed, counted one by one."""
        return self._number(f"{_COUNT} WHERE {_OPEN} AND expires_at <= ?", now)

    def count_running_of(self, agent_id: str, now: int) -> int:
        """The number of active and paused sessions of an agent, counted one by one."""
        return self._number(
            f"{_COUNT} WHERE {_OPEN} AND agent_id = ? AND expires_at > ?",
            agent_id,
            now,
        )

    def count_paused(self, now: int) -> int:
        """The number of paused sessions, counted one by one."""
        return self._number(f"{_COUNT} WHERE {_PAUSED} AND expires_at > ?", now)

    def count_paused_of(self, agent_id: str, now: int) -> int:
        """The number of paused sessions of an agent, counted one by one."""
        return self._number(
            f"{_COUNT} WHERE {_PAUSED} AND agent_id = ? AND expires_at > ?",
            agent_id,
            now,
        )

    def _number(self, query: str, *arguments: Any) -> int:
        return int(self._one(query, *arguments))

    def _one(self, query: str, *arguments: Any) -> Any:
        row = self._db.execute(query, arguments).fetchone()
        if row is None:
            raise sqlite3.DatabaseError(DAMAGED)
        return row[0]

    def page(
        self,
        *,
        which: Kind,
        after: Cursor,
        until: int | None,
        agent_id: str | None,
        limit: int,
        now: int,
    ) -> list[Session]:
        """At most `limit` sessions in order of deadline, after the position `after` and with
        deadlines of at most `until`."""
        where = f"{_KINDS[which]} AND (expires_at, session_id) > (?, ?)"
        arguments: list[Any] = [*after]
        if until is not None:
            where += " AND expires_at <= ?"
            arguments.append(until)
        if agent_id is not None:
            where += " AND agent_id = ?"
            arguments.append(agent_id)
        rows = self._db.execute(
            f"SELECT {_SESSION} FROM sessions WHERE {where}"
            " ORDER BY expires_at, session_id LIMIT ?",
            (*arguments, limit),
        )
        return [self._session(row, now) for row in rows.fetchall()]

    def due(self, cutoff: int, limit: int) -> Iterator[Due]:
        """Sessions that ended at or before `cutoff`. Each query fetches at most `limit`."""
        seen: set[int] = set()
        for condition, closed in (
            (f"{_OPEN} AND expires_at <= ?", False),
            (f"{_CLOSED} AND expires_at <= ?", True),
            ("closed_at <= ?", True),
        ):
            rows = self._db.execute(
                f"SELECT id, session_id FROM sessions WHERE {condition} LIMIT ?",
                (cutoff, limit),
            ).fetchall()
            for row_id, session_id in rows:
                if row_id not in seen:
                    seen.add(row_id)
                    yield Due(row_id, session_id, closed)

    # Idempotency

    def replay(self, found: Found, idempotency: IdempotencyKey) -> tuple[str, Session] | None:
        """The request remembered with this key, as text, and the session with its usage after
        it, or `None`."""
        row = self._db.execute(
            f"SELECT admission, as_of, {_COUNTERS} FROM replays"
            " WHERE id = ? AND caller = ? AND key = ?",
            (found.row_id, *idempotency),
        ).fetchone()
        if row is None:
            return None
        request, as_of, made, window_start, window_calls = row
        usage = Usage(made, window_start, window_calls)
        return request, replace(found.session, as_of=as_of, usage=usage)

    def remember(
        self, row_id: int, idempotency: IdempotencyKey, request: str, session: Session
    ) -> None:
        """Remember a request and the usage of the session after it."""
        self._db.execute(
            "INSERT INTO replays VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row_id,
                *idempotency,
                request,
                session.as_of,
                *astuple(session.usage),
            ),
        )

    def forget(self, row_id: int, limit: int) -> int:
        """Drop at most `limit` remembered admissions of a session. Return how many."""
        return self._db.execute(
            "DELETE FROM replays WHERE rowid IN"
            " (SELECT rowid FROM replays WHERE id = ? LIMIT ?)",
            (row_id, limit),
        ).rowcount

    def creation(self, agent_id: str, idempotency: CreationKey) -> Creation | None:
        """The creation remembered with this key, or `None`."""
        row = self._db.execute(
            "SELECT session_id, terms, created_at, request, forget_at FROM creations"
            " WHERE caller = ? AND agent_id = ? AND key = ?",
            (idempotency.caller, agent_id, idempotency.key),
        ).fetchone()
        if row is None:
            return None
        session_id, terms, created_at, request, forget_at = row
        session = Session.opened(session_id, to_grant(terms), created_at)
        return Creation(session, request, forget_at)

    def count_creations(self) -> dict[str, int]:
        """How many creations are remembered for each caller, found by a scan."""
        return dict(self._db.execute("SELECT caller, count(*) FROM creations GROUP BY caller"))

    def remember_creation(
        self, idempotency: CreationKey, session: Session, forget_at: int
    ) -> None:
        """Remember a creation, replacing an older one with the same key."""
        caller, key, request = idempotency
        grant = session.grant
        self._db.execute(
            "INSERT OR REPLACE INTO creations VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                caller,
                grant.agent_id,
                key,
                request,
                forget_at,
                session.session_id,
                session.terms.created_at,
                to_text(grant),
            ),
        )

    def forget_creations(self, now: int, limit: int) -> list[str]:
        """Drop at most `limit` creations that are due to be forgotten. Return the caller of
        each."""
        dropped = self._db.execute(
            "DELETE FROM creations WHERE rowid IN"
            " (SELECT rowid FROM creations WHERE forget_at <= ? LIMIT ?) RETURNING caller",
            (now, limit),
        )
        return [caller for (caller,) in dropped]

    # Agents

    def freeze_of(self, agent_id: str) -> Freeze | None:
        """The freeze of an agent, or `None`."""
        row = self._db.execute(
            f"SELECT {_FREEZE} FROM frozen_agents WHERE agent_id = ?", (agent_id,)
        ).fetchone()
        return None if row is None else Freeze(*row)

    def freeze(self, agent_id: str, freeze: Freeze) -> None:
        """Freeze an agent. If it is frozen already, only the reason changes."""
        self._db.execute(
            "INSERT INTO frozen_agents VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET reason = excluded.reason",
            (agent_id, *astuple(freeze)),
        )

    def unfreeze(self, agent_id: str) -> None:
        """Lift the freeze of an agent."""
        self._db.execute("DELETE FROM frozen_agents WHERE agent_id = ?", (agent_id,))

    def count_frozen(self) -> int:
        """The number of frozen agents, counted one by one."""
        return self._number("SELECT count(*) FROM frozen_agents")

    def frozen(self, after: str, limit: int) -> list[tuple[str, Freeze]]:
        """At most `limit` frozen agents whose ids come after `after`, in order."""
        rows = self._db.execute(
            f"SELECT agent_id, {_FREEZE} FROM frozen_agents WHERE agent_id > ?"
            " ORDER BY agent_id LIMIT ?",
            (after, limit),
        )
        return [(agent_id, Freeze(*freeze)) for agent_id, *freeze in rows]

    # The clock

    def reserved_until(self) -> int:
        """The instant that `reserve` last wrote."""
        return self._number("SELECT reserved_until FROM clock")

    def reserve(self, until: int) -> None:
        """Write an instant later than any that the store has returned."""
        self._db.execute("UPDATE clock SET reserved_until = ?", (until,))


_FIND = (
    f"SELECT {_SESSION}, EXISTS"
    " (SELECT 1 FROM frozen_agents WHERE frozen_agents.agent_id = sessions.agent_id)"
    " FROM sessions WHERE session_id = ?"
)
