"""The admission rules, each at its edges."""

from __future__ import annotations

import pytest

from app.domain import lifecycle
from app.domain.admission import Admission, Admitted, Denied, Violation, decide
from app.domain.admission import DenialCode as Code
from app.domain.advice import NextAction
from app.domain.session import (
    MICROSECONDS,
    ClosedBy,
    DataSensitivity,
    Session,
    SessionStatus,
    Terms,
)
from tests.support import AGENT, OTHER_AGENT, START, a_batch, a_call, a_grant, new_id


def closed_at(now: int, before: Session) -> Session:
    terms = lifecycle.close(ClosedBy("ops"))(before, now)
    assert isinstance(terms, Terms)
    return before.with_terms(terms, now)


def session(**terms: object) -> Session:
    return Session.opened(new_id(), a_grant(**terms), START)


def admitted(before: Session, admission: Admission, now: int = START) -> Session:
    decision = decide(before, admission, now)
    assert isinstance(decision, Admitted), decision
    return decision.session


def denied(before: Session, admission: Admission, now: int = START) -> Denied:
    decision = decide(before, admission, now)
    assert isinstance(decision, Denied), decision
    return decision


def after(secs: float) -> int:
    return START + round(secs * MICROSECONDS)


def test_an_admitted_call_counts_once_in_budget_and_window() -> None:
    counted = admitted(session(), a_call())

    assert (counted.usage.calls_made, counted.usage.rate_window_calls) == (1, 1)
    assert counted.usage.rate_window_start == START


def test_a_batch_counts_every_tool_including_repeats() -> None:
    counted = admitted(session(), a_batch("read_file", "read_file", "list_dir"))

    assert counted.usage.calls_made == 3


def test_the_last_call_of_the_budget_is_admitted_and_the_next_is_not() -> None:
    last = admitted(admitted(session(call_budget=2), a_call()), a_call())

    denial = denied(last, a_call())

    assert denial.code is Code.BUDGET_EXCEEDED
    assert (denial.limit, denial.used) == (2, 2)
    assert denial.next_action is NextAction.NEW_SESSION
    assert denial.retry_after_secs is None


def test_a_whole_batch_must_fit_the_budget() -> None:
    assert denied(session(call_budget=2), a_batch(*["read_file"] * 3)).used == 0
    assert admitted(session(call_budget=3), a_batch(*["read_file"] * 3)).usage.calls_made == 3


def test_a_budget_of_zero_admits_nothing() -> None:
    assert denied(session(call_budget=0), a_call()).code is Code.BUDGET_EXCEEDED


def test_a_session_lives_until_just_before_its_deadline() -> None:
    mortal = session(time_limit_secs=10)

    assert admitted(mortal, a_call(), after(10) - 1)
    assert denied(mortal, a_call(), after(10)).code is Code.SESSION_EXPIRED


def test_a_session_with_no_time_is_expired_at_creation() -> None:
    assert session(time_limit_secs=0).status is SessionStatus.EXPIRED
    assert denied(session(time_limit_secs=0), a_call()).code is Code.SESSION_EXPIRED


def test_a_closed_session_stays_closed_after_its_deadline() -> None:
    closed = closed_at(after(5), session(time_limit_secs=10))

    assert closed.at(after(20)).status is SessionStatus.CLOSED
    assert denied(closed, a_call(), after(20)).code is Code.SESSION_CLOSED


def test_a_call_that_names_another_agent_is_denied() -> None:
    assert admitted(session(), a_call(agent_id=AGENT))
    denial = denied(session(), a_call(agent_id=OTHER_AGENT))

    assert denial.code is Code.AGENT_MISMATCH
    assert denial.next_action is NextAction.STOP


def test_another_agent_does_not_learn_that_a_session_is_closed() -> None:
    closed = closed_at(START, session())

    assert denied(closed, a_call(agent_id=OTHER_AGENT)).code is Code.AGENT_MISMATCH


@pytest.mark.parametrize("ceiling", DataSensitivity)
@pytest.mark.parametrize("tier", DataSensitivity)
def test_a_call_may_touch_data_up_to_the_ceiling(
    ceiling: DataSensitivity, tier: DataSensitivity
) -> None:
    order = ["public", "internal", "confidential", "restricted"]
    decision = decide(session(data_sensitivity_ceiling=ceiling), a_call(tier=tier), START)

    allowed = order.index(tier.value) <= order.index(ceiling.value)
    assert isinstance(decision, Admitted) is allowed
    if isinstance(decision, Denied):
        assert decision.code is Code.SENSITIVITY_EXCEEDED
        assert decision.next_action is NextAction.LOWER_SENSITIVITY


def test_a_call_without_a_tier_skips_the_sensitivity_rule() -> None:
    assert admitted(session(data_sensitivity_ceiling=DataSensitivity.PUBLIC), a_call())


