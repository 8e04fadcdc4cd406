"""Problems (RFC 9457): how one is rendered, and the codes of HTTP and of the service itself.

The codes that are about sessions are in `app.api.problem_types`.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, NamedTuple

from pydantic_core import to_json

from app.domain.errors import ArbiterError, InvalidField, TransientError
from app.http.response import Headers, RawResponse

_PROBLEM_JSON = (b"content-type", b"application/problem+json")
_SHOULD_RETRY = b"x-should-retry"
_RETRY_AFTER_SECS = 1
"""What a 503 advises: a transient error may be over by then."""


class ProblemType(NamedTuple):
    """What all problems with one code have in common."""

    code: str
    status: int
    title: str
    detail: str
    """What happened, for a person."""
    remedy: str
    """What to do about it, for the page that explains the code."""
    agent_message: str | None = None
    """One sentence without limits or names, safe to show to an agent."""

    @property
    def path(self) -> str:
        """The page that explains the code: the problem's `type`."""
        return f"/problems/{self.code}"

    def explain(self) -> str:
        """The page that explains the code, as plain text."""
        return (
            f"{self.code} (HTTP {self.status})\n{self.title}\n\n"
            f"What happened: {self.detail}\n\nWhat to do: {self.remedy}\n"
        )


VALIDATION_FAILED = ProblemType(
    "validation_failed",
    422,
    "Request not valid",
    "The request has fields that are missing, unknown or not valid.",
    'errors[] says where and why. Nothing is coerced: 5 is an integer, 5.0 and "5" are not. '
    "/openapi.json and /docs describe every field.",
)
MALFORMED_JSON = ProblemType(
    "malformed_json",
    400,
    "Body is not JSON",
    "The body is not one JSON document in UTF-8.",
    "Send JSON as RFC 8259 defines it: UTF-8 without a byte order mark, no NaN or Infinity, "
    "and no key twice in one object.",
)
UNSUPPORTED_MEDIA_TYPE = ProblemType(
    "unsupported_media_type",
    415,
    "Content type is not JSON",
    "Send the body as JSON, with the header: Content-Type: application/json",
    "curl needs -H 'content-type: application/json' with -d.",
)
PAYLOAD_TOO_LARGE = ProblemType(
    "payload_too_large",
    413,
    "Body too large",
    "A request body may have at most 65536 bytes.",
    "Send less: fewer tools, a shorter intent.",
)
UNAUTHENTICATED = ProblemType(
    "unauthenticated",
    401,
    "Not authenticated",
    "Send Authorization: Bearer <name>.<secret>.",
    "python -m app keys new --name NAME --scope SCOPE makes a key; the line it prints goes "
    "into ARBITER_API_KEYS.",
)
INSUFFICIENT_SCOPE = ProblemType(
    "insufficient_scope",
    403,
    "Not allowed for this key",
    "The scope of this API key does not cover this request.",
    "admin may do everything; operate may read, close, see agents and metrics; proxy may "
    "create, get, call and batch.",
)
STORE_UNAVAILABLE = ProblemType(
    "store_unavailable",
    503,
    "Store not available",
    "The session store does not answer just now; nothing was recorded.",
    "Wait Retry-After seconds and repeat the request, with the same Idempotency-Key if it has "
    "one. If it lasts, look at /readyz and the log.",
    "The call could not be checked just now; try again in a moment.",
)
OVERLOADED = ProblemType(
    "overloaded",
    503,
    "Service overloaded",
    "The service has as many requests or connections as it takes; nothing was recorded.",
    "Wait Retry-After seconds and repeat the request. If it lasts because there are too many "
    "sessions, raise ARBITER_MAX_SESSIONS, or use shorter time limits or a shorter retention; "
    "if because too much is asked at once, add replicas.",
    "The call could not be checked just now; try again in a moment.",
)
SHUTTING_DOWN = ProblemType(
    "shutting_down",
    503,
    "Shutting down",
    "This process is about to stop; ask another one.",
    "Send the request to another replica, with the same Idempotency-Key if it has one: a "
    "request that was cut off may have been counted.",
)
NOT_FOUND = ProblemType(
    "not_found",
    404,
    "Nothing here",
    "This service has nothing at this path.",
    "Paths are written as in /openapi.json: ids in canonical lower case, no trailing slash, "
    "nothing percent-encoded.",
)
METHOD_NOT_ALLOWED = ProblemType(
    "method_not_allowed",
    405,
    "Method not allowed",
    "This path does not take this method; the Allow header lists those it takes.",
    "See /openapi.json or /docs.",
)
MALFORMED_REQUEST = ProblemType(
    "malformed_request",
    400,
    "Not a valid HTTP request",
    "This is not an HTTP request that can be understood in one way only.",
    "Send HTTP/1.1 (RFC 9112) with exactly one Host, and a body with either one "
    "Content-Length or Transfer-Encoding: chunked. HTTPS and HTTP/2 need a reverse proxy.",
)
HEADERS_TOO_LARGE = ProblemType(
    "headers_too_large",
    431,
    "Headers too large",
    "A request may have at most 64 header fields, and 16384 bytes before its body.",
    "Send fewer or shorter headers, or a shorter path.",
)
REQUEST_TIMEOUT = ProblemType(
    "request_timeout",
    408,
    "Request too slow",
    "The request did not arrive in time; nothing was recorded.",
    "Send the whole request at once. The time limit is ARBITER_REQUEST_TIMEOUT_SECS.",
)
INTERNAL_ERROR = ProblemType(
    "internal_error",
    500,
    "Internal error",
    "Something failed inside the service; the error has been logged.",
    "Quote the request_id to the operator of this service; it is in the log.",
    "The call could not be checked; stop here.",
)

