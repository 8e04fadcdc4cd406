"""Whether a store answers, told to the log when it changes."""

from __future__ import annotations

import logging

_log = logging.getLogger("arbiter.store")


class Availability:
    """Remembers the last outcome, so that an outage is two lines in the log."""

    def __init__(self) -> None:
        self._failing = False

    def failed(self, reason: str) -> None:
        """A step failed."""
        if not self._failing:
            self._failing = True
            _log.error("store unavailable: %s", reason)

    def succeeded(self) -> None:
        """A step succeeded."""
        if self._failing:
            self._failing = False
            _log.warning("store available again")
