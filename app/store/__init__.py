"""Backends, chosen by the scheme of a URL and imported only when chosen."""

from __future__ import annotations

from importlib import import_module
from urllib.parse import urlsplit

from app.store.base import SessionStore, StoreLimits

BACKENDS = {
    "memory": "app.store.memory:MemoryStore",
    "sqlite": "app.store.sqlite:SqliteStore",
}
"""Scheme -> where its `SessionStore` is. Its `from_url(url, limits)` makes one."""

ONE_PROCESS = {
    "memory": "every worker would have sessions and budgets of its own",
    "sqlite": "one process owns the file",
}
"""Schemes whose stores several processes cannot share, and why."""


class UnknownStore(ValueError):
    """The URL names no backend of this service."""


def scheme_of(url: str) -> str:
    """The scheme of a store URL. Raises `UnknownStore` if there is no such backend."""
    scheme = urlsplit(url).scheme
    if scheme not in BACKENDS:
        known = ", ".join(f"{name}://" for name in BACKENDS)
        raise UnknownStore(f"unknown store; use one of: {known}")
    return scheme


def open_store(url: str, limits: StoreLimits) -> SessionStore:
    """The store at `url`, not yet opened. Raises `UnknownStore`, or `ValueError` if the
    backend cannot use the URL."""
    module, _, name = BACKENDS[scheme_of(url)].partition(":")
    backend = getattr(import_module(module), name)
    store: SessionStore = backend.from_url(url, limits)
    return store
