"""How much the service may hold, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

TOO_MANY_CREATIONS = (
    "The store cannot remember another creation with this caller's Idempotency-Key; nothing "
    "was created. Retry later, omit the key, or raise ARBITER_MAX_SESSIONS."
)
"""The message of `SessionLimitReached` when the key of a creation cannot be remembered."""

TOO_MANY_CALLS = (
    "The store cannot remember another call with this caller's Idempotency-Key; nothing was "
    "recorded. Retry later, omit the key, or raise ARBITER_MAX_REMEMBERED_CALLS."
)
"""The message of `SessionLimitReached` when the key of a call cannot be remembered."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """How much a store may hold, and for how long."""

    retention_secs: int = 300
    max_sessions: int = 1_000_000
    """The most sessions in the store, including ended ones not yet removed."""
    max_active_sessions_per_agent: int | None = None
    max_remembered_calls: int = 2_000_000
    """How many calls with idempotency keys of one caller a store keeps in memory. All callers
    together may have twice as many (`FairShare`). Stores that keep them elsewhere are limited
    by the engine."""

    @property
    def max_remembered_creations(self) -> int:
        """How many creations are remembered by idempotency key. One caller alone may have half
        of them (`FairShare`), which is as many as there may be sessions."""
        return 2 * self.max_sessions
