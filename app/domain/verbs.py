"""The verbs."""

from __future__ import annotations

from typing import NamedTuple


class Swept(NamedTuple):
    """What one slice of a sweep removed."""

    expired: int
    """Removed sessions that expired without being closed."""
    closed: int
    """Removed sessions that had been closed."""
    more: bool
    """Whether to sweep another slice at once."""
