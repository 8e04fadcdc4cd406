"""Store backends, chosen by URL scheme and imported only when chosen."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from app.domain.capacity import StoreLimits
from app.store.contract import SessionStore

BACKENDS = {
    "memory": "app.store.memory.store:MemoryStore",
    "sqlite": "app.store.sqlite.store:SqliteStore",
    "redis": "app.store.redis.store:RedisStore",
    "rediss": "app.store.redis.store:RedisStore",
    "redis+cluster": "app.store.redis.store:RedisStore",
    "redis+sentinel": "app.store.redis.store:RedisStore",
}
"""Scheme -> where to import its `SessionStore`, which `from_url(url, limits)` creates."""

BACKUPS = {
    "sqlite": "app.store.sqlite.backup:back_up",
}
"""Scheme -> where to import the function that copies its store into a file."""

ONE_PROCESS = {
    "memory": "each worker would have its own sessions and budgets",
    "sqlite": "only one process can use the file",
}
"""Scheme -> why several processes cannot share its store."""


class UnknownStore(ValueError):
    """No backend has the scheme of the URL, or the backend lacks the operation."""


def scheme_of(url: str) -> str:
    """The scheme of a store URL. Raises `UnknownStore` if no backend has it."""
    scheme = url.partition(":")[0].lower()
    if scheme not in BACKENDS:
        known = ", ".join(f"{name}://" for name in BACKENDS)
        raise UnknownStore(f"unknown URL scheme; use one of: {known}")
    return scheme


def open_store(url: str, limits: StoreLimits) -> SessionStore:
    """The store at `url`, not yet opened.

    Raises `UnknownStore`, or `ValueError` if the backend cannot use the URL.
    """
    store: SessionStore = _imported(BACKENDS[scheme_of(url)]).from_url(url, limits)
    return store


def back_up(url: str, target: Path) -> int:
    """Copy the store at `url`, which may be in use, into a new file. Return the number of
    sessions copied.

    Raises `UnknownStore` if this kind of store cannot be copied, and `StoreUnusable` if the
    copy fails.
    """
    scheme = scheme_of(url)
    if scheme not in BACKUPS:
        raise UnknownStore(
            f"cannot copy a {scheme} store; backup works only with sqlite:// stores"
        )
    sessions: int = _imported(BACKUPS[scheme])(url, target)
    return sessions


def _imported(where: str) -> Any:
    module, _, name = where.partition(":")
    return getattr(import_module(module), name)
