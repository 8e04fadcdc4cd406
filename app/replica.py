"""This process as operators see it, and what they can change about it while it runs."""

from __future__ import annotations

import os
from typing import NamedTuple

from app import __version__
from app.observability.audit import Actor
from app.observability.events import Events
from app.observability.logs import LogLevel, is_more_verbose, log_level
from app.service import SessionService


class ReplicaState(NamedTuple):
    """A process, at one instant."""

    version: str
    store: str
    """Its URL, without secrets."""
    started_at: int
    """Microseconds since the Unix epoch."""
    draining: bool
    """Whether `/readyz` answers 503: an operator asked for that, or the process is stopping."""
    log_level: LogLevel
    pid: int


class Replica:
    """The process that serves `service` over `store`, a URL without secrets, since
    `started_at`, in microseconds. Workers of one parent are replicas too: a change concerns
    one of them."""

    def __init__(
        self, service: SessionService, events: Events, store: str, started_at: int
    ) -> None:
        self._service = service
        self._events = events
        self._store = store
        self._started_at = started_at

    def state(self) -> ReplicaState:
        """The process as it is now."""
        return ReplicaState(
            __version__,
            self._store,
            self._started_at,
            self._service.draining,
            log_level(),
            os.getpid(),
        )

    def update(
        self,
        actor: Actor,
        *,
        draining: bool | None = None,
        level: LogLevel | None = None,
    ) -> ReplicaState:
        """Change what is given, report what differs from before, and return the state.

        A process that stops goes on draining, whatever is asked for.
        """
        before = self.state()
        if draining is not None:
            self._service.drain(on=draining)
        changed: dict[str, bool | str] = {}
        if self._service.draining != before.draining:
            changed["draining"] = self._service.draining
        if level is not None and level != before.log_level:
            changed["log_level"] = level
        # The line about the change is written under the more verbose of both levels.
        if level is not None and is_more_verbose(level, before.log_level):
            self._events.apply_log_level(level)
        if changed:
            self._events.replica_changed(changed, actor)
        if level is not None:
            self._events.apply_log_level(level)
        return self.state()
