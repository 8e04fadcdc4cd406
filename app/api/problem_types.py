"""The problem codes about sessions. Those of HTTP and of the service itself are in
`app.http.problems`."""

from __future__ import annotations

from enum import StrEnum

from app.domain.advice import DenialCode, NextAction
from app.domain.ceilings import Exceeded
from app.http.problems import SERVICE_PROBLEMS, UNREACHABLE, ProblemType, Refused

SESSION_NOT_FOUND = ProblemType(
    "session_not_found",
    404,
    "Session not found",
    "There is no session with this id. Ended sessions are removed after a while.",
    "Check the id: 36 characters, lower case. Ended sessions are removed after "
    "ARBITER_RETENTION_SECS, and a memory store loses all sessions in a restart. Create a new "
    "session if the task should continue.",
    "This task cannot go on as it is; stop and ask a person.",
    next_action=NextAction.NEW_SESSION.value,
)
AGENT_MISMATCH = ProblemType(
    "agent_mismatch",
    403,
    "Wrong agent",
    "The session does not belong to the agent that the request names.",
    "Send the agent_id that the session was created for, or leave it out. If an agent "
    "presented another agent's session id, find out how it got that id.",
    "This task belongs to another agent; stop here.",
)
SESSION_CLOSED = ProblemType(
    "session_closed",
    409,
    "Session closed",
    "The session has been closed and cannot be reopened.",
    "This session was ended on purpose, alone or with all sessions of its agent. Ask the "
    "operator before you create another one.",
    "This task has been closed; stop here.",
)
SESSION_EXPIRED = ProblemType(
    "session_expired",
    408,
    "Session expired",
    "The session's time limit has passed.",
    "Repeating the call cannot help. Create a new session if the task should continue, with a "
    "longer time_limit_secs if this happens often.",
    "The time for this task is up; stop here, or ask a person.",
)
AGENT_FROZEN = ProblemType(
    "agent_frozen",
    403,
    "Agent frozen",
    "An operator has frozen the agent: everything that it does is denied. The same request can "
    "pass once somebody lifts the freeze. GET /agents/AGENT says why.",
    "DELETE /agents/AGENT/freeze lifts it. Its sessions are not closed.",
    "This agent has been suspended; ask a person.",
    next_action=NextAction.ASK_OPERATOR.value,
)
SESSION_PAUSED = ProblemType(
    "session_paused",
    409,
    "Session paused",
    "The session is paused: the same request can pass once somebody resumes it. Its time limit "
    "keeps running.",
    "An operator holds this session. POST /sessions/SESSION/resume lets it admit calls again.",
    "This task is paused; wait until a person resumes it.",
    next_action=NextAction.ASK_OPERATOR.value,
)
REVISION_CONFLICT = ProblemType(
    "revision_conflict",
    409,
    "Revision conflict",
    "The session's terms have changed since the expected revision.",
    "Read the session, decide again, and send its revision as expected_revision, or leave that "
    "out.",
    "The terms of this task have just changed.",
    next_action=NextAction.FIX_REQUEST.value,
)
BUDGET_EXCEEDED = ProblemType(
    "budget_exceeded",
    429,
    "Call budget exceeded",
    "The session's call budget has too few calls left.",
    "A budget never refills, so waiting cannot help. A batch of up to calls_remaining calls "
    "still fits. For more, create a new session, or ask for a larger budget.",
    "Too few calls are left in the budget of this task.",
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
    "waiting cannot help: no window can hold that many calls, or the session expires first. "
    "next_action then says whether a smaller batch or a new session can.",
    "This task is calling tools too fast.",
)
TOO_MANY_SESSIONS = ProblemType(
    "too_many_sessions",
    429,
    "Too many sessions",
    "The agent has reached this server's cap on active sessions. The same request can pass "
    "once one of them is closed or has expired.",
    "Close a session that is no longer needed, or wait for one to expire. The cap is "
    "ARBITER_MAX_ACTIVE_SESSIONS_PER_AGENT.",
    "This agent has too many tasks at once; finish one first, or ask a person.",
)
IDEMPOTENCY_CONFLICT = ProblemType(
    "idempotency_conflict",
    422,
    "Idempotency key reused",
    "This idempotency key was used before, for a different request.",
    "Use a new key for each request, and repeat a request unchanged when you retry it with its "
    "key.",
    UNREACHABLE,
)
GRANT_EXCEEDS_KEY = ProblemType(
    "grant_exceeds_key",
    403,
    "Grant exceeds key",
    "The session would allow more than this API key may grant; see errors.",
    "errors lists every limit that the request exceeds. Ask for less, or ask the operator, who "
    "sets the limits of a key in ARBITER_API_KEYS_FILE. A field that is left out is lowered to "
    "the limit.",
    "This task asks for more than may be granted; ask the operator.",
    next_action=NextAction.ASK_OPERATOR.value,
)

