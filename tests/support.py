"""Shorthands for tests: a manual clock, and values with sensible defaults."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from app.domain import lifecycle
from app.domain.admission import Admission, Admitted, Denied, Operation
from app.domain.idempotency import CreationKey, IdempotencyKey
from app.domain.session import (
    MICROSECONDS,
    ClosedBy,
    DataSensitivity,
    Grant,
    PausedBy,
    Session,
)
from app.domain.tools import AllowList
from app.store.codec import to_text
from app.store.contract import SessionStore

AGENT = "7c9e6679-7425-40de-944b-e07fc1f90ae7"
OTHER_AGENT = "11111111-2222-4333-8444-555555555555"
START = 1_767_268_800 * MICROSECONDS


@dataclass
class ManualClock:
    """A clock that moves only when a test advances it."""

    now: int = START

    def __call__(self) -> int:
        return self.now

    def advance(self, secs: float) -> None:
        self.now += round(secs * MICROSECONDS)


def new_id() -> str:
    return str(uuid.uuid4())


def a_grant(*tools: str, **terms: Any) -> Grant:
    """A grant for `tools`, or for `read_file` and `list_dir` if none are given."""
    terms = {"agent_id": AGENT, "declared_intent": "read and analyse files"} | terms
    return Grant(authorized_tools=AllowList.of(tools or ("read_file", "list_dir")), **terms)


def a_call(
    tool: str = "read_file",
    *,
    agent_id: str | None = None,
    tier: DataSensitivity | None = None,
) -> Admission:
    return Admission(Operation.CALL, (tool,), agent_id, tier)


def a_batch(
    *tools: str, agent_id: str | None = None, tier: DataSensitivity | None = None
) -> Admission:
    return Admission(Operation.BATCH, tools, agent_id, tier)


async def create(
    store: SessionStore, grant: Grant | None = None, key: IdempotencyKey | None = None
) -> Admitted | Denied:
    """Create a session; with `key`, as a request that asks for just this grant."""
    grant = grant or a_grant()
    if key is None:
        return await store.create(grant)
    return await store.create(grant, CreationKey(*key, to_text(grant)))


async def opened(store: SessionStore, grant: Grant | None = None) -> Session:
    """A new session in `store`."""
    created = await create(store, grant)
    assert isinstance(created, Admitted)
    return created.session


async def change(
    store: SessionStore, session_id: str, transition: lifecycle.Transition
) -> Session | Denied:
    """Change a session without an idempotency key."""
    changed = await store.change(session_id, transition)
    return changed if isinstance(changed, Denied) else changed.session


PAUSE = lifecycle.pause(PausedBy("ops", "looking into it"))


async def close(store: SessionStore, session_id: str) -> Session | Denied:
    return await change(store, session_id, lifecycle.close(ClosedBy("ops")))


async def count_active(store: SessionStore, agent_id: str | None = None) -> int:
    """How many sessions of an agent, or of all, are active now."""
    if agent_id is None:
        return (await store.totals()).active
    return (await store.get_agent(agent_id)).active_sessions


async def kill(store: SessionStore, agent_id: str = AGENT) -> int:
    """Use the kill switch. Return how many sessions it closed."""
    return len(await store.close_sessions_for_agent(agent_id, "ops"))


def session_request(**fields: Any) -> dict[str, Any]:
    """The JSON body of a request that creates a session."""
    return {
        "agent_id": AGENT,
        "declared_intent": "read and analyse files",
        "authorized_tools": ["read_file", "list_dir"],
    } | fields
