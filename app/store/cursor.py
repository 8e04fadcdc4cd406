"""Where a session stands in a list, and how a client is told."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import NamedTuple

from app.store.contract import InvalidCursor


class Position(NamedTuple):
    """Where a session stands in the order of deadlines."""

    expires_at: int
    session_id: str

    @classmethod
    def of_cursor(cls, cursor: str) -> Position:
        """The position that `to_cursor` wrote. Raises `InvalidCursor` for any other text."""
        try:
            text = urlsafe_b64decode(cursor.encode()).decode()
            expires_at, _, session_id = text.partition(".")
            position = cls(int(expires_at), session_id)
        except ValueError as error:
            raise InvalidCursor(InvalidCursor.__doc__) from error
        if not 0 <= position.expires_at <= _LAST or not session_id:
            raise InvalidCursor(InvalidCursor.__doc__)
        if position.to_cursor() != cursor:
            raise InvalidCursor(InvalidCursor.__doc__)
        return position

    def to_cursor(self) -> str:
        """This position as an opaque text."""
        return urlsafe_b64encode(f"{self.expires_at}.{self.session_id}".encode()).decode()


FIRST = Position(-1, "")
"""Before every session."""

_LAST = 2**63 - 1
"""Databases hold integers of 64 bits."""
