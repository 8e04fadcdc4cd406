"""The gate: which connections and requests it accepts, and which have to make room."""

from __future__ import annotations

import pytest

from app.observability.metrics import Metrics
from app.server.gate import SURPLUS_CLOSINGS, SURPLUS_CONNECTIONS, Gate, Limits


class FakeConnection:
    """A connection as the gate sees it."""

    def __init__(self, deadline: float = 10.0, *, idle: bool = False) -> None:
        self.deadline = deadline
        self.told: list[str] = []
        self.is_waiting = True
        self._idle = idle

    def is_idle(self) -> bool:
        return self._idle

    def on_deadline(self) -> None:
        self.told.append("on_deadline")

    def drop(self) -> None:
        self.told.append("drop")

    def start(self) -> None:
        self.told.append("start")

    def shed(self) -> None:
        self.told.append("shed")


def gate_of(connections: int = 4, in_flight: int = 2) -> Gate:
    limits = Limits(connections=connections, requests_in_flight=in_flight, keep_alive_secs=75)
    return Gate(Metrics(), limits)


def test_over_the_limit_the_oldest_makes_room() -> None:
    gate = gate_of()
    assert all(gate.enter(FakeConnection()) for _ in range(4))
    surplus = [FakeConnection() for _ in range(SURPLUS_CONNECTIONS + 2)]

    assert [gate.enter(each) for each in surplus].count(True) == 0

    assert [each.told for each in surplus[:3]] == [["drop"], ["drop"], []]


def test_leaving_makes_room_once() -> None:
    gate = gate_of(connections=1)
    first, second = FakeConnection(), FakeConnection()
    gate.enter(first)
    gate.enter(second)
    gate.leave(second)
    gate.leave(first)

    assert gate.metrics.connections == 0
    assert gate.enter(FakeConnection())


@pytest.mark.parametrize(
    ("in_flight", "method", "expected"),
    [
        (1, b"POST", True),
        (2, b"POST", False),
        (2, b"DELETE", True),
        (2 + SURPLUS_CLOSINGS - 1, b"DELETE", True),
        (2 + SURPLUS_CLOSINGS, b"DELETE", False),
    ],
)
def test_closing_has_reserved_capacity(in_flight: int, method: bytes, expected: bool) -> None:
    gate = gate_of()
    gate.metrics.requests_in_flight = in_flight

    assert gate.has_capacity(method) is expected


def test_overdue_connections_are_notified_at_the_deadline() -> None:
    gate = gate_of()
    due, later, surplus = FakeConnection(5.0), FakeConnection(5.1), FakeConnection(4.0)
    for each in (due, later, FakeConnection(9), FakeConnection(9), surplus):
        gate.enter(each)

    gate.reap(5.0)

    assert (due.told, later.told, surplus.told) == (["on_deadline"], [], ["on_deadline"])


@pytest.mark.parametrize(("held", "told"), [(4, ["on_deadline"]), (3, [])])
def test_idle_connections_end_sooner_near_the_limit(held: int, told: list[str]) -> None:
    gate = gate_of(connections=4)
    # Idle since 0, with a keep-alive of 75 seconds.
    idle, busy = FakeConnection(75.0, idle=True), FakeConnection(10.0)
    for each in (idle, busy, *(FakeConnection() for _ in range(held - 2))):
        gate.enter(each)

    gate.reap(1.9)
    assert idle.told == []
    gate.reap(2.0)

    assert (idle.told, busy.told) == (told, [])


def test_a_request_that_ends_starts_the_one_that_waited_longest() -> None:
    gate = gate_of(in_flight=2)
    gate.metrics.requests_in_flight = 2
    first, second = FakeConnection(), FakeConnection()
    gate.queue.join(first)
    gate.queue.join(second)

    gate.start_next()
    assert first.told == []  # what ended was a DELETE over the limit
    gate.metrics.requests_in_flight = 1
    gate.start_next()

    assert (first.told, second.told) == (["start"], [])


def test_reaping_sheds_what_has_waited_too_long() -> None:
    now = 0.0
    gate = Gate(Metrics(), Limits(queue_delay_secs=0.25), clock=lambda: now)
    connection = FakeConnection(deadline=99)
    gate.queue.join(connection)
    gate.reap(0)
    assert connection.told == []

    now = 0.3
    gate.reap(0)

    assert connection.told == ["shed"]
