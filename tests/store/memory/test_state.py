"""The state in memory: what a write changes, the write of the value before it restores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from app.domain import verbs
from app.domain.capacity import StoreLimits
from app.domain.idempotency import ChangeKey, CreationKey, IdempotencyKey
from app.domain.lifecycle import Amendment, amend, close, resume
from app.domain.session import MICROSECONDS, ClosedBy, SessionStatus
from app.domain.verbs import Writes
from app.store.contract import SessionFilter
from app.store.cursor import FIRST
from app.store.memory.state import State
from tests.support import AGENT, OTHER_AGENT, PAUSE, a_batch, a_grant

LIMITS = StoreLimits(retention_secs=10, max_sessions=20, max_remembered_calls=20)
KEYS = [IdempotencyKey(caller, key) for caller in "ab" for key in "12"]
LATEST = 40 * 3600 * MICROSECONDS

agents = st.sampled_from([AGENT, OTHER_AGENT])
keys = st.sampled_from([None, *KEYS])
sessions = st.integers(0, 30)
transitions = st.sampled_from(
    [
        PAUSE,
        resume,
        close(ClosedBy("ops")),
        amend(Amendment(add_calls=1), 10**6),
        amend(Amendment(time_limit_secs=30), 10**6),
    ]
)

Verb = Callable[[State, int, list[str]], tuple[Any, Writes]]


def creating(agent: str, secs: int, key: IdempotencyKey | None) -> Verb:
    named = None if key is None else CreationKey(*key, "digest")
    grant = a_grant(agent_id=agent, time_limit_secs=secs)
    return lambda state, now, _: verbs.create(state, now, LIMITS, grant, named)


def recording(which: int, key: IdempotencyKey | None) -> Verb:
    return lambda state, now, ids: verbs.record(
        state, now, ids[which % len(ids)], a_batch("read_file"), key, dry_run=False
    )


def changing(which: int, transition: Any, key: IdempotencyKey | None) -> Verb:
    named = None if key is None else ChangeKey(*key, "digest")
    return lambda state, now, ids: verbs.change(
        state, now, ids[which % len(ids)], transition, named
    )


histories = st.lists(
    st.tuples(
        st.sampled_from([0, 1, 20, 3600, 25 * 3600]),
        st.one_of(
            st.builds(creating, agents, st.sampled_from([0, 60, 10**5]), keys),
            st.builds(creating, agents, st.sampled_from([0, 60, 10**5]), keys),
            st.builds(recording, sessions, keys),
            st.builds(recording, sessions, keys),
            st.builds(changing, sessions, transitions, keys),
            agents.map(lambda agent: lambda s, now, _: verbs.freeze(s, now, agent, "r", "ops")),
            agents.map(lambda agent: lambda s, now, _: verbs.unfreeze(s, now, agent)),
            agents.map(lambda agent: lambda s, now, _: verbs.close_agent(s, now, agent, "ops")),
            st.just(lambda s, now, _: verbs.sweep(s, now, LIMITS, 5)),
        ),
    ),
    max_size=40,
)


def everything(state: State, ids: list[str]) -> Any:
    """All that can be seen of the state, at several instants."""
    now = LATEST
    statuses = [None, *SessionStatus]
    return (
        [state.session(each) for each in ids],
        [{key: state.call(each, key) for key in state.keys_of(each)} for each in ids],
        [
            list(state.positions(SessionFilter(agent, status), FIRST, instant))
            for agent in (None, AGENT, OTHER_AGENT)
            for status in statuses
            for instant in (0, now)
        ],
        state.count_sessions(),
        [state.totals(instant) for instant in (0, now)],
        [[*state.ended(instant)] for instant in (30 * MICROSECONDS, now)],
        [[*state.forgettable(instant)] for instant in (25 * 3600 * MICROSECONDS, now)],
        [
            state.creation((caller, a, key))
            for caller, key in KEYS
            for a in (AGENT, OTHER_AGENT)
        ],
        [state.freeze_of(agent) for agent in (AGENT, OTHER_AGENT)],
        state.frozen("", 9),
        # How much room there is: of several callers, each sees what all have used.
        [
            (state.room_for_calls.used(caller), state.room_for_creations.used(caller))
            for caller in "ab"
        ],
    )


def apply(state: State, writes: Writes) -> list[Any]:
    return [type(write)(write.key, state.put(write)) for write in writes]


@given(histories, histories)
def test_undoing_writes_newest_first_restores_everything(
    kept: list[tuple[int, Verb]], undone: list[tuple[int, Verb]]
) -> None:
    state, ids, now = State(LIMITS), ["none"], 0
    undo: list[Any] = []
    before = None
    for number, (secs, verb) in enumerate([*kept, *undone]):
        if number == len(kept):
            before = everything(state, ids)
        now += secs * MICROSECONDS
        writes = verb(state, now, ids)[1]
        inverse = apply(state, writes)
        if number < len(kept):
            ids += [each.key for each in writes if isinstance(each, verbs.SessionWrite)]
        else:
            undo += inverse
    for write in reversed(undo):
        state.put(write)

    assert before is None or everything(state, ids) == before


@given(histories)
def test_a_verb_changes_nothing_by_itself(history: list[tuple[int, Verb]]) -> None:
    state, ids, now = State(LIMITS), ["none"], 0
    for secs, verb in history:
        now += secs * MICROSECONDS
        before = everything(state, ids)
        _, writes = verb(state, now, ids)
        assert everything(state, ids) == before
        apply(state, writes)
        ids += [each.key for each in writes if isinstance(each, verbs.SessionWrite)]
