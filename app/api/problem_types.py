"""The problem codes: the only file that knows which status each has, and what it says to a
person, to whoever has to mend it, and to an agent."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class ProblemCode(StrEnum):
    """Every code that a problem can have."""

    SESSION_NOT_FOUND = "session_not_found"
    AGENT_MISMATCH = "agent_mismatch"
    SESSION_CLOSED = "session_closed"
    SESSION_EXPIRED = "session_expired"
    BUDGET_EXCEEDED = "budget_exceeded"
    TOOL_NOT_AUTHORIZED = "tool_not_authorized"
    SENSITIVITY_EXCEEDED = "sensitivity_exceeded"
    RATE_LIMITED = "rate_limited"
    TOO_MANY_SESSIONS = "too_many_sessions"
    IDEMPOTENCY_CONFLICT = "idempotency_conflict"
    VALIDATION_FAILED = "validation_failed"
    MALFORMED_JSON = "malformed_json"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    UNAUTHENTICATED = "unauthenticated"
    INSUFFICIENT_SCOPE = "insufficient_scope"
    STORE_UNAVAILABLE = "store_unavailable"
    OVERLOADED = "overloaded"
    SHUTTING_DOWN = "shutting_down"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    MALFORMED_REQUEST = "malformed_request"
    HEADERS_TOO_LARGE = "headers_too_large"
    REQUEST_TIMEOUT = "request_timeout"
    INTERNAL_ERROR = "internal_error"


class ProblemType(NamedTuple):
    """What all problems of one code have in common."""

    status: int
    title: str
    detail: str
    """What happened, for a person."""
    remedy: str
    """What to do about it, for the page at the problem's `type`."""
    agent_message: str | None = None
    """One sentence without limits or names, safe to show to an agent."""


_CALL_A_PERSON = "Quote the request_id to whoever runs this service; the log has it."

