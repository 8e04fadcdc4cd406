"""A model of the whole contract, as plain as possible, compared with every store over random
histories. These are biased to the edges: window ends, deadlines, the end of the retention, and
the last unit of a budget."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from msgspec import UNSET
from msgspec.structs import replace

from app.domain.admission import Admission, Admitted, Denied, Operation
from app.domain.capacity import StoreLimits
from app.domain.idempotency import ChangeKey, IdempotencyKey
from app.domain.lifecycle import Amendment, Changed, amend, resume
from app.domain.session import MICROSECONDS, DataSensitivity, Grant, Session, SessionStatus
from app.domain.tools import AllowList
from app.store.codec import to_text
from app.store.contract import SessionFilter, SessionStore
from tests.conftest import DURABLE, STORES
from tests.support import (
    AGENT,
    OTHER_AGENT,
    PAUSE,
    ManualClock,
    a_grant,
    close,
    create,
    kill,
    new_id,
)

T = TypeVar("T")

RETENTION_SECS = 300
"""More than a history takes: engines end keys by their own time, not by that of the test."""
CAP = 3
LIMITS = StoreLimits(
    retention_secs=RETENTION_SECS, max_sessions=99, max_active_sessions_per_agent=CAP
)
DAY_SECS = 24 * 3600
TIERS = ["public", "internal", "confidential", "restricted"]
KEYS = [
    None,
    None,
    IdempotencyKey("a", "1"),
    IdempotencyKey("a", "2"),
    IdempotencyKey("b", "1"),
]

tools = st.sampled_from(["read", "read", "read", "write", "fs.read", "rm"])
allow_lists = st.sampled_from([[], ["read"], ["read", "write"], ["read", "fs.*"], ["*"]])
agents = st.sampled_from([AGENT, OTHER_AGENT])
tiers = st.sampled_from([None, None, None, *DataSensitivity])


class Ask(NamedTuple):
    """A request that an agent makes, and when."""

    how: str
    names: list[str]
    agent: str | None
    tier: DataSensitivity | None
    key: IdempotencyKey | None
    dry_run: bool
    edge: str | None
    offset: int


asks = st.builds(
    Ask,
    how=st.sampled_from(["freely", "one call", "one call", "rest", "one too many", "again"]),
    names=st.lists(tools, max_size=3),
    agent=st.sampled_from([None, None, None, AGENT]),
    tier=tiers,
    key=st.sampled_from(KEYS),
    dry_run=st.sampled_from([False, False, True]),
    edge=st.sampled_from([None] * 8 + ["window_end"] * 3 + ["deadline"]),
    offset=st.sampled_from([-1, 0]),
)


@dataclass
class Model:
    """One session, as the contract describes it."""

    grant: Grant
    created: int
    made: int = 0
    window_start: int = 0
    window_calls: int = 0
    closed: int | None = None
    limit_end: int | None = None
    """The deadline, where a change has moved it."""
    paused: bool = False
    rev: int = 1
    changes: dict[str, Amendment] = field(default_factory=dict)
    replays: dict[IdempotencyKey, tuple[Admission, Session]] = field(default_factory=dict)

    @property
    def deadline(self) -> int:
        if self.limit_end is not None:
            return self.limit_end
        return self.created + self.grant.time_limit_secs * MICROSECONDS

    @property
    def window_end(self) -> int:
        return self.window_start + self.grant.rate_limit_window_secs * MICROSECONDS

    def status(self, now: int) -> str:
        if self.closed is not None:
            return "closed"
        if now >= self.deadline:
            return "expired"
        return "paused" if self.paused else "active"

    @property
    def removal(self) -> int:
        ended = self.deadline if self.closed is None else min(self.closed, self.deadline)
        return ended + RETENTION_SECS * MICROSECONDS

    def allows(self, tool: str) -> bool:
        entries = self.grant.authorized_tools.entries
        return tool in entries or "*" in entries or ("fs.*" in entries and tool[:3] == "fs.")

    def failed_rules(self, asked: Admission, now: int, *, frozen: bool) -> list[str]:
        """The codes of the rules that fail. The first names the denial."""
        if asked.agent_id not in (None, self.grant.agent_id):
            return ["agent_mismatch"]
        if self.status(now) in ("closed", "expired"):
            return [f"session_{self.status(now)}"]
        if frozen:
            return ["agent_frozen"]
        if self.paused:
            return ["session_paused"]
        n = len(asked.tool_names)
        if n == 0:
            return []
        tier, limit = asked.data_sensitivity, self.grant.rate_limit_per_minute
        used = self.window_calls if now < self.window_end else 0
        ceiling = TIERS.index(self.grant.data_sensitivity_ceiling.value)
        found = []
        if self.made + n > self.grant.call_budget:
            found.append("budget_exceeded")
        if not all(self.allows(tool) for tool in asked.tool_names):
            found.append("tool_not_authorized")
        if tier is not None and TIERS.index(tier.value) > ceiling:
            found.append("sensitivity_exceeded")
        if limit is not None and used + n > limit:
            found.append("rate_limited")
        return found

    def count(self, n: int, now: int) -> None:
        self.made += n
        if n and now >= self.window_end:
            self.window_start, self.window_calls = now, 0
        self.window_calls += n


class StoreMachine(RuleBasedStateMachine):
    """Applies the actions of agents, operators and time to a store and to the model."""

    make_store: Any

    sessions = Bundle("sessions")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.runner = asyncio.Runner()
        self.folder = TemporaryDirectory()
        self.store = self._make()
        self.models: dict[str, Model] = {}
        self.creations: dict[tuple[IdempotencyKey, str], tuple[int, Grant, str]] = {}
        self.frozen: set[str] = set()

    def _make(self) -> SessionStore:
        store: SessionStore = type(self).make_store(LIMITS, self.clock, Path(self.folder.name))
        return store

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(step)

    @initialize(target=sessions, rate=st.sampled_from([None, 1, 3]))
    def open(self, rate: int | None) -> Any:
        self.run(self.store.open())
        self._record(new_id(), Admission(Operation.CALL, ("read",)), None, dry_run=False)
        terms = {"call_budget": 9, "rate_limit_per_minute": rate}
        made = [self._create(a_grant("read", agent_id=AGENT, **terms), None) for _ in range(2)]
        return multiple(*made)

    def teardown(self) -> None:
        self.run(self.store.aclose())
        self.runner.close()
        self.folder.cleanup()

    @rule(
        target=sessions,
        entries=allow_lists,
        agent=agents,
        limit_secs=st.sampled_from([0, 60, 61, 3600, 3600, 3600]),
        budget=st.sampled_from([0, 1, 3, 9, 9]),
        rate=st.sampled_from([None, 0, 1, 2, 3]),
        window_secs=st.sampled_from([1, 10, 60]),
        ceiling=st.sampled_from(list(DataSensitivity)),
        key=st.sampled_from(KEYS),
    )
    def create(
        self,
        entries: list[str],
        agent: str,
        limit_secs: int,
        budget: int,
        rate: int | None,
        window_secs: int,
        ceiling: DataSensitivity,
        key: IdempotencyKey | None,
    ) -> Any:
        grant = Grant(
            agent_id=agent,
            declared_intent="model",
            authorized_tools=AllowList.of(entries),
            time_limit_secs=limit_secs,
            call_budget=budget,
            rate_limit_per_minute=rate,
            rate_limit_window_secs=window_secs,
            data_sensitivity_ceiling=ceiling,
        )
        return self._create(grant, key)

    @rule(target=sessions, key=st.sampled_from(KEYS[2:]))
    def repeat_creation(self, key: IdempotencyKey) -> Any:
        known = [grant for (used, _), (_, grant, _) in self.creations.items() if used == key]
        return self._create(known[0], key) if known else multiple()

    def _create(self, grant: Grant, key: IdempotencyKey | None) -> Any:
        """Create a session in both. Return its id, or nothing if none was created."""
        now = self.clock.now
        decision = self.run(create(self.store, grant, key))
        known = None if key is None else self.creations.get((key, grant.agent_id))
        if grant.agent_id in self.frozen:
            assert isinstance(decision, Denied)
            assert decision.code.value == "agent_frozen"
            return multiple()
        if known is not None and now < known[0] + DAY_SECS * MICROSECONDS:
            _, first_grant, first_id = known
            if first_grant != grant:
                assert isinstance(decision, Denied)
                assert decision.code.value == "idempotency_conflict"
            else:
                assert isinstance(decision, Admitted)
                assert decision.replayed
                assert decision.session.session_id == first_id
            return multiple()
        if self._running(grant.agent_id) >= CAP:
            assert isinstance(decision, Denied)
            assert decision.code.value == "too_many_sessions"
            return multiple()
        assert isinstance(decision, Admitted)
        assert not decision.replayed
        session_id = decision.session.session_id
        self.models[session_id] = Model(grant, now, window_start=now)
        if key is not None:
            self.creations[key, grant.agent_id] = (now, grant, session_id)
        return session_id

    @rule(session_id=sessions, asks=st.lists(asks, min_size=1, max_size=8))
    def record(self, session_id: str, asks: list[Ask]) -> None:
        for ask in asks:
            self._go_to(session_id, ask.edge, ask.offset)
            asked, key = self._asked(self.models.get(session_id), ask)
            self._record(session_id, asked, key, ask.dry_run)

    def _asked(self, model: Model | None, ask: Ask) -> tuple[Admission, IdempotencyKey | None]:
        if model is None or ask.how == "freely":
            return Admission(Operation.BATCH, tuple(ask.names), ask.agent, ask.tier), ask.key
        if ask.how == "one call":
            return Admission(Operation.CALL, ("read",), ask.agent, ask.tier), ask.key
        if ask.how == "again" and model.replays:
            key = next(iter(model.replays))
            return model.replays[key][0], key
        n = self._left(model) + (ask.how == "one too many")
        tool = (*model.grant.authorized_tools.entries, "none")[0].replace("*", "x")
        return Admission(Operation.BATCH, (tool,) * n), ask.key

    def _left(self, model: Model) -> int:
        """How many calls the budget and the rate limit allow now."""
        rate = model.grant.rate_limit_per_minute
        used = model.window_calls if self.clock.now < model.window_end else 0
        budget = model.grant.call_budget - model.made
        return max(0, budget if rate is None else min(budget, rate - used))

    def _go_to(self, session_id: str, edge: str | None, offset: int) -> None:
        """Move the clock to an edge of the session, or just before it, but never backwards."""
        model = self.models.get(session_id)
        if model is not None and edge is not None:
            self.clock.now = max(self.clock.now, getattr(model, edge) + offset)

    def _record(
        self, session_id: str, asked: Admission, key: IdempotencyKey | None, dry_run: bool
    ) -> None:
        now, model = self.clock.now, self.models.get(session_id)
        decision = self.run(self.store.record(session_id, asked, key, dry_run=dry_run))
        if model is None:
            assert isinstance(decision, Denied)
            assert decision.code.value == "session_not_found"
            return
        frozen = model.grant.agent_id in self.frozen
        failed_rules = model.failed_rules(asked, now, frozen=frozen)
        unusable = [code for code in failed_rules if code.split("_")[0] in _UNUSABLE]
        if not unusable and key in model.replays:
            first, answer = model.replays[key]
            if first == asked:
                # The usage is that of then, the terms are those of now.
                assert isinstance(decision, Admitted)
                assert decision.replayed
                session = decision.session
                assert (session.usage, session.as_of) == (answer.usage, answer.as_of)
                assert (session.grant, session.terms.rev) == (model.grant, model.rev)
            else:
                assert isinstance(decision, Denied)
                assert decision.code.value == "idempotency_conflict"
            return
        if failed_rules:
            assert isinstance(decision, Denied)
            assert decision.code.value == failed_rules[0]
            listed = [each.code.value for each in decision.violations]
            assert listed == ([] if unusable else failed_rules)
            return
        assert isinstance(decision, Admitted)
        assert not decision.replayed
        assert decision.session.usage.calls_made == model.made + len(asked.tool_names)
        if not dry_run:
            model.count(len(asked.tool_names), now)
            if key is not None and asked.tool_names:
                model.replays[key] = (asked, decision.session)

    @rule(session_id=sessions)
    def close(self, session_id: str) -> None:
        outcome = self.run(close(self.store, session_id))
        model = self.models.get(session_id)
        if model is None or model.closed is not None:
            assert isinstance(outcome, Denied)
            expected = "session_not_found" if model is None else "session_closed"
            assert outcome.code.value == expected
            return
        assert isinstance(outcome, Session)
        model.closed = self.clock.now
        model.rev += 1

    @rule(agent=agents)
    def kill(self, agent: str) -> None:
        assert self.run(kill(self.store, agent)) == self._running(agent)
        for model in self._of(agent):
            if model.status(self.clock.now) in ("active", "paused"):
                model.closed = self.clock.now
                model.rev += 1

    @rule(
        session_id=sessions,
        amendment=st.builds(
            Amendment,
            add_calls=st.sampled_from([None, 1, 5]),
            time_limit_secs=st.sampled_from([None, None, 0, 60, 3600]),
            authorized_tools=st.sampled_from([None, None, (), ("read",), ("fs.*",)]),
            rate_limit_per_minute=st.sampled_from([UNSET, UNSET, None, 0, 2]),
            expected_revision=st.sampled_from([None, None, 1, 2]),
        ),
        key=st.sampled_from(["1", "2", "3"]),
    )
    def amend(self, session_id: str, amendment: Amendment, key: str) -> None:
        now, model = self.clock.now, self.models.get(session_id)
        change_key = ChangeKey("ops", key, to_text(amendment))
        outcome = self.run(self.store.change(session_id, amend(amendment, 10**6), change_key))
        code = outcome.code.value if isinstance(outcome, Denied) else None
        if model is None or model.status(now) in ("closed", "expired"):
            assert code == (
                "session_not_found" if model is None else f"session_{model.status(now)}"
            )
        elif key in model.changes:
            assert code == (None if model.changes[key] == amendment else "idempotency_conflict")
            assert code is not None or outcome.replayed  # type: ignore[union-attr]
        elif amendment.expected_revision not in (None, model.rev):
            assert code == "revision_conflict"
        else:
            assert code is None
            model.changes[key] = amendment
            self._amend(model, amendment)

    def _amend(self, model: Model, amendment: Amendment) -> None:
        before = model.grant
        limit = amendment.rate_limit_per_minute
        secs, tools = amendment.time_limit_secs, amendment.authorized_tools
        model.grant = replace(
            before,
            call_budget=before.call_budget + (amendment.add_calls or 0),
            time_limit_secs=before.time_limit_secs if secs is None else secs,
            authorized_tools=before.authorized_tools if tools is None else AllowList.of(tools),
            rate_limit_per_minute=before.rate_limit_per_minute if limit is UNSET else limit,
        )
        if model.grant != before:
            model.rev += 1
        if model.grant.time_limit_secs != before.time_limit_secs:
            wanted = model.created + model.grant.time_limit_secs * MICROSECONDS
            model.limit_end = max(wanted, self.clock.now)

    @rule(session_id=sessions, hold=st.booleans())
    def pause_or_resume(self, session_id: str, hold: bool) -> None:
        now, model = self.clock.now, self.models.get(session_id)
        outcome = self.run(self.store.change(session_id, PAUSE if hold else resume))
        if model is None or model.status(now) in ("closed", "expired"):
            assert isinstance(outcome, Denied)
            return
        assert isinstance(outcome, Changed)
        model.rev += model.paused != hold
        model.paused = hold

    @rule(agent=agents, stop=st.booleans())
    def freeze_or_unfreeze(self, agent: str, stop: bool) -> None:
        if stop:
            self.run(self.store.freeze(agent, "model", "ops"))
            self.frozen.add(agent)
        else:
            self.run(self.store.unfreeze(agent))
            self.frozen.discard(agent)

    @rule(secs=st.sampled_from([0.000001, 0.5, 1, 1, 9.999999, 10, DAY_SECS]))
    def wait(self, secs: float) -> None:
        self.clock.advance(secs)

    @rule(
        session_id=sessions,
        limit=st.sampled_from([1, 2, 100]),
        edge=st.sampled_from([None, "removal"]),
        offset=st.sampled_from([-1, 0]),
    )
    def sweep(self, session_id: str, limit: int, edge: str | None, offset: int) -> None:
        self._go_to(session_id, edge, offset)
        now, more, removed = self.clock.now, True, 0
        while more:
            swept = self.run(self.store.cleanup_expired(limit))
            assert swept.expired + swept.closed <= limit
            more, removed = swept.more, removed + swept.expired + swept.closed
        due = [session_id for session_id, model in self.models.items() if model.removal <= now]
        assert removed == len(due)
        for gone in due:
            del self.models[gone]

    @rule(
        agent=st.one_of(st.none(), agents),
        status=st.sampled_from([None, *SessionStatus]),
        limit=st.integers(1, 3),
    )
    def read_page_by_page(
        self, agent: str | None, status: SessionStatus | None, limit: int
    ) -> None:
        seen: list[str] = []
        cursor, more = None, True
        while more:
            page = self.run(
                self.store.list_all(SessionFilter(agent, status), limit=limit, cursor=cursor)
            )
            assert len(page.sessions) <= limit
            seen += [session.session_id for session in page.sessions]
            cursor, more = page.next_cursor, page.next_cursor is not None
        expected = sorted(
            (model.deadline, session_id)
            for session_id, model in self.models.items()
            if agent in (None, model.grant.agent_id)
            and status in (None, model.status(self.clock.now))
        )
        assert seen == [session_id for _, session_id in expected]

    def _of(self, agent: str) -> list[Model]:
        return [each for each in self.models.values() if each.grant.agent_id == agent]

    def _with(self, agent: str, *statuses: str) -> int:
        return sum(each.status(self.clock.now) in statuses for each in self._of(agent))

    def _running(self, agent: str) -> int:
        return self._with(agent, "active", "paused")

    @invariant()
    def every_session_matches_the_model(self) -> None:
        for session_id, model in self.models.items():
            session = self.run(self.store.get(session_id))
            assert session is not None
            assert session.usage.calls_made == model.made <= model.grant.call_budget
            assert session.grant == model.grant
            assert session.usage.rate_window_start == model.window_start
            assert session.usage.rate_window_calls == model.window_calls
            assert session.status.value == model.status(self.clock.now)
            assert session.terms.expires_at == model.deadline
            assert session.terms.rev == model.rev

    @invariant()
    def counts_and_lists_agree(self) -> None:
        totals = self.run(self.store.totals())
        for count, status in ((totals.active, "active"), (totals.paused, "paused")):
            assert count == self._with(AGENT, status) + self._with(OTHER_AGENT, status)
        assert totals.frozen_agents == len(self.frozen)
        page = self.run(self.store.list_all(SessionFilter(), limit=500))
        in_order = sorted((each.deadline, id_) for id_, each in self.models.items())
        assert [session.session_id for session in page.sessions] == [id_ for _, id_ in in_order]
        for agent in (AGENT, OTHER_AGENT):
            state = self.run(self.store.get_agent(agent))
            assert state.active_sessions == self._with(agent, "active")
            assert state.paused_sessions == self._with(agent, "paused")
            assert (state.freeze is not None) == (agent in self.frozen)
            for status in (None, *SessionStatus):
                page = self.run(self.store.list_all(SessionFilter(agent, status), limit=500))
                assert {session.session_id for session in page.sessions} == {
                    session_id
                    for session_id, model in self.models.items()
                    if model.grant.agent_id == agent
                    and status in (None, model.status(self.clock.now))
                }


_UNUSABLE = {"agent", "session"}


class DurableMachine(StoreMachine):
    """Also restarts the service now and then."""

    @rule()
    def restart(self) -> None:
        self.run(self.store.aclose())
        self.store = self._make()
        self.run(self.store.open())


HISTORIES = {"redis": 60, "cluster": 30}
"""Fewer where every step is a round trip. The parity test of Redis adds many more."""


@pytest.mark.parametrize("backend", STORES)
def test_any_history_leaves_store_and_model_agreeing(backend: str) -> None:
    class Machine(DurableMachine if backend in DURABLE else StoreMachine):
        make_store = staticmethod(STORES[backend])

    histories = HISTORIES.get(backend, 150)
    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=histories, stateful_step_count=25, deadline=None),
    )
