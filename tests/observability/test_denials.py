"""The memory of denials: what it keeps, and that it stays small."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from app.domain.admission import Denied, Violation, already_closed
from app.domain.advice import DenialCode, NextAction
from app.domain.session import Session
from app.observability import denials as denials_module
from app.observability.audit import Actor
from app.observability.denials import Denials
from tests.support import AGENT, OTHER_AGENT, ManualClock, a_grant, new_id

ACTOR = Actor("gate", "r-1")
RATE = Denied(
    DenialCode.RATE_LIMITED,
    NextAction.WAIT,
    violations=(Violation(DenialCode.RATE_LIMITED, 1, 1, 1),),
)
UNKNOWN = Denied(DenialCode.SESSION_NOT_FOUND, NextAction.NEW_SESSION)


@pytest.fixture
def memory(clock: ManualClock) -> Denials:
    return Denials(clock)


def note(
    memory: Denials,
    denied: Denied = RATE,
    session_id: str = "",
    agent_id: str = AGENT,
    tools: tuple[str, ...] = ("read_file",),
    actor: Actor = ACTOR,
) -> None:
    memory.note("call", denied, actor, session_id=session_id, agent_id=agent_id, tools=tools)


def latest(memory: Denials, **wanted: Any) -> list[Any]:
    return list(memory.latest(**({"limit": 100} | wanted)))


def test_the_newest_denial_comes_first(memory: Denials, clock: ManualClock) -> None:
    for number in range(3):
        note(memory, actor=Actor("gate", str(number)))
        clock.advance(1)

    told = latest(memory)

    assert [each.actor.request_id for each in told] == ["2", "1", "0"]
    assert told[0].at - told[1].at == 1_000_000


def test_a_denial_is_kept_as_it_was_given(memory: Denials, clock: ManualClock) -> None:
    session_id = new_id()
    memory.note(
        "batch",
        RATE,
        ACTOR,
        session_id=session_id,
        agent_id=AGENT,
        tools=("a", "b"),
        dry_run=True,
    )

    (told,) = latest(memory)

    assert (told.at, told.operation, told.code) == (clock.now, "batch", "rate_limited")
    assert (told.session_id, told.agent_id, told.actor) == (session_id, AGENT, ACTOR)
    assert (told.tools, told.violations) == (("a", "b"), RATE.violations)
    assert told.dry_run


def test_filters_leave_only_what_matches_all_of_them(memory: Denials) -> None:
    session_id = new_id()
    note(memory, RATE, session_id)
    note(memory, UNKNOWN, session_id)
    note(memory, RATE, new_id(), OTHER_AGENT)

    assert len(latest(memory, session_id=session_id)) == 2
    assert len(latest(memory, agent_id=OTHER_AGENT)) == 1
    assert len(latest(memory, code=DenialCode.RATE_LIMITED)) == 2
    assert len(latest(memory, code=DenialCode.RATE_LIMITED, session_id=session_id)) == 1
    assert latest(memory, agent_id=OTHER_AGENT, session_id=session_id) == []


def test_the_limit_counts_what_matches(memory: Denials) -> None:
    for denied in (UNKNOWN, RATE, UNKNOWN, RATE, UNKNOWN):
        note(memory, denied)

    assert len(latest(memory, code=DenialCode.RATE_LIMITED, limit=2)) == 2
    assert len(latest(memory, limit=2)) == 2


def test_only_the_latest_denials_are_kept(
    memory: Denials, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denials_module, "MAX_DENIALS", 3)
    for number in range(10):
        note(memory, actor=Actor("gate", str(number)))

    assert [each.actor.request_id for each in latest(memory)] == ["9", "8", "7"]


def test_large_batches_do_not_make_the_memory_large(
    memory: Denials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 denied batches of 256 long names would take hundreds of megabytes."""
    monkeypatch.setattr(denials_module, "MAX_TOOL_NAMES", 6)
    note(memory, actor=Actor("gate", "single"))
    for number in range(3):
        note(memory, tools=("a", "b", "c"), actor=Actor("gate", str(number)))
    assert [each.actor.request_id for each in latest(memory)] == ["2", "1"]

    for number in range(6):
        note(memory, actor=Actor("gate", f"call-{number}"))
    assert len(latest(memory)) == 6


def test_a_denial_does_not_keep_its_session_alive(memory: Denials, clock: ManualClock) -> None:
    """A grant may take tens of kilobytes, and outlives its session here otherwise."""
    session = Session.opened(new_id(), a_grant(), clock.now)
    denied = already_closed(session)
    before = sys.getrefcount(session), sys.getrefcount(denied)

    note(memory, denied)

    assert (sys.getrefcount(session), sys.getrefcount(denied)) == before
    assert [each.agent_id for each in latest(memory)] == [AGENT]
