"""Logs when a store becomes unavailable and when it recovers."""

from __future__ import annotations

import logging

_log = logging.getLogger("arbiter.store")


class Availability:
    """Remembers the last outcome, so that an outage takes two lines in the log."""

    def __init__(self) -> None:
        self._failing = False

    def failed(self, reason: str) -> None:
        """Record that an operation failed."""
        if not self._failing:
            self._failing = True
            _log.error("store unavailable: %s", reason)

    def succeeded(self) -> None:
        """Record that an operation succeeded."""
        if self._failing:
            self._failing = False
            _log.warning("store available again")
