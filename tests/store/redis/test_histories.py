"""Random histories over two replicas that die and lose replies: the model still holds."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test
from typing_extensions import override

from app.domain.admission import Admission, Admitted, Denied
from app.domain.capacity import StoreLimits
from app.domain.idempotency import ChangeKey, CreationKey, IdempotencyKey
from app.domain.lifecycle import Changed, Transition
from app.domain.session import AgentState, Grant, Session
from app.domain.verbs import Swept
from app.store.contract import (
    FrozenAgents,
    Page,
    SessionFilter,
    SessionStore,
    Totals,
)
from app.store.redis.client import Step
from app.store.redis.store import RedisStore
from tests.conftest import STORES
from tests.store.test_stateful import StoreMachine
from tests.support import ManualClock

T = TypeVar("T")


class Died(BaseException):
    """The replica is gone."""


_doomed: ContextVar[bool] = ContextVar("_doomed", default=False)
"""Whether a replica may die in this verb. Its background tasks go on."""


class UnreliableReplicas(SessionStore):
    """Two replicas, of which one may die before a verb, or lose the reply after it. Then the
    client tries again with any of them, and the two answers must fit together."""

    def __init__(self, replicas: list[Any]) -> None:
        self._replicas: list[RedisStore] = replicas
        self._chance = random.Random()

    @override
    async def open(self) -> None:
        for replica in self._replicas:
            await replica.open()

    @override
    async def aclose(self) -> None:
        for replica in self._replicas:
            await replica.aclose()

    @override
    async def ping(self) -> None:
        await self._replicas[0].ping()

    async def _dying(self, doing: Callable[[RedisStore], Awaitable[T]], at: int) -> T | None:
        """Let one replica die before its script number `at`. Return what it would have
        answered, or `None` if it did not get so far."""
        replica = self._chance.choice(self._replicas)
        submit, sent = replica._client.submit, 0

        def submit_or_die(step: Step) -> Awaitable[Any]:
            nonlocal sent
            sent += _doomed.get()
            if sent > at and _doomed.get():
                raise Died
            return submit(step)

        replica._client.submit = submit_or_die  # type: ignore[method-assign,assignment]
        token = _doomed.set(True)
        try:
            return await doing(replica)
        except Died:
            return None
        finally:
            _doomed.reset(token)
            del replica._client.submit

    async def _do(
        self,
        doing: Callable[[RedisStore], Awaitable[T]],
        again: Callable[[T, T], bool] | None,
    ) -> T:
        """Run a verb, perhaps after a failed attempt. `again` checks the answer that was lost
        against that of the retry. Without it a verb is not retried once it may have run."""
        fault = self._chance.random()
        if fault < 0.25:
            await self._dying(doing, 0)
        elif fault < 0.5 and again is not None:
            first = await self._dying(doing, self._chance.choice((1, 2, 9)))
            second = await doing(self._chance.choice(self._replicas))
            if first is not None:
                assert again(first, second), (first, second)
                return first
            return second
        return await doing(self._chance.choice(self._replicas))

    @override
    async def create(
        self, grant: Grant, idempotency: CreationKey | None = None
    ) -> Admitted | Denied:
        return await self._do(
            lambda store: store.create(grant, idempotency),
            None if idempotency is None else _same_or_replayed,
        )

    @override
    async def find_creation(
        self, agent_id: str, idempotency: CreationKey
    ) -> Admitted | Denied | None:
        return await self._do(lambda store: store.find_creation(agent_id, idempotency), _same)

    @override
    async def record(
        self,
        session_id: str,
        admission: Admission,
        idempotency: IdempotencyKey | None = None,
        *,
        dry_run: bool = False,
    ) -> Admitted | Denied:
        repeatable = dry_run or idempotency is not None
        return await self._do(
            lambda store: store.record(session_id, admission, idempotency, dry_run=dry_run),
            _same_or_replayed if repeatable else None,
        )

    @override
    async def change(
        self, session_id: str, transition: Transition, idempotency: ChangeKey | None = None
    ) -> Changed | Denied:
        return await self._do(
            lambda store: store.change(session_id, transition, idempotency), _same_change
        )

    @override
    async def get(self, session_id: str) -> Session | None:
        return await self._do(lambda store: store.get(session_id), _same)

    @override
    async def list_all(
        self, which: SessionFilter, *, limit: int, cursor: str | None = None
    ) -> Page:
        return await self._do(
            lambda store: store.list_all(which, limit=limit, cursor=cursor), _same
        )

    @override
    async def get_agent(self, agent_id: str) -> AgentState:
        return await self._do(lambda store: store.get_agent(agent_id), _same)

    @override
    async def freeze(self, agent_id: str, reason: str, actor: str) -> AgentState:
        return await self._do(lambda store: store.freeze(agent_id, reason, actor), _same)

    @override
    async def unfreeze(self, agent_id: str) -> AgentState:
        return await self._do(lambda store: store.unfreeze(agent_id), _same)

    @override
    async def list_frozen(self, *, limit: int, cursor: str | None = None) -> FrozenAgents:
        return await self._do(
            lambda store: store.list_frozen(limit=limit, cursor=cursor), _same
        )

    @override
    async def totals(self) -> Totals:
        return await self._do(lambda store: store.totals(), _same)

    @override
    async def close_sessions_for_agent(self, agent_id: str, actor: str) -> list[str]:
        return await self._do(
            lambda store: store.close_sessions_for_agent(agent_id, actor),
            lambda _, then: then == [],
        )

    @override
    async def cleanup_expired(self, limit: int) -> Swept:
        # What a dying replica has swept is not counted by anyone.
        return await self._replicas[0].cleanup_expired(limit)


def _same(first: object, second: object) -> bool:
    return first == second


def _same_or_replayed(first: object, second: object) -> bool:
    if isinstance(first, Admitted) and isinstance(second, Admitted):
        return first.session == second.session
    return first == second


def _same_change(first: object, second: object) -> bool:
    if isinstance(first, Changed) and isinstance(second, Changed):
        return first.session == second.session
    return isinstance(second, Denied)


class ReplicasMachine(StoreMachine):
    """The faults are part of the history, so that a failing one can be repeated."""

    @initialize(
        target=StoreMachine.sessions,
        rate=st.sampled_from([None, 1, 3]),
        seed=st.integers(0, 10**6),
    )
    def open(self, rate: int | None, seed: int) -> Any:  # type: ignore[override]
        self.store._chance.seed(seed)
        return super().open(rate)


@pytest.mark.parametrize(("backend", "histories"), [("redis", 40), ("cluster", 20)])
def test_any_history_over_replicas_that_fail_agrees_with_the_model(
    backend: str, histories: int
) -> None:
    class Machine(ReplicasMachine):
        @staticmethod
        def make_store(limits: StoreLimits, clock: ManualClock, folder: Path) -> SessionStore:
            replicas = [STORES[backend](limits, clock, folder) for _ in range(2)]
            return UnreliableReplicas(replicas)

    run_state_machine_as_test(
        Machine,
        settings=settings(max_examples=histories, stateful_step_count=25, deadline=None),
    )
