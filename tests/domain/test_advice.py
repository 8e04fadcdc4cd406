"""Advice, followed: over every combination of violations, whether what is advised can help."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from app.domain.admission import Admission, Admitted, Denied, Operation, decide
from app.domain.advice import DenialCode, NextAction
from app.domain.session import MICROSECONDS, DataSensitivity, Grant, Session, Usage
from app.domain.tools import AllowList
from tests.support import AGENT, START, new_id

WINDOW_SECS = 60


class Case(NamedTuple):
    """A session, and a request for calls."""

    session: Session
    admission: Admission
    now: int = START

    def decide(self) -> Admitted | Denied:
        return decide(self.session, self.admission, self.now)


def sessions() -> Iterator[Session]:
    """Sessions that have used nothing, some or all of what they may."""
    for tools, budget, limit, secs in product(
        [("a", "b"), ()], [0, 1, 2, 4], [None, 0, 1, 2, 4], [30, 3600]
    ):
        grant = Grant(
            agent_id=AGENT,
            declared_intent="test",
            authorized_tools=AllowList.of(tools),
            time_limit_secs=secs,
            call_budget=budget,
            rate_limit_per_minute=limit,
            rate_limit_window_secs=WINDOW_SECS,
        )
        terms = Session.opened(new_id(), grant, START).terms
        for made, in_window in product(range(budget + 1), range(5)):
            if in_window <= made and (limit is None or in_window <= limit):
                yield Session("id", terms, Usage(made, START, in_window), START)


def cases() -> Iterator[Case]:
    for session, tools, tier in product(
        sessions(),
        [("a",), ("x",), ("a", "b"), ("a", "x"), ("a", "b", "a"), ("x", "x", "x")],
        [None, *DataSensitivity],
    ):
        yield Case(session, Admission(Operation.BATCH, tools, None, tier))


DENIED = [case for case in cases() if isinstance(case.decide(), Denied)]


def denial_of(case: Case) -> Denied:
    denied = case.decide()
    assert isinstance(denied, Denied)
    return denied


def follow(case: Case, denied: Denied) -> Case:
    """Do what was advised, in the most modest way."""
    session, (operation, tools, agent_id, tier), now = case[0], _fields(case.admission), case[2]
    match denied.next_action:
        case NextAction.WAIT:
            assert denied.retry_after_secs is not None
            now += denied.retry_after_secs * MICROSECONDS
        case NextAction.SPLIT_BATCH:
            assert len(tools) > 1
            tools = tools[:-1]
        case NextAction.USE_AUTHORIZED_TOOL:
            known = session.grant.authorized_tools.entries
            tools = tuple(tool if tool in known else known[0] for tool in tools)
        case NextAction.LOWER_SENSITIVITY:
            tier = DataSensitivity.PUBLIC
        case NextAction.NEW_SESSION:
            session = Session.opened(new_id(), session.grant, now)
        case other:
            raise AssertionError(other)
    return Case(session, Admission(operation, tools, agent_id, tier), now)


def _fields(
    admission: Admission,
) -> tuple[Operation, tuple[str, ...], str | None, DataSensitivity | None]:
    return (
        admission.operation,
        admission.tool_names,
        admission.agent_id,
        admission.data_sensitivity,
    )


def can_admit_anything(session: Session) -> bool:
    """Whether the session can admit any call at all, now or in a later window."""
    later = session.terms.expires_at - MICROSECONDS
    return any(
        isinstance(decide(session, Admission(Operation.CALL, (tool,)), now), Admitted)
        for tool in session.grant.authorized_tools.entries
        for now in (START, max(START, later))
    )


def test_every_combination_of_violations_is_there() -> None:
    rules = {
        DenialCode.BUDGET_EXCEEDED,
        DenialCode.TOOL_NOT_AUTHORIZED,
        DenialCode.SENSITIVITY_EXCEEDED,
        DenialCode.RATE_LIMITED,
    }
    found = {frozenset(each.code for each in denial_of(case).violations) for case in DENIED}

    assert len(found) == 2 ** len(rules) - 1


def test_advice_that_is_followed_leads_to_an_admission() -> None:
    for case in DENIED:
        at, advised = case, []
        while isinstance(denied := at.decide(), Denied):
            advised.append(denied.next_action)
            if denied.next_action is NextAction.ASK_OPERATOR:
                # Only at once: no one is led on first.
                assert len(advised) == 1, (case, advised)
                break
            assert len(advised) < 6, (case, advised)
            at = follow(at, denied)


def test_only_the_same_request_is_repeated() -> None:
    """`wait` and `new_session` change nothing about the request, so it must then pass."""
    for case in DENIED:
        denied = denial_of(case)
        assert (denied.retry_after_secs is not None) == (denied.next_action is NextAction.WAIT)
        if denied.next_action in (NextAction.WAIT, NextAction.NEW_SESSION):
            assert isinstance(follow(case, denied).decide(), Admitted), case


def test_a_session_that_can_admit_a_call_is_not_given_up() -> None:
    for case in DENIED:
        gives_up = denial_of(case).next_action in (
            NextAction.ASK_OPERATOR,
            NextAction.NEW_SESSION,
        )
        if case.session.grant.authorized_tools.entries:
            assert gives_up != can_admit_anything(case.session), case


def test_an_operator_is_asked_only_if_a_new_session_would_be_refused_too() -> None:
    for case in DENIED:
        if denial_of(case).next_action is NextAction.ASK_OPERATOR:
            fresh = Session.opened(new_id(), case.session.grant, START)
            assert isinstance(Case(fresh, case.admission).decide(), Denied), case
