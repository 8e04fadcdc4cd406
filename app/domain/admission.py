"""Admission: decide whether a session may make these calls now, and count them if so.

The store checks rule 1, that the session exists. `check_usable` checks rules 2 to 6, and
`decide` checks rules 2 to 10. The first rule that fails names the denial. The denial lists
every one of rules 7 to 10 that fails. Each rule requires:

    2   agent_mismatch        the caller names the session's agent, or no agent
    3   session_closed        the session is not closed
    4   session_expired       now < expires_at
    5   agent_frozen          the agent is not frozen
    6   session_paused        the session is not paused
    7   budget_exceeded       calls_made + n <= call_budget
    8   tool_not_authorized   every tool is on the allow-list
    9   sensitivity_exceeded  the tier is at most the ceiling
    10  rate_limited          window calls + n <= limit; an elapsed window counts as empty

An empty batch is subject to rules 2 to 6 only.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from app.domain.advice import DenialCode, NextAction, advise
from app.domain.session import MICROSECONDS, DataSensitivity, Session


class Operation(StrEnum):
    """How admission is requested. A call and a batch of one are different requests."""

    CALL = "call"
    BATCH = "batch"


class Admission(msgspec.Struct, frozen=True, gc=False):
    """A request for admission. An idempotent retry must repeat it unchanged."""

    operation: Operation
    tool_names: tuple[str, ...]
    agent_id: str | None = None
    data_sensitivity: DataSensitivity | None = None


class Violation(msgspec.Struct, frozen=True, gc=False):
    """One of rules 7 to 10 that failed, with its figures."""

    code: DenialCode
    limit: int | None = None
    """The call budget or the rate limit."""
    used: int | None = None
    requested: int | None = None
    ceiling: DataSensitivity | None = None
    tier: DataSensitivity | None = None
    """The tier that the request has."""
    tool_indexes: tuple[int, ...] = ()
    """Positions in the batch, from 0, of the unauthorised tools."""


class Admitted(msgspec.Struct, frozen=True, gc=False):
    """The request was admitted. `session` is the session after it."""

    session: Session
    replayed: bool = False
    """Whether this is the answer to an earlier request with the same idempotency key."""


class Denied(msgspec.Struct, frozen=True, gc=False):
    """The request was denied. Nothing has changed."""

    code: DenialCode
    next_action: NextAction
    session: Session | None = None
    violations: tuple[Violation, ...] = ()
    retry_after_secs: int | None = None
    """Seconds until the same request can pass, or `None` if waiting cannot help."""
    limit: int | None = None
    used: int | None = None
    requested: int | None = None
    since: int | None = None
    """Since when the agent is frozen, or when an idempotency key was first used. An instant."""


NO_SESSION = Denied(DenialCode.SESSION_NOT_FOUND, NextAction.NEW_SESSION)
"""Rule 1: the session does not exist."""


def key_conflict(first_used_at: int) -> Denied:
    """The idempotency key was used at `first_used_at`, for a different request."""
    return Denied(DenialCode.IDEMPOTENCY_CONFLICT, NextAction.FIX_REQUEST, since=first_used_at)


def too_many_sessions(cap: int, active: int) -> Denied:
    """The denial of a creation when the agent has `active` of `cap` active sessions."""
    return Denied(
        DenialCode.TOO_MANY_SESSIONS,
        NextAction.CLOSE_A_SESSION if cap else NextAction.ASK_OPERATOR,
        limit=cap,
        used=active,
        requested=1,
    )


def already_closed(session: Session) -> Denied:
    """Rule 3: the session is closed."""
    return Denied(DenialCode.SESSION_CLOSED, NextAction.STOP, session)


def expired(session: Session) -> Denied:
    """Rule 4: the session is expired."""
    return Denied(DenialCode.SESSION_EXPIRED, NextAction.NEW_SESSION, session)


def agent_frozen(session: Session | None = None) -> Denied:
    """Rule 5: the agent is frozen. A creation has no session."""
    return Denied(DenialCode.AGENT_FROZEN, NextAction.ASK_OPERATOR, session)


def check_usable(
    session: Session, agent_id: str | None, now: int, *, frozen: bool = False
) -> Denied | None:
    """Apply rules 2 to 6, which do not depend on the calls, at the instant `now`.

    Return the denial, or `None` if the caller may use the session.
    """
    terms = session.terms
    if agent_id is not None and agent_id != terms.grant.agent_id:
        return Denied(DenialCode.AGENT_MISMATCH, NextAction.STOP, session.at(now))
    if terms.closed_at is not None:
        return already_closed(session.at(now))
    if now >= terms.expires_at:
        return expired(session.at(now))
    if frozen:
        return agent_frozen(session.at(now))
    if terms.paused_at is not None:
        return Denied(DenialCode.SESSION_PAUSED, NextAction.ASK_OPERATOR, session.at(now))
    return None


def decide(
    session: Session, admission: Admission, now: int, *, frozen: bool = False
) -> Admitted | Denied:
    """Apply rules 2 to 10 at the instant `now`. `frozen` says whether the agent is.

    `now` must never be earlier than in a previous decision about the same session. A store
    whose clock can step back holds it still instead.
    """
    unusable = check_usable(session, admission.agent_id, now, frozen=frozen)
    if unusable is not None:
        return unusable
    terms, usage, tools = session.terms, session.usage, admission.tool_names
    n = len(tools)
    if n == 0:
        return Admitted(session.at(now))
    grant, tier = terms.grant, admission.data_sensitivity
    limit = grant.rate_limit_per_minute
    window_secs = grant.rate_limit_window_secs
    elapsed = now >= usage.rate_window_start + window_secs * MICROSECONDS
    if (
        usage.calls_made + n <= grant.call_budget
        and grant.authorized_tools.allows_all(tools)
        and (tier is None or not tier.exceeds(grant.data_sensitivity_ceiling))
        and (limit is None or (n if elapsed else usage.rate_window_calls + n) <= limit)
    ):
        return Admitted(session.with_calls(n, now, new_window=elapsed))
    seen = session.at(now)
    return denial(seen, n, _violations(seen, admission))


def denial(session: Session, calls: int, violations: tuple[Violation, ...]) -> Denied:
    """The denial of `calls` calls for these violations. `session` is as of now."""
    first = violations[0]
    next_action, retry_after_secs = advise(session, calls, {each.code for each in violations})
    return Denied(
        first.code,
        next_action,
        session,
        violations,
        retry_after_secs,
        first.limit,
        first.used,
        first.requested,
    )


def violation(
    code: DenialCode, session: Session, admission: Admission, tool_indexes: tuple[int, ...] = ()
) -> Violation:
    """A violation of one of rules 7 to 10 by `admission`. `session` is as of now."""
    grant, calls = session.grant, len(admission.tool_names)
    if code is DenialCode.BUDGET_EXCEEDED:
        return Violation(code, grant.call_budget, session.usage.calls_made, calls)
    if code is DenialCode.RATE_LIMITED:
        return Violation(code, grant.rate_limit_per_minute, session.window_calls_used, calls)
    if code is DenialCode.SENSITIVITY_EXCEEDED:
        ceiling, tier = grant.data_sensitivity_ceiling, admission.data_sensitivity
        return Violation(code, ceiling=ceiling, tier=tier)
    return Violation(code, requested=calls, tool_indexes=tool_indexes)


def _violations(session: Session, admission: Admission) -> tuple[Violation, ...]:
    grant = session.grant
    n = len(admission.tool_names)
    found = []
    if session.usage.calls_made + n > grant.call_budget:
        found.append(violation(DenialCode.BUDGET_EXCEEDED, session, admission))
    names = admission.tool_names
    allowed = {name: grant.authorized_tools.allows(name) for name in {*names}}
    unauthorized = tuple([at for at, name in enumerate(names) if not allowed[name]])
    if unauthorized:
        found.append(
            violation(DenialCode.TOOL_NOT_AUTHORIZED, session, admission, unauthorized)
        )
    tier = admission.data_sensitivity
    if tier is not None and tier.exceeds(grant.data_sensitivity_ceiling):
        found.append(violation(DenialCode.SENSITIVITY_EXCEEDED, session, admission))
    limit = grant.rate_limit_per_minute
    if limit is not None and session.window_calls_used + n > limit:
        found.append(violation(DenialCode.RATE_LIMITED, session, admission))
    return tuple(found)
