"""The file of a SQLite store: its location, its owner, and how it is opened."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, cast, get_args
from urllib.parse import parse_qsl, unquote, urlsplit

from app.domain.errors import StoreUnusable
from app.store.sqlite.schema import check_version, create_tables

Synchronous = Literal["full", "normal"]

BUSY_SECS = 1.0
"""How long to wait for a lock that another program holds on the file."""

MAX_LOG_BYTES = 64 * 1024 * 1024
"""A log that has grown beyond this, because a reader kept it open, is cut off when it is next
written from its start (`PRAGMA journal_size_limit`)."""

CHECKPOINT_PAGES = 4000
"""Pages of 4 KiB that the write-ahead log may hold before they are moved into the file."""

DAMAGED = "the file is damaged; restore a backup"

OWNER_ONLY = 0o600
"""Only the owner may read the files, since session ids are capabilities."""

_REASONS = {
    "SQLITE_FULL": "the disk is full; free some space",
    "SQLITE_READONLY": "the file or its folder is read-only; make both writable",
    "SQLITE_BUSY": "another program has locked the file; stop that program",
    "SQLITE_LOCKED": "another program has locked the file; stop that program",
    "SQLITE_CORRUPT": DAMAGED,
    "SQLITE_NOTADB": "the file is not a SQLite database; use another path",
    "SQLITE_CANTOPEN": "the file cannot be opened; its folder must exist and be writable",
    "SQLITE_IOERR": "the disk reported an error; check the disk",
    "SQLITE_PERM": "access to the file was denied; check its permissions",
    "SQLITE_AUTH": "access to the file was denied; check its permissions",
}


def reason(error: Exception) -> str:
    """Explain to an operator why the file cannot be used."""
    if isinstance(error, OSError):
        if isinstance(error, FileNotFoundError):
            return "the file or its folder does not exist; check the path"
        return (error.strerror or str(error)).lower()
    name = getattr(error, "sqlite_errorname", None)
    if name is None:
        return str(error)
    # Extended codes add detail after the second underscore (https://sqlite.org/rescode.html).
    basic = "_".join(name.split("_")[:2])
    return f"{_REASONS[basic]} ({name})" if basic in _REASONS else f"{error} ({name})"


class Location(NamedTuple):
    """A parsed `sqlite://` URL."""

    path: Path
    synchronous: Synchronous

    @classmethod
    def of_url(cls, url: str) -> Location:
        """Parse `sqlite:///absolute/path`, with an optional `?synchronous=full` or `normal`.
        A fourth slash makes no difference, except that a file in the root folder needs it: who
        writes `sqlite:///sessions.db` expects a relative path. Raises `ValueError` for anything
        else."""
        path = _path(url)
        parts = urlsplit(url)
        options = parse_qsl(parts.query, keep_blank_values=True) or [("synchronous", "full")]
        (name, synchronous), *more = options
        known = name == "synchronous" and synchronous in get_args(Synchronous)
        if more or parts.fragment or not known:
            raise ValueError(
                "the only option is ?synchronous=full (the default) or ?synchronous=normal"
            )
        absolute = Path("/" + path.lstrip("/"))
        is_dotted = not {".", ".."}.isdisjoint(path.split("/"))
        if is_dotted or (absolute.parent == Path("/") and not path.startswith("//")):
            raise ValueError(
                f"a path is never relative: this one means the file {absolute}; write the "
                "whole path, as in sqlite:///var/lib/arbiter/sessions.db"
            )
        return cls(absolute, cast("Synchronous", synchronous))


def _path(url: str) -> str:
    wrong = "the URL is not valid; write sqlite:///folder/file.db for the file /folder/file.db"
    # urlsplit would silently drop or misread what is rejected here.
    if not url.startswith("sqlite:///") or not url.isprintable():
        raise ValueError(wrong)
    try:
        path = unquote(urlsplit(url).path, errors="strict")
    except UnicodeDecodeError:
        raise ValueError(wrong) from None
    if path.strip("/") == "" or path.endswith("/") or not path.isprintable():
        raise ValueError(wrong)
    return path


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn errors about the file at `path` into `StoreUnusable`, as one sentence."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreUnusable(f"cannot use {path}: {reason(error)}") from error
    except StoreUnusable as error:
        raise StoreUnusable(f"cannot use {path}: {error}") from error.__cause__


class DatabaseFile:
    """An open database file that this process alone owns."""

    def __init__(self, location: Location) -> None:
        """Open the file, and create it if it does not exist. Raises `StoreUnusable`."""
        with explained(location.path), ExitStack() as opened:
            path = _resolved(location.path)
            lock = _own(path)
            opened.callback(os.close, lock)
            if path.exists():
                _identity(str(path))
            # Only as the owner: closing a file drops SQLite's locks on it (fcntl(2)).
            # SQLite gives the files beside it the same permissions.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, OWNER_ONLY))
            self.db = _connect(path, location.synchronous)
            opened.callback(self.db.close)
            self._files = {name: _identity(name) for name in _in_use(path)}
            self._log = f"{path}-wal"
            self._sizes = self._read_sizes()
            self._opened = opened.pop_all()

    def check_in_place(self) -> None:
        """Raise `OSError` if a file has been moved or replaced since it was opened, or cut off
        since the last change. Writes to it would be lost, or mixed with those of another
        owner."""
        for name, identity in self._files.items():
            if _identity(name) != identity:
                raise OSError(0, "another file has taken its place; put the original back")
        # It may grow: a checkpoint by another program, such as SQLite's command line, moves
        # what has been committed from the log into the file.
        if any(now < known for now, known in zip(self._read_sizes(), self._sizes, strict=True)):
            raise OSError(
                0,
                "another program has cut it off; restart the service, and restore a backup if "
                "it does not start",
            )

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the file within this block: nobody else may."""
        try:
            yield
        finally:
            self._sizes = self._read_sizes()

    @property
    def log_bytes(self) -> int:
        """The size of the write-ahead log."""
        return os.stat(self._log).st_size  # noqa: PTH116 - as below

    def _read_sizes(self) -> list[int]:
        return [os.stat(name).st_size for name in self._files]  # noqa: PTH116 - as below

    def close(self) -> None:
        """Close the file and give up its ownership."""
        self._opened.close()


