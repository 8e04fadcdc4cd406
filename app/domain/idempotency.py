"""Idempotency keys: what they belong to, and how long they are remembered."""

from __future__ import annotations

from typing import NamedTuple

CREATION_REPLAY_SECS = 24 * 3600
"""How long a creation can be replayed with its idempotency key."""


class IdempotencyKey(NamedTuple):
    """A key belongs to the caller who sent it: equal keys of two callers are different."""

    caller: str
    key: str


class CreationKey(NamedTuple):
    """The idempotency key of a creation. It belongs to the caller and the agent."""

    caller: str
    key: str
    request: str
    """A digest of the request as the caller sent it. A retry must repeat the request."""


class ChangeKey(NamedTuple):
    """The idempotency key of a change. It shares its session with the keys of calls."""

    caller: str
    key: str
    request: str
    """A digest of the request, different from any admission. A retry must repeat it."""
