"""What went wrong, as RFC 9457 problem details with the headers that belong to them."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from pydantic_core import to_json

from app.api.problem_types import DO_NOT_RETRY, PROBLEMS, ProblemCode, problem_type_path
from app.domain.admission import NO_SESSION, Denied, NextAction, Violation
from app.domain.errors import (
    ArbiterError,
    InvalidField,
    Overloaded,
    ShuttingDown,
    StoreUnavailable,
)
from app.http.response import Answer, Headers, has_rate_headers, rate_headers

_PROBLEM_JSON = (b"content-type", b"application/problem+json")
_SHOULD_RETRY = b"x-should-retry"
_RETRY_SOON = 1
"""Seconds after which a transient error may have passed."""
_TRANSIENT = {"retryable": True, "next_action": NextAction.WAIT.value}


class Refused(Exception):
    """A request that is refused before the service is asked."""

    def __init__(
        self,
        code: ProblemCode,
        detail: str | None = None,
        *,
        errors: list[dict[str, str]] | None = None,
        headers: Headers | None = None,
    ) -> None:
        super().__init__(code)
        self.code = code
        self.detail = detail
        self.errors = errors
        self.headers = headers or []


def refused_answer(refused: Refused, request_id: str) -> Answer:
    """The answer to a request that was refused before the service was asked."""
    if refused.code is ProblemCode.SESSION_NOT_FOUND:
        return denied_answer(NO_SESSION, request_id)
    extra: dict[str, Any] = {} if refused.errors is None else {"errors": refused.errors}
    if refused.code is ProblemCode.OVERLOADED:
        extra = _TRANSIENT
    return _answer(refused.code, request_id, refused.detail, extra, refused.headers)


def error_answer(error: ArbiterError, request_id: str) -> Answer:
    """The answer when the service could not decide."""
    match error:
        case InvalidField():
            errors = [{"in": error.location, "field": error.field, "detail": str(error)}]
            return _answer(
                ProblemCode.VALIDATION_FAILED, request_id, None, {"errors": errors}, []
            )
        case StoreUnavailable():
            return _answer(ProblemCode.STORE_UNAVAILABLE, request_id, None, _TRANSIENT, [])
        case Overloaded():
            return _answer(ProblemCode.OVERLOADED, request_id, str(error), _TRANSIENT, [])
        case ShuttingDown():
            return _answer(ProblemCode.SHUTTING_DOWN, request_id, None, _TRANSIENT, [])
    raise error


def denied_answer(denied: Denied, request_id: str) -> Answer:
    """The answer to a denial."""
    extra: dict[str, Any] = {
        "retryable": denied.retry_after_secs is not None,
        "next_action": denied.next_action.value,
        "violations": [_violation(each) for each in denied.violations],
    }
    headers: Headers = []
    if denied.retry_after_secs is not None:
        extra["retry_after_secs"] = denied.retry_after_secs
        headers.append((b"retry-after", b"%d" % denied.retry_after_secs))
    if denied.limit is not None:
        extra |= {"limit": denied.limit, "used": denied.used}
    if denied.session is not None and has_rate_headers(denied):
        headers += rate_headers(denied.session)
    return _answer(ProblemCode(denied.code), request_id, None, extra, headers)


def _violation(violation: Violation) -> dict[str, Any]:
    entry: dict[str, Any] = {"code": violation.code.value}
    if violation.limit is not None:
        entry |= {"limit": violation.limit, "used": violation.used}
    if violation.tool_indexes:
        entry["tool_indexes"] = violation.tool_indexes
    return entry


def _answer(
    code: ProblemCode,
    request_id: str,
    detail: str | None,
    extra: dict[str, Any],
    headers: Headers,
) -> Answer:
    kind = PROBLEMS[code]
    body = {
        "type": problem_type_path(code),
        "title": kind.title,
        "status": kind.status,
        "code": code.value,
        "detail": detail or kind.detail,
        # Names this occurrence (RFC 9457, section 3.1.5) without repeating what was sent.
        "instance": f"/requests/{request_id}",
        "request_id": request_id,
        **extra,
    }
    if kind.agent_message is not None:
        body["agent_message"] = kind.agent_message
    encoded = to_json(body)
    answer_headers = [
        _PROBLEM_JSON,
        (b"content-length", b"%d" % len(encoded)),
        *headers,
    ]
    if kind.status == HTTPStatus.SERVICE_UNAVAILABLE:
        answer_headers.append((b"retry-after", b"%d" % _RETRY_SOON))
    if extra.get("retryable"):
        answer_headers.append((_SHOULD_RETRY, b"true"))
    elif kind.status in DO_NOT_RETRY:
        answer_headers.append((_SHOULD_RETRY, b"false"))
    return Answer(kind.status, answer_headers, encoded)
