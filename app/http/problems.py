"""Problems (RFC 9457): their rendering, and the codes of HTTP and of the service itself.

The codes about sessions are in `app.api.problem_types`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, NamedTuple, Protocol

import structlog
from pydantic_core import to_json

from app.domain.errors import InvalidField, ShuttingDown, TransientError
from app.http.response import Headers, RawResponse

_PROBLEM_JSON = (b"content-type", b"application/problem+json")
_SHOULD_RETRY, _SHOULD_NOT_RETRY = (b"x-should-retry", b"true"), (b"x-should-retry", b"false")
"""Some client libraries retry some statuses on their own, unless this says not to."""
_RETRY_AFTER_SECS = 1
"""`Retry-After` of a retryable 503. Transient errors are often over by then."""


class ProblemType(NamedTuple):
    """The common part of all problems with one code."""

    code: str
    status: int
    title: str
    detail: str
    """What happened, for a person."""
    remedy: str
    """What to do about it, for the code's page."""
    agent_message: str | None = None
    """One sentence without limits or tool names, safe to show to an agent."""
    next_action: str = "fix_request"
    """What a program can do about it, unless the problem itself knows better."""
    retryable: bool = False

    @property
    def path(self) -> str:
        """The path of the page that explains the code: the problem's `type`."""
        return f"/problems/{self.code}"

    def explain(self) -> str:
        """Return the page that explains the code, as plain text."""
        return (
            f"{self.code} (HTTP {self.status})\n{self.title}\n\n"
            f"What happened: {self.detail}\n\nWhat to do: {self.remedy}\n"
        )


UNREACHABLE = "This tool cannot be reached now; stop here."
"""For the agent, when its proxy or a gateway has made a mistake."""

