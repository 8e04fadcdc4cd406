"""Garbage collection that does not stop the service for long.

A full collection looks into every container. Sessions are none (`app.domain.session`), but
the lists that keep a million of them in order are. So after each full collection what has
survived is frozen, that is, put where later collections do not look: each then sees only
what came since the one before. A frozen object is still freed when the last reference to it
goes; only a cycle that becomes garbage after it was frozen stays until the end.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (700, 5, 1)
"""Full collections often, since each looks at what is new only. Rarer young ones (5000) made
pauses of 20 ms while a million sessions came and went."""

_FULL = 2


@contextmanager
def short_pauses() -> Iterator[None]:
    """Freeze what survives each full collection, until the end of the block."""
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
