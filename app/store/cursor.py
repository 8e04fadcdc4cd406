"""Cursors: where a page of sessions ends, as opaque text for clients."""

from __future__ import annotations

from base64 import urlsafe_b64decode, urlsafe_b64encode
from typing import NamedTuple

from app.domain.session import Freeze
from app.store.contract import FrozenAgents, InvalidCursor


class Cursor(NamedTuple):
    """The position of a session in the order of deadlines."""

    expires_at: int
    session_id: str

    @classmethod
    def decode(cls, text: str) -> Cursor:
        """Parse the text that `encode` returned. Raises `InvalidCursor` for any other text."""
        try:
            plain = urlsafe_b64decode(text.encode()).decode()
            expires_at, _, session_id = plain.partition(".")
            cursor = cls(int(expires_at), session_id)
        except ValueError as error:
            raise InvalidCursor(InvalidCursor.__doc__) from error
        if not 0 <= cursor.expires_at <= _LAST or not session_id:
            raise InvalidCursor(InvalidCursor.__doc__)
        if cursor.encode() != text:
            raise InvalidCursor(InvalidCursor.__doc__)
        return cursor

    def encode(self) -> str:
        """Return the cursor as opaque text."""
        return urlsafe_b64encode(f"{self.expires_at}.{self.session_id}".encode()).decode()


FIRST = Cursor(-1, "")
"""The position before every session."""

_LAST = 2**63 - 1
"""Databases store signed 64-bit integers."""


def decode_agent(cursor: str | None) -> str:
    """The id after which a page of agents begins. Raises `InvalidCursor`."""
    return "" if cursor is None else Cursor.decode(cursor).session_id


def frozen_page(found: list[tuple[str, Freeze]], limit: int) -> FrozenAgents:
    """The page that begins with `found`, in order, one more than `limit` if there are more."""
    page = found[:limit]
    return FrozenAgents(page, Cursor(0, page[-1][0]).encode() if len(found) > limit else None)