VALIDATION_FAILED = ProblemType(
    "validation_failed",
    422,
    "Invalid request",
    "The request has fields that are missing, unknown or invalid; see errors.",
    "Correct the fields that errors lists, and send the request again. Nothing is coerced: 5 "
    'is an integer, but 5.0 and "5" are not. /openapi.json and /docs describe every field.',
    UNREACHABLE,
)
INVALID_CHECK = ProblemType(
    "invalid_check",
    400,
    "Invalid check",
    "The gateway's check request has missing, repeated or invalid headers or fields; see "
    "errors.",
    "Correct what errors lists, in the configuration of the gateway or in the client. A "
    "gateway must replace the headers that it sends, never add to those of the client.",
    UNREACHABLE,
)
MALFORMED_JSON = ProblemType(
    "malformed_json",
    400,
    "Malformed JSON",
    "The body is not a single JSON document in UTF-8.",
    "Send JSON (RFC 8259) in UTF-8, without a byte order mark, NaN, Infinity, or duplicate "
    "keys in an object.",
    UNREACHABLE,
)
UNSUPPORTED_MEDIA_TYPE = ProblemType(
    "unsupported_media_type",
    415,
    "Unsupported media type",
    "The body must be JSON in UTF-8. Send exactly one header, Content-Type: application/json",
    "With curl -d, add -H 'content-type: application/json'; without it curl declares a form. "
    "Do not compress the body.",
    UNREACHABLE,
)
PAYLOAD_TOO_LARGE = ProblemType(
    "payload_too_large",
    413,
    "Body too large",
    "The request is too large: a body may have at most 65536 bytes.",
    "Send fewer tools or a shorter intent. A chunked body can also be too large because of its "
    "framing; use fewer, larger chunks then.",
    "That is too much in one request; ask for less at a time.",
)
UNAUTHENTICATED = ProblemType(
    "unauthenticated",
    401,
    "Not authenticated",
    "The request has no valid API key. Send Authorization: Bearer <name>.<secret>",
    "arbiter keys new --name NAME --scope SCOPE makes a key. It prints what to add to "
    "ARBITER_API_KEYS, and the token to send.",
    "The call could not be checked; stop here.",
    next_action="ask_operator",
)
INSUFFICIENT_SCOPE = ProblemType(
    "insufficient_scope",
    403,
    "Insufficient scope",
    "The scope of this API key does not cover this request. Use a key with a scope that the "
    "WWW-Authenticate header names.",
    "Use a key with another scope. proxy may create, read and close sessions and record calls "
    "and batches. operate may read, list, change and close sessions, freeze agents, and see "
    "denials, the process and metrics. admin may do everything.",
    "The call could not be checked; stop here.",
    next_action="ask_operator",
)
MISDIRECTED_REQUEST = ProblemType(
    "misdirected_request",
    421,
    "Host not served",
    "Without API keys this service serves only the hosts localhost, 127.0.0.1 and [::1].",
    "Use one of these hosts in the URL, or set ARBITER_API_KEYS. The check keeps web pages "
    "from reaching the service under their own host names (DNS rebinding).",
    UNREACHABLE,
)
STORE_UNAVAILABLE = ProblemType(
    "store_unavailable",
    503,
    "Store unavailable",
    "The session store could not answer.",
    "outcome says what is known. not_recorded: nothing was recorded; wait Retry-After seconds "
    "and repeat the request. unknown: the request may have been recorded. With an "
    "Idempotency-Key, repeat it with the same key, which cannot record it twice. Without one, "
    "do not repeat it: read the session, whose calls_made tells whether they were counted; "
    "for a creation, list the sessions of the agent. If the error persists, check /readyz and "
    "the log.",
    "The call could not be checked right now; try again in a moment.",
    next_action="wait",
    retryable=True,
)
SESSION_LIMIT_REACHED = ProblemType(
    "session_limit_reached",
    503,
    "Session limit reached",
    "The store is full; nothing was recorded. Retry later, or raise ARBITER_MAX_SESSIONS.",
    "Wait until sessions have ended and been removed. If the error persists, raise "
    "ARBITER_MAX_SESSIONS, or use shorter time limits or a shorter ARBITER_RETENTION_SECS. "
    "Creations with an Idempotency-Key are remembered for 24 hours, up to the same number for "
    "one caller. The memory store remembers ARBITER_MAX_REMEMBERED_CALLS calls with a "
    "key for one caller.",
    "No new task can be started right now; try again later.",
    next_action="wait",
    retryable=True,
)
OVERLOADED = ProblemType(
    "overloaded",
    503,
    "Service overloaded",
    "The service is at its limit of requests or connections; nothing was recorded.",
    "Wait Retry-After seconds and repeat the request. If the error persists, add replicas.",
    "The call could not be checked right now; try again in a moment.",
    next_action="wait",
    retryable=True,
)
SHUTTING_DOWN = ProblemType(
    "shutting_down",
    503,
    "Shutting down",
    "This process is shutting down.",
    "Send the request to another replica. If outcome is unknown, it may have been recorded "
    "here; what to do then is as for store_unavailable.",
    "The call could not be checked right now; try again in a moment.",
    next_action="wait",
    retryable=True,
)
NOT_FOUND = ProblemType(
    "not_found",
    404,
    "Not found",
    "This service has nothing at this path; /openapi.json lists the paths of its API.",
    "Write the path as in /openapi.json, without a trailing slash or percent-encoding.",
    UNREACHABLE,
)
METHOD_NOT_ALLOWED = ProblemType(
    "method_not_allowed",
    405,
    "Method not allowed",
    "This path does not support the method; the Allow header lists those it supports.",
    "Use a method from the Allow header. /openapi.json and /docs describe each of them.",
    UNREACHABLE,
)
MALFORMED_REQUEST = ProblemType(
    "malformed_request",
    400,
    "Malformed HTTP request",
    "The request is not valid HTTP/1.0 or 1.1, or it could be understood in more than one way.",
    "Send HTTP/1.1 (RFC 9112) with exactly one Host, and a body with either one "
    "Content-Length or Transfer-Encoding: chunked. HTTPS and HTTP/2 need a reverse proxy.",
    UNREACHABLE,
)
HEADERS_TOO_LARGE = ProblemType(
    "headers_too_large",
    431,
    "Headers too large",
    "The request has more than 64 header fields, or more than 16384 bytes before its body.",
    "Send fewer or shorter headers, or a shorter URL.",
)
REQUEST_TIMEOUT = ProblemType(
    "request_timeout",
    408,
    "Request too slow",
    "The request did not arrive in time; nothing was recorded. Send it again, in one go.",
    "Send the whole request at once. The time limit is ARBITER_REQUEST_TIMEOUT_SECS.",
    "The call could not be checked right now; try again in a moment.",
    next_action="wait",
    retryable=True,
)
INTERNAL_ERROR = ProblemType(
    "internal_error",
    500,
    "Internal error",
    "Something failed inside the service. Report the request_id to its operator.",
    "Report the request_id to the operator of this service: the log has the error under it. If "
    "outcome is unknown, a call or creation may have been recorded.",
    "The call could not be checked; stop here.",
    next_action="ask_operator",
)

