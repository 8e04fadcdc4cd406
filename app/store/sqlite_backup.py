"""A copy of a SQLite store, consistent also while a process writes to it."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from app.domain.errors import StoreUnusable
from app.store.sqlite_file import OWNER_ONLY, Location, check_undamaged, explained
from app.store.sqlite_schema import check_ours


def back_up(url: str, target: Path) -> int:
    """Copy the store as it is at one instant into a new file that needs nothing beside it;
    how many sessions that is. Whoever writes to the store is not held up.

    Raises `StoreUnusable` if the store cannot be read or the copy not be written; an
    existing file is left alone, and a copy that failed leaves no file.
    """
    source, unfinished = (
        Location.of_url(url).path,
        target.with_name(f"{target.name}.unfinished"),
    )
    with explained(source):
        if not source.is_file():
            raise StoreUnusable("there is no such file")
    with explained(target):
        if target.exists():
            raise StoreUnusable("it is there already, and will not be overwritten")
        os.close(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL, OWNER_ONLY))
    try:
        sessions = _copy(source, unfinished)
        with explained(target):
            unfinished.rename(target)
            _make_durable(target.parent)
    finally:
        unfinished.unlink(missing_ok=True)
    return sessions


def _copy(source: Path, target: Path) -> int:
    # Not read-only, which cannot read a store that was stopped in order.
    with explained(source):
        original = sqlite3.connect(f"{source.resolve().as_uri()}?mode=rw", uri=True)
    with closing(original), closing(sqlite3.connect(target, isolation_level=None)) as copy:
        with explained(source):
            check_ours(original)
            # In one step: in several it would start anew whenever somebody writes.
            original.backup(copy)
        with explained(target):
            # Without a log of its own the copy is a single file.
            copy.execute("PRAGMA journal_mode = DELETE")
            check_undamaged(copy)
            (sessions,) = copy.execute("SELECT count(*) FROM sessions").fetchone()
    return int(sessions)


def _make_durable(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
