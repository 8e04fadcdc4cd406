"""Request and response bodies, with the names and units of the wire.

Requests are strict: unknown fields are errors, and nothing is coerced.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Self

from msgspec import UNSET
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from app.api.problem_types import ProblemCode
from app.domain.advice import DenialCode
from app.domain.lifecycle import Amendment
from app.domain.session import (
    DEFAULT_CALL_BUDGET,
    DEFAULT_RATE_LIMIT_WINDOW_SECS,
    DEFAULT_TIME_LIMIT_SECS,
    MAX_DELEGATION_CHARS,
    MAX_DELEGATIONS,
    MAX_INT32,
    MAX_INTENT_CHARS,
    MAX_RATE_LIMIT_WINDOW_SECS,
    DataSensitivity,
    Grant,
    SessionStatus,
)
from app.domain.tools import (
    MAX_BATCH,
    MAX_ENTRIES,
    TOOL_ENTRY_PATTERN,
    TOOL_NAME_PATTERN,
    AllowList,
)
from app.observability.logs import LogLevel

CANONICAL_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
"""RFC 9562, section 4, in the only spelling that this service accepts as an id."""

SESSION_ID_EXAMPLE = "0b8f1e6c-3f5d-4b2a-9c7e-2d1a6f4e8b90"
AGENT_ID_EXAMPLE = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


def canonical_uuid(value: str) -> str:
    """Return the UUID in lower case. Raises `ValueError` if `value` is not a UUID."""
    if CANONICAL_UUID.fullmatch(value):
        return value
    canonical = value.lower()
    if not CANONICAL_UUID.fullmatch(canonical):
        raise ValueError("must be a UUID such as 7c9e6679-7425-40de-944b-e07fc1f90ae7")
    return canonical


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("must not be blank")
    return value


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("must not be null; leave the field out instead")
    return value


def _tier(value: Any) -> Any:
    # Strict validation wants a member of the enum, but JSON has only its value.
    tier = _TIERS.get(value) if isinstance(value, str) else None
    if tier is None:
        raise ValueError(f"must be one of {', '.join(DataSensitivity)}")
    return tier


_TIERS = {tier.value: tier for tier in DataSensitivity}


NotNull = BeforeValidator(_not_null)
"""Marks a field that may be left out but may not be null. `openapi.py` documents it so."""


def _session_id(value: str) -> str:
    if not CANONICAL_UUID.fullmatch(value):
        raise ValueError("must be a session id, a UUID in lower case")
    return value


SessionIdText = Annotated[
    str,
    AfterValidator(_session_id),
    WithJsonSchema({"type": "string", "format": "uuid", "examples": [SESSION_ID_EXAMPLE]}),
]
UuidText = Annotated[
    str,
    AfterValidator(canonical_uuid),
    WithJsonSchema({"type": "string", "format": "uuid", "examples": [AGENT_ID_EXAMPLE]}),
]
RequestIdText = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
ToolName = Annotated[str, StringConstraints(pattern=TOOL_NAME_PATTERN)]
ToolEntry = Annotated[str, StringConstraints(pattern=TOOL_ENTRY_PATTERN)]
Tier = Annotated[DataSensitivity, BeforeValidator(_tier)]
Count = Annotated[int, Field(ge=0, le=MAX_INT32, json_schema_extra={"format": "int32"})]


class _Request(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class CreateSession(_Request):
    """The terms of a new session."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "agent_id": AGENT_ID_EXAMPLE,
                    "declared_intent": "Summarise the open incidents",
                    "authorized_tools": ["read_file", "fs.*"],
                    "call_budget": 100,
                    "rate_limit_per_minute": 60,
                }
            ]
        }
    )

    agent_id: UuidText = Field(description="The agent that the session is for.")
    declared_intent: Annotated[
        str,
        StringConstraints(min_length=1, max_length=MAX_INTENT_CHARS),
        AfterValidator(_not_blank),
    ] = Field(description="What the agent says it will do. Stored, never interpreted.")
    authorized_tools: list[ToolEntry] = Field(
        max_length=MAX_ENTRIES,
        description="Tools that the session may call: exact names, or patterns in which * "
        "matches any run of characters. An empty list authorises nothing.",
    )
    delegation_chain_snapshot: list[
        Annotated[str, StringConstraints(max_length=MAX_DELEGATION_CHARS)]
    ] = Field(
        default_factory=list,
        max_length=MAX_DELEGATIONS,
        description="Who delegated to whom. Stored, never interpreted.",
    )
    time_limit_secs: Count = Field(
        default=DEFAULT_TIME_LIMIT_SECS,
        description="Lifetime in seconds. The server has a maximum, 604800 by default.",
    )
    call_budget: Count = Field(
        default=DEFAULT_CALL_BUDGET, description="Calls over the whole life of the session."
    )
    rate_limit_per_minute: Annotated[Count | None, NotNull] = Field(
        default=None,
        description="Calls per window of rate_limit_window_secs, despite the name. "
        "No limit if absent. 0 admits nothing.",
    )
    rate_limit_window_secs: Annotated[
        int,
        Field(ge=1, le=MAX_RATE_LIMIT_WINDOW_SECS, json_schema_extra={"format": "int32"}),
    ] = Field(
        default=DEFAULT_RATE_LIMIT_WINDOW_SECS,
        description="Length of a rate window in seconds.",
    )
    data_sensitivity_ceiling: Tier = Field(
        default=DataSensitivity.INTERNAL, description="The highest tier that a call may touch."
    )

    def to_grant(self) -> Grant:
        """Return the requested grant."""
        return Grant(
            agent_id=self.agent_id,
            declared_intent=self.declared_intent,
            authorized_tools=AllowList.of(self.authorized_tools),
            delegation_chain_snapshot=tuple(self.delegation_chain_snapshot),
            time_limit_secs=self.time_limit_secs,
            call_budget=self.call_budget,
            rate_limit_per_minute=self.rate_limit_per_minute,
            rate_limit_window_secs=self.rate_limit_window_secs,
            data_sensitivity_ceiling=self.data_sensitivity_ceiling,
        )