AGENT_MESSAGES = {
    NextAction.WAIT: "This task is calling tools too fast; wait before you try again.",
    NextAction.SPLIT_BATCH: "That is too many calls at once; make fewer at a time.",
    NextAction.USE_AUTHORIZED_TOOL: "This tool is not available in this task; use one of the "
    "tools that are.",
    NextAction.LOWER_SENSITIVITY: "This data is too sensitive for this task; use other data, "
    "or ask a person.",
    NextAction.NEW_SESSION: "No more calls are possible in this task; stop here, or ask a "
    "person.",
    NextAction.ASK_OPERATOR: "This task does not allow that; stop and ask a person.",
}
"""What to tell the agent when calls are denied: it depends on what can help."""

DENIALS = {
    DenialCode.SESSION_NOT_FOUND: SESSION_NOT_FOUND,
    DenialCode.AGENT_MISMATCH: AGENT_MISMATCH,
    DenialCode.SESSION_CLOSED: SESSION_CLOSED,
    DenialCode.SESSION_EXPIRED: SESSION_EXPIRED,
    DenialCode.AGENT_FROZEN: AGENT_FROZEN,
    DenialCode.SESSION_PAUSED: SESSION_PAUSED,
    DenialCode.BUDGET_EXCEEDED: BUDGET_EXCEEDED,
    DenialCode.TOOL_NOT_AUTHORIZED: TOOL_NOT_AUTHORIZED,
    DenialCode.SENSITIVITY_EXCEEDED: SENSITIVITY_EXCEEDED,
    DenialCode.RATE_LIMITED: RATE_LIMITED,
    DenialCode.TOO_MANY_SESSIONS: TOO_MANY_SESSIONS,
    DenialCode.IDEMPOTENCY_CONFLICT: IDEMPOTENCY_CONFLICT,
    DenialCode.REVISION_CONFLICT: REVISION_CONFLICT,
}
"""The problem type of each denial."""

PROBLEM_TYPES = {
    kind.code: kind for kind in (*DENIALS.values(), GRANT_EXCEEDS_KEY, *SERVICE_PROBLEMS)
}
"""Every problem of this API by its code."""

ProblemCode = StrEnum(  # type: ignore[misc]  # mypy wants the members written out again
    "ProblemCode", {code.upper(): code for code in PROBLEM_TYPES}
)
ProblemCode.__doc__ = "Every code that a problem can have."


def session_not_found() -> Refused:
    """Return the refusal of a request for a session that does not exist."""
    return Refused(SESSION_NOT_FOUND, members={"violations": []})


MAX_ENTRY_ERRORS = 20
"""Most entries of an allow-list that one response names."""

_MOST = {
    "call_budget": "This key may grant at most {} calls.",
    "time_limit_secs": "This key may grant at most {} seconds.",
    "data_sensitivity_ceiling": "This key may grant at most the tier {}.",
}


def grant_exceeds_key(limits: tuple[Exceeded, ...]) -> Refused:
    """Return the refusal of a creation that exceeds these limits of the caller's key."""
    errors = []
    for field, maximum, entries in limits:
        if field in _MOST:
            errors.append(_field_error(field, _MOST[field].format(maximum)))
        for entry in entries[:MAX_ENTRY_ERRORS]:
            detail = "No tool or pattern that this key may grant covers this entry."
            errors.append(_field_error(f"{field}/{entry}", detail))
    return Refused(GRANT_EXCEEDS_KEY, members={"errors": errors})


def _field_error(field: str, detail: str) -> dict[str, str]:
    return {"in": "body", "field": field, "detail": detail}