def test_a_denial_lists_every_position_of_an_unauthorised_tool() -> None:
    denial = denied(session(), a_batch("read_file", "rm", "list_dir", "rm"))

    assert denial.violations == (
        Violation(Code.TOOL_NOT_AUTHORIZED, requested=4, tool_indexes=(1, 3)),
    )
    assert denial.next_action is NextAction.USE_AUTHORIZED_TOOL


def test_the_first_failed_rule_names_the_denial_and_all_are_listed() -> None:
    strict = session(
        call_budget=1, rate_limit_per_minute=1, data_sensitivity_ceiling=DataSensitivity.PUBLIC
    )
    denial = denied(strict, a_batch("rm", "rm", tier=DataSensitivity.RESTRICTED))

    assert denial.code is Code.BUDGET_EXCEEDED
    assert [each.code for each in denial.violations] == [
        Code.BUDGET_EXCEEDED,
        Code.TOOL_NOT_AUTHORIZED,
        Code.SENSITIVITY_EXCEEDED,
        Code.RATE_LIMITED,
    ]


def test_an_empty_batch_passes_a_spent_budget_and_records_nothing() -> None:
    spent = admitted(session(call_budget=1, rate_limit_per_minute=0), a_batch())

    assert admitted(spent, a_batch()).usage.calls_made == 0
    assert denied(closed_at(START, spent), a_batch()).code is Code.SESSION_CLOSED


class TestRate:
    def test_a_window_admits_its_limit_and_no_more(self) -> None:
        full = admitted(session(rate_limit_per_minute=2), a_batch("read_file", "read_file"))

        denial = denied(full, a_call(), after(59))

        assert denial.code is Code.RATE_LIMITED
        assert (denial.limit, denial.used) == (2, 2)
        assert (denial.next_action, denial.retry_after_secs) == (NextAction.WAIT, 1)

    def test_a_window_elapses_exactly_at_its_length(self) -> None:
        full = admitted(session(rate_limit_per_minute=1), a_call())

        assert denied(full, a_call(), after(60) - 1).retry_after_secs == 1
        fresh = admitted(full, a_call(), after(60))
        assert (fresh.usage.rate_window_start, fresh.usage.rate_window_calls) == (after(60), 1)

    def test_a_new_window_opens_with_the_first_call_after_the_old_one(self) -> None:
        late = admitted(session(rate_limit_per_minute=1), a_call(), after(90))

        assert late.usage.rate_window_start == after(90)
        assert denied(late, a_call(), after(149)).code is Code.RATE_LIMITED
        assert admitted(late, a_call(), after(150))

    def test_a_batch_after_a_window_is_checked_against_an_empty_one(self) -> None:
        denial = denied(
            session(rate_limit_per_minute=2), a_batch(*["read_file"] * 3), after(60)
        )

        assert denial.code is Code.RATE_LIMITED
        assert (denial.limit, denial.used) == (2, 0)

    def test_a_limit_of_zero_admits_nothing_in_any_window(self) -> None:
        shut = session(rate_limit_per_minute=0)

        for now in (START, after(60), after(61)):
            denial = denied(shut, a_call(), now)
            assert denial.code is Code.RATE_LIMITED
            expected = NextAction.ASK_OPERATOR, None
            assert (denial.next_action, denial.retry_after_secs) == expected

    def test_a_batch_that_no_window_can_hold_is_not_retryable(self) -> None:
        denial = denied(session(rate_limit_per_minute=2), a_batch(*["read_file"] * 3))

        expected = NextAction.SPLIT_BATCH, None
        assert (denial.next_action, denial.retry_after_secs) == expected

    def test_waiting_is_not_advised_past_the_deadline_of_the_session(self) -> None:
        short = session(rate_limit_per_minute=1, time_limit_secs=60)
        full = admitted(short, a_call())

        denial = denied(full, a_call(), after(30))

        assert denial.next_action is NextAction.NEW_SESSION
        assert denial.retry_after_secs is None

    def test_the_advised_wait_is_long_enough(self) -> None:
        full = admitted(session(rate_limit_per_minute=1), a_call())
        now = after(12.3)

        wait = denied(full, a_call(), now).retry_after_secs

        assert wait == 48
        assert admitted(full, a_call(), now + wait * MICROSECONDS)

    def test_without_a_rate_limit_any_rate_is_admitted(self) -> None:
        assert admitted(session(call_budget=999), a_batch(*["read_file"] * 256))

    def test_a_window_need_not_be_a_minute_long(self) -> None:
        full = admitted(session(rate_limit_per_minute=1, rate_limit_window_secs=5), a_call())

        assert denied(full, a_call(), after(5) - 1)
        assert admitted(full, a_call(), after(5))


@pytest.mark.parametrize(
    "admission",
    [
        a_batch(*["read_file"] * 9),
        a_call("rm"),
        a_call(tier=DataSensitivity.RESTRICTED),
        a_batch(*["read_file"] * 4),
        a_call(agent_id=OTHER_AGENT),
    ],
)
def test_a_denial_reports_the_session_unchanged(admission: Admission) -> None:
    before = admitted(session(call_budget=8, rate_limit_per_minute=3), a_call())

    assert denied(before, admission).session == before
