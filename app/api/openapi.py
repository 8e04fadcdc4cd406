"""The OpenAPI document: descriptions that routes share, and changes to FastAPI's document that
make generated clients pleasant to use."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

from app.api.problem_types import (
    BUDGET_EXCEEDED,
    GRANT_EXCEEDS_KEY,
    IDEMPOTENCY_CONFLICT,
    RATE_LIMITED,
    TOOL_NOT_AUTHORIZED,
    ProblemCode,
)
from app.api.schemas import Count, Violation
from app.domain.advice import NextAction
from app.domain.session import MAX_INT32
from app.http.problems import (
    INSUFFICIENT_SCOPE,
    INTERNAL_ERROR,
    MALFORMED_JSON,
    PAYLOAD_TOO_LARGE,
    STORE_UNAVAILABLE,
    UNAUTHENTICATED,
    UNSUPPORTED_MEDIA_TYPE,
    VALIDATION_FAILED,
    ProblemType,
)

TAGS = [
    {"name": "sessions", "description": "Issue and end task sessions."},
    {"name": "admission", "description": "Ask before each tool call, and count it."},
    {"name": "agents", "description": "All sessions of an agent, and the kill switch."},
    {"name": "operations", "description": "Health, metrics, and what a replica knows."},
]

_DESCRIPTION = """\
Before an agent proxy lets a tool call through, it asks here: may this session make this
call now? If so, the call is counted in the same atomic step. A denial changes nothing.

Every error is an RFC 9457 problem. Programs should act on `code`. `agent_message` is safe
to show to the agent.
"""


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


def problem_responses(*kinds: ProblemType) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that can respond with these problems."""
    found: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        response = found.setdefault(
            kind.status,
            {
                "description": kind.title,
                "content": {
                    "application/problem+json": {
                        "schema": {"$ref": "#/components/schemas/Problem"},
                        "examples": {},
                    }
                },
                "headers": {"X-Request-Id": _header("The id of this request.")},
            },
        )
        if kind.status in (429, 503):
            response["headers"]["Retry-After"] = _header(
                "Seconds to wait, if the same request can succeed then.", "integer"
            )
        response["content"]["application/problem+json"]["examples"][kind.code] = {
            "summary": kind.title,
            "value": _example(kind),
        }
    return found


def _example(kind: ProblemType) -> dict[str, Any]:
    example: dict[str, Any] = {
        "type": kind.path,
        "title": kind.title,
        "status": kind.status,
        "code": kind.code,
        "detail": kind.detail,
        "instance": "/requests/4f1d2c3b5a69-2a",
        "request_id": "4f1d2c3b5a69-2a",
        "retryable": kind.retryable,
        "next_action": kind.next_action,
    }
    if kind.agent_message is not None:
        example["agent_message"] = kind.agent_message
    return example | _DENIAL_EXAMPLES.get(kind, {})


_DENIAL_EXAMPLES: dict[ProblemType, dict[str, Any]] = {
    BUDGET_EXCEEDED: {
        "retryable": False,
        "next_action": NextAction.NEW_SESSION.value,
        "violations": [{"code": "budget_exceeded", "limit": 100, "used": 100, "requested": 1}],
        "limit": 100,
        "used": 100,
        "requested": 1,
    },
    TOOL_NOT_AUTHORIZED: {
        "retryable": False,
        "next_action": NextAction.USE_AUTHORIZED_TOOL.value,
        "violations": [{"code": "tool_not_authorized", "tool_indexes": [0]}],
    },
    RATE_LIMITED: {
        "retryable": True,
        "retry_after_secs": 12,
        "next_action": NextAction.WAIT.value,
        "violations": [{"code": "rate_limited", "limit": 60, "used": 60, "requested": 1}],
        "limit": 60,
        "used": 60,
        "requested": 1,
    },
    GRANT_EXCEEDS_KEY: {
        "retryable": False,
        "errors": [
            {
                "in": "body",
                "field": "call_budget",
                "detail": "This key may grant at most 1000 calls.",
            }
        ],
    },
    VALIDATION_FAILED: {
        "errors": [
            {"in": "body", "field": "call_budget", "detail": "Input should be a valid integer"}
        ]
    },
}


def _header(description: str, kind: str = "string") -> dict[str, Any]:
    schema: dict[str, Any] = {"type": kind}
    if kind == "integer":
        schema |= {"format": "int32", "minimum": 1, "maximum": MAX_INT32}
    return {"description": description, "schema": schema}


RATE_HEADERS = {
    "RateLimit-Policy": _header('The limits, such as "budget";q=100, "window";q=60;w=60'),
    "RateLimit": _header('What is left of them, such as "budget";r=57, "window";r=3;t=12'),
    "Idempotency-Replayed": _header("true if this repeats an earlier response."),
    "X-Request-Id": _header("The id of this request."),
}
CREATED_HEADERS = {
    "Location": _header("The path of the session."),
    "Idempotency-Replayed": _header("true if this repeats an earlier response."),
    "X-Request-Id": _header("The id of this request."),
}
CHANGED_HEADERS = {
    "Idempotency-Replayed": _header("true if this repeats an earlier change."),
    "X-Request-Id": _header("The id of this request."),
}
SESSION_LINKS = {
    operation_id: {
        "operationId": operation_id,
        "parameters": {"session_id": "$response.body#/session_id"},
    }
    for operation_id in ("recordCall", "recordBatch", "getSession", "closeSession")
}


def build_document(app: FastAPI) -> dict[str, Any]:
    """Build the OpenAPI document of `app`."""
    document = get_openapi(
        title="Arbiter",
        version=app.version,
        summary="Task sessions that limit what an AI agent may do.",
        description=_DESCRIPTION,
        routes=app.routes,
        tags=TAGS,
        separate_input_output_schemas=False,
    )
    schemas = document["components"]["schemas"]
    for generated in ("HTTPValidationError", "ValidationError"):
        schemas.pop(generated, None)
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= problem.pop("$defs")
    schemas["Problem"] = problem
    _drop_defaults(problem, *(schemas[name] for name in ("Violation", "FieldError")))
    document["components"]["securitySchemes"] = {
        "apiKey": {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "name.secret",
            "description": "Made by `arbiter keys new`.",
        }
    }
    for operations in document["paths"].values():
        for operation in operations.values():
            # FastAPI would spell out the model that stands for no body.
            for content in operation.get("requestBody", {}).get("content", {}).values():
                content["schema"].pop("default", None)
    _tidy(document)
    document["components"]["schemas"] = dict(sorted(schemas.items()))
    return document


def _drop_defaults(*schemas: dict[str, Any]) -> None:
    """Remove defaults: a member that a problem lacks does not apply, and has no value."""
    for schema in schemas:
        for member in schema["properties"].values():
            member.pop("default", None)


def _tidy(node: Any) -> None:
    """Declare optional fields absent rather than null, and bounds of integers as integers."""
    if isinstance(node, list):
        for each in node:
            _tidy(each)
    elif isinstance(node, dict):
        if "anyOf" in node:
            (only,) = (kind for kind in node.pop("anyOf") if kind != {"type": "null"})
            node |= only
            node.pop("default", None)
        if node.pop("nullable", False):
            node["type"] = [node["type"], "null"]
        for key, value in node.items():
            if key in ("minimum", "maximum"):
                node[key] = int(value)
            _tidy(value)
