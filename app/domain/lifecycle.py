"""Transitions: the changes of a session's terms.

A transition is a pure function of the session and the instant. It returns the new terms, or
the denial if this session cannot be changed so. Stores apply it atomically
(`SessionStore.change`).
"""

from __future__ import annotations

from collections.abc import Callable

from app.domain.admission import Denied, already_closed
from app.domain.session import ClosedBy, Session, Terms

Transition = Callable[[Session, int], Terms | Denied]
"""Called with the session, and the instant of the change in microseconds."""


def close(by: ClosedBy) -> Transition:
    """End the session for good. An expired one can be closed too, a closed one cannot."""

    def transition(session: Session, now: int) -> Terms | Denied:
        if session.terms.closed_at is not None:
            return already_closed(session.at(now))
        return session.terms.changed(closed_at=now, closed_by=by)

    return transition