class _Admission(_Request):
    agent_id: Annotated[UuidText | None, NotNull] = Field(
        default=None,
        description="If present, it must be the session's agent.",
    )
    data_sensitivity: Annotated[Tier | None, NotNull] = Field(
        default=None,
        description="The tier of data that the calls touch. If present, it must be at most "
        "the session's ceiling.",
    )


class RecordCall(_Admission):
    """One tool call."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"tool_name": "read_file"}]})

    tool_name: ToolName = Field(description="The tool, compared byte for byte.")


class RecordBatch(_Admission):
    """Several tool calls. Either all are admitted or none."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"tool_names": ["read_file", "fs.list"]}]}
    )

    tool_names: list[ToolName] = Field(
        max_length=MAX_BATCH,
        description="The tools, one per call. An empty batch records nothing.",
    )


class UpdateSession(_Request):
    """New terms for a running session. What is left out stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"add_calls": 50}]})

    call_budget: Annotated[Count | None, NotNull] = Field(
        default=None,
        description="Calls over the whole life. Below calls_made, none are left.",
    )
    add_calls: Annotated[Count | None, NotNull] = Field(
        default=None, description="Calls to add to the budget."
    )
    time_limit_secs: Annotated[Count | None, NotNull] = Field(
        default=None,
        description="Lifetime in seconds, from created_at. One that has passed already expires "
        "the session now.",
    )
    add_secs: Annotated[Count | None, NotNull] = Field(
        default=None, description="Seconds to add to the time limit."
    )
    authorized_tools: Annotated[list[ToolEntry] | None, NotNull] = Field(
        default=None, max_length=MAX_ENTRIES, description="The new allow-list."
    )
    add_tools: Annotated[list[ToolEntry] | None, NotNull] = Field(
        default=None, max_length=MAX_ENTRIES, description="Entries to add to the allow-list."
    )
    remove_tools: Annotated[list[ToolEntry] | None, NotNull] = Field(
        default=None,
        max_length=MAX_ENTRIES,
        description="Entries to remove from the allow-list. Each must be an entry of it: a "
        "tool that a pattern covers can only be removed with the pattern.",
    )
    rate_limit_per_minute: Count | None = Field(
        default=None,
        description="Calls per window of rate_limit_window_secs. null removes the limit.",
        json_schema_extra={"nullable": True},
    )
    rate_limit_window_secs: Annotated[
        Annotated[
            int,
            Field(ge=1, le=MAX_RATE_LIMIT_WINDOW_SECS, json_schema_extra={"format": "int32"}),
        ]
        | None,
        NotNull,
    ] = Field(default=None, description="Length of a rate window in seconds.")
    data_sensitivity_ceiling: Annotated[Tier | None, NotNull] = Field(
        default=None, description="The highest tier that a call may touch."
    )
    expected_revision: Annotated[Count | None, NotNull] = Field(
        default=None,
        description="Refuse the change with revision_conflict if the session has another "
        "revision.",
    )

    @model_validator(mode="after")
    def _one_way_only(self) -> Self:
        for absolute, relative in _EITHER_OR:
            if absolute in self.model_fields_set and relative in self.model_fields_set:
                raise ValueError(f"{absolute} and {relative} cannot be sent together")
        return self

    @property
    def is_relative(self) -> bool:
        """Whether a repetition would change the session again."""
        # To add or remove a tool twice comes to the same.
        return bool(self.add_calls or self.add_secs)

    def to_amendment(self) -> Amendment:
        """Return the requested changes."""
        tools = self.authorized_tools
        return Amendment(
            call_budget=self.call_budget,
            add_calls=self.add_calls,
            time_limit_secs=self.time_limit_secs,
            add_secs=self.add_secs,
            authorized_tools=None if tools is None else tuple(tools),
            add_tools=tuple(self.add_tools or ()),
            remove_tools=tuple(self.remove_tools or ()),
            rate_limit_per_minute=(
                self.rate_limit_per_minute
                if "rate_limit_per_minute" in self.model_fields_set
                else UNSET
            ),
            rate_limit_window_secs=self.rate_limit_window_secs,
            data_sensitivity_ceiling=self.data_sensitivity_ceiling,
            expected_revision=self.expected_revision,
        )


_EITHER_OR = (
    ("call_budget", "add_calls"),
    ("time_limit_secs", "add_secs"),
    ("authorized_tools", "add_tools"),
    ("authorized_tools", "remove_tools"),
)
"""Fields and their relative forms."""


class UpdateReplica(_Request):
    """What to change about a process. What is left out stays as it is."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"draining": True}]})

    draining: Annotated[bool | None, NotNull] = Field(
        default=None,
        description="true: /readyz answers 503 shutting_down, and everything goes on being "
        "served. false undoes it, but not the draining after SIGTERM.",
    )
    log_level: Annotated[LogLevel | None, NotNull] = Field(
        default=None, description="The level of the log, until the process ends."
    )


