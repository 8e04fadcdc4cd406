"""The latest denials that this process gave, in memory.

Recording a denial must be cheap, because an attack causes very many. It appends one tuple; the
rest is built when an operator asks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from app.domain.admission import Denied, Violation
from app.domain.advice import DenialCode
from app.observability.audit import Actor

MAX_DENIALS = 10_000
MAX_TOOL_NAMES = 65_536
"""Names of tools in all of them. 10,000 batches of long names would take 450 MB."""


class Denial(NamedTuple):
    """A request that was denied. It holds no session, whose grant can be large."""

    at: int
    """Microseconds since the Unix epoch, by the wall clock of this machine."""
    operation: str
    """`create`, `call`, `batch`, `close`, `amend`, `pause` or `resume`."""
    code: DenialCode
    actor: Actor
    session_id: str
    """Empty for a creation."""
    agent_id: str
    """The session's agent. If the session is unknown, the agent that the request named, which
    can be empty."""
    tools: tuple[str, ...]
    dry_run: bool
    violations: tuple[Violation, ...]


_TOOLS = Denial._fields.index("tools")


class Denials:
    """The latest `MAX_DENIALS` denials; fewer if they are about more than `MAX_TOOL_NAMES`
    tools together."""

    def __init__(self, now: Callable[[], int] = lambda: time.time_ns() // 1000) -> None:
        self._now = now
        self._kept: deque[tuple[Any, ...]] = deque()
        self._tool_names = 0

    def note(
        self,
        operation: str,
        denied: Denied,
        actor: Actor,
        *,
        session_id: str = "",
        agent_id: str = "",
        tools: tuple[str, ...] = (),
        dry_run: bool = False,
    ) -> None:
        """Remember a denial. `agent_id` is the agent that the request named, if any."""
        session = denied.session
        if session is not None:
            agent_id = session.grant.agent_id
        kept = self._kept
        if len(kept) >= MAX_DENIALS:
            self._forget_oldest()
        # The fields of `Denial` in order. Making one here would take twice as long.
        kept.append(
            (
                self._now(),
                operation,
                denied.code,
                actor,
                session_id,
                agent_id,
                tools,
                dry_run,
                denied.violations,
            )
        )
        self._tool_names += len(tools)
        while self._tool_names > MAX_TOOL_NAMES:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        self._tool_names -= len(self._kept.popleft()[_TOOLS])

    def latest(
        self,
        *,
        limit: int,
        session_id: str | None = None,
        agent_id: str | None = None,
        code: DenialCode | None = None,
        request_id: str | None = None,
        since: int | None = None,
    ) -> Iterator[Denial]:
        """The latest denials that match every filter given, newest first, and not before the
        instant `since`. Read them before another is noted."""
        found = (
            denial
            for denial in map(Denial._make, reversed(self._kept))
            if (session_id is None or denial.session_id == session_id)
            and (agent_id is None or denial.agent_id == agent_id)
            and (code is None or denial.code is code)
            and (request_id is None or denial.actor.request_id == request_id)
            and (since is None or denial.at >= since)
        )
        return islice(found, limit)
