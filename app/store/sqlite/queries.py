"""Every statement of a SQLite store that reads or writes sessions (`app.store.sqlite.schema`).

Sessions are known by the number of their row. A number is given again when its session is
gone, so that nothing may be kept by number alone.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from msgspec.structs import replace

from app.domain.admission import Admission
from app.domain.session import Grant, Session
from app.store.codec import to_admission, to_grant, to_session, to_text
from app.store.contract import IdempotencyKey
from app.store.cursor import Cursor
from app.store.sqlite.file import DAMAGED

GRANTS_KEPT = 16_384
"""Grants of the latest sessions that are kept decoded."""

_COUNTERS = "calls_made, rate_window_start, rate_window_calls"
_SESSION = f"id, session_id, created_at, expires_at, {_COUNTERS}, closed_at"
_OPEN, _CLOSED = "closed_at IS NULL", "closed_at IS NOT NULL"


class Found(NamedTuple):
    """A session and the number of its row."""

    row_id: int
    session: Session


class Due(NamedTuple):
    """A session to remove."""

    row_id: int
    session_id: str
    closed: bool


class Queries:
    """The sessions in an open database. Every method raises `sqlite3.Error`."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._grants: OrderedDict[str, Grant] = OrderedDict()

    # Sessions

    def find(self, session_id: str, now: int) -> Found | None:
        """The session as it is now."""
        row = self._db.execute(_FIND, (session_id,)).fetchone()
        return None if row is None else self._found(row, now)

    def _found(self, row: Any, now: int) -> Found:
        row_id, session_id, created_at, expires_at, made, start, calls, closed_at = row
        grant = self._grant(session_id, row_id)
        return Found(
            row_id,
            Session(
                session_id, grant, created_at, expires_at, now, made, start, calls, closed_at
            ),
        )

    def _grant(self, session_id: str, row_id: int) -> Grant:
        known = self._grants.get(session_id)
        if known is None:
            terms = self._one("SELECT terms FROM grants WHERE id = ?", row_id)
            known = self._grants[session_id] = to_grant(terms)
            if len(self._grants) > GRANTS_KEPT:
                self._grants.popitem(last=False)
        return known

    def insert(self, session: Session) -> None:
        """Add a session that was just opened."""
        row_id = self._db.execute(
            "INSERT INTO sessions VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
            (
                session.session_id,
                session.grant.agent_id,
                session.created_at,
                session.expires_at,
                session.grant.call_budget,
                session.calls_made,
                session.rate_window_start,
                session.rate_window_calls,
            ),
        ).lastrowid
        self._db.execute("INSERT INTO grants VALUES (?, ?)", (row_id, to_text(session.grant)))

    def count_calls(self, row_id: int, session: Session) -> None:
        """Write the counters of a session."""
        self._db.execute(
            "UPDATE sessions SET calls_made = ?, rate_window_start = ?, rate_window_calls = ?"
            " WHERE id = ?",
            (
                session.calls_made,
                session.rate_window_start,
                session.rate_window_calls,
                row_id,
            ),
        )

    def close(self, row_id: int, now: int) -> None:
        """Close a session."""
        self._db.execute("UPDATE sessions SET closed_at = ? WHERE id = ?", (now, row_id))

    def close_active_of(self, agent_id: str, now: int) -> int:
        """Close the active sessions of an agent; how many."""
        return self._db.execute(
            "UPDATE sessions SET closed_at = ?"
            f" WHERE {_OPEN} AND agent_id = ? AND expires_at > ?",
            (now, agent_id, now),
        ).rowcount

    def delete(self, row_id: int, session_id: str) -> None:
        """Remove a session."""
        self._grants.pop(session_id, None)
        self._db.execute("DELETE FROM sessions WHERE id = ?", (row_id,))
        self._db.execute("DELETE FROM grants WHERE id = ?", (row_id,))

    # Counts and lists

    def count_sessions(self) -> int:
        """How many sessions there are, by a scan."""
        return self._number("SELECT count(*) FROM sessions")

    def count_open(self) -> int:
        """How many were not closed, by a scan."""
        return self._number(f"SELECT count(*) FROM sessions WHERE {_OPEN}")

    def count_expired(self, now: int) -> int:
        """How many have expired and were not closed; costs as much as there are."""
        return self._number(
            f"SELECT count(*) FROM sessions WHERE {_OPEN} AND expires_at <= ?", now
        )

    def count_active_of(self, agent_id: str, now: int) -> int:
        """How many sessions of an agent are active; costs as much as there are."""
        return self._number(
            f"SELECT count(*) FROM sessions WHERE {_OPEN} AND agent_id = ? AND expires_at > ?",
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
        closed: bool,
        after: Cursor,
        until: int | None,
        agent_id: str | None,
        limit: int,
        now: int,
    ) -> list[Session]:
        """At most `limit` sessions after a position, with deadlines up to and including
        `until`, in order; the closed ones or the others."""
        where = f"{_CLOSED if closed else _OPEN} AND (expires_at, session_id) > (?, ?)"
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
        return [self._found(row, now).session for row in rows.fetchall()]

    def due(self, cutoff: int, limit: int) -> Iterator[Due]:
        """Sessions that ended at `cutoff` or before; looks for at most `limit` at once."""
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

    def replay(
        self, found: Found, idempotency: IdempotencyKey
    ) -> tuple[Admission, Session] | None:
        """The admission that came with this key before, and the session after it."""
        row = self._db.execute(
            f"SELECT admission, as_of, {_COUNTERS} FROM replays"
            " WHERE id = ? AND caller = ? AND key = ?",
            (found.row_id, *idempotency),
        ).fetchone()
        if row is None:
            return None
        admission, as_of, made, window_start, window_calls = row
        return to_admission(admission), replace(
            found.session,
            as_of=as_of,
            calls_made=made,
            rate_window_start=window_start,
            rate_window_calls=window_calls,
        )

    def remember(
        self, row_id: int, idempotency: IdempotencyKey, admission: Admission, session: Session
    ) -> None:
        """Keep an admission and the session after it."""
        self._db.execute(
            "INSERT INTO replays VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row_id,
                *idempotency,
                to_text(admission),
                session.as_of,
                session.calls_made,
                session.rate_window_start,
                session.rate_window_calls,
            ),
        )

    def forget(self, row_id: int, limit: int) -> int:
        """Drop at most `limit` admissions that are kept with a session; how many."""
        return self._db.execute(
            "DELETE FROM replays WHERE rowid IN"
            " (SELECT rowid FROM replays WHERE id = ? LIMIT ?)",
            (row_id, limit),
        ).rowcount

    def creation(self, idempotency: IdempotencyKey) -> tuple[Session, int] | None:
        """The session that was created with this key, and when to forget it."""
        row = self._db.execute(
            "SELECT session, forget_at FROM creations WHERE caller = ? AND key = ?",
            idempotency,
        ).fetchone()
        return None if row is None else (to_session(row[0]), row[1])

    def count_creations(self) -> int:
        """How many creations are kept, by a scan."""
        return self._number("SELECT count(*) FROM creations")

    def remember_creation(
        self, idempotency: IdempotencyKey, session: Session, forget_at: int
    ) -> None:
        """Keep a creation, in the place of one with the same key."""
        self._db.execute(
            "INSERT OR REPLACE INTO creations VALUES (?, ?, ?, ?)",
            (*idempotency, forget_at, to_text(session)),
        )

    def forget_creations(self, now: int, limit: int) -> int:
        """Drop at most `limit` creations whose time is over; how many."""
        return self._db.execute(
            "DELETE FROM creations WHERE rowid IN"
            " (SELECT rowid FROM creations WHERE forget_at <= ? LIMIT ?)",
            (now, limit),
        ).rowcount

    # The clock

    def reserved_until(self) -> int:
        """The instant that `reserve` wrote."""
        return self._number("SELECT reserved_until FROM clock")

    def reserve(self, until: int) -> None:
        """Write an instant that is later than any that was told."""
        self._db.execute("UPDATE clock SET reserved_until = ?", (until,))


_FIND = f"SELECT {_SESSION} FROM sessions WHERE session_id = ?"
