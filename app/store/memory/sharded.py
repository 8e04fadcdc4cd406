"""A dict in many small ones.

A dict that grows, or that is full of places where something was deleted, is rebuilt as a
whole; at a million entries that holds the event loop for tens of milliseconds. A shard is
rebuilt on its own, in microseconds.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

SHARDS = 1024
"""A power of two. A million entries make shards of a thousand."""


class ShardedDict(Generic[K, V]):
    """A mapping whose keys are spread over `SHARDS` dicts by their hash."""

    __slots__ = ("_length", "_shards")

    def __init__(self) -> None:
        self._shards: tuple[dict[K, V], ...] = tuple({} for _ in range(SHARDS))
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def shard(self, key: K) -> dict[K, V]:
        """The dict in which `key` is or would be. For reading and replacing values only:
        the length is kept by the methods below."""
        return self._shards[hash(key) & (SHARDS - 1)]

    def get(self, key: K) -> V | None:
        """The value of `key`, or `None`."""
        return self.shard(key).get(key)

    def __getitem__(self, key: K) -> V:
        return self.shard(key)[key]

    def __setitem__(self, key: K, value: V) -> None:
        shard = self.shard(key)
        before = len(shard)
        shard[key] = value
        self._length += len(shard) - before

    def pop(self, key: K) -> V:
        """Remove `key` and return its value. Raises `KeyError`."""
        value = self.shard(key).pop(key)
        self._length -= 1
        return value

    def discard(self, key: K) -> None:
        """Remove `key` if it is there."""
        if key in self.shard(key):
            self.pop(key)
