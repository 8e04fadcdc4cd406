"""What only the memory store has: its clock."""

from __future__ import annotations

import time

import pytest

from app.domain.session import MICROSECONDS
from app.store.memory import anchored_clock


def test_setting_the_wall_clock_does_not_move_the_store(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = anchored_clock()
    wall = time.time_ns()
    for step in (-3600, 3600):
        monkeypatch.setattr(time, "time_ns", lambda step=step: wall + step * 10**9)

        assert abs(clock() - wall // 1000) < 60 * MICROSECONDS


def test_the_clock_never_runs_backwards() -> None:
    clock = anchored_clock()
    read = [clock() for _ in range(1000)]

    assert read == sorted(read)