def _resolved(path: Path) -> Path:
    """Follow symbolic links, so that every path to the file leads to the same owner lock."""
    try:
        return path.resolve()
    except RuntimeError as error:
        raise StoreUnusable(
            "it is a symbolic link that leads back to itself; fix the link"
        ) from error


def _in_use(path: Path) -> list[str]:
    return [str(path), f"{path}-wal", f"{path}-owner"]


def _identity(name: str) -> tuple[int, int]:
    status = os.stat(name)  # noqa: PTH116 - for every commit; a Path costs more
    if status.st_nlink > 1:
        raise OSError(0, "it has a second name, a hard link; remove one of the names")
    return status.st_dev, status.st_ino


def _own(path: Path) -> int:
    """Take the lock of the file's owner, which ends with the process. It is on a file of its
    own: closing the database file would drop SQLite's locks on it (fcntl(2))."""
    with ExitStack() as opened:
        lock = os.open(f"{path}-owner", os.O_RDWR | os.O_CREAT, OWNER_ONLY)
        opened.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
            raise StoreUnusable(
                f"another process (id {owner}) owns it; run one process per file"
            ) from error
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
        opened.pop_all()
        return lock


def _connect(path: Path, synchronous: Synchronous) -> sqlite3.Connection:
    with ExitStack() as opened:
        db = sqlite3.connect(
            path, timeout=BUSY_SECS, isolation_level=None, check_same_thread=False
        )
        opened.callback(db.close)
        # Before anything is written: the file may be damaged, or another program's.
        check_version(db)
        check_undamaged(db)
        _keep_log(db)
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {MAX_LOG_BYTES}")
        # The kill switch sorts what it closes, and there may be no folder for temporary files.
        db.execute("PRAGMA temp_store = MEMORY")
        # On macOS, fsync alone leaves the data in the drive's cache.
        db.execute("PRAGMA fullfsync = ON")
        db.execute("PRAGMA checkpoint_fullfsync = ON")
        create_tables(db)
        opened.pop_all()
        return db


def _keep_log(db: sqlite3.Connection) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreUnusable(
            "its file system does not support a write-ahead log; use a local disk"
        )


def check_undamaged(db: sqlite3.Connection) -> None:
    """Raise `StoreUnusable` if the file is damaged."""
    found = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
    if found != ["ok"]:
        raise StoreUnusable(DAMAGED)
