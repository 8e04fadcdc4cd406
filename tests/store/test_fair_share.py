"""Room that callers share."""

from __future__ import annotations

from app.store.fair_share import FairShare


def fill(share: FairShare, caller: str) -> int:
    """Use all that the caller may, and return how much that was."""
    used = 0
    while share.has_room(caller):
        share.add(caller)
        used += 1
    return used


def test_there_is_always_room_for_another_caller() -> None:
    share = FairShare(100)

    assert [fill(share, caller) for caller in "abcde"] == [50, 25, 13, 6, 3]


def test_two_callers_that_ask_in_turn_get_a_third_each() -> None:
    share = FairShare(99)
    each = 0
    while share.has_room("a"):
        share.add("a")
        share.add("b")
        each += 1

    assert not share.has_room("b")
    assert each == 33


def test_room_that_is_given_back_is_free() -> None:
    share = FairShare(10, {"a": 5})
    assert not share.has_room("a")
    copy = share.copy()

    share.add("a", -5)

    assert fill(share, "a") == 5
    assert not copy.has_room("a")
