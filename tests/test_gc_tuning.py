"""Garbage collection that visits each survivor once."""

from __future__ import annotations

import gc
from typing import Any

from app.domain.session import Session
from app.gc_tuning import short_pauses
from tests.support import START, a_grant, new_id


def test_survivors_of_a_full_collection_are_not_visited_again() -> None:
    thresholds = gc.get_threshold()
    with short_pauses():
        kept: list[Any] = [[] for _ in range(1000)]
        gc.collect()
        assert not any(each is kept[0] for each in gc.get_objects())

        cycle: list[Any] = []
        cycle.append(cycle)
        del cycle
        assert gc.collect() >= 1

    assert gc.get_threshold() == thresholds
    assert gc.get_freeze_count() == 0
    assert kept


def test_the_collector_does_not_track_sessions() -> None:
    session = Session.opened(new_id(), a_grant(), START)

    assert not gc.is_tracked(session)
    assert not gc.is_tracked(session.grant)
