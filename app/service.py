"""The use cases. The HTTP API calls these and nothing below them.

A denial is returned as a value. Exceptions come from `app.domain.errors` and mean that the
service could not decide.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from hashlib import sha256

from msgspec.structs import replace

from app.domain.admission import Admission, Admitted, Denied, Operation
from app.domain.advice import DenialCode
from app.domain.ceilings import Ceilings, GrantExceedsKey, exceeded, lowered
from app.domain.errors import ArbiterError, InvalidField, ShuttingDown, StoreUnavailable
from app.domain.idempotency import ChangeKey, CreationKey, IdempotencyKey
from app.domain.lifecycle import (
    Amendment,
    Changed,
    Transition,
    amend,
    close,
    pause,
    resume,
)
from app.domain.session import (
    AgentState,
    ClosedBy,
    DataSensitivity,
    Grant,
    PausedBy,
    Session,
)
from app.observability.audit import Actor
from app.observability.events import Events
from app.store.codec import to_text
from app.store.contract import (
    InvalidCursor,
    Page,
    SessionFilter,
    SessionStore,
    Totals,
)

_UNDECIDED = (ArbiterError, asyncio.CancelledError)
"""Errors after which the outcome may be unknown. A server that shuts down cancels requests that
take too long."""


class SessionService:
    """Issues, enforces and ends sessions in `store`, and reports each outcome to `events`."""

    def __init__(self, store: SessionStore, events: Events, max_time_limit_secs: int) -> None:
        self._store = store
        self._events = events
        self._max_time_limit_secs = max_time_limit_secs
        self._retiring = False
        self._draining = False

    async def create_session(
        self,
        grant: Grant,
        actor: Actor,
        *,
        sent: AbstractSet[str],
        ceilings: Ceilings | None = None,
        idempotency: IdempotencyKey | None = None,
    ) -> Admitted | Denied:
        """Create a session. `sent` are the fields that the request has; the defaults of the
        others are lowered to the `ceilings` of the caller's key and to this server's maximum.

        Raises `GrantExceedsKey` for a grant beyond the ceilings, and `InvalidField` for a time
        limit above the maximum.
        """
        key = None
        if idempotency is not None:
            key = CreationKey(*idempotency, _digest(grant, sent))
        if ceilings is not None:
            grant = lowered(grant, ceilings, sent)
        if "time_limit_secs" not in sent:
            secs = min(grant.time_limit_secs, self._max_time_limit_secs)
            grant = replace(grant, time_limit_secs=secs)
        refusal = self._refusal(grant, ceilings)
        try:
            if refusal is None:
                decision = await self._store.create(grant, key)
            else:
                decision = await self._replay_creation(grant.agent_id, key, refusal)
        except _UNDECIDED as error:
            self._events.failed("create", error, actor, agent_id=grant.agent_id)
            raise
        if isinstance(decision, Denied):
            decision = await self._with_freeze(decision, grant.agent_id)
        self._events.created(grant.agent_id, decision, actor)
        return decision

    def _refusal(self, grant: Grant, ceilings: Ceilings | None) -> ArbiterError | None:
        if ceilings is not None and (limits := exceeded(grant, ceilings)):
            return GrantExceedsKey(limits)
        if grant.time_limit_secs <= self._max_time_limit_secs:
            return None
        return self._too_long()

    def _too_long(self) -> InvalidField:
        return InvalidField(
            "body",
            "time_limit_secs",
            f"This server allows at most {self._max_time_limit_secs} seconds.",
        )

    async def _replay_creation(
        self, agent_id: str, key: CreationKey | None, refusal: ArbiterError
    ) -> Admitted | Denied:
        """The first answer to a request that would be refused today: the maximum of the server
        or of the key may have been lowered since. Raises `refusal` if there is none."""
        known = None if key is None else await self._store.find_creation(agent_id, key)
        if known is None:
            raise refusal
        return known

    def record_call(
        self,
        session_id: str,
        tool_name: str,
        actor: Actor,
        *,
        agent_id: str | None = None,
        data_sensitivity: DataSensitivity | None = None,
        idempotency: IdempotencyKey | None = None,
        dry_run: bool = False,
    ) -> Awaitable[Admitted | Denied]:
        """Admit and count one tool call, or deny it and change nothing."""
        admission = Admission(Operation.CALL, (tool_name,), agent_id, data_sensitivity)
        return self._record(session_id, admission, actor, idempotency, dry_run=dry_run)

    def record_batch(
        self,
        session_id: str,
        tool_names: tuple[str, ...],
        actor: Actor,
        *,
        agent_id: str | None = None,
        data_sensitivity: DataSensitivity | None = None,
        idempotency: IdempotencyKey | None = None,
        dry_run: bool = False,
    ) -> Awaitable[Admitted | Denied]:
        """Admit and count all the calls, or deny them all and change nothing."""
        admission = Admission(Operation.BATCH, tool_names, agent_id, data_sensitivity)
        return self._record(session_id, admission, actor, idempotency, dry_run=dry_run)

    async def _record(
        self,
        session_id: str,
        admission: Admission,
        actor: Actor,
        idempotency: IdempotencyKey | None,
        *,
        dry_run: bool,
    ) -> Admitted | Denied:
        try:
            decision = await self._store.record(
                session_id, admission, idempotency, dry_run=dry_run
            )
        except _UNDECIDED as error:
            event = admission.operation.value
            self._events.failed(event, error, actor, session_id=session_id, admission=admission)
            raise
        if isinstance(decision, Denied) and decision.session is not None:
            decision = await self._with_freeze(decision, decision.session.grant.agent_id)
        self._events.decided(session_id, admission, decision, actor, dry_run=dry_run)
        return decision

    async def _with_freeze(self, denied: Denied, agent_id: str) -> Denied:
        """Add since when the agent is frozen, if that is why it was denied."""
        if denied.code is not DenialCode.AGENT_FROZEN:
            return denied
        try:
            freeze = (await self._store.get_agent(agent_id)).freeze
        except StoreUnavailable:
            # The denial stands without it.
            return denied
        return denied if freeze is None else replace(denied, since=freeze.frozen_at)

    async def close_session(self, session_id: str, actor: Actor) -> Changed | Denied:
        """Close a session for good."""
        outcome = await self._change("close", session_id, close(ClosedBy(actor.caller)), actor)
        self._events.closed(session_id, outcome, actor)
        return outcome

    async def amend_session(
        self,
        session_id: str,
        amendment: Amendment,
        actor: Actor,
        *,
        ceilings: Ceilings | None = None,
        idempotency: IdempotencyKey | None = None,
    ) -> Changed | Denied:
        """Change the terms of a running session. Raises `InvalidField` for terms that a session
        may not have, and `GrantExceedsKey` for those beyond the `ceilings` of the caller's
        key."""
        secs = amendment.time_limit_secs
        if secs is not None and secs > self._max_time_limit_secs:
            raise self._too_long()
        key = None
        if idempotency is not None:
            key = ChangeKey(*idempotency, f"amend {to_text(amendment)}")
        transition = amend(amendment, self._max_time_limit_secs, ceilings)
        outcome = await self._change("amend", session_id, transition, actor, key)
        self._events.changed("amend", session_id, outcome, actor)
        return outcome

    async def pause_session(
        self, session_id: str, reason: str, actor: Actor
    ) -> Changed | Denied:
        """Hold a session: it admits no calls until it is resumed."""
        transition = pause(PausedBy(actor.caller, reason))
        outcome = await self._change("pause", session_id, transition, actor)
        self._events.changed("pause", session_id, outcome, actor, reason)
        return outcome

    async def resume_session(
        self, session_id: str, reason: str, actor: Actor
    ) -> Changed | Denied:
        """Let a paused session admit calls again."""
        outcome = await self._change("resume", session_id, resume, actor)
        self._events.changed("resume", session_id, outcome, actor, reason)
        return outcome

    async def _change(
        self,
        event: str,
        session_id: str,
        transition: Transition,
        actor: Actor,
        key: ChangeKey | None = None,
    ) -> Changed | Denied:
        try:
            return await self._store.change(session_id, transition, key)
        except _UNDECIDED as error:
            self._events.failed(event, error, actor, session_id=session_id)
            raise

    async def get_session(self, session_id: str) -> Session | None:
        """The session as it is now, or `None` if it does not exist."""
        return await self._store.get(session_id)

    async def list_sessions(
        self, which: SessionFilter, *, limit: int, cursor: str | None
    ) -> Page:
        """A page of sessions. Raises `InvalidField` for a cursor that is not valid."""
        with _checking_cursor():
            return await self._store.list_all(which, limit=limit, cursor=cursor)

    async def get_agent(self, agent_id: str) -> AgentState:
        """The agent as it is now. One never seen has no sessions and is not frozen."""
        return await self._store.get_agent(agent_id)

    async def list_frozen_agents(
        self, *, limit: int, cursor: str | None
    ) -> tuple[list[tuple[str, AgentState]], str | None]:
        """A page of frozen agents as they are now, and the next cursor. Raises `InvalidField`
        for a cursor that is not valid."""
        with _checking_cursor():
            page = await self._store.list_frozen(limit=limit, cursor=cursor)
        # At once, so that a store sends or commits them together.
        states = await asyncio.gather(*(self._store.get_agent(each) for each, _ in page.agents))
        agents = [each for each, _ in page.agents]
        return list(zip(agents, states, strict=True)), page.next_cursor

    async def freeze_agent(self, agent_id: str, reason: str, actor: Actor) -> AgentState:
        """Deny everything to the agent until it is unfrozen."""
        frozen = self._store.freeze(agent_id, reason, actor.caller)
        return await self._change_agent("freeze", agent_id, frozen, actor, reason)

    async def unfreeze_agent(self, agent_id: str, actor: Actor) -> AgentState:
        """Lift the freeze of an agent, if there is one."""
        unfrozen = self._store.unfreeze(agent_id)
        return await self._change_agent("unfreeze", agent_id, unfrozen, actor)

    async def _change_agent(
        self,
        event: str,
        agent_id: str,
        change: Awaitable[AgentState],
        actor: Actor,
        reason: str = "",
    ) -> AgentState:
        try:
            state = await change
        except _UNDECIDED as error:
            self._events.failed(event, error, actor, agent_id=agent_id)
            raise
        self._events.agent_changed(event, agent_id, actor, reason)
        return state

    async def close_agent_sessions(self, agent_id: str, actor: Actor) -> int:
        """The kill switch: close every active or paused session of the agent. Return their
        number."""
        try:
            closed = await self._store.close_sessions_for_agent(agent_id, actor.caller)
        except _UNDECIDED as error:
            self._events.failed("close_agent", error, actor, agent_id=agent_id)
            raise
        self._events.agent_closed(agent_id, closed, actor)
        return len(closed)

    def retire(self) -> None:
        """Keep serving, but report from now on that this process is not ready."""
        self._retiring = True

    def drain(self, *, on: bool) -> None:
        """The same until it is turned off again. It does not undo `retire`."""
        self._draining = on

    @property
    def draining(self) -> bool:
        """Whether this process reports that it is not ready, although it serves."""
        return self._retiring or self._draining

    async def ready(self) -> None:
        """Return if the service is ready for requests. Raises `StoreUnavailable` or
        `ShuttingDown` if it is not."""
        if self.draining:
            raise ShuttingDown
        await self._store.ping()

    async def totals(self) -> Totals:
        """How many sessions are active and paused, and how many agents are frozen."""
        return await self._store.totals()


@contextmanager
def _checking_cursor() -> Iterator[None]:
    try:
        yield
    except InvalidCursor as error:
        raise InvalidField(
            "query",
            "cursor",
            "The cursor is not valid. Send the next_cursor of an earlier page, unchanged.",
        ) from error


def _digest(grant: Grant, sent: AbstractSet[str]) -> str:
    """What a retry of a creation must repeat. A time limit that was left out stays so, whatever
    this server would fill in."""
    time_limit_secs = grant.time_limit_secs if "time_limit_secs" in sent else None
    request = f"{time_limit_secs} {to_text(replace(grant, time_limit_secs=0))}"
    return sha256(request.encode()).hexdigest()
