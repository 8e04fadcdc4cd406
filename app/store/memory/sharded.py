"""A dict split into many small ones.

A dict that grows or fills up with deleted entries is rebuilt as a whole. At a million
entries that blocks the event loop for tens of milliseconds. Rebuilding one shard takes
microseconds.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

SHARDS = 1024
"""A power of two. With a million entries, a shard has about a thousand."""

_LAST = SHARDS - 1


class ShardedDict(Generic[K, V]):
    """A mapping that spreads its keys over `SHARDS` dicts by hash."""

    __slots__ = ("_length", "_shards")

    def __init__(self) -> None:
        self._shards: tuple[dict[K, V], ...] = tuple({} for _ in range(SHARDS))
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def shard(self, key: K) -> dict[K, V]:
        """The dict that holds `key`, if any does. Only read it or replace values in it: the
        methods below keep count of the entries."""
        return self._shards[hash(key) & _LAST]

    def get(self, key: K) -> V | None:
        """The value of `key`, or `None`."""
        return self._shards[hash(key) & _LAST].get(key)

    def __getitem__(self, key: K) -> V:
        return self.shard(key)[key]

    def __setitem__(self, key: K, value: V) -> None:
        shard = self.shard(key)
        before = len(shard)
        shard[key] = value
        self._length += len(shard) - before

    def pop(self, key: K) -> V:
        """Remove `key` and return its value. Raises `KeyError` if it is not present."""
        value = self.shard(key).pop(key)
        self._length -= 1
        return value

    def discard(self, key: K) -> None:
        """Remove `key` if it is present."""
        if key in self.shard(key):
            self.pop(key)
