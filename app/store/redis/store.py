"""A store shared by many replicas: Redis, Valkey, or a cluster of them.

Everything about a session and about its agent is in one cell (`keys`). Each verb about one
session or one agent is one script there, so no replica can see or leave half of it, and a
replica that dies leaves nothing to repair. Only lists without an agent, the count of all and
the sweep visit all cells; each cell's part is exact by itself.

The time is the engine's.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from typing_extensions import override

from app.domain.admission import (
    NO_SESSION,
    Admission,
    Admitted,
    Denied,
    key_conflict,
    too_many_sessions,
)
from app.domain.capacity import TOO_MANY_CREATIONS, StoreLimits
from app.domain.errors import (
    ArbiterError,
    SessionLimitReached,
    StoreUnavailable,
    StoreUnreachable,
    StoreUnusable,
)
from app.domain.idempotency import (
    CREATION_REPLAY_SECS,
    ChangeKey,
    CreationKey,
    IdempotencyKey,
)
from app.domain.lifecycle import Changed, Transition, check_running
from app.domain.session import (
    MICROSECONDS,
    AgentState,
    ClosedBy,
    Grant,
    Marks,
    Session,
    SessionStatus,
    Terms,
)
from app.domain.verbs import Swept
from app.store.clock import Clock
from app.store.codec import marks_of, to_text
from app.store.contract import (
    FrozenAgents,
    Page,
    SessionFilter,
    SessionStore,
    Totals,
)
from app.store.cursor import FIRST, Cursor, decode_agent, frozen_page
from app.store.fair_share import FairShare
from app.store.listing import Listing
from app.store.redis import keys, replies, scripts
from app.store.redis.client import ScriptClient, Step
from app.store.redis.pages import Merge
from app.store.redis.replies import TermsCache
from app.store.redis.url import RedisUrl

CLOSED_AT_ONCE = 1000
"""Sessions that one step of the kill switch closes."""

SURVEY_EVERY_SECS = 1.0
"""How old the total may be that `max_sessions` is compared with."""

OPEN_ATTEMPTS = 3
"""How often a start asks an engine that does not answer in time."""

MOST_ATTEMPTS = 100
"""How often a change is tried while other changes of the same session get in between."""


class RedisStore(SessionStore):
    """Sessions in a Redis or Valkey."""

    def __init__(self, url: RedisUrl, limits: StoreLimits, clock: Clock | None = None) -> None:
        self._url = url
        self._limits = limits
        self._clock = clock
        self._client = ScriptClient(url)
        self._terms = TermsCache()
        self._total_sessions = 0
        self._remembered_creations = FairShare(limits.max_remembered_creations)
        self._due: dict[str, int] = {}

    @classmethod
    def from_url(cls, url: str, limits: StoreLimits) -> RedisStore:
        """The store at a URL that `RedisUrl.parse` accepts. Raises `ValueError`."""
        return cls(RedisUrl.parse(url), limits)

    @override
    async def open(self) -> None:
        await self._client.open()
        try:
            await self._prepare()
        except BaseException:
            await self._client.aclose()
            raise
        self._surveys = asyncio.create_task(self._survey_regularly())

    async def _prepare(self) -> None:
        # A busy engine may miss a deadline once. That need not fail a start.
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                await self._check_layout()
                await self._survey()
            except StoreUnavailable as error:
                if attempt == OPEN_ATTEMPTS:
                    raise StoreUnusable(
                        f"cannot use {self._url}: it does not answer"
                    ) from error
            else:
                return

    async def _check_layout(self) -> None:
        version = await self._client.run(scripts.LAYOUT, (keys.LAYOUT,), keys.LAYOUT_VERSION)
        if version.decode() != keys.LAYOUT_VERSION:
            raise StoreUnusable(
                f"cannot use {self._url}: its keys were written by another version of this "
                "program; run that version, or use an empty database"
            )

    @override
    async def aclose(self) -> None:
        # Cancel repeatedly: if a gathered step fails in the same tick, asyncio loses the first
        # cancellation.
        while not self._surveys.done():
            self._surveys.cancel()
            await asyncio.wait([self._surveys], timeout=1)
        await self._client.aclose()

    @override
    async def ping(self) -> None:
        await self._client.run(scripts.LAYOUT, (keys.LAYOUT,), keys.LAYOUT_VERSION)

    def _step(self, script: scripts.Script, in_cell: tuple[str, ...], *arguments: Any) -> Step:
        """A script with its keys, of which the first is the cell's clock."""
        prefix = in_cell[0].removesuffix("clock")
        # The engine's time counts, unless a test has a clock.
        now = "" if self._clock is None else self._clock()
        return Step(script, in_cell, (prefix, now, *arguments))

    async def _run(
        self, script: scripts.Script, in_cell: tuple[str, ...], *arguments: Any
    ) -> Any:
        return await self._client.submit(self._step(script, in_cell, *arguments))

    @override
    async def create(
        self, grant: Grant, idempotency: CreationKey | None = None
    ) -> Admitted | Denied:
        session_id = keys.new_session_id(grant.agent_id)
        clock, session_key, _ = keys.session_keys(session_id)
        packed, text = replies.pack_terms(Terms(grant, 0, 0))
        limits, cap = self._limits, self._limits.max_active_sessions_per_agent
        caller = "" if idempotency is None else idempotency.caller
        reply = await self._run(
            scripts.CREATE,
            (
                clock,
                session_key,
                keys.agent_keys(grant.agent_id).open,
                keys.creation_key(grant.agent_id, idempotency),
            ),
            session_id,
            packed,
            text,
            grant.time_limit_secs * MICROSECONDS,
            limits.retention_secs * 1000,
            "" if cap is None else cap,
            int(self._total_sessions >= limits.max_sessions),
            int(not self._remembered_creations.has_room(caller)),
            "" if idempotency is None else idempotency.request,
            caller,
            CREATION_REPLAY_SECS * MICROSECONDS,
            grant.agent_id,
            *replies.exact_tools(grant),
        )
        known = replies.creation(reply)
        if known is not None:
            return known
        outcome = reply[0]
        if outcome == b"full":
            raise SessionLimitReached
        if outcome == b"creations_full":
            raise SessionLimitReached(TOO_MANY_CREATIONS)
        if outcome == b"too_many":
            return too_many_sessions(cap or 0, reply[1])
        session = Session.opened(session_id, grant, reply[1])
        self._terms.keep(session_id, session.terms)
        self._total_sessions += 1
        if idempotency is not None:
            self._remembered_creations.add(caller)
        return Admitted(session)

    @override
    async def find_creation(
        self, agent_id: str, idempotency: CreationKey
    ) -> Admitted | Denied | None:
        in_cell = keys.agent_keys(agent_id).clock, keys.creation_key(agent_id, idempotency)
        return replies.creation(
            await self._run(scripts.FIND_CREATION, in_cell, idempotency.request)
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
        known = self._terms.get(session_id)
        tier = admission.data_sensitivity
        reply = await self._run(
            scripts.ADMIT,
            keys.session_keys(session_id),
            0 if known is None else known.rev,
            admission.agent_id or "",
            "" if tier is None else tier.rank,
            int(dry_run),
            "" if idempotency is None else keys.replay_field(idempotency),
            "" if idempotency is None else to_text(admission),
            *admission.tool_names,
        )
        session = self._terms.session(session_id, reply, known)
        return replies.decision(reply, session, admission)

    @override
    async def change(
        self, session_id: str, transition: Transition, idempotency: ChangeKey | None = None
    ) -> Changed | Denied:
        for _ in range(MOST_ATTEMPTS):
            session = await self._read_unchanged(session_id)
            if session is None:
                return NO_SESSION
            new, refusal = _apply(transition, session)
            if idempotency is None and (refusal or new is session.terms):
                return _refuse(refusal) if refusal else Changed(session)
            # A change is refused only if its key is not known.
            reply = await self._swap(session, new, idempotency, only_look=bool(refusal))
            match reply[0]:
                case b"known":
                    _, first_used_at = replies.unpack_usage(reply[2])
                    same = reply[1] == 1
                    return self._repeated(session, first_used_at, same=same)
                case b"changed":
                    self._terms.keep(session_id, new)
                    usage, _ = replies.unpack_usage(reply[1])
                    return Changed(Session(session_id, new, usage, session.as_of))
                case b"moved" if refusal:
                    return _refuse(refusal)
        raise StoreUnreachable

    async def _swap(
        self, session: Session, terms: Terms, idempotency: ChangeKey | None, *, only_look: bool
    ) -> list[Any]:
        """Replace the terms that the session has. With `only_look`, see only whether the key is
        known."""
        packed, text = replies.pack_terms(terms)
        field, request = "", ""
        if idempotency is not None:
            field = keys.replay_field(IdempotencyKey(*idempotency[:2]))
            request = idempotency.request
        reply: list[Any] = await self._run(
            scripts.CHANGE,
            keys.session_keys(session.session_id),
            session.session_id,
            0 if only_look else session.terms.rev,
            packed,
            text,
            self._limits.retention_secs * 1000,
            marks_of(terms),
            field,
            request,
            *replies.exact_tools(terms.grant),
        )
        return reply

    def _repeated(
        self, session: Session, first_used_at: int, *, same: bool
    ) -> Changed | Denied:
        ended = check_running(session, session.as_of)
        if ended is not None:
            return ended
        return Changed(session, replayed=True) if same else key_conflict(first_used_at)

    async def _read_unchanged(self, session_id: str) -> Session | None:
        try:
            return await self.get(session_id)
        except StoreUnavailable as error:
            # It was only read so far.
            raise StoreUnreachable from error

    @override
    async def get(self, session_id: str) -> Session | None:
        (session,) = await self._read([session_id])
        return session

    async def _read(self, session_ids: Sequence[str]) -> list[Session | None]:
        """The sessions as they are now, with one script for each cell."""
        known = {session_id: self._terms.get(session_id) for session_id in session_ids}
        by_cell: dict[str, list[str]] = {}
        for session_id in session_ids:
            by_cell.setdefault(keys.cell_of_session(session_id), []).append(session_id)
        found: dict[str, Session | None] = {}
        steps = []
        for cell, ids in by_cell.items():
            arguments: list[Any] = []
            for session_id in ids:
                terms = known[session_id]
                arguments += [session_id, 0 if terms is None else terms.rev]
            steps.append(self._step(scripts.READ, keys.cell_keys(cell)[:1], *arguments))
        for ids, told in zip(
            by_cell.values(), await self._client.submit_all(steps), strict=True
        ):
            for session_id, reply in zip(ids, told, strict=True):
                found[session_id] = self._terms.session(session_id, reply, known[session_id])
        return [found[session_id] for session_id in session_ids]

    @override
    async def close_sessions_for_agent(self, agent_id: str, actor: str) -> list[str]:
        in_cell = keys.agent_keys(agent_id)[:2]
        retention = self._limits.retention_secs * 1000
        by = to_text(Marks(closed_by=ClosedBy(actor, kill_switch=True)))
        all_closed: list[str] = []
        more = True
        while more:
            closed, seen = await self._run(
                scripts.CLOSE_AGENT, in_cell, CLOSED_AT_ONCE, retention, by
            )
            all_closed += [session_id.decode() for session_id in closed]
            more = seen == CLOSED_AT_ONCE
        return all_closed

    @override
    async def get_agent(self, agent_id: str) -> AgentState:
        return await self._agent(agent_id, "read")

    @override
    async def freeze(self, agent_id: str, reason: str, actor: str) -> AgentState:
        return await self._agent(agent_id, "freeze", actor, reason)

    @override
    async def unfreeze(self, agent_id: str) -> AgentState:
        return await self._agent(agent_id, "unfreeze")

    async def _agent(
        self, agent_id: str, verb: str, actor: str = "", reason: str = ""
    ) -> AgentState:
        in_cell = keys.agent_keys(agent_id)[:3]
        return replies.agent(
            await self._run(scripts.AGENT, in_cell, agent_id, verb, actor, reason)
        )

    @override
    async def list_frozen(self, *, limit: int, cursor: str | None = None) -> FrozenAgents:
        after = decode_agent(cursor)
        steps = [self._step(scripts.FROZEN, keys.cell_keys(cell)[:1]) for cell in keys.CELLS]
        found = []
        for told in await self._client.submit_all(steps):
            for agent_id, text in zip(told[::2], told[1::2], strict=True):
                freeze = replies.freeze(text)
                if freeze is not None and agent_id.decode() > after:
                    found.append((agent_id.decode(), freeze))
        found.sort(key=lambda each: each[0])
        return frozen_page(found[: limit + 1], limit)

    @override
    async def totals(self) -> Totals:
        steps = [self._step(scripts.COUNT, keys.cell_keys(cell)[:3]) for cell in keys.CELLS]
        found = await self._client.submit_all(steps)
        running, paused, frozen = map(sum, zip(*found, strict=True))
        return Totals(running - paused, paused, frozen)

    @override
    async def list_all(
        self, which: SessionFilter, *, limit: int, cursor: str | None = None
    ) -> Page:
        after = FIRST if cursor is None else Cursor.decode(cursor)
        agent_id, status = which.agent_id, which.status
        cells = keys.CELLS if agent_id is None else [keys.cell_of_agent(agent_id)]

        async def read(
            some: Sequence[str], starts: Sequence[Cursor], most: int
        ) -> list[list[Cursor]]:
            steps = [
                self._step(
                    scripts.PAGE,
                    self._index_keys(cell, which),
                    *start,
                    most,
                    "" if status is None else status.value,
                )
                for cell, start in zip(some, starts, strict=True)
            ]
            return list(map(_cursors, await self._client.submit_all(steps)))

        merge, listing, goes_on = Merge(cells, after, read), Listing(which, limit), True
        while goes_on:
            wanted = listing.wanted
            entries = await merge.take(wanted)
            goes_on = len(entries) == wanted
            # An entry can be older than its session.
            sessions = await self._read([entry.session_id for entry in entries])
            for entry, session in zip(entries, sessions, strict=True):
                goes_on = listing.look(entry, session) and goes_on
        return listing.page()

    def _index_keys(self, cell: str, which: SessionFilter) -> tuple[str, ...]:
        agent_id, status = which.agent_id, which.status
        index = keys.cell_keys(cell) if agent_id is None else keys.agent_keys(agent_id)
        match status:
            case None:
                return index.clock, index.open, index.closed
            case SessionStatus.CLOSED:
                return index.clock, index.closed
            case SessionStatus.PAUSED:
                return index.clock, index.paused
        return index.clock, index.open

    async def _survey(self) -> None:
        """Find out how much all cells hold, and how much of it is due to be removed."""
        retention = self._limits.retention_secs * MICROSECONDS
        steps = [
            self._step(scripts.DUE, keys.cell_keys(cell)[:1], retention) for cell in keys.CELLS
        ]
        found = await self._client.submit_all(steps)
        creations: Counter[str] = Counter()
        for _, _, by_caller in found:
            for caller, remembered in zip(by_caller[::2], by_caller[1::2], strict=True):
                creations[caller.decode()] += int(remembered)
        self._total_sessions = sum(sessions for sessions, _, _ in found)
        self._remembered_creations = FairShare(self._limits.max_remembered_creations, creations)
        self._due = {
            cell: due for cell, (_, due, _) in zip(keys.CELLS, found, strict=True) if due
        }

    async def _survey_regularly(self) -> None:
        while True:
            await asyncio.sleep(SURVEY_EVERY_SECS)
            # Ignore the failure: it has been logged, and the next survey runs in a second.
            with suppress(StoreUnavailable):
                await self._survey()

    @override
    async def cleanup_expired(self, limit: int) -> Swept:
        is_fresh = not self._due
        if is_fresh:
            await self._survey()
        asked: dict[str, int] = {}
        for cell, due in self._due.items():
            if limit <= sum(asked.values()):
                break
            asked[cell] = min(due, limit - sum(asked.values()))
        retention = self._limits.retention_secs * MICROSECONDS
        steps = [
            self._step(scripts.SWEEP, keys.cell_keys(cell)[:1], retention, most)
            for cell, most in asked.items()
        ]
        expired_ones = closed_ones = forgotten = 0
        found = await self._client.submit_all(steps)
        for (cell, most), (expired, closed, creations) in zip(
            asked.items(), found, strict=True
        ):
            expired_ones += expired
            closed_ones += closed
            self._total_sessions -= expired + closed
            forgotten += creations
            left = self._due.get(cell, 0) - most
            if expired + closed + creations < most or left <= 0:
                self._due.pop(cell, None)
            else:
                self._due[cell] = left
        if not self._due and (forgotten or not is_fresh):
            # Who has room now, and what fell due since the last survey.
            await self._survey()
        return Swept(expired_ones, closed_ones, more=bool(self._due))


def _apply(
    transition: Transition, session: Session
) -> tuple[Terms, Denied | ArbiterError | None]:
    """The terms after a transition, or those before and why it is refused."""
    try:
        terms = transition(session, session.as_of)
    except ArbiterError as error:
        return session.terms, error
    return (session.terms, terms) if isinstance(terms, Denied) else (terms, None)


def _refuse(refusal: Denied | ArbiterError) -> Denied:
    if isinstance(refusal, ArbiterError):
        raise refusal
    return refusal


def _cursors(told: list[bytes]) -> list[Cursor]:
    """The entries that `page.lua` returned."""
    return [
        Cursor(int(deadline), session_id.decode())
        for session_id, deadline in zip(told[::2], told[1::2], strict=True)
    ]
