"""The errors of the service. A denial is a value (see `admission`), not an error: an
error means that the service could not decide.

    ArbiterError
    ├── InvalidField        the request breaks a rule of this server's configuration
    ├── Unusable            what is configured cannot be used; at start only
    │   ├── StoreUnusable
    │   └── AuditUnusable
    └── TransientError      trying again may help; nothing was recorded
        ├── StoreUnavailable
        ├── Overloaded
        └── ShuttingDown

The docstring of a class is its default message.
"""

from __future__ import annotations


class ArbiterError(Exception):
    """The service could not decide."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or (self.__doc__ or "").strip())


class InvalidField(ArbiterError):
    """A field of the request has a value that this server does not accept."""

    def __init__(self, location: str, field: str, message: str) -> None:
        super().__init__(message)
        self.location = location
        """Where the field stands: `body`, `query` or `header`."""
        self.field = field


class Unusable(ArbiterError):
    """The service cannot start as it is configured."""


class StoreUnusable(Unusable):
    """The session store cannot be used as it is configured."""


class AuditUnusable(Unusable):
    """The audit log cannot be written where it is configured."""


class TransientError(ArbiterError):
    """The service cannot decide just now; nothing was recorded."""

    code = "transient"
    """As it stands on the wire."""


class StoreUnavailable(TransientError):
    """The session store does not answer just now; nothing was recorded."""

    code = "store_unavailable"


class Overloaded(TransientError):
    """The service holds as many sessions as it is configured to hold."""

    code = "overloaded"


class ShuttingDown(TransientError):
    """This process is about to stop; ask another one."""

    code = "shutting_down"