class Paused(BaseModel):
    """Who paused a session, when and why."""

    at: datetime
    by: Annotated[str | None, NotNull] = Field(
        default=None, description="The name of the key, if there are keys."
    )
    reason: Annotated[str | None, NotNull] = Field(
        default=None, description="Absent if none was given."
    )


class Session(BaseModel):
    """A session as it is now."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "session_id": SESSION_ID_EXAMPLE,
                    "agent_id": AGENT_ID_EXAMPLE,
                    "declared_intent": "Summarise the open incidents",
                    "delegation_chain_snapshot": [],
                    "authorized_tools": ["read_file", "fs.*"],
                    "time_limit_secs": 3600,
                    "call_budget": 100,
                    "rate_limit_per_minute": 60,
                    "rate_limit_window_secs": 60,
                    "data_sensitivity_ceiling": "internal",
                    "created_at": "2026-01-01T12:00:00.000000Z",
                    "expires_at": "2026-01-01T13:00:00.000000Z",
                    "revision": 1,
                    "calls_made": 1,
                    "calls_remaining": 99,
                    "rate_window_start": "2026-01-01T12:00:00.000000Z",
                    "rate_window_calls": 1,
                    "status": "active",
                    "is_active": True,
                }
            ]
        },
    )

    session_id: UuidText = Field(description="A capability. Treat it as a secret.")
    agent_id: UuidText
    declared_intent: str
    delegation_chain_snapshot: list[str]
    authorized_tools: list[str]
    time_limit_secs: Count
    call_budget: Count
    rate_limit_per_minute: Annotated[Count | None, NotNull] = Field(
        default=None,
        description="Absent if there is no rate limit.",
    )
    rate_limit_window_secs: Count
    data_sensitivity_ceiling: DataSensitivity
    created_at: datetime
    expires_at: datetime
    revision: Count = Field(description="1 at first; grows with every change of the terms.")
    calls_made: Count
    calls_remaining: Count
    rate_window_start: datetime
    rate_window_calls: Count
    status: SessionStatus
    is_active: bool = Field(description="Whether it is active with budget left.")
    paused: Annotated[Paused | None, NotNull] = Field(
        default=None,
        description="Who paused it. Only for keys of operators, from the routes about one "
        "session, and while it is paused.",
    )


class SessionPage(BaseModel):
    """A page of sessions, in the order of their deadlines."""

    items: list[Session]
    next_cursor: Annotated[str | None, NotNull] = Field(
        default=None,
        description="The cursor of the next page. Absent on the last page.",
    )


class Agent(BaseModel):
    """An agent as it is now."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "agent_id": AGENT_ID_EXAMPLE,
                    "active_sessions": 2,
                    "paused_sessions": 0,
                    "frozen": False,
                }
            ]
        },
    )

    agent_id: UuidText
    active_sessions: Count
    paused_sessions: Count
    frozen: bool = Field(description="Whether everything that it does is denied.")
    frozen_at: Annotated[datetime | None, NotNull] = Field(
        default=None, description="Absent if it is not frozen."
    )
    frozen_by: Annotated[str | None, NotNull] = Field(
        default=None, description="The name of the key that froze it, if there are keys."
    )
    reason: Annotated[str | None, NotNull] = Field(
        default=None, description="Why it is frozen. Absent if none was given."
    )


