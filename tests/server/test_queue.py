"""The queue of requests: how long they may wait, and who is shed."""

from __future__ import annotations

import pytest

from app.server.queue import RequestQueue

DELAY = 0.25


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeWaiter:
    """A connection whose request waits."""

    def __init__(self) -> None:
        self.is_waiting = True
        self.is_shed = False

    def shed(self) -> None:
        self.is_waiting = False
        self.is_shed = True


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> RequestQueue[FakeWaiter]:
    return RequestQueue(DELAY, clock)


def test_requests_take_their_turn_in_order(queue: RequestQueue[FakeWaiter]) -> None:
    waiters = [FakeWaiter() for _ in range(5000)]
    for each in waiters:
        queue.join(each)

    assert [queue.take() for _ in waiters] == waiters
    assert queue.take() is None


def test_a_request_is_shed_when_it_has_waited_longer_than_the_delay(
    queue: RequestQueue[FakeWaiter], clock: Clock
) -> None:
    early, late = FakeWaiter(), FakeWaiter()
    queue.join(early)
    clock.now += DELAY
    queue.join(late)
    queue.shed_overdue()
    assert not early.is_shed

    clock.now += 0.001
    queue.shed_overdue()

    assert queue.take() is late
    assert (early.is_shed, late.is_shed) == (True, False)


def test_others_may_wait_although_one_has_waited_too_long(
    queue: RequestQueue[FakeWaiter], clock: Clock
) -> None:
    """To refuse them at once would make clients that ask again ask all the more often."""
    overdue, waits = FakeWaiter(), FakeWaiter()
    queue.join(overdue)
    clock.now += DELAY + 0.001
    queue.join(waits)
    queue.shed_overdue()

    assert queue.take() is waits
    assert overdue.is_shed


def test_clients_that_gave_up_are_passed_over(
    queue: RequestQueue[FakeWaiter], clock: Clock
) -> None:
    gone, waits = FakeWaiter(), FakeWaiter()
    queue.join(gone)
    clock.now += DELAY
    queue.join(waits)
    gone.is_waiting = False
    clock.now += 0.001
    queue.shed_overdue()

    assert queue.take() is waits
    assert not gone.is_shed


def test_without_a_delay_no_request_waits(clock: Clock) -> None:
    assert not RequestQueue[FakeWaiter](0, clock).is_open
    assert RequestQueue[FakeWaiter](DELAY, clock).is_open