SERVICE_PROBLEMS = (
    VALIDATION_FAILED,
    INVALID_CHECK,
    MALFORMED_JSON,
    UNSUPPORTED_MEDIA_TYPE,
    PAYLOAD_TOO_LARGE,
    UNAUTHENTICATED,
    INSUFFICIENT_SCOPE,
    MISDIRECTED_REQUEST,
    STORE_UNAVAILABLE,
    SESSION_LIMIT_REACHED,
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

_TRANSIENT_TYPES = (STORE_UNAVAILABLE, SESSION_LIMIT_REACHED, SHUTTING_DOWN)
_TRANSIENT = {kind.code: kind for kind in _TRANSIENT_TYPES}
_NOT_RECORDED = {"outcome": "not_recorded"}


class Repeat(Enum):
    """What happens if a request is repeated whose outcome is unknown."""

    READS = auto()
    """It records nothing."""
    HARMLESS = auto()
    """It asks for a state, which cannot be reached twice."""
    RELATIVE = auto()
    """It changes a session by so much more, and would do so again."""
    KEYED = auto()
    """Its idempotency key keeps it from being recorded twice."""
    MAY_COUNT_TWICE = auto()


_UNKNOWN_DETAILS = {
    Repeat.HARMLESS: "The request may have taken effect. Repeating it is safe.",
    Repeat.KEYED: "The request may have been recorded. Repeat it with the same "
    "Idempotency-Key, which cannot record it twice.",
    Repeat.RELATIVE: "The change may have been made; do not just repeat it. To find out, read "
    "the session: its revision has grown if it was. With an Idempotency-Key a repetition is "
    "safe.",
    Repeat.MAY_COUNT_TWICE: "The call may have been counted, but you have not been told that "
    "it is allowed. Do not make it and do not retry. To find out, read the session: calls_made "
    "has grown if it was counted; for a creation, list the agent's sessions. With an "
    "Idempotency-Key a retry is safe.",
}


class Refused(Exception):
    """The request is refused before it reaches the service.

    `detail` replaces that of the problem type. `members` and `headers` are added to the
    response.
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


FieldError = dict[str, Any]
"""Where and why a field is invalid: `in`, `field`, `detail`, and for a name that is not known
there, the names that are (`known`)."""


def invalid_field(
    location: str, field: str, detail: str, kind: ProblemType = VALIDATION_FAILED
) -> Refused:
    """Return the refusal of a request with one invalid field."""
    return invalid_fields([{"in": location, "field": field, "detail": detail}], kind)


def invalid_fields(
    errors: list[FieldError],
    kind: ProblemType = VALIDATION_FAILED,
    *,
    no_such_tool: bool = False,
) -> Refused:
    """Return the refusal of a request with invalid fields. `no_such_tool` says that all that is
    wrong is a name of a tool, which the agent chose: it is no mistake of the program."""
    members: dict[str, Any] = {"errors": errors}
    if no_such_tool:
        members["agent_message"] = "There is no tool with this name; use a tool's exact name."
        members["next_action"] = "use_authorized_tool"
    return Refused(kind, members=members)


_SAFE_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


def unknown_field(location: str, name: str, known: Iterable[str]) -> FieldError:
    """Say that a field or parameter is not known, and which are. Its name is input, so it is
    repeated only if it is harmless."""
    safe = _SAFE_NAME.fullmatch(name) is not None
    known = sorted(known)
    return {
        "in": location,
        "field": name if safe else "",
        "detail": f"is not known here; use {', '.join(known)}"
        if known
        else "is not known here; there are none",
        "known": known,
    }


class Asked(Protocol):
    """The request that a problem answers."""

    @property
    def request_id(self) -> str:
        """The id that the response repeats, or a new one."""

    @property
    def root_path(self) -> str:
        """Where this service is mounted: the `root_path` of the ASGI scope."""


class Occurrence(NamedTuple):
    """The request that a problem answers, where there is no more of it than this."""

    request_id: str
    root_path: str = ""


Failure = (Exception, asyncio.CancelledError)
"""What ends a request without a response. Only the server cancels, when it stops and the time
for requests in flight is over."""


def failed_response(error: BaseException, asked: Asked, repeat: Repeat) -> RawResponse:
    """Return the response to a request that ended with `error`, a `Failure`. Defects are
    logged."""
    if isinstance(error, Refused):
        return refused_response(error, asked)
    if isinstance(error, InvalidField):
        return refused_response(invalid_field(error.location, error.field, str(error)), asked)
    if isinstance(error, asyncio.CancelledError):
        error = ShuttingDown()
    if isinstance(error, TransientError) and (kind := _TRANSIENT.get(error.code)):
        detail = str(error) if kind is SESSION_LIMIT_REACHED else kind.detail
        return _transient_response(kind, detail, asked, repeat, unknown=error.outcome_unknown)
    structlog.get_logger("arbiter").exception("request failed", request_id=asked.request_id)
    members = {"outcome": "not_recorded" if repeat is Repeat.READS else "unknown"}
    return problem_response(INTERNAL_ERROR, asked, None, members, [])


def _transient_response(
    kind: ProblemType,
    detail: str,
    asked: Asked,
    repeat: Repeat,
    *,
    unknown: bool,
) -> RawResponse:
    members: dict[str, Any]
    if not unknown or repeat is Repeat.READS:
        members = dict(_NOT_RECORDED)
        if kind is not SESSION_LIMIT_REACHED:
            detail += " Nothing was recorded."
    else:
        detail += " " + _UNKNOWN_DETAILS[repeat]
        members = {"outcome": "unknown"}
        if repeat is Repeat.KEYED:
            members["next_action"] = "retry_with_same_key"
        elif repeat in (Repeat.MAY_COUNT_TWICE, Repeat.RELATIVE):
            members |= {"retryable": False, "next_action": "stop"}
        if repeat is Repeat.MAY_COUNT_TWICE:
            members["agent_message"] = (
                "This call could not be checked, so it was not made; stop here."
            )
    return problem_response(kind, asked, detail, members, [])


def refused_response(refused: Refused, asked: Asked) -> RawResponse:
    """Return the response to a refused request."""
    kind, members = refused.kind, refused.members
    if kind.retryable:
        members = _NOT_RECORDED | members
    return problem_response(kind, asked, refused.detail, members, refused.headers)


def problem_response(
    kind: ProblemType,
    asked: Asked,
    detail: str | None,
    members: dict[str, Any],
    headers: Headers,
) -> RawResponse:
    """Return the response for a problem. `members` are added to those of every problem, and
    `headers` to those of every problem response."""
    retryable = members.get("retryable", kind.retryable)
    request_id = asked.request_id
    body = {
        "type": asked.root_path + kind.path,
        "title": kind.title,
        "status": kind.status,
        "code": kind.code,
        "detail": detail or kind.detail,
        # Names this occurrence (RFC 9457, section 3.1.5) without repeating any input. The log
        # has the same id.
        "instance": f"/requests/{request_id}",
        "request_id": request_id,
        "retryable": retryable,
        "next_action": kind.next_action,
    }
    if kind.agent_message is not None:
        body["agent_message"] = kind.agent_message
    waits = retryable and kind.status == HTTPStatus.SERVICE_UNAVAILABLE
    if waits:
        body["retry_after_secs"] = _RETRY_AFTER_SECS
    encoded = to_json(body | members)
    all_headers = [
        _PROBLEM_JSON,
        (b"content-length", b"%d" % len(encoded)),
        *headers,
        _SHOULD_RETRY if retryable else _SHOULD_NOT_RETRY,
    ]
    if waits:
        all_headers.append((b"retry-after", b"%d" % _RETRY_AFTER_SECS))
    return RawResponse(kind.status, all_headers, encoded)