class AgentPage(BaseModel):
    """A page of frozen agents, in the order of their ids."""

    items: list[Agent]
    next_cursor: Annotated[str | None, NotNull] = Field(
        default=None,
        description="The cursor of the next page. Absent on the last page.",
    )


class Reason(_Request):
    """Why an operator does something."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"reason": "Deletes files that it should read"}]}
    )

    reason: Annotated[str, StringConstraints(max_length=MAX_INTENT_CHARS)] = Field(
        default="", description="For people. Stored, never interpreted."
    )


NO_REASON = Reason()
"""What a request without a body means."""


class AgentSessionsClosed(BaseModel):
    """The result of the kill switch."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"agent_id": AGENT_ID_EXAMPLE, "closed": 2}]}
    )

    agent_id: UuidText
    closed: Count


class Violation(BaseModel):
    """A rule that the request violates."""

    code: ProblemCode
    limit: Count = Field(default=0, description="The call budget or the rate limit.")
    used: Count = Field(default=0, description="How much of the limit is used.")
    requested: Count = Field(default=0, description="How many calls the request makes.")
    ceiling: DataSensitivity = Field(
        default=DataSensitivity.INTERNAL, description="The highest tier that calls may touch."
    )
    tool_indexes: list[Count] = Field(
        default=[], description="Positions in the batch, from 0, of tools that are not allowed."
    )


class DeniedOperation(StrEnum):
    """What was denied."""

    CREATE = "create"
    CALL = "call"
    BATCH = "batch"
    CLOSE = "close"
    AMEND = "amend"
    PAUSE = "pause"
    RESUME = "resume"


class Denial(BaseModel):
    """A request that was denied."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "at": "2026-01-01T12:00:00.000000Z",
                    "operation": "call",
                    "code": "tool_not_authorized",
                    "session_id": SESSION_ID_EXAMPLE,
                    "agent_id": AGENT_ID_EXAMPLE,
                    "caller": "gate",
                    "request_id": "4f1d2c3b5a69-2a",
                    "tools": ["delete_file"],
                    "dry_run": False,
                    "violations": [{"code": "tool_not_authorized", "tool_indexes": [0]}],
                }
            ]
        }
    )

    at: datetime
    operation: DeniedOperation
    code: DenialCode
    session_id: Annotated[UuidText | None, NotNull] = Field(
        default=None, description="A capability. Treat it as a secret. Absent for a creation."
    )
    agent_id: Annotated[UuidText | None, NotNull] = Field(
        default=None,
        description="The agent of the session. If the session is unknown, the agent that the "
        "request named; absent if it named none.",
    )
    caller: str = Field(description="The name of the key; empty if the service has no keys.")
    request_id: str
    tools: list[str] = Field(max_length=MAX_BATCH, description="The tools of the request.")
    dry_run: bool
    violations: list[Violation] = Field(description="All rules that the request violated.")


class DenialPage(BaseModel):
    """The latest denials, newest first."""

    items: list[Denial]


class Replica(BaseModel):
    """The process that answers."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "version": "0.1.0",
                    "store": "redis://arbiter:***@engine:6379/0",
                    "started_at": "2026-01-01T12:00:00.000000Z",
                    "draining": False,
                    "log_level": "info",
                    "pid": 1,
                }
            ]
        }
    )

    version: str
    store: str = Field(description="The URL of the store, without secrets.")
    started_at: datetime
    draining: bool = Field(
        description="Whether /readyz answers 503 although everything is served: because an "
        "operator said so, or because the process is stopping."
    )
    log_level: LogLevel
    pid: Count = Field(description="The id of the process, which tells workers apart.")


class Health(BaseModel):
    """The service is healthy."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"status": "ok"}]})

    status: str
