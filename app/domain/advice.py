"""What a caller can do about a denial, chosen from all violations.

Advice never names what cannot help. It is about this session first: if any call could still be
admitted, now or after a wait, the advice is how to get there. If none could, a new session on
the same terms is advised only if it would admit the very same request. Otherwise the terms are
the obstacle, and only an operator can change them.
"""

from __future__ import annotations

from collections.abc import Collection
from enum import StrEnum

from app.domain.session import MICROSECONDS, Session


class DenialCode(StrEnum):
    """Why a request was denied. The values are the codes on the wire."""

    SESSION_NOT_FOUND = "session_not_found"
    AGENT_MISMATCH = "agent_mismatch"
    SESSION_CLOSED = "session_closed"
    SESSION_EXPIRED = "session_expired"
    AGENT_FROZEN = "agent_frozen"
    SESSION_PAUSED = "session_paused"
    BUDGET_EXCEEDED = "budget_exceeded"
    TOOL_NOT_AUTHORIZED = "tool_not_authorized"
    SENSITIVITY_EXCEEDED = "sensitivity_exceeded"
    RATE_LIMITED = "rate_limited"
    TOO_MANY_SESSIONS = "too_many_sessions"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    REVISION_CONFLICT = "revision_conflict"


class NextAction(StrEnum):
    """What the caller can do about a problem."""

    WAIT = "wait"
    """Wait, then repeat the same request."""
    SPLIT_BATCH = "split_batch"
    """Ask for fewer calls at a time."""
    USE_AUTHORIZED_TOOL = "use_authorized_tool"
    LOWER_SENSITIVITY = "lower_sensitivity"
    NEW_SESSION = "new_session"
    CLOSE_A_SESSION = "close_a_session"
    ASK_OPERATOR = "ask_operator"
    """Only a person can help."""
    FIX_REQUEST = "fix_request"
    """The request is wrong; a corrected one can succeed."""
    RETRY_WITH_SAME_KEY = "retry_with_same_key"
    """Repeat the same request with the same idempotency key: it cannot count twice."""
    STOP = "stop"


Advice = tuple[NextAction, int | None]
"""The next action and, if it is to wait, for how many seconds."""


def advise(session: Session, calls: int, violated: Collection[DenialCode]) -> Advice:
    """The advice after a denial of `calls` calls by rules 7 to 10. `session` is as of now."""
    grant, left = session.grant, session.calls_remaining
    limit = grant.rate_limit_per_minute
    wait = _secs_to_next_window(session)
    if limit is None:
        by_rate = left
    elif wait is None:
        by_rate = limit - session.window_calls_used
    else:
        by_rate = limit
    most = min(left, by_rate)
    asks_for_less = (
        DenialCode.TOOL_NOT_AUTHORIZED in violated
        or DenialCode.SENSITIVITY_EXCEEDED in violated
    )
    if most <= 0:
        fits = calls <= grant.call_budget and (limit is None or calls <= limit)
        fits = fits and grant.time_limit_secs > 0 and not asks_for_less
        return (NextAction.NEW_SESSION if fits else NextAction.ASK_OPERATOR), None
    if DenialCode.TOOL_NOT_AUTHORIZED in violated:
        some = bool(grant.authorized_tools.entries)
        return (NextAction.USE_AUTHORIZED_TOOL if some else NextAction.ASK_OPERATOR), None
    if asks_for_less:
        return NextAction.LOWER_SENSITIVITY, None
    if calls > most:
        return NextAction.SPLIT_BATCH, None
    return NextAction.WAIT, wait


def _secs_to_next_window(session: Session) -> int | None:
    """Seconds until the current rate window has elapsed, at least 1, or `None` if the session
    expires first."""
    wait = max(1, -(-(session.window_ends_at - session.as_of) // MICROSECONDS))
    if session.as_of + wait * MICROSECONDS >= session.terms.expires_at:
        return None
    return wait
