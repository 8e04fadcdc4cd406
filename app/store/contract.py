"""The contract of a session store. A backend can be written from this page alone; the
contract tests in `tests/store` run over every backend.

Every backend promises:

- **One verb, one atomic step.** No method reads, awaits and then writes. Racing requests
  take effect one after another, and each sees the state that the previous one left.
- **Only success is recorded.** A denial or a dry run changes nothing, and neither does an
  exception, except where `StoreUnavailable` leaves the outcome unknown.
- **The store owns the clock.** An operation reads it once, and it never runs backwards.
  Returned sessions carry that instant as `as_of`. All instants are integer microseconds
  since the Unix epoch.
- **Ended sessions stay for a while.** An expired or closed session is reported as such until
  `StoreLimits.retention_secs` after it ended. After that it may be removed, and is unknown.
- **Errors.** Every method raises `StoreUnavailable` if it cannot establish the outcome, and
  `StoreUnreachable` only if it is certain that nothing was recorded. An unknown outcome is
  never reported as success.

Session and agent ids are canonical lower-case UUIDs. Callers have validated all arguments.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from app.domain.admission import Admission, Admitted, Denied
from app.domain.idempotency import ChangeKey, CreationKey, IdempotencyKey
from app.domain.lifecycle import Changed, Transition
from app.domain.session import AgentState, Freeze, Grant, Session, SessionStatus
from app.domain.verbs import Swept


class Totals(NamedTuple):
    """What the store holds now."""

    active: int
    paused: int
    frozen_agents: int
    log_bytes: int | None = None
    """The size of the write-ahead log, if the store has one."""


class SessionFilter(NamedTuple):
    """Which sessions to list. `None` matches any."""

    agent_id: str | None = None
    status: SessionStatus | None = None
    tool: str | None = None
    """A tool that the session's allow-list covers."""
    max_calls_remaining: int | None = None
    expires_before: int | None = None
    """An instant; the deadline is before it."""

    @property
    def is_selective(self) -> bool:
        """Whether sessions must be looked at one by one to find those that match."""
        return self.tool is not None or self.max_calls_remaining is not None

    def matches(self, session: Session) -> bool:
        """Whether the session is one of these, apart from its agent and its deadline."""
        most = self.max_calls_remaining
        return (
            self.status in (None, session.status)
            and (self.tool is None or session.grant.authorized_tools.allows(self.tool))
            and (most is None or session.calls_remaining <= most)
        )


LOOKED_AT_MOST = 5000
"""Sessions that one page of a list looks at. With a filter it may have fewer than it could,
although more follow."""


class Page(NamedTuple):
    """One page of sessions. `next_cursor` is `None` on the last page."""

    sessions: list[Session]
    next_cursor: str | None


class FrozenAgents(NamedTuple):
    """One page of frozen agents. `next_cursor` is `None` on the last page."""

    agents: list[tuple[str, Freeze]]
    next_cursor: str | None


class InvalidCursor(ValueError):
    """The cursor was not issued by this store."""


