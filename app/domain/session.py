"""A task session: one agent's grant for one task, and how much of it has been used.

Instants are integer microseconds since the Unix epoch, in UTC, everywhere inside the
service; names that end in `_secs` are whole seconds, the unit of the wire.

All values here are immutable. What changes during a session's life is a handful of
counters, so a store replaces the `Session` and every `Session` handed out is a snapshot.

Both are msgspec structs with `gc=False`: they can be part of no cycle, and a million of
them must not be looked at by the garbage collector.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from app.domain.tools import AllowList

MICROSECONDS = 1_000_000
"""Microseconds in a second."""

MAX_INT32 = 2_147_483_647
DEFAULT_TIME_LIMIT_SECS = 3600
DEFAULT_CALL_BUDGET = 1000
DEFAULT_RATE_LIMIT_WINDOW_SECS = 60
MAX_RATE_LIMIT_WINDOW_SECS = 86_400
MAX_INTENT_CHARS = 1024
MAX_DELEGATIONS = 32
MAX_DELEGATION_CHARS = 256


class DataSensitivity(StrEnum):
    """How sensitive the data is that a call touches, lowest tier first."""

    PUBLIC = "public"
    INTERNAL = "internal"
    CONFIDENTIAL = "confidential"
    RESTRICTED = "restricted"

    @property
    def rank(self) -> int:
        """0 for the lowest tier, and one more for each above it."""
        return _TIER[self]

    def exceeds(self, ceiling: DataSensitivity) -> bool:
        """Whether this tier lies above `ceiling`."""
        return _TIER[self] > _TIER[ceiling]


_TIER = {tier: rank for rank, tier in enumerate(DataSensitivity)}


class SessionStatus(StrEnum):
    """Where a session is in its life. A closed session stays closed when its time runs out."""

    ACTIVE = "active"
    CLOSED = "closed"
    EXPIRED = "expired"


class Grant(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a session allows; fixed when it is created."""

    agent_id: str
    declared_intent: str
    authorized_tools: AllowList
    delegation_chain_snapshot: tuple[str, ...] = ()
    time_limit_secs: int = DEFAULT_TIME_LIMIT_SECS
    call_budget: int = DEFAULT_CALL_BUDGET
    rate_limit_per_minute: int | None = None
    """Calls per window, despite the name; `None` is no limit, 0 admits nothing."""
    rate_limit_window_secs: int = DEFAULT_RATE_LIMIT_WINDOW_SECS
    data_sensitivity_ceiling: DataSensitivity = DataSensitivity.INTERNAL


class Session(msgspec.Struct, frozen=True, gc=False):
    """A session as it was at the instant `as_of`."""

    session_id: str
    grant: Grant
    created_at: int
    expires_at: int
    """The first instant at which the session is expired."""
    as_of: int
    calls_made: int
    rate_window_start: int
    rate_window_calls: int
    closed_at: int | None

    @classmethod
    def opened(cls, session_id: str, grant: Grant, now: int) -> Session:
        """The session that begins `now`; its first rate window opens with it."""
        expires_at = now + grant.time_limit_secs * MICROSECONDS
        return cls(session_id, grant, now, expires_at, now, 0, now, 0, None)

    @property
    def status(self) -> SessionStatus:
        """Where the session is in its life, at `as_of`."""
        if self.closed_at is not None:
            return SessionStatus.CLOSED
        if self.as_of >= self.expires_at:
            return SessionStatus.EXPIRED
        return SessionStatus.ACTIVE

    @property
    def calls_remaining(self) -> int:
        """Calls left in the budget."""
        return self.grant.call_budget - self.calls_made

    @property
    def is_active(self) -> bool:
        """Whether the session can still admit a call: active, with budget left."""
        return self.calls_remaining > 0 and self.status is SessionStatus.ACTIVE

    @property
    def window_ends_at(self) -> int:
        """The first instant at which the current rate window has elapsed."""
        return self.rate_window_start + self.grant.rate_limit_window_secs * MICROSECONDS

    def with_calls(self, n: int, now: int, *, new_window: bool) -> Session:
        """The session after `n` more calls `now`, which open a new rate window or not."""
        return Session(
            self.session_id,
            self.grant,
            self.created_at,
            self.expires_at,
            now,
            self.calls_made + n,
            now if new_window else self.rate_window_start,
            n if new_window else self.rate_window_calls + n,
            self.closed_at,
        )

    @property
    def window_calls_used(self) -> int:
        """Calls that count against the rate limit: those of a window not yet elapsed."""
        return self.rate_window_calls if self.as_of < self.window_ends_at else 0

    def at(self, now: int) -> Session:
        """The same session, seen `now`."""
        return msgspec.structs.replace(self, as_of=now)

    def with_closed(self, now: int) -> Session:
        """The session after it was closed `now`."""
        return msgspec.structs.replace(self, as_of=now, closed_at=now)
