"""Lists over many cells: a k-way merge in the order of deadlines."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from app.store.cursor import Cursor

FIRST_READ = 4
"""Entries read from each cell at first. Over 256 cells this mostly makes a page of 100."""

Read = Callable[[Sequence[str], Sequence[Cursor], int], Awaitable[list[list[Cursor]]]]
"""Called with cells, the cursor in each after which to read, and how many entries at most."""


class Merge:
    """The entries of several cells after a cursor, as one ordered sequence."""

    def __init__(self, cells: Sequence[str], after: Cursor, read: Read) -> None:
        self._read = read
        self._after = dict.fromkeys(cells, after)
        self._entries: dict[str, deque[Cursor]] = {cell: deque() for cell in cells}
        self._at_end: set[str] = set()
        self._most = FIRST_READ

    async def take(self, count: int) -> list[Cursor]:
        """The next `count` entries; fewer only at the end."""
        taken: list[Cursor] = []
        while len(taken) < count:
            await self._fill(count)
            heads = [(entries[0], cell) for cell, entries in self._entries.items() if entries]
            if not heads:
                break
            heapq.heapify(heads)
            while heads and len(taken) < count:
                entry, cell = heads[0]
                entries = self._entries[cell]
                entries.popleft()
                taken.append(entry)
                if entries:
                    heapq.heapreplace(heads, (entries[0], cell))
                elif cell in self._at_end:
                    heapq.heappop(heads)
                else:
                    # Its next entry is not known, and may come before all others.
                    break
        return taken

    async def _fill(self, count: int) -> None:
        empty = [
            cell
            for cell, entries in self._entries.items()
            if not entries and cell not in self._at_end
        ]
        if not empty:
            return
        most = min(self._most, count) if len(self._entries) > 1 else count
        found = await self._read(empty, [self._after[cell] for cell in empty], most)
        for cell, entries in zip(empty, found, strict=True):
            self._entries[cell].extend(entries)
            if len(entries) < most:
                self._at_end.add(cell)
            if entries:
                self._after[cell] = entries[-1]
        # Cells that are asked again hold more than their share.
        self._most *= 2
