"""What routes say about themselves in the OpenAPI document: problems, headers, links."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, Field

from app.api.problem_types import (
    AGENT_FROZEN,
    AGENT_MESSAGES,
    AGENT_MISMATCH,
    BUDGET_EXCEEDED,
    DENIALS,
    GRANT_EXCEEDS_KEY,
    IDEMPOTENCY_CONFLICT,
    PROBLEM_TYPES,
    RATE_LIMITED,
    REVISION_CONFLICT,
    SENSITIVITY_EXCEEDED,
    SESSION_CLOSED,
    SESSION_EXPIRED,
    SESSION_PAUSED,
    TOO_MANY_SESSIONS,
    TOOL_NOT_AUTHORIZED,
    ProblemCode,
)
from app.api.schemas import SESSION_ID_EXAMPLE, Count, Violation
from app.domain.advice import NextAction
from app.domain.session import MAX_INT32
from app.http.problems import (
    HEADERS_TOO_LARGE,
    INSUFFICIENT_SCOPE,
    INTERNAL_ERROR,
    MALFORMED_JSON,
    MALFORMED_REQUEST,
    METHOD_NOT_ALLOWED,
    MISDIRECTED_REQUEST,
    NOT_FOUND,
    OVERLOADED,
    PAYLOAD_TOO_LARGE,
    REQUEST_TIMEOUT,
    SHUTTING_DOWN,
    STORE_UNAVAILABLE,
    UNAUTHENTICATED,
    UNSUPPORTED_MEDIA_TYPE,
    VALIDATION_FAILED,
    Occurrence,
    ProblemType,
    problem_response,
)

_EPOCH = datetime.fromtimestamp(0, UTC)


class Outcome(StrEnum):
    """What is known about a request that failed."""

    NOT_RECORDED = "not_recorded"
    UNKNOWN = "unknown"


class ClosedBy(StrEnum):
    """How a session was closed."""

    CLOSE = "close"
    KILL_SWITCH = "kill_switch"


class FieldError(BaseModel):
    """An invalid part of the request."""

    location: str = Field(alias="in", description="body, path, query or header.")
    field: str = Field(description="The path of the field; empty for the whole part.")
    detail: str
    known: list[str] = Field(
        default=[], description="The names that are known there, if the field is not."
    )


class Problem(BaseModel):
    """What went wrong (RFC 9457)."""

    type: str = Field(description="A path on this service that explains the code.")
    title: str
    status: Count
    code: ProblemCode = Field(description="The code that programs should act on.")
    detail: str = Field(description="What happened, for people.")
    instance: str = Field(
        description="Identifies this occurrence. The log has the request id in it."
    )
    request_id: str
    retryable: bool = Field(description="Whether the same request can succeed later.")
    retry_after_secs: Count = Field(default=0, description="Seconds until then.")
    next_action: NextAction = Field(description="What the caller can do about it.")
    outcome: Outcome = Field(
        default=Outcome.NOT_RECORDED,
        description="What is known about a request that failed. unknown: it may have been "
        "recorded.",
    )
    violations: list[Violation] = Field(
        default=[], description="All rules that the request violates."
    )
    errors: list[FieldError] = Field(default=[], description="The invalid parts.")
    agent_id: str = Field(default="", description="The agent that was denied.")
    session_ref: str = Field(
        default="",
        description="The first 8 characters of the session id, as in the log.",
    )
    since: datetime = Field(
        default=_EPOCH, description="Since when the agent is frozen or the session paused."
    )
    needed_scopes: list[str] = Field(
        default=[], description="The scopes of which a key needs one."
    )
    limit: Count = Field(default=0, description="The limit that the request would exceed.")
    used: Count = Field(default=0, description="How much of the limit is used.")
    requested: Count = Field(default=0, description="How much the request asks for.")
    expires_at: datetime = Field(default=_EPOCH, description="When the session expired.")
    closed_at: datetime = Field(default=_EPOCH, description="When the session was closed.")
    closed_by: ClosedBy = Field(
        default=ClosedBy.CLOSE,
        description="How it was closed: alone, or with all sessions of its agent.",
    )
    revision: Count = Field(default=0, description="The revision that the session has now.")
    closed_by_key: str = Field(
        default="", description="The name of the key that closed it. For operators only."
    )
    agent_message: str = Field(default="", description="One sentence for the agent.")


WITHOUT_STORE = (VALIDATION_FAILED, UNAUTHENTICATED, INSUFFICIENT_SCOPE, INTERNAL_ERROR)
"""Problems of every route that needs a key."""

ALWAYS = (*WITHOUT_STORE, STORE_UNAVAILABLE)
"""Problems of every route that needs a key and asks the store."""

WITH_BODY = (MALFORMED_JSON, PAYLOAD_TOO_LARGE, UNSUPPORTED_MEDIA_TYPE, IDEMPOTENCY_CONFLICT)
"""Further problems of routes that take a body and an idempotency key."""

CHANGE_BODY = (MALFORMED_JSON, PAYLOAD_TOO_LARGE, UNSUPPORTED_MEDIA_TYPE)
"""Further problems of routes that take a body."""

_ANYWHERE = (
    REQUEST_TIMEOUT,
    HEADERS_TOO_LARGE,
    MISDIRECTED_REQUEST,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    OVERLOADED,
    SHUTTING_DOWN,
)
"""Problems that the server responds with before it looks for a route. They are described with
the others of their status, or else under `default`."""


def problem_responses(*kinds: ProblemType) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that can respond with these problems."""
    by_status: dict[int | str, list[ProblemType]] = {}
    for kind in (*kinds, MALFORMED_REQUEST):
        by_status.setdefault(kind.status, []).append(kind)
    for kind in _ANYWHERE:
        status = kind.status if kind.status in by_status else "default"
        if kind not in by_status.setdefault(status, []):
            by_status[status].append(kind)
    found = {status: _problem_response(status, *each) for status, each in by_status.items()}
    # Generated clients read an error whose status is not listed as this.
    found["default"]["description"] = f"Any other problem. {found['default']['description']}"
    return found


