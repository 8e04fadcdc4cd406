"""A durable store on one machine: a SQLite file, owned by one process.

Every request becomes a job on the one thread that has the connection. Jobs that arrive
during a commit share the next one, and each request is answered only once its commit is
durable. So a crash at any moment loses nothing that was answered, and a failed commit charges
nothing. `decide` makes the decisions, as in the memory store.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
from typing_extensions import override

from app.domain.admission import Admission, Admitted, Denied
from app.domain.capacity import StoreLimits
from app.domain.errors import (
    ArbiterError,
    StoreUnavailable,
    StoreUnreachable,
)
from app.domain.idempotency import ChangeKey, CreationKey, IdempotencyKey
from app.domain.lifecycle import Changed, Transition
from app.domain.session import AgentState, Grant, Session
from app.domain.verbs import Swept
from app.store.availability import Availability
from app.store.clock import Clock, anchored_clock
from app.store.contract import (
    FrozenAgents,
    InvalidCursor,
    Page,
    SessionFilter,
    SessionStore,
    Totals,
)
from app.store.sqlite.file import DAMAGED, DatabaseFile, Location, explained, reason
from app.store.sqlite.group_commit import GroupCommit, Job
from app.store.sqlite.transactions import Transactions

FAR_AHEAD_SECS = 5
"""More than a crash or two can explain: the wall clock was set back."""

_log = logging.getLogger("arbiter.store")


_UNWRITTEN = frozenset({"SQLITE_FULL", "SQLITE_IOERR_WRITE"})
"""Errors of a COMMIT that was not written whole."""


class SqliteStore(SessionStore):
    """Sessions in a SQLite file."""

    def __init__(
        self, location: Location, limits: StoreLimits, clock: Clock | None = None
    ) -> None:
        self._location = location
        self._limits = limits
        self._clock = clock or anchored_clock()
        self._availability = Availability()

    @classmethod
    def from_url(cls, url: str, limits: StoreLimits) -> SqliteStore:
        """The store for `sqlite:///absolute/path`. Raises `ValueError` for any other URL."""
        return cls(Location.of_url(url), limits)

    @override
    async def open(self) -> None:
        await asyncio.to_thread(self._open)
        self._commits = GroupCommit(self._commit, "sqlite")

    def _open(self) -> None:
        self._file = DatabaseFile(self._location)
        try:
            with explained(self._location.path):
                self._transactions = Transactions(self._file.db, self._limits, self._clock)
                if self._transactions.ahead_secs > FAR_AHEAD_SECS:
                    _log.warning(
                        "the wall clock is %d seconds behind the store's clock, which does not "
                        "go back: sessions expire that much earlier by the wall clock; check "
                        "the system time",
                        self._transactions.ahead_secs,
                    )
        except BaseException:
            self._file.close()
            raise

    @override
    async def aclose(self) -> None:
        # If this fails, the file keeps a slightly later instant, which is safe.
        with suppress(StoreUnavailable):
            await self._commits.submit(self._transactions.stop_clock)
        await self._commits.drain()
        await asyncio.to_thread(self._file.close)

    def _commit(self, jobs: Sequence[Job]) -> Sequence[Any]:
        """Run the jobs in one transaction and return their outcomes. If it fails, no job has
        changed anything and every outcome is an error. A failed COMMIT is rolled back. If
        all of it had reached the disk and the machine then stops, recovery can still apply
        it."""
        outcomes: list[Any] = []
        is_committing = False
        try:
            self._file.check_in_place()
            with self._file.changing(), self._transactions.transaction():
                for job in jobs:
                    # One by one: their number shows which job hit a defect.
                    outcomes.append(self._outcome(job))  # noqa: PERF401
                is_committing = True
        except (sqlite3.Error, OSError) as error:
            self._availability.failed(reason(error))
            unwritten = getattr(error, "sqlite_errorname", "") in _UNWRITTEN
            certain = unwritten or not is_committing
            failure = StoreUnreachable if certain else StoreUnavailable
            return [failure() for _ in jobs]
        except Exception as defect:  # noqa: BLE001 - raised where the job was submitted
            met_in = len(outcomes)
            return [defect if n == met_in else StoreUnreachable() for n in range(len(jobs))]
        if not any(isinstance(outcome, StoreUnavailable) for outcome in outcomes):
            self._availability.succeeded()
        return outcomes

    def _outcome(self, job: Job) -> Any:
        # These are raised before anything is written, so the rest of the group continues.
        try:
            return job()
        except (ArbiterError, InvalidCursor) as refusal:
            return refusal
        except msgspec.MsgspecError:
            self._availability.failed(DAMAGED)
            return StoreUnreachable()

    @override
    async def ping(self) -> None:
        # Reading the clock writes to the file, at most once a second.
        await self._commits.submit(self._transactions.now)

    @override
    async def create(
        self, grant: Grant, idempotency: CreationKey | None = None
    ) -> Admitted | Denied:
        return await self._commits.submit(lambda: self._transactions.create(grant, idempotency))

    @override
    async def find_creation(
        self, agent_id: str, idempotency: CreationKey
    ) -> Admitted | Denied | None:
        return await self._commits.submit(
            lambda: self._transactions.find_creation(agent_id, idempotency)
        )

    @override
    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None = None,
        *,
        dry_run: bool = False,
    ) -> Admitted | Denied:
        return await self._commits.submit(
            lambda: self._transactions.record(
                session_id, admission, idempotency, dry_run=dry_run
            )
        )

    @override
    async def change(
        self, session_id: str, transition: Transition, idempotency: ChangeKey | None = None
    ) -> Changed | Denied:
        return await self._commits.submit(
            lambda: self._transactions.change(session_id, transition, idempotency)
        )

    @override
    async def get(self, session_id: str) -> Session | None:
        return await self._commits.submit(lambda: self._transactions.get(session_id))

    @override
    async def list_all(
        self, which: SessionFilter, *, limit: int, cursor: str | None = None
    ) -> Page:
        return await self._commits.submit(
            lambda: self._transactions.list_all(which, limit, cursor)
        )

    @override
    async def get_agent(self, agent_id: str) -> AgentState:
        return await self._commits.submit(lambda: self._transactions.get_agent(agent_id))

    @override
    async def freeze(self, agent_id: str, reason: str, actor: str) -> AgentState:
        return await self._commits.submit(
            lambda: self._transactions.freeze(agent_id, reason, actor)
        )

    @override
    async def unfreeze(self, agent_id: str) -> AgentState:
        return await self._commits.submit(lambda: self._transactions.unfreeze(agent_id))

    @override
    async def list_frozen(self, *, limit: int, cursor: str | None = None) -> FrozenAgents:
        return await self._commits.submit(lambda: self._transactions.list_frozen(limit, cursor))

    @override
    async def totals(self) -> Totals:
        return await self._commits.submit(
            lambda: self._transactions.totals()._replace(log_bytes=self._file.log_bytes)
        )

    @override
    async def close_sessions_for_agent(self, agent_id: str, actor: str) -> list[str]:
        return await self._commits.submit(
            lambda: self._transactions.close_sessions_for_agent(agent_id, actor)
        )

    @override
    async def cleanup_expired(self, limit: int) -> Swept:
        return await self._commits.submit(lambda: self._transactions.cleanup_expired(limit))
