"""`admit.lua` is a port of `decide()`: the same histories through both give the same answers,
to the last field. Histories are biased to the edges of windows, deadlines and budgets."""

from __future__ import annotations

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from app.domain.admission import Admission, Admitted, Denied, Operation
from app.domain.capacity import StoreLimits
from app.domain.idempotency import IdempotencyKey
from app.domain.session import MICROSECONDS, DataSensitivity, Grant, Session
from app.domain.tools import AllowList
from app.store.contract import SessionStore
from tests.conftest import STORES
from tests.support import AGENT, OTHER_AGENT, ManualClock, close, opened

LETTERS = st.text("ab./", min_size=1, max_size=4)
ENTRIES = st.one_of(LETTERS, st.text("ab.*", min_size=1, max_size=5), st.just("*"))
KEYS = [
    None,
    None,
    IdempotencyKey("a", "1"),
    IdempotencyKey("a:1", ""),
    IdempotencyKey("b", "1"),
]


class Turn(NamedTuple):
    """One request, and how long after the one before or at which edge it comes."""

    operation: Operation
    tools: list[str]
    agent: str | None
    tier: DataSensitivity | None
    key: IdempotencyKey | None
    dry_run: bool
    edge: str
    offset: int
    close: bool


grants = st.builds(
    Grant,
    agent_id=st.just(AGENT),
    declared_intent=st.text(max_size=10),
    authorized_tools=st.lists(ENTRIES, max_size=5).map(AllowList.of),
    delegation_chain_snapshot=st.lists(st.text(max_size=5), max_size=2).map(tuple),
    time_limit_secs=st.sampled_from([0, 5, 3600]),
    call_budget=st.sampled_from([0, 1, 3, 10, 2_147_483_647]),
    rate_limit_per_minute=st.sampled_from([None, 0, 1, 3, 2_147_483_647]),
    rate_limit_window_secs=st.sampled_from([1, 3, 60, 86_400]),
    data_sensitivity_ceiling=st.sampled_from(DataSensitivity),
)
turns = st.builds(
    Turn,
    operation=st.sampled_from(Operation),
    tools=st.lists(LETTERS, max_size=4),
    agent=st.sampled_from([None, None, AGENT, OTHER_AGENT]),
    tier=st.sampled_from([None, *DataSensitivity]),
    key=st.sampled_from(KEYS),
    dry_run=st.sampled_from([False, False, True]),
    edge=st.sampled_from(["now", "now", "later", "window", "window", "deadline"]),
    offset=st.sampled_from([-1, 0, 1]),
    close=st.sampled_from([False] * 15 + [True]),
)


def move(clock: ManualClock, session: Session, turn: Turn) -> None:
    """Go to the edge that the turn is at, never back."""
    edges = {
        "now": clock.now,
        "later": clock.now + MICROSECONDS // 3,
        "window": session.window_ends_at,
        "deadline": session.terms.expires_at,
    }
    clock.now = max(clock.now, edges[turn.edge] + turn.offset)


def same(one: Any, other: Any) -> bool:
    """Whether two answers are equal but for the id, which each store chooses."""
    return without_id(one) == without_id(other)


def without_id(answer: Any) -> Any:
    if isinstance(answer, Session):
        return structs.replace(answer, session_id="")
    if isinstance(answer, Admitted):
        return structs.replace(answer, session=without_id(answer.session))
    if isinstance(answer, Denied):
        return structs.replace(answer, session=without_id(answer.session))
    return answer


async def compare(
    stores: list[SessionStore], clock: ManualClock, grant: Grant, history: Any
) -> None:
    for store in stores:
        await store.open()
    try:
        opened_ones = [await opened(store, grant) for store in stores]
        assert same(*opened_ones)
        session = opened_ones[0]
        both = list(zip(stores, [each.session_id for each in opened_ones], strict=True))
        for turn in history:
            move(clock, session, turn)
            if turn.close:
                assert same(*[await close(store, session_id) for store, session_id in both])
            asked = Admission(turn.operation, tuple(turn.tools), turn.agent, turn.tier)
            assert same(
                *[
                    await store.record(session_id, asked, turn.key, dry_run=turn.dry_run)
                    for store, session_id in both
                ]
            )
            read = [await store.get(session_id) for store, session_id in both]
            assert same(*read)
            assert read[0] is not None
            session = read[0]
    finally:
        for store in stores:
            await store.aclose()


@pytest.mark.parametrize("backend", ["redis", "sqlite"])
def test_both_say_the_same_of_any_history(backend: str) -> None:
    @settings(max_examples=300, deadline=None)
    @given(grants, st.lists(turns, min_size=1, max_size=20))
    def run(grant: Grant, history: list[Turn]) -> None:
        clock = ManualClock()
        with TemporaryDirectory() as folder:
            stores = [
                STORES[each](StoreLimits(), clock, Path(folder)) for each in ("memory", backend)
            ]
            asyncio.run(compare(stores, clock, grant, history))

    run()


@given(st.lists(ENTRIES, max_size=4), st.lists(LETTERS, min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_patterns_mean_the_same(entries: list[str], names: list[str]) -> None:
    grant = Grant(
        agent_id=AGENT,
        declared_intent="x",
        authorized_tools=AllowList.of(entries),
        data_sensitivity_ceiling=DataSensitivity.PUBLIC,
    )
    turn = Turn(Operation.BATCH, names, None, None, None, True, "now", 0, False)
    clock = ManualClock()
    with TemporaryDirectory() as folder:
        stores = [
            STORES[each](StoreLimits(), clock, Path(folder)) for each in ("memory", "redis")
        ]
        asyncio.run(compare(stores, clock, grant, [turn]))