PROBLEMS = {
    ProblemCode.SESSION_NOT_FOUND: ProblemType(
        404,
        "Session not found",
        "No session has this id; it never existed, or it ended and has been removed.",
        "Check the id: 36 characters, lower case. Ended sessions are removed after the "
        "retention time. Create a new session if the task goes on.",
        "This task session does not exist any more; a new one is needed to go on.",
    ),
    ProblemCode.AGENT_MISMATCH: ProblemType(
        403,
        "Session of another agent",
        "The session belongs to another agent than the one named in the request.",
        "Send the agent_id that the session was created for, or leave it out. If an agent "
        "presented the session id of another one, find out where it has it from.",
        "This task session belongs to another agent; stop using it.",
    ),
    ProblemCode.SESSION_CLOSED: ProblemType(
        409,
        "Session closed",
        "The session has been closed.",
        "Somebody ended this session on purpose: by closing it, or all sessions of the "
        "agent. Ask before creating another one.",
        "This task session has been closed; stop here.",
    ),
    ProblemCode.SESSION_EXPIRED: ProblemType(
        408,
        "Session expired",
        "The session's time limit has passed.",
        "Repeating the call cannot help. Create a new session if the task goes on, with a "
        "longer time_limit_secs if this happens often.",
        "The time for this task is over; a new session is needed to go on.",
    ),
    ProblemCode.BUDGET_EXCEEDED: ProblemType(
        429,
        "Call budget exceeded",
        "The session's call budget does not allow so many more calls.",
        "A budget never refills, so that waiting cannot help. A batch larger than what is "
        "left can be sent in parts up to calls_remaining; otherwise create a new session.",
        "The call budget of this task does not allow it; a new session is needed to go on.",
    ),
    ProblemCode.TOOL_NOT_AUTHORIZED: ProblemType(
        403,
        "Tool not authorized",
        "The session's allow-list does not contain every tool that was to be called.",
        "violations[].tool_indexes gives the places, from 0, of the tools that are not "
        "allowed. Names are compared byte for byte. Call another tool, or create a session "
        "whose authorized_tools contains this one.",
        "This tool is not available in this task; use one of the tools that are.",
    ),
    ProblemCode.SENSITIVITY_EXCEEDED: ProblemType(
        403,
        "Data too sensitive",
        "The call touches data above the session's sensitivity ceiling.",
        "Tiers are public, internal, confidential, restricted. Touch less sensitive data, "
        "or create a session with a higher data_sensitivity_ceiling.",
        "This data is too sensitive for this task; work with less sensitive data.",
    ),
    ProblemCode.RATE_LIMITED: ProblemType(
        429,
        "Rate limit exceeded",
        "The session's rate limit does not allow so many calls in the current window.",
        "If retryable is true, wait Retry-After seconds and send the same request. If it is "
        "false, waiting cannot help: no window can hold so many calls, or the session "
        "expires first.",
        "This task is calling tools too fast; slow down.",
    ),
    ProblemCode.TOO_MANY_SESSIONS: ProblemType(
        429,
        "Too many sessions",
        "The agent has as many active sessions as this server allows.",
        "Close a session that is no longer needed, or wait for one to expire. The cap is "
        "ARBITER_MAX_ACTIVE_SESSIONS_PER_AGENT.",
        "This agent has too many open tasks; finish one first.",
    ),
    ProblemCode.IDEMPOTENCY_CONFLICT: ProblemType(
        422,
        "Idempotency key used before",
        "This idempotency key was used for another request.",
        "A key stands for one request. Use a new key for a new request, and repeat a "
        "request unchanged when you retry it.",
        "The request could not be repeated as it was sent; stop here.",
    ),
    ProblemCode.VALIDATION_FAILED: ProblemType(
        422,
        "Request not valid",
        "The request has fields that are missing, unknown or have values that are not valid.",
        'errors[] says where and why. Nothing is coerced: 5 is an integer, 5.0 and "5" are '
        "not. /openapi.json and /docs describe every field.",
    ),
    ProblemCode.MALFORMED_JSON: ProblemType(
        400,
        "Body is not JSON",
        "The body is not one JSON document in UTF-8.",
        "Send JSON as RFC 8259 defines it: UTF-8 without a byte order mark, no NaN or "
        "Infinity, and no key twice in one object.",
    ),
    ProblemCode.UNSUPPORTED_MEDIA_TYPE: ProblemType(
        415,
        "Content type is not JSON",
        "Send the body as JSON, with the header: Content-Type: application/json",
        "curl needs -H 'content-type: application/json' with -d.",
    ),
    ProblemCode.PAYLOAD_TOO_LARGE: ProblemType(
        413,
        "Body too large",
        "A request body may have at most 65536 bytes.",
        "Send less: fewer tools, a shorter intent.",
    ),
    ProblemCode.UNAUTHENTICATED: ProblemType(
        401,
        "Not authenticated",
        "Send Authorization: Bearer <name>.<secret>.",
        "python -m app keys new --name NAME --scope SCOPE makes a key; the line it prints "
        "goes into ARBITER_API_KEYS.",
    ),
    ProblemCode.INSUFFICIENT_SCOPE: ProblemType(
        403,
        "Not allowed for this key",
        "The scope of this API key does not cover this request.",
        "admin may do everything; operate may read, close, see agents and metrics; proxy may "
        "create, get, call and batch.",
    ),
    ProblemCode.STORE_UNAVAILABLE: ProblemType(
        503,
        "Store not available",
        "The session store does not answer just now; nothing was recorded.",
        "Wait Retry-After seconds and repeat the request, with the same Idempotency-Key if "
        "it has one. If it lasts, look at /readyz and the log.",
        "The call could not be checked just now; try again in a moment.",
    ),
    ProblemCode.OVERLOADED: ProblemType(
        503,
        "Service overloaded",
        "The service has as many requests or connections as it takes; nothing was recorded.",
        "Wait Retry-After seconds and repeat the request. If it lasts because there are too "
        "many sessions, raise ARBITER_MAX_SESSIONS, or use shorter time limits or a shorter "
        "retention; if because too much is asked at once, add replicas.",
        "The service is busy just now; try again in a moment.",
    ),
    ProblemCode.SHUTTING_DOWN: ProblemType(
        503,
        "Shutting down",
        "This process is about to stop; ask another one.",
        "Send the request to another replica, with the same Idempotency-Key if it has one: one "
        "that was cut off may have been counted.",
    ),
    ProblemCode.NOT_FOUND: ProblemType(
        404,
        "Nothing here",
        "This service has nothing at this path.",
        "Paths are written as in /openapi.json: ids in canonical lower case, no trailing "
        "slash, nothing percent-encoded.",
    ),
    ProblemCode.METHOD_NOT_ALLOWED: ProblemType(
        405,
        "Method not allowed",
        "This path does not take this method; the Allow header lists those it takes.",
        "See /openapi.json or /docs.",
    ),
    ProblemCode.MALFORMED_REQUEST: ProblemType(
        400,
        "Not a valid HTTP request",
        "What was sent is not an HTTP request that can be understood in one way only.",
        "Send HTTP/1.1 (RFC 9112) with exactly one Host, and a body with either one "
        "Content-Length or Transfer-Encoding: chunked. HTTPS and HTTP/2 need a reverse proxy.",
    ),
    ProblemCode.HEADERS_TOO_LARGE: ProblemType(
        431,
        "Headers too large",
        "A request may have at most 64 header fields, and 16384 bytes before its body.",
        "Send fewer or shorter headers, or a shorter path.",
    ),
    ProblemCode.REQUEST_TIMEOUT: ProblemType(
        408,
        "Request too slow",
        "The request did not arrive in time; nothing was recorded.",
        "Send the whole request at once. The time is ARBITER_REQUEST_TIMEOUT_SECS.",
    ),
    ProblemCode.INTERNAL_ERROR: ProblemType(
        500,
        "Internal error",
        "Something failed inside the service; the error has been logged.",
        _CALL_A_PERSON,
        "The call could not be checked; stop here.",
    ),
}


DO_NOT_RETRY = {403, 404, 408, 409, 429}
"""Statuses that client libraries may retry by themselves and, unless the problem says
otherwise, must not."""


def problem_type_path(code: ProblemCode) -> str:
    """Where a code is explained."""
    return f"/problems/{code}"


def explain(code: ProblemCode) -> str:
    """The page about a code, as plain text."""
    kind = PROBLEMS[code]
    return (
        f"{code} (HTTP {kind.status})\n{kind.title}\n\n"
        f"What happened: {kind.detail}\n\nWhat to do: {kind.remedy}\n"
    )
