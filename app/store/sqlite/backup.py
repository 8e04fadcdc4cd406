"""A copy of a SQLite store, consistent also while a process writes to it."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from app.domain.errors import StoreUnusable
from app.store.sqlite.file import Location, check_undamaged, explained
from app.store.sqlite.schema import check_version


def back_up(url: str, target: Path) -> int:
    """Copy the store as it is at one instant into a new file that needs nothing beside it;
    how many sessions that is. Whoever writes to the store is not held up.

    Raises `StoreUnusable` if the store cannot be read or the copy not be written; an
    existing file is left alone, and a copy that failed leaves no file.
    """
    source = Location.of_url(url).path
    with explained(source):
        if not source.is_file():
            raise StoreUnusable("there is no such file")
    with explained(target):
        if os.path.lexists(target) or not target.name:
            raise StoreUnusable("it is there already, and will not be overwritten")
        with _unfinished(target) as unfinished:
            sessions = _copy(source, unfinished)
            # Unlike a renaming this fails if somebody else made a file of that name.
            os.link(unfinished, target)
            _make_durable(target.parent)
    return sessions


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """An empty file next to the target that only its owner can read, and that goes away."""
    handle, name = tempfile.mkstemp(prefix=f"{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            Path(name + suffix).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> int:
    # Not read-only, which cannot read a store that was stopped in order.
    uri = f"{source.resolve().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True)) as original:
        with explained(source):
            if check_version(original) == 0:
                raise StoreUnusable("there is nothing in it")
        with closing(sqlite3.connect(target, isolation_level=None)) as copy:
            # In one step: in several it would start anew whenever somebody writes.
            original.backup(copy)
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
