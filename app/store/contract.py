"""The contract of a session store. A backend can be written from this page alone; the
contract tests in `tests/store` run over every backend.

Every backend promises:

- **One verb, one atomic step.** Nothing is read, awaited and then written. Of requests that
  race, each sees the state that the one before it left.
- **Only what succeeded is recorded.** A denial, a dry run or an exception changes nothing.
- **The store has the clock.** It is read once for each operation, and it never runs
  backwards; the instant comes back as `as_of` of the session. All instants are integer
  microseconds since the Unix epoch.
- **Ended sessions stay.** An expired or closed session answers as such until
  `StoreLimits.retention_secs` after it ended; then it may be removed, and is unknown.
- **Errors.** Every method raises `StoreUnavailable` when the outcome could not be
  established. What is unknown is never reported as success.

Session and agent ids are canonical lower-case UUIDs. Callers have validated everything.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

from app.domain.admission import Admission, Admitted, Denied
from app.domain.session import Grant, Session, SessionStatus

CREATION_REPLAY_SECS = 24 * 3600
"""How long a creation can be replayed by its idempotency key."""

TOO_MANY_CREATIONS = (
    "The service remembers as many creations with an Idempotency-Key as it is configured to; "
    "nothing was created."
)
"""Says the `Overloaded` of a creation whose key there is no room for."""


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """What a store is configured to hold, and for how long."""

    retention_secs: int = 300
    max_sessions: int = 1_000_000
    """Sessions in the store, ended ones that are not yet removed included; and apart from
    them, creations that are remembered by their idempotency key."""
    max_active_sessions_per_agent: int | None = None


class IdempotencyKey(NamedTuple):
    """A key belongs to the caller who sent it: two callers' equal keys are two keys."""

    caller: str
    key: str


class SessionFilter(NamedTuple):
    """Which sessions to list; `None` is any."""

    agent_id: str | None = None
    status: SessionStatus | None = None


class Page(NamedTuple):
    """Some sessions, and where the next ones start; no cursor on the last page."""

    sessions: list[Session]
    next_cursor: str | None


class Swept(NamedTuple):
    """What one slice of a sweep removed."""

    expired: int
    """Removed sessions that had run out of time."""
    closed: int
    """Removed sessions that somebody had closed."""
    more: bool
    """Whether another slice is due at once."""


class InvalidCursor(ValueError):
    """The cursor was not made by this store."""


class SessionStore(ABC):
    """Where sessions live."""

    @abstractmethod
    async def open(self) -> None:
        """Make the store ready for use. Called once, before anything else.

        Raises `StoreUnusable` if it cannot be, as it is configured.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Release what `open` took. Called once; nothing is called afterwards."""

    @abstractmethod
    async def ping(self) -> None:
        """Return if the store can serve requests now; raise `StoreUnavailable` if not."""

    @abstractmethod
    async def create(
        self, session_id: str, grant: Grant, idempotency: IdempotencyKey | None = None
    ) -> Admitted | Denied:
        """Open a session that begins now, under an id that nobody has used.

        With an idempotency key that this caller has used in the last 24 hours, answer with
        the session of that time (`replayed`) if the grant is equal, else
        `idempotency_conflict`. Only then does the cap on active sessions apply:
        `too_many_sessions`, with `limit` and `used`. Sessions past their deadline do not
        count, swept or not. Look-up, count and creation are one step.

        Raises `Overloaded` when the store is full: `max_sessions` sessions, or for a
        request with a key, as many remembered creations.
        """

    @abstractmethod
    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None = None,
        *,
        dry_run: bool = False,
    ) -> Admitted | Denied:
        """Decide, and if admitted count the calls, in one step (`app.domain.admission`).

        `session_not_found` if there is no such session. With an idempotency key that was
        admitted before in this session, and while rules 2 to 4 hold, answer with the
        session of that time (`replayed`) and count nothing if the admission is equal, else
        `idempotency_conflict`. A dry run answers the same and records nothing, the key
        included; nor is the key of an empty batch remembered.

        The cost does not depend on the number of sessions or, for exact tool names, on the
        length of the allow-list.
        """

    @abstractmethod
    async def close(self, session_id: str) -> Session | Denied:
        """Close the session for good and return it; an expired one too.

        `session_not_found`, or `session_closed` if it was closed before.
        """

    @abstractmethod
    async def get(self, session_id: str) -> Session | None:
        """The session as it is now, or `None`."""

    @abstractmethod
    async def list_all(
        self, which: SessionFilter, *, limit: int, cursor: str | None = None
    ) -> Page:
        """At most `limit` sessions after `cursor`, in the order of their deadline.

        Statuses follow the clock. A cursor stays good while sessions come and go: no session
        that is there throughout is missed or given twice. Raises `InvalidCursor`.
        """

    @abstractmethod
    async def count_active_for_agent(self, agent_id: str) -> int:
        """How many sessions of the agent have status `active` now; no scan."""

    @abstractmethod
    async def count_active(self) -> int:
        """How many sessions have status `active` now; no scan."""

    @abstractmethod
    async def close_sessions_for_agent(self, agent_id: str) -> int:
        """Close every session of the agent that is active now, in one step; how many."""

    @abstractmethod
    async def cleanup_expired(self, limit: int) -> Swept:
        """Remove up to `limit` sessions that ended at least `retention_secs` ago.

        What is remembered with a session counts as well, where there is work in removing it:
        it is bounded by `limit`, so that a caller can yield between slices.
        """
