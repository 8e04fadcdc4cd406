"""The problem codes about sessions. Those of HTTP and of the service itself are in
`app.http.problems`."""

from __future__ import annotations

from enum import StrEnum

from app.domain.admission import DenialCode
from app.http.problems import SERVICE_PROBLEMS, ProblemType, Refused

SESSION_NOT_FOUND = ProblemType(
    "session_not_found",
    404,
    "Session not found",
    "No session has this id: it never existed, or it has ended and been removed.",
    "Check the id: 36 characters, lower case. Ended sessions are removed after "
    "ARBITER_RETENTION_SECS, and a memory store loses all sessions in a restart. Create a new "
    "session if the task should continue.",
    "This task session does not exist; a new one is needed to continue.",
)
AGENT_MISMATCH = ProblemType(
    "agent_mismatch",
    403,
    "Wrong agent",
    "The session does not belong to the agent that the request names.",
    "Send the agent_id that the session was created for, or leave it out. If an agent "
    "presented another agent's session id, find out how it got that id.",
    "This task session belongs to another agent; stop using it.",
)
SESSION_CLOSED = ProblemType(
    "session_closed",
    409,
    "Session closed",
    "The session has been closed and cannot be reopened.",
    "This session was ended on purpose, alone or with all sessions of its agent. Ask the "
    "operator before you create another one.",
    "This task session has been closed; stop here.",
)
SESSION_EXPIRED = ProblemType(
    "session_expired",
    408,
    "Session expired",
    "The session's time limit has passed.",
    "Repeating the call cannot help. Create a new session if the task should continue, with a "
    "longer time_limit_secs if this happens often.",
    "The time for this task is up; a new session is needed to continue.",
)
BUDGET_EXCEEDED = ProblemType(
    "budget_exceeded",
    429,
    "Call budget exceeded",
    "The session's call budget has too few calls left.",
    "A budget never refills, so waiting cannot help. A batch of up to calls_remaining calls "
    "still fits; for more, create a new session.",
    "Too few calls are left in the budget of this task; a new session is needed.",
)
TOOL_NOT_AUTHORIZED = ProblemType(
    "tool_not_authorized",
    403,
    "Tool not authorized",
    "The session's allow-list does not cover every tool in the request.",
    "violations[].tool_indexes lists the positions, from 0, of the tools that are not allowed. "
    "Names are compared byte for byte. Call another tool, or create a session whose "
    "authorized_tools cover this one.",
    "This tool is not available in this task; use one of the tools that are.",
)
SENSITIVITY_EXCEEDED = ProblemType(
    "sensitivity_exceeded",
    403,
    "Data too sensitive",
    "The call touches data above the session's sensitivity ceiling.",
    "The tiers, in rising order, are public, internal, confidential and restricted. Touch less "
    "sensitive data, or create a session with a higher data_sensitivity_ceiling.",
    "This data is too sensitive for this task; work with less sensitive data.",
)
RATE_LIMITED = ProblemType(
    "rate_limited",
    429,
    "Rate limit exceeded",
    "The session's rate window has too few calls left.",
    "If retryable is true, wait Retry-After seconds and send the same request. If it is false, "
    "waiting cannot help: no window can hold that many calls, or the session expires first.",
    "This task is calling tools too fast; slow down.",
)
TOO_MANY_SESSIONS = ProblemType(
    "too_many_sessions",
    429,
    "Too many sessions",
    "The agent has reached this server's cap on active sessions.",
    "Close a session that is no longer needed, or wait for one to expire. The cap is "
    "ARBITER_MAX_ACTIVE_SESSIONS_PER_AGENT.",
    "This agent has too many open tasks; finish one first.",
)
IDEMPOTENCY_CONFLICT = ProblemType(
    "idempotency_conflict",
    422,
    "Idempotency key reused",
    "This idempotency key was used before, for a different request.",
    "Use a new key for each request, and repeat a request unchanged when you retry it with its "
    "key.",
    "The call could not be checked; stop here.",
)

DENIALS = {
    DenialCode.SESSION_NOT_FOUND: SESSION_NOT_FOUND,
    DenialCode.AGENT_MISMATCH: AGENT_MISMATCH,
    DenialCode.SESSION_CLOSED: SESSION_CLOSED,
    DenialCode.SESSION_EXPIRED: SESSION_EXPIRED,
    DenialCode.BUDGET_EXCEEDED: BUDGET_EXCEEDED,
    DenialCode.TOOL_NOT_AUTHORIZED: TOOL_NOT_AUTHORIZED,
    DenialCode.SENSITIVITY_EXCEEDED: SENSITIVITY_EXCEEDED,
    DenialCode.RATE_LIMITED: RATE_LIMITED,
    DenialCode.TOO_MANY_SESSIONS: TOO_MANY_SESSIONS,
    DenialCode.IDEMPOTENCY_CONFLICT: IDEMPOTENCY_CONFLICT,
}
"""The problem type of each denial."""

PROBLEM_TYPES = {kind.code: kind for kind in (*DENIALS.values(), *SERVICE_PROBLEMS)}
"""Every problem of this API by its code."""

ProblemCode = StrEnum(  # type: ignore[misc]  # mypy wants the members written out again
    "ProblemCode", {code.upper(): code for code in PROBLEM_TYPES}
)
ProblemCode.__doc__ = "Every code that a problem can have."


def session_not_found() -> Refused:
    """Return the refusal of a request for a session that does not exist."""
    members = {"retryable": False, "next_action": "new_session", "violations": []}
    return Refused(SESSION_NOT_FOUND, members=members)
