"""The errors of the service. A denial is a value (see `admission`), not an error: an
error means that the service could not decide.

    ArbiterError
    ├── InvalidField        the request breaks a rule of this server's configuration
    ├── StoreUnusable       the store cannot be opened as it is configured; at start only
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


class StoreUnusable(ArbiterError):
    """The session store cannot be used as it is configured."""


class TransientError(ArbiterError):
    """The service cannot decide just now; nothing was recorded."""


class StoreUnavailable(TransientError):
    """The session store does not answer just now; nothing was recorded."""


class Overloaded(TransientError):
    """The service holds as many sessions as it is configured to hold."""


class ShuttingDown(TransientError):
    """This process is about to stop; ask another one."""
