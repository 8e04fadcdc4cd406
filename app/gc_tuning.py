"""Garbage collection with short pauses.

A full collection visits every container. The collector does not track sessions
(`app.domain.session`), but it does track the lists that keep a million of them in order. So
the survivors of each full collection are frozen: later collections skip them and visit only
newer objects. A frozen object is still freed when its last reference goes. Only a cycle that
becomes garbage after it was frozen stays until the service stops.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (700, 5, 1)
"""Full collections are frequent, since each visits only new objects. A young threshold of 5000
caused pauses of 20 ms while a million sessions came and went."""

_FULL = 2


@contextmanager
def short_pauses() -> Iterator[None]:
    """Freeze the survivors of each full collection until the end of the block."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.callbacks.append(_freeze_survivors)
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(_freeze_survivors)
        gc.unfreeze()


def _freeze_survivors(phase: str, info: dict[str, int]) -> None:
    if phase == "stop" and info["generation"] == _FULL:
        gc.freeze()
