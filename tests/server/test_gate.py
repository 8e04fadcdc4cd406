"""Who gets a place, and who has to give one up."""

from __future__ import annotations

import pytest

from app.observability.metrics import Metrics
from app.server.gate import SURPLUS_CLOSINGS, SURPLUS_CONNECTIONS, Gate, Limits


class FakeConnection:
    """What the gate knows of a connection."""

    def __init__(self, deadline: float = 10.0, *, idle: bool = False) -> None:
        self.deadline = deadline
        self.told: list[str] = []
        self._idle = idle

    def is_idle(self) -> bool:
        return self._idle

    def on_deadline(self) -> None:
        self.told.append("on_deadline")

    def drop(self) -> None:
        self.told.append("drop")


def gate_of(connections: int = 4, in_flight: int = 2) -> Gate:
    limits = Limits(connections=connections, requests_in_flight=in_flight, keep_alive_secs=75)
    return Gate(Metrics(), limits)


def test_past_the_cap_the_oldest_makes_room() -> None:
    gate = gate_of()
    assert all(gate.enter(FakeConnection()) for _ in range(4))
    surplus = [FakeConnection() for _ in range(SURPLUS_CONNECTIONS + 2)]

    assert [gate.enter(each) for each in surplus].count(True) == 0

    assert [each.told for each in surplus[:3]] == [["drop"], ["drop"], []]


def test_who_leaves_gives_a_place_back_once() -> None:
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
def test_closing_has_places_of_its_own(in_flight: int, method: bytes, expected: bool) -> None:
    gate = gate_of()
    gate.metrics.requests_in_flight = in_flight

    assert gate.has_capacity(method) is expected


def test_who_is_overdue_is_told_so_at_the_deadline() -> None:
    gate = gate_of()
    due, later, surplus = FakeConnection(5.0), FakeConnection(5.1), FakeConnection(4.0)
    for each in (due, later, FakeConnection(9), FakeConnection(9), surplus):
        gate.enter(each)

    gate.reap(5.0)

    assert (due.told, later.told, surplus.told) == (["on_deadline"], [], ["on_deadline"])


@pytest.mark.parametrize(("held", "told"), [(4, ["on_deadline"]), (3, [])])
def test_idle_ones_have_less_patience_when_most_places_are_taken(
    held: int, told: list[str]
) -> None:
    gate = gate_of(connections=4)
    # Idle since 0, with 75 seconds to be so.
    idle, busy = FakeConnection(75.0, idle=True), FakeConnection(10.0)
    for each in (idle, busy, *(FakeConnection() for _ in range(held - 2))):
        gate.enter(each)

    gate.reap(1.9)
    assert idle.told == []
    gate.reap(2.0)

    assert (idle.told, busy.told) == (told, [])
