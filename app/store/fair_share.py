"""Room that callers share, so that one of them cannot use it up."""

from __future__ import annotations

from collections.abc import Mapping


class FairShare:
    """How much of a limited room each caller uses.

    A caller may use as much as is still free. So one alone gets half of the room, two get a
    third each, and a newcomer always finds some ("dynamic thresholds", Choudhury and Hahne,
    1998).
    """

    def __init__(self, room: int, used: Mapping[str, int] | None = None) -> None:
        self._room = room
        self._used = dict(used or {})
        self._total = sum(self._used.values())

    def has_room(self, caller: str) -> bool:
        """Whether the caller may use one more."""
        return self._used.get(caller, 0) < self._room - self._total

    def add(self, caller: str, n: int = 1) -> None:
        """Count `n` more for the caller, or fewer if it is negative."""
        self._total += n
        used = self._used.get(caller, 0) + n
        if used:
            self._used[caller] = used
        else:
            self._used.pop(caller, None)

    def copy(self) -> FairShare:
        """An independent copy."""
        return FairShare(self._room, self._used)

    def used(self, caller: str) -> int:
        """What the caller uses."""
        return self._used.get(caller, 0)

    @property
    def total(self) -> int:
        """What all callers use together."""
        return self._total
