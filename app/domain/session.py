"""A task session: one agent's grant for one task, and how much of it has been used.

A session has two halves that change for different reasons. `Terms` are what it allows;
transitions change them (`app.domain.lifecycle`). `Usage` is what admissions count. Neither
ever touches the other.

Inside the service, instants are integer microseconds since the Unix epoch, in UTC. Names
that end in `_secs` are whole seconds, the unit on the wire.

All values here are immutable, so every `Session` that a store returns is a snapshot. They
are msgspec structs with `gc=False`: they cannot be part of a reference cycle, and the
garbage collector must not visit a million of them.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

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
    """The sensitivity of the data that a call touches, lowest tier first."""

    PUBLIC = "public"
    INTERNAL = "internal"
    CONFIDENTIAL = "confidential"
    RESTRICTED = "restricted"

    @property
    def rank(self) -> int:
        """The position of the tier, from 0 for the lowest."""
        return _TIER[self]

    def exceeds(self, ceiling: DataSensitivity) -> bool:
        """Return whether this tier is above `ceiling`."""
        return _TIER[self] > _TIER[ceiling]


_TIER = {tier: rank for rank, tier in enumerate(DataSensitivity)}


class SessionStatus(StrEnum):
    """Where a session is in its life. A closed session stays closed past its deadline."""

    ACTIVE = "active"
    PAUSED = "paused"
    CLOSED = "closed"
    EXPIRED = "expired"


class Grant(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What a caller asks for when it creates a session."""

    agent_id: str
    declared_intent: str
    authorized_tools: AllowList
    delegation_chain_snapshot: tuple[str, ...] = ()
    time_limit_secs: int = DEFAULT_TIME_LIMIT_SECS
    call_budget: int = DEFAULT_CALL_BUDGET
    rate_limit_per_minute: int | None = None
    """Calls per window, despite the name. `None` means no limit; 0 admits no call."""
    rate_limit_window_secs: int = DEFAULT_RATE_LIMIT_WINDOW_SECS
    data_sensitivity_ceiling: DataSensitivity = DataSensitivity.INTERNAL


class ClosedBy(msgspec.Struct, frozen=True, gc=False):
    """Who closed a session, and how."""

    actor: str
    """The name of the API key; empty if the service runs without keys."""
    kill_switch: bool = False
    """Whether all sessions of the agent were closed together."""


class PausedBy(msgspec.Struct, frozen=True, gc=False):
    """Who paused a session, and why."""

    actor: str
    """The name of the API key; empty if the service runs without keys."""
    reason: str = ""


class Marks(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Who did what to a session: the part of its terms that stores keep as one text."""

    closed_by: ClosedBy | None = None
    paused_by: PausedBy | None = None


class Terms(msgspec.Struct, frozen=True, gc=False):
    """What a session allows, and when it began and ends."""

    grant: Grant
    created_at: int
    expires_at: int
    """The first instant at which the session is expired."""
    closed_at: int | None = None
    rev: int = 1
    """Grows by one with every change of the terms. Anything cached about them is good for one
    session id and one `rev`."""
    closed_by: ClosedBy | None = None
    """`None` if it is not closed."""
    paused_at: int | None = None
    paused_by: PausedBy | None = None
    """`None` if it is not paused."""

    def changed(self, **changes: Any) -> Terms:
        """The next revision, with these changes."""
        return msgspec.structs.replace(self, rev=self.rev + 1, **changes)


class Freeze(msgspec.Struct, frozen=True, gc=False):
    """A stop for everything that an agent does, until it is lifted."""

    frozen_at: int
    reason: str = ""
    by: str = ""
    """The name of the API key; empty if the service runs without keys."""


class AgentState(msgspec.Struct, frozen=True, gc=False):
    """An agent as it is now."""

    active_sessions: int
    paused_sessions: int
    freeze: Freeze | None = None


class Usage(msgspec.Struct, frozen=True, gc=False):
    """What admissions have counted."""

    calls_made: int
    rate_window_start: int
    rate_window_calls: int


class Session(msgspec.Struct, frozen=True, gc=False):
    """A session as it was at the instant `as_of`."""

    session_id: str
    terms: Terms
    usage: Usage
    as_of: int

    @classmethod
    def opened(cls, session_id: str, grant: Grant, now: int) -> Session:
        """A new session that begins at `now`, together with its first rate window."""
        terms = Terms(grant, now, now + grant.time_limit_secs * MICROSECONDS)
        return cls(session_id, terms, Usage(0, now, 0), now)

    @property
    def grant(self) -> Grant:
        """What the session allows."""
        return self.terms.grant

    @property
    def status(self) -> SessionStatus:
        """Where the session is in its life at `as_of`."""
        if self.terms.closed_at is not None:
            return SessionStatus.CLOSED
        if self.as_of >= self.terms.expires_at:
            return SessionStatus.EXPIRED
        if self.terms.paused_at is not None:
            return SessionStatus.PAUSED
        return SessionStatus.ACTIVE

    @property
    def calls_remaining(self) -> int:
        """Calls left in the budget; 0 if it was lowered below the calls made."""
        # Not max(), which takes longer: this runs for every admission.
        left = self.terms.grant.call_budget - self.usage.calls_made
        return left if left > 0 else 0  # noqa: FURB136

    @property
    def is_active(self) -> bool:
        """Whether the session can still admit a call: active, with budget left."""
        return self.calls_remaining > 0 and self.status is SessionStatus.ACTIVE

    @property
    def window_ends_at(self) -> int:
        """The first instant at which the current rate window has elapsed."""
        window = self.terms.grant.rate_limit_window_secs * MICROSECONDS
        return self.usage.rate_window_start + window

    @property
    def window_calls_used(self) -> int:
        """Calls that count against the rate limit; 0 once the window has elapsed."""
        return self.usage.rate_window_calls if self.as_of < self.window_ends_at else 0

    def with_calls(self, n: int, now: int, *, new_window: bool) -> Session:
        """The session after `n` more calls at `now`, in the current or a new rate window."""
        usage = self.usage
        if new_window:
            counted = Usage(usage.calls_made + n, now, n)
        else:
            start, calls = usage.rate_window_start, usage.rate_window_calls
            counted = Usage(usage.calls_made + n, start, calls + n)
        return Session(self.session_id, self.terms, counted, now)

    def with_terms(self, terms: Terms, now: int) -> Session:
        """The session after its terms changed at `now`."""
        return Session(self.session_id, terms, self.usage, now)

    def at(self, now: int) -> Session:
        """The same session as of `now`."""
        return Session(self.session_id, self.terms, self.usage, now)
