"""The file of a SQLite store: where it is, whose it is, how it is opened and copied."""

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
from app.store.sqlite.schema import check_version, migrate

Synchronous = Literal["full", "normal"]

BUSY_SECS = 1.0
"""How long to wait for a lock that another program holds on the file."""

CHECKPOINT_PAGES = 4000
"""Pages of 4 KiB in the log before they are moved into the file."""

DAMAGED = "the file is damaged; restore a backup"

OWNER_ONLY = 0o600
"""Session ids are capabilities."""

_REASONS = {
    "SQLITE_FULL": "the disk is full",
    "SQLITE_READONLY": "the file or its folder is read-only",
    "SQLITE_BUSY": "another program has locked the file",
    "SQLITE_LOCKED": "another program has locked the file",
    "SQLITE_CORRUPT": DAMAGED,
    "SQLITE_NOTADB": "the file is not a SQLite database",
    "SQLITE_CANTOPEN": "the file cannot be opened; is its folder there, and writable?",
    "SQLITE_IOERR": "the disk reported an error",
    "SQLITE_PERM": "the file cannot be accessed",
    "SQLITE_AUTH": "the file cannot be accessed",
}


def reason(error: Exception) -> str:
    """Why the file cannot be used, for an operator."""
    if isinstance(error, OSError):
        if isinstance(error, FileNotFoundError):
            return "there is no such file or folder"
        return (error.strerror or str(error)).lower()
    name = getattr(error, "sqlite_errorname", None)
    if name is None:
        return str(error)
    # Extended codes say more after the second underscore (https://sqlite.org/rescode.html).
    basic = "_".join(name.split("_")[:2])
    return f"{_REASONS[basic]} ({name})" if basic in _REASONS else f"{error} ({name})"


class Location(NamedTuple):
    """What a `sqlite://` URL says."""

    path: Path
    synchronous: Synchronous

    @classmethod
    def of_url(cls, url: str) -> Location:
        """`sqlite:///absolute/path`, with `?synchronous=full` or `normal`. A fourth slash
        says the same. Raises `ValueError` for anything else."""
        path = _path(url)
        parts = urlsplit(url)
        options = parse_qsl(parts.query, keep_blank_values=True) or [("synchronous", "full")]
        (name, synchronous), *more = options
        known = name == "synchronous" and synchronous in get_args(Synchronous)
        if more or parts.fragment or not known:
            raise ValueError("the only option is ?synchronous=full (the default) or normal")
        return cls(Path("/" + path.lstrip("/")), cast("Synchronous", synchronous))


def _path(url: str) -> str:
    wrong = "write sqlite:///folder/file.db; the path is always absolute"
    # What urlsplit would drop in silence, or take for something else.
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
    """Turns errors of the file into `StoreUnusable`, in one sentence."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreUnusable(f"cannot use {path}: {reason(error)}") from error
    except StoreUnusable as error:
        raise StoreUnusable(f"cannot use {path}: {error}") from error.__cause__


class DatabaseFile:
    """An open file that no other process of this program has open."""

    def __init__(self, location: Location) -> None:
        """Opens the file; makes it if there is none. Raises `StoreUnusable`."""
        with explained(location.path), ExitStack() as opened:
            path = _resolved(location.path)
            lock = _own(path)
            opened.callback(os.close, lock)
            if path.exists():
                _identity(str(path))
            # Only the owner may do this: closing a file drops SQLite's locks on it (fcntl(2)).
            # SQLite gives the files beside it the same permissions.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, OWNER_ONLY))
            self.db = _connect(path, location.synchronous)
            opened.callback(self.db.close)
            self._files = {name: _identity(name) for name in _in_use(path)}
            self._opened = opened.pop_all()

    def check_in_place(self) -> None:
        """Raise `OSError` if a file is no longer where it was opened: what is written to it
        would be lost, or written by another owner as well."""
        for name, identity in self._files.items():
            if _identity(name) != identity:
                raise OSError(0, "another file has taken its place")

    def close(self) -> None:
        """Close the file and give it free."""
        self._opened.close()


def _resolved(path: Path) -> Path:
    """The same path whichever link leads to the file, since its owner is known by it."""
    try:
        return path.resolve()
    except RuntimeError as error:
        raise StoreUnusable("it is a link that leads to itself") from error


def _in_use(path: Path) -> list[str]:
    return [str(path), f"{path}-wal", f"{path}-owner"]


def _identity(name: str) -> tuple[int, int]:
    status = os.stat(name)  # noqa: PTH116 - for every commit; a Path costs more
    if status.st_nlink > 1:
        raise OSError(0, "it has a second name (a hard link), under which it is another store")
    return status.st_dev, status.st_ino


def _own(path: Path) -> int:
    """Take the lock that says who owns the file; it goes with the process. Not a lock on
    the file itself: SQLite's own would be lost when it is closed (fcntl(2))."""
    with ExitStack() as opened:
        lock = os.open(f"{path}-owner", os.O_RDWR | os.O_CREAT, OWNER_ONLY)
        opened.callback(os.close, lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(lock, 20).decode("ascii", "replace").strip() or "unknown"
            raise StoreUnusable(
                f"another process (id {owner}) owns it; run one process for each file"
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
        # Before anything is written: the file may be none of ours, or damaged.
        check_version(db)
        check_undamaged(db)
        _keep_log(db)
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        # The kill switch sorts what it closes; there may be no folder for temporary files.
        db.execute("PRAGMA temp_store = MEMORY")
        # Elsewhere fsync is enough; on macOS it leaves the data in the drive's cache.
        db.execute("PRAGMA fullfsync = ON")
        db.execute("PRAGMA checkpoint_fullfsync = ON")
        migrate(db)
        opened.pop_all()
        return db


def _keep_log(db: sqlite3.Connection) -> None:
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StoreUnusable("its file system cannot keep a write-ahead log")


def check_undamaged(db: sqlite3.Connection) -> None:
    """Raise `StoreUnusable` if the file is damaged."""
    found = [row[0] for row in db.execute("PRAGMA quick_check(1)")]
    if found != ["ok"]:
        raise StoreUnusable(DAMAGED)
