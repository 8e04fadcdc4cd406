"""Errors: the service could not decide. A denial is a value (`admission`), not an error.

    ArbiterError
    ├── InvalidField        this server does not accept the value of a field
    ├── GrantExceedsKey     the caller's key may not grant this (`app.domain.ceilings`)
    ├── Unusable            the configuration cannot be used; raised only at start
    │   ├── StoreUnusable
    │   └── AuditUnusable
    └── TransientError      a retry may succeed
        ├── StoreUnavailable
        │   └── StoreUnreachable
        ├── SessionLimitReached
        └── ShuttingDown

The docstring of a class is its default message.
"""

from __future__ import annotations


class ArbiterError(Exception):
    """The service could not decide on the request."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class InvalidField(ArbiterError):
    """This server does not accept the value of a field in the request."""

    def __init__(self, location: str, field: str, message: str) -> None:
        super().__init__(message)
        self.location = location
        """The part of the request with the field: `body`, `query` or `header`."""
        self.field = field


class Unusable(ArbiterError):
    """The service cannot start with this configuration."""


class StoreUnusable(Unusable):
    """The session store cannot be used; check ARBITER_STORE_URL."""


class AuditUnusable(Unusable):
    """The audit log cannot be written; check ARBITER_AUDIT_LOG."""


class TransientError(ArbiterError):
    """The service cannot decide right now; try again in a moment."""

    code = "transient"
    """The problem code on the wire."""
    outcome_unknown = True
    """Whether the request may have been recorded. False only where that is certain."""


class StoreUnavailable(TransientError):
    """The session store did not respond in time; the request may have been recorded."""

    code = "store_unavailable"


class StoreUnreachable(StoreUnavailable):
    """The session store could not be reached, or refused the request; nothing was recorded."""

    outcome_unknown = False


class SessionLimitReached(TransientError):
    """The store is full; nothing was recorded. Retry later, or raise ARBITER_MAX_SESSIONS."""

    code = "session_limit_reached"
    outcome_unknown = False


class ShuttingDown(TransientError):
    """This process is shutting down; send the request to another replica."""

    code = "shutting_down"
