"""The steps of a store in Redis or Valkey that take place in the slots of sessions."""

from __future__ import annotations

from typing import Any

from app.domain.admission import Admission, Admitted, Denied
from app.domain.errors import StoreUnavailable
from app.domain.session import MICROSECONDS, Grant, Session
from app.store.clock import Clock
from app.store.codec import to_text
from app.store.contract import IdempotencyKey, StoreLimits
from app.store.redis import replies, scripts
from app.store.redis.client import ScriptClient, Step


class Sessions:
    """What is known of each session, and what can be done to it in one atomic step."""

    def __init__(self, engine: ScriptClient, limits: StoreLimits, clock: Clock | None) -> None:
        self._engine = engine
        self._retention_secs = limits.retention_secs
        self._clock = clock
        self._grants = replies.Grants()

    def now(self) -> int | str:
        """What scripts take for the time: their own, unless a test has a clock."""
        return "" if self._clock is None else self._clock()

    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None,
        *,
        dry_run: bool,
    ) -> Admitted | Denied:
        """See `SessionStore.record`."""
        grant = self._grants.get(session_id)
        tier = admission.data_sensitivity
        reply = await self._engine.run(
            scripts.ADMIT,
            replies.session_keys(session_id),
            self.now(),
            admission.agent_id or "",
            "" if tier is None else tier.rank,
            int(dry_run),
            int(grant is None),
            "" if idempotency is None else replies.key_field(idempotency),
            "" if idempotency is None else to_text(admission),
            *admission.tool_names,
        )
        session = self._session(session_id, reply, grant)
        decision: Admitted | Denied = replies.decision(reply, session, admission)
        return decision

    def _session(
        self, session_id: str, reply: list[Any], grant: Grant | None
    ) -> Session | None:
        return self._grants.session(session_id, reply, grant) if len(reply) > 1 else None

    async def read(self, session_ids: list[str]) -> list[Session | None]:
        """The sessions as they are now; `None` for those that are not there."""
        grants = [self._grants.get(session_id) for session_id in session_ids]
        found = await self._engine.run_all(
            [
                Step(
                    scripts.SESSION_READ,
                    replies.session_keys(session_id)[:2],
                    (self.now(), int(grant is None)),
                )
                for session_id, grant in zip(session_ids, grants, strict=True)
            ]
        )
        return list(map(self._session, session_ids, found, grants))

    async def write(self, session_id: str, grant: Grant, begin_by: int) -> Session:
        """Create the session, or find that it was. Raises `StoreUnavailable` if it is later
        than `begin_by`."""
        rate, tools = grant.rate_limit_per_minute, grant.authorized_tools.entries
        reply = await self._engine.run(
            scripts.SESSION_CREATE,
            (*replies.session_keys(session_id)[:2], replies.sweep_key(session_id)),
            self.now(),
            begin_by,
            grant.agent_id,
            to_text(grant),
            grant.time_limit_secs,
            grant.call_budget,
            "" if rate is None else rate,
            grant.rate_limit_window_secs,
            grant.data_sensitivity_ceiling.rank,
            self._retention_secs * 1000,
            " ".join(tool for tool in tools if "*" in tool),
            *(tool for tool in tools if "*" not in tool),
        )
        session = self._session(session_id, reply, grant)
        if session is None:
            raise StoreUnavailable
        self._grants.keep(session_id, grant)
        return session

    async def close(self, session_ids: list[str], *, only_active: bool) -> list[list[Any]]:
        """Close sessions; what `session_close.lua` said of each."""
        retention = self._retention_secs * 1000
        return await self._engine.run_all(
            [
                Step(
                    scripts.SESSION_CLOSE,
                    replies.session_keys(session_id),
                    (self.now(), int(only_active), retention),
                )
                for session_id in session_ids
            ]
        )

    def closing(self, session: Session, reply: list[Any]) -> Session | Denied:
        """What became of a session that was to be closed."""
        closed = self._session(session.session_id, reply, session.grant)
        return replies.closing(reply, closed)

    async def sweep(self, session_ids: list[str]) -> list[list[Any]]:
        """Remove those that ended long enough ago; what `session_sweep.lua` said of each."""
        retention = self._retention_secs * MICROSECONDS
        found = await self._engine.run_all(
            [
                Step(
                    scripts.SESSION_SWEEP,
                    (*replies.session_keys(session_id), replies.sweep_key(session_id)),
                    (self.now(), retention),
                )
                for session_id in session_ids
            ]
        )
        for session_id, (outcome, *_) in zip(session_ids, found, strict=True):
            if outcome != b"alive":
                self._grants.forget(session_id)
        return found
