"""Backends, chosen by the scheme of a URL and imported only when chosen."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from app.store.contract import SessionStore, StoreLimits

BACKENDS = {
    "memory": "app.store.memory.store:MemoryStore",
    "sqlite": "app.store.sqlite.store:SqliteStore",
    "redis": "app.store.redis.store:RedisStore",
    "rediss": "app.store.redis.store:RedisStore",
    "redis+cluster": "app.store.redis.store:RedisStore",
    "redis+sentinel": "app.store.redis.store:RedisStore",
}
"""Scheme -> where its `SessionStore` is. Its `from_url(url, limits)` makes one."""

BACKUPS = {
    "sqlite": "app.store.sqlite.backup:back_up",
}
"""Scheme -> how its store is copied into a file."""

ONE_PROCESS = {
    "memory": "every worker would have sessions and budgets of its own",
    "sqlite": "one process owns the file",
}
"""Schemes whose stores several processes cannot share, and why."""


class UnknownStore(ValueError):
    """The URL names no backend of this service."""


def scheme_of(url: str) -> str:
    """The scheme of a store URL. Raises `UnknownStore` if there is no such backend."""
    scheme = url.partition(":")[0].lower()
    if scheme not in BACKENDS:
        known = ", ".join(f"{name}://" for name in BACKENDS)
        raise UnknownStore(f"unknown store; use one of: {known}")
    return scheme


def open_store(url: str, limits: StoreLimits) -> SessionStore:
    """The store at `url`, not yet opened. Raises `UnknownStore`, or `ValueError` if the
    backend cannot use the URL."""
    store: SessionStore = _imported(BACKENDS[scheme_of(url)]).from_url(url, limits)
    return store


def back_up(url: str, target: Path) -> int:
    """Copy the store at `url`, which may be in use, into a new file; how many sessions.

    Raises `UnknownStore` if such a store is not backed up by us, and `StoreUnusable`.
    """
    scheme = scheme_of(url)
    if scheme not in BACKUPS:
        raise UnknownStore(f"a {scheme} store is not a file that could be copied")
    sessions: int = _imported(BACKUPS[scheme])(url, target)
    return sessions


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