SERVICE_PROBLEMS = (
    VALIDATION_FAILED,
    MALFORMED_JSON,
    UNSUPPORTED_MEDIA_TYPE,
    PAYLOAD_TOO_LARGE,
    UNAUTHENTICATED,
    INSUFFICIENT_SCOPE,
    STORE_UNAVAILABLE,
    OVERLOADED,
    SHUTTING_DOWN,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    MALFORMED_REQUEST,
    HEADERS_TOO_LARGE,
    REQUEST_TIMEOUT,
    INTERNAL_ERROR,
)
"""Every problem that is not about a session."""

_TRANSIENT = {kind.code: kind for kind in (STORE_UNAVAILABLE, OVERLOADED, SHUTTING_DOWN)}
_CAN_PASS_LATER = {"retryable": True, "next_action": "wait"}

DO_NOT_RETRY = frozenset({403, 404, 408, 409, 429})
"""Statuses that client libraries may retry by themselves, and must not unless the problem
says so."""


class Refused(Exception):
    """A request that is refused before the service is asked.

    `detail` replaces the general one of the problem type; `members` are added to the problem.
    """

    def __init__(
        self,
        kind: ProblemType,
        detail: str | None = None,
        *,
        members: dict[str, Any] | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(kind.code)
        self.kind = kind
        self.detail = detail
        self.members = members or {}
        self.headers = headers or []


def invalid_field(location: str, field: str, detail: str) -> Refused:
    """The refusal of a request with one field that is not valid."""
    return invalid_fields([{"in": location, "field": field, "detail": detail}])


def invalid_fields(errors: list[dict[str, str]]) -> Refused:
    """The refusal of a request with fields that are not valid."""
    return Refused(VALIDATION_FAILED, members={"errors": errors})


def refused_response(refused: Refused, request_id: str) -> RawResponse:
    """The response to a request that was refused before the service was asked."""
    kind, members = refused.kind, refused.members
    if kind is OVERLOADED:
        members = _CAN_PASS_LATER | members
    return problem_response(kind, request_id, refused.detail, members, refused.headers)


def error_response(error: ArbiterError, request_id: str) -> RawResponse:
    """The response when the service could not decide. Raises errors that are defects here."""
    if isinstance(error, InvalidField):
        refused = invalid_field(error.location, error.field, str(error))
        return refused_response(refused, request_id)
    if isinstance(error, TransientError) and (kind := _TRANSIENT.get(error.code)):
        detail = str(error) if kind is OVERLOADED else None
        return problem_response(kind, request_id, detail, _CAN_PASS_LATER, [])
    raise error


def problem_response(
    kind: ProblemType,
    request_id: str,
    detail: str | None,
    members: dict[str, Any],
    headers: Headers,
) -> RawResponse:
    """A problem with `members` beside those that every problem has."""
    body = {
        "type": kind.path,
        "title": kind.title,
        "status": kind.status,
        "code": kind.code,
        "detail": detail or kind.detail,
        # Names this occurrence (RFC 9457, section 3.1.5) without repeating any input.
        "instance": f"/requests/{request_id}",
        "request_id": request_id,
        **members,
    }
    if kind.agent_message is not None:
        body["agent_message"] = kind.agent_message
    encoded = to_json(body)
    all_headers = [
        _PROBLEM_JSON,
        (b"content-length", b"%d" % len(encoded)),
        *headers,
    ]
    if kind.status == HTTPStatus.SERVICE_UNAVAILABLE:
        all_headers.append((b"retry-after", b"%d" % _RETRY_AFTER_SECS))
    if members.get("retryable"):
        all_headers.append((_SHOULD_RETRY, b"true"))
    elif kind.status in DO_NOT_RETRY:
        all_headers.append((_SHOULD_RETRY, b"false"))
    return RawResponse(kind.status, all_headers, encoded)
