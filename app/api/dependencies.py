"""Path, query and header parameters of routes."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import Depends, Header, Path, Query
from pydantic import BeforeValidator, Field, WithJsonSchema

from app.api.problem_types import session_not_found
from app.api.schemas import AGENT_ID_EXAMPLE, CANONICAL_UUID, SESSION_ID_EXAMPLE, canonical_uuid
from app.domain.idempotency import IdempotencyKey
from app.domain.session import MAX_INT32
from app.http.headers import MAX_IDEMPOTENCY_KEY_CHARS, idempotency_key, wants_minimal
from app.http.problems import invalid_field
from app.http.request import StrictRequest
from app.observability.audit import Actor
from app.service import SessionService

MAX_PAGE = 500
DEFAULT_PAGE = 100
MAX_CURSOR_CHARS = 128
"""Documentation: the longest cursor has 76 characters, and clients treat it as opaque."""


def flag(value: Any) -> Any:
    """Read a boolean of the query. Raises `ValueError`."""
    if value not in ("true", "false", False):
        raise ValueError("must be true or false")
    return value == "true"


def _digits(value: Any) -> Any:
    if isinstance(value, str) and not (value.isascii() and value.isdecimal()):
        raise ValueError("must be a whole number")
    return value


# Header parameters are documentation: what a header means is read from the request.
def _service(request: StrictRequest) -> SessionService:
    service: SessionService = request.services.service
    return service


def _session_id(
    session_id: Annotated[
        str,
        Path(
            description="A UUID in lower case. Anything else is session_not_found.",
            json_schema_extra={"format": "uuid"},
            examples=[SESSION_ID_EXAMPLE],
        ),
    ],
) -> str:
    if not CANONICAL_UUID.fullmatch(session_id):
        raise session_not_found()
    return session_id


def _agent_id(
    agent_id: Annotated[
        str,
        Path(
            description="A UUID, in upper or lower case.",
            json_schema_extra={"format": "uuid"},
            examples=[AGENT_ID_EXAMPLE],
        ),
    ],
) -> str:
    try:
        return canonical_uuid(agent_id)
    except ValueError as error:
        raise invalid_field("path", "agent_id", str(error)) from None


def _problem_code(code: Annotated[str, Path()]) -> str:
    return code


def _idempotency(
    request: StrictRequest,
    _: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            description="1 to 255 printable ASCII characters. A retry with the same key gets "
            "the first admitted response again and costs nothing.",
            json_schema_extra={
                "minLength": 1,
                "maxLength": MAX_IDEMPOTENCY_KEY_CHARS,
                "pattern": "^[ -~]+$",
            },
            examples=["8e03978e-40d5-43dd-bc93-6894a57f9324"],
        ),
    ] = None,
) -> IdempotencyKey | None:
    if not request.has_header(b"idempotency-key"):
        return None
    key = idempotency_key(request.header_texts(b"idempotency-key"))
    return None if key is None else IdempotencyKey(request.caller.name, key)


def _minimal(
    request: StrictRequest,
    _: Annotated[
        str | None,
        Header(
            alias="Prefer",
            description="return=minimal asks for 204 without a body. Without it, or with "
            "return=representation, the response is the session.",
            json_schema_extra={"enum": ["return=minimal", "return=representation"]},
        ),
    ] = None,
) -> bool:
    return request.has_header(b"prefer") and wants_minimal(request.header_texts(b"prefer"))


def _actor(request: StrictRequest) -> Actor:
    return Actor(request.caller.name, request.request_id)


RequestActor = Annotated[Actor, Depends(_actor)]
ProblemCodeInPath = Annotated[str, Depends(_problem_code)]
Service = Annotated[SessionService, Depends(_service)]
SessionId = Annotated[str, Depends(_session_id)]
AgentId = Annotated[str, Depends(_agent_id)]
Idempotency = Annotated[IdempotencyKey | None, Depends(_idempotency)]
Minimal = Annotated[bool, Depends(_minimal)]
DryRun = Annotated[
    bool,
    BeforeValidator(flag),
    Query(description="Decide as for a real request, but record nothing."),
]


def _instant(value: Any) -> Any:
    """Read an instant of the query (RFC 3339, section 5.6) as microseconds since 1970. A plus
    sign of an offset arrives as a space unless it was escaped."""
    text = value.replace(" ", "+") if isinstance(value, str) else ""
    try:
        found = datetime.fromisoformat(text) if _RFC3339.fullmatch(text) else None
    except ValueError:
        found = None
    if found is None:
        raise ValueError("must be an instant such as 2026-01-01T12:00:00Z")
    return (found - _EPOCH) // timedelta(microseconds=1)


_RFC3339 = re.compile(
    r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)", re.ASCII | re.IGNORECASE
)
_EPOCH = datetime.fromtimestamp(0, UTC)

QueryInstant = Annotated[
    int,
    BeforeValidator(_instant),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]
Digits = Annotated[
    int,
    Field(ge=0, le=MAX_INT32, json_schema_extra={"format": "int32"}),
    BeforeValidator(_digits),
]
ListCursor = Annotated[
    str | None,
    Query(
        description="next_cursor of the previous page. Absent for the first page.",
        json_schema_extra={
            "minLength": 1,
            "maxLength": MAX_CURSOR_CHARS,
            "pattern": "^[A-Za-z0-9_=-]+$",
        },
    ),
]
Limit = Annotated[
    int,
    Field(ge=1, le=MAX_PAGE, json_schema_extra={"format": "int32"}),
    BeforeValidator(_digits),
    Query(description="Maximum number of items in the answer."),
]