class SessionStore(ABC):
    """Where sessions live."""

    waits_apart: ClassVar[bool] = True
    """Whether every request waits for an answer of its own. If not, it waits for nothing but in
    long lists, or many wait for the same future: then a request needs no task."""

    @abstractmethod
    async def open(self) -> None:
        """Make the store ready for use. Called once, before any other method.

        Raises `StoreUnusable` if the store cannot be used as configured.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Release the resources that `open` acquired. Called once, as the last method."""

    @abstractmethod
    async def ping(self) -> None:
        """Return if the store can serve requests now. Raises `StoreUnavailable` if not."""

    @abstractmethod
    async def create(
        self, grant: Grant, idempotency: CreationKey | None = None
    ) -> Admitted | Denied:
        """Create a session that begins now, under a new random id.

        If the caller used the idempotency key for this agent in the last 24 hours, return the
        session as it was created then (`replayed`) if the request is equal, else
        `idempotency_conflict`. Before that check, `agent_frozen` applies; only after it does
        the cap on active and paused sessions: `too_many_sessions`, with `limit` and `used`.
        Sessions past their deadline do not count, swept or not. Look-up, count and creation
        are one atomic step.

        Raises `SessionLimitReached` if the store holds `max_sessions` sessions or, for a
        request with a key, remembers as many creations as are the caller's share.
        """

    @abstractmethod
    async def find_creation(
        self, agent_id: str, idempotency: CreationKey
    ) -> Admitted | Denied | None:
        """What `create` would answer to this key from memory, or `None`. Creates nothing."""

    @abstractmethod
    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None = None,
        *,
        dry_run: bool = False,
    ) -> Admitted | Denied:
        """Decide and, if admitted, count the calls, in one atomic step
        (`app.domain.admission`).

        Denied with `session_not_found` if the session does not exist. If the idempotency
        key was admitted before in this session, and while rules 2 to 6 hold, return the
        session with its usage as it was then (`replayed`) and count nothing if the admission
        is equal, else `idempotency_conflict`. A dry run gives the same answer and records
        nothing, not even the key. The key of an empty batch is not remembered either.

        Raises `SessionLimitReached` if an admission with a key cannot be remembered.

        The cost does not depend on the number of sessions or, for exact tool names, on the
        length of the allow-list.
        """

    @abstractmethod
    async def change(
        self, session_id: str, transition: Transition, idempotency: ChangeKey | None = None
    ) -> Changed | Denied:
        """Change the terms of a session in one atomic step (`app.domain.lifecycle`).

        `session_not_found`, or the denial that the transition returns; then nothing has
        changed. Usage is never touched. The transition may be called several times, and what
        it raises is raised here.

        If the idempotency key was used before in this session, and the session has not ended,
        change nothing: `Changed` with `replayed` and the session as it is now, or
        `idempotency_conflict` if the request was another one. The key is remembered with the
        session, even of a change that changes nothing; not of a denial.
        """

    @abstractmethod
    async def get(self, session_id: str) -> Session | None:
        """The session as it is now, or `None` if it does not exist."""

    @abstractmethod
    async def list_all(
        self, which: SessionFilter, *, limit: int, cursor: str | None = None
    ) -> Page:
        """At most `limit` sessions after `cursor`, in order of deadline. Looks at no more than
        `LOOKED_AT_MOST` sessions.

        Statuses follow the clock. A cursor stays valid while sessions come and go: a session
        that exists throughout is listed exactly once. Raises `InvalidCursor`.
        """

    @abstractmethod
    async def get_agent(self, agent_id: str) -> AgentState:
        """The agent as it is now: how many of its sessions are active and paused, without a
        scan, and whether it is frozen. An agent never seen has none and is not."""

    @abstractmethod
    async def freeze(self, agent_id: str, reason: str, actor: str) -> AgentState:
        """Deny everything to the agent, from now on and until `unfreeze`: creations, and calls
        in all of its sessions, with `agent_frozen`. Nothing is closed. Survives whatever the
        sessions of this store survive. If it is frozen already, only the reason changes."""

    @abstractmethod
    async def unfreeze(self, agent_id: str) -> AgentState:
        """Undo `freeze`. Does nothing if the agent is not frozen."""

    @abstractmethod
    async def list_frozen(self, *, limit: int, cursor: str | None = None) -> FrozenAgents:
        """At most `limit` frozen agents after `cursor`, in the order of their ids. Raises
        `InvalidCursor`."""

    @abstractmethod
    async def totals(self) -> Totals:
        """How many sessions are active and paused now, and how many agents are frozen, without
        a scan."""

    @abstractmethod
    async def close_sessions_for_agent(self, agent_id: str, actor: str) -> list[str]:
        """Close every active or paused session of the agent in one atomic step, in the name of
        `actor`. Return their ids."""

    @abstractmethod
    async def cleanup_expired(self, limit: int) -> Swept:
        """Remove up to `limit` sessions that ended at least `retention_secs` ago.

        Admissions remembered with a session count towards `limit` too, where removing them
        is work. So each call is bounded, and the caller can yield between calls.
        """
