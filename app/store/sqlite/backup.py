"""Backups of a SQLite store, consistent even while a process writes to it."""

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
    """Copy the store, as it is at one instant, into a new file that stands alone. Return the
    number of sessions copied. Writers to the store are not blocked.

    Raises `StoreUnusable` if the store cannot be read or the copy cannot be written. An
    existing file is never overwritten, and a failed copy leaves no file.
    """
    source = Location.of_url(url).path
    with explained(source):
        if not source.is_file():
            raise StoreUnusable("the file does not exist; check ARBITER_STORE_URL")
    with explained(target):
        if os.path.lexists(target) or not target.name:
            raise StoreUnusable("it already exists and is not overwritten; name a new file")
        with _unfinished(target) as unfinished:
            sessions = _copy(source, unfinished)
            # Unlike renaming, linking fails if the name has been taken in the meantime.
            os.link(unfinished, target)
            _make_durable(target.parent)
    return sessions


@contextmanager
def _unfinished(target: Path) -> Iterator[Path]:
    """A temporary file next to the target, readable only by its owner."""
    handle, name = tempfile.mkstemp(prefix=f"{target.name}.", dir=target.parent)
    os.close(handle)
    try:
        yield Path(name)
    finally:
        for suffix in ("", "-journal", "-wal", "-shm"):
            Path(name + suffix).unlink(missing_ok=True)


def _copy(source: Path, target: Path) -> int:
    # Not mode=ro, which cannot read a store that was shut down cleanly.
    uri = f"{source.resolve().as_uri()}?mode=rw"
    with closing(sqlite3.connect(uri, uri=True)) as original:
        with explained(source):
            if check_version(original) == 0:
                raise StoreUnusable("the file is empty; check ARBITER_STORE_URL")
        with closing(sqlite3.connect(target, isolation_level=None)) as copy:
            # In one step: a copy in several steps starts over whenever the original is written.
            original.backup(copy)
            # Without a write-ahead log the copy is a single file.
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
