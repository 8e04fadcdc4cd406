"""The sessions of a memory store in order: by deadline, and by agent and deadline.

Sorted lists of plain tuples insert, remove, count and seek in logarithmic time, without
pauses for rebuilding. The garbage collector does not track the tuples.
"""

from __future__ import annotations

from collections.abc import Iterator

from sortedcontainers import SortedList

from app.domain.session import Session
from app.store.cursor import Cursor


class SessionIndex:
    """Sessions in order. Holds their ids, not the sessions."""

    def __init__(self) -> None:
        self._by_deadline: SortedList[tuple[int, str]] = SortedList()
        self._by_agent: SortedList[tuple[str, int, str]] = SortedList()

    def add(self, session: Session) -> None:
        """Add a session."""
        expires_at = session.terms.expires_at
        self._by_deadline.add((expires_at, session.session_id))
        self._by_agent.add((session.grant.agent_id, expires_at, session.session_id))

    def remove(self, session: Session) -> None:
        """Remove a session. Raises `ValueError` if it is not in the index."""
        expires_at = session.terms.expires_at
        self._by_deadline.remove((expires_at, session.session_id))
        self._by_agent.remove((session.grant.agent_id, expires_at, session.session_id))

    def count_alive(self, now: int) -> int:
        """The number of sessions with a deadline after `now`."""
        return len(self._by_deadline) - self._by_deadline.bisect_left((now + 1, ""))

    def count_alive_of(self, agent_id: str, now: int) -> int:
        """The number of the agent's sessions with a deadline after `now`."""
        last = self._by_agent.bisect_left(_past(agent_id))
        return last - self._by_agent.bisect_left((agent_id, now + 1, ""))

    def after(
        self, position: Cursor, agent_id: str | None, until: int | None
    ) -> Iterator[Cursor]:
        """The positions after `position`, of one agent or of all, with deadlines of at most
        `until`."""
        if agent_id is None:
            for expires_at, session_id in self._by_deadline.irange(
                position, None if until is None else (until + 1, ""), (False, False)
            ):
                yield Cursor(expires_at, session_id)
            return
        last = _past(agent_id) if until is None else (agent_id, until + 1, "")
        for _, expires_at, session_id in self._by_agent.irange(
            (agent_id, *position), last, (False, False)
        ):
            yield Cursor(expires_at, session_id)


def _past(agent_id: str) -> tuple[str, int, str]:
    """A bound after all entries of the agent and before those of the next one."""
    return (agent_id + "\0", 0, "")