def _problem_response(status: int | str, *kinds: ProblemType) -> dict[str, Any]:
    headers = ["X-Request-Id", "X-Should-Retry"]
    if UNAUTHENTICATED in kinds or INSUFFICIENT_SCOPE in kinds:
        headers.append("WWW-Authenticate")
    if status in (429, 503, "default"):
        headers.append("Retry-After")
    if RATE_LIMITED in kinds:
        headers += ["RateLimit-Policy", "RateLimit"]
    return {
        "description": " ".join(f"`{kind.code}`: {kind.title}." for kind in kinds),
        "content": {
            "application/problem+json": {
                "schema": {"$ref": "#/components/schemas/Problem"},
                "examples": {
                    kind.code: {"$ref": f"#/components/examples/{kind.code}"} for kind in kinds
                },
            }
        },
        "headers": headers_named(*headers),
    }


def headers_named(*names: str) -> dict[str, Any]:
    """Return the `headers` of a response that has these of `HEADERS`."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _header(description: str, example: str, **more: Any) -> dict[str, Any]:
    schema = {"type": "string", **more}
    return {"description": description, "schema": schema, "example": example}


HEADERS: dict[str, dict[str, Any]] = {
    "X-Request-Id": _header(
        "The id of this request: the one that was sent, or a new one.",
        "4f1d2c3b5a69-2a",
        pattern="^[A-Za-z0-9._-]{1,64}$",
    ),
    "X-Should-Retry": _header(
        "Whether the same request can succeed later, as `retryable` in the body.",
        "false",
    ),
    "WWW-Authenticate": _header(
        "How to authenticate, on 401 and `insufficient_scope` (RFC 6750, section 3).", "Bearer"
    ),
    "Retry-After": {
        "description": "Seconds to wait, if the same request can succeed then.",
        "schema": {"type": "integer", "format": "int32", "minimum": 1, "maximum": MAX_INT32},
        "example": 12,
    },
    "RateLimit-Policy": _header(
        "The limits: `q` calls, for a window in `w` seconds. "
        "On 429, only for `budget_exceeded` and `rate_limited`.",
        '"budget";q=100, "window";q=60;w=60',
    ),
    "RateLimit": _header(
        "What is left of them: `r` calls, and `t` seconds until the window has elapsed. "
        "On 429, only for `budget_exceeded` and `rate_limited`.",
        '"budget";r=57, "window";r=3;t=12',
    ),
    "Idempotency-Replayed": _header(
        "true if this repeats the response to an earlier request with the same key.",
        "true",
    ),
    "Preference-Applied": _header(
        "Which preference was honoured (RFC 7240, section 3).",
        "return=minimal",
    ),
    "Location": _header("The path of the session.", f"/sessions/{SESSION_ID_EXAMPLE}"),
}
"""The headers of responses."""

_ADMITTED = ("RateLimit-Policy", "RateLimit", "Idempotency-Replayed")
RATE_HEADERS = headers_named(*_ADMITTED)
MINIMAL_HEADERS = headers_named(*_ADMITTED, "Preference-Applied")
CREATED_HEADERS = headers_named("Location", "Idempotency-Replayed")
CHANGED_HEADERS = headers_named("Idempotency-Replayed")
SESSION_LINKS = {
    operation_id: {
        "operationId": operation_id,
        "parameters": {"session_id": "$response.body#/session_id"},
    }
    for operation_id in ("recordCall", "recordBatch", "getSession", "closeSession")
}


def problem_examples() -> dict[str, dict[str, Any]]:
    """Return a full example of every problem, by its code."""
    return {
        kind.code: {"summary": kind.title, "value": _example(kind)}
        for kind in PROBLEM_TYPES.values()
    }


def _example(kind: ProblemType) -> dict[str, Any]:
    members = _MEMBERS.get(kind, {})
    if kind in DENIALS.values():
        members = {"violations": []} | members
    elif kind.retryable:
        members = {"outcome": "not_recorded"} | members
    action = members.get("next_action")
    if members.get("violations") and action:
        members |= {"agent_message": AGENT_MESSAGES[action]}
    response = problem_response(kind, Occurrence("4f1d2c3b5a69-2a"), None, members, [])
    example: dict[str, Any] = json.loads(response.body)
    return example


def _errors(location: str, field: str, detail: str) -> dict[str, Any]:
    return {"errors": [{"in": location, "field": field, "detail": detail}]}


_SPENT = {"limit": 100, "used": 100, "requested": 1}
_FULL = {"limit": 60, "used": 60, "requested": 1}
_AT_ONE_INSTANT = "2026-01-01T13:00:00.000000Z"
_MEMBERS: dict[ProblemType, dict[str, Any]] = {
    SESSION_CLOSED: {
        "next_action": NextAction.STOP,
        "closed_at": _AT_ONE_INSTANT,
        "closed_by": "kill_switch",
    },
    AGENT_MISMATCH: {"next_action": NextAction.STOP},
    SESSION_EXPIRED: {"next_action": NextAction.NEW_SESSION, "expires_at": _AT_ONE_INSTANT},
    BUDGET_EXCEEDED: {
        "next_action": NextAction.NEW_SESSION,
        "violations": [{"code": "budget_exceeded"} | _SPENT],
    }
    | _SPENT,
    TOOL_NOT_AUTHORIZED: {
        "next_action": NextAction.USE_AUTHORIZED_TOOL,
        "violations": [{"code": "tool_not_authorized", "tool_indexes": [0]}],
    },
    SENSITIVITY_EXCEEDED: {
        "next_action": NextAction.LOWER_SENSITIVITY,
        "violations": [{"code": "sensitivity_exceeded", "ceiling": "internal"}],
    },
    RATE_LIMITED: {
        "retryable": True,
        "next_action": NextAction.WAIT,
        "violations": [{"code": "rate_limited"} | _FULL],
        "retry_after_secs": 12,
    }
    | _FULL,
    TOO_MANY_SESSIONS: {
        "next_action": NextAction.CLOSE_A_SESSION,
        "limit": 10,
        "used": 10,
        "requested": 1,
    },
    REVISION_CONFLICT: {"revision": 3},
    SESSION_PAUSED: {"since": _AT_ONE_INSTANT},
    AGENT_FROZEN: {"since": _AT_ONE_INSTANT},
    INSUFFICIENT_SCOPE: {"needed_scopes": ["operate"]},
    GRANT_EXCEEDS_KEY: _errors("body", "call_budget", "This key may grant at most 1000 calls."),
    VALIDATION_FAILED: _errors("body", "call_budget", "Input should be a valid integer"),
}
"""What a problem has besides the members that every problem has."""
