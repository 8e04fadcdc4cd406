"""One page of a list, with bounded work: what every backend does with the sessions it finds."""

from __future__ import annotations

from app.domain.session import Session
from app.store.contract import LOOKED_AT_MOST, Page, SessionFilter
from app.store.cursor import Cursor

CHUNK = 500
"""Sessions that a backend fetches at once while it looks for those that match."""


class Listing:
    """Collects a page from sessions in the order of deadlines."""

    def __init__(self, which: SessionFilter, limit: int) -> None:
        self._which = which
        self._limit = limit
        self._found: list[Session] = []
        self._looked = 0
        self._last: Cursor | None = None
        self._more = False

    @property
    def wanted(self) -> int:
        """How many sessions to look at next."""
        if self._which.is_selective:
            return min(CHUNK, LOOKED_AT_MOST + 1 - self._looked)
        return self._limit + 1 - len(self._found)

    def look(self, position: Cursor, session: Session | None) -> bool:
        """Look at the next session, or at one that has gone by now. Return whether to go on."""
        until = self._which.expires_before
        if until is not None and position.expires_at >= until:
            return False
        if len(self._found) == self._limit or self._looked == LOOKED_AT_MOST:
            self._more = True
            return False
        self._looked += 1
        self._last = position
        if session is not None and self._which.matches(session):
            self._found.append(session)
        return True

    def page(self) -> Page:
        """The page, after all that was found has been looked at."""
        more = self._more and self._last is not None
        return Page(self._found, self._last.encode() if more and self._last else None)
