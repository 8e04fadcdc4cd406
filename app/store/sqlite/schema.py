"""The tables of a SQLite store, and how an older file becomes a newer one."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from app.domain.errors import StoreUnusable

APPLICATION_ID = 0x41524254
"""Stands in the header of every file of ours: "ARBT"."""

# What an admission changes is kept apart from what never changes and can be long, and is
# found by a number that grows: sessions that are busy at the same time share pages, and a
# group of admissions writes few of them. All instants are microseconds since the epoch.
_TABLES = """
CREATE TABLE sessions (
    id INTEGER PRIMARY KEY,
    session_id TEXT NOT NULL UNIQUE,
    agent_id TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    call_budget INTEGER NOT NULL,
    calls_made INTEGER NOT NULL CHECK (calls_made BETWEEN 0 AND call_budget),
    rate_window_start INTEGER NOT NULL,
    rate_window_calls INTEGER NOT NULL,
    closed_at INTEGER
) STRICT;
-- With closed_at as well, or counting would look into the table for it.
CREATE INDEX open_by_deadline ON sessions (expires_at, session_id, closed_at)
    WHERE closed_at IS NULL;
CREATE INDEX open_by_agent ON sessions (agent_id, expires_at, session_id, closed_at)
    WHERE closed_at IS NULL;
CREATE INDEX closed_by_deadline ON sessions (expires_at, session_id)
    WHERE closed_at IS NOT NULL;
CREATE INDEX closed_by_agent ON sessions (agent_id, expires_at, session_id)
    WHERE closed_at IS NOT NULL;
CREATE INDEX closings ON sessions (closed_at) WHERE closed_at IS NOT NULL;
-- The grant of the session with the same id, as JSON.
CREATE TABLE grants (
    id INTEGER PRIMARY KEY,
    terms TEXT NOT NULL
) STRICT;
-- Admissions by idempotency key, and what the session looked like after them.
CREATE TABLE replays (
    id INTEGER NOT NULL,
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    admission TEXT NOT NULL,
    as_of INTEGER NOT NULL,
    calls_made INTEGER NOT NULL,
    rate_window_start INTEGER NOT NULL,
    rate_window_calls INTEGER NOT NULL,
    UNIQUE (id, caller, key)
) STRICT;
-- Creations by idempotency key, with the whole session, which they outlive.
CREATE TABLE creations (
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    forget_at INTEGER NOT NULL,
    session TEXT NOT NULL,
    UNIQUE (caller, key)
) STRICT;
CREATE INDEX forgettings ON creations (forget_at);
-- One row: every instant that the store has ever told is earlier.
CREATE TABLE clock (reserved_until INTEGER NOT NULL) STRICT;
INSERT INTO clock VALUES (0);
"""

MIGRATIONS = (_TABLES,)
"""Scripts in order. The version of a file says how many of them it has been through."""


def check_version(db: sqlite3.Connection, newest: int = len(MIGRATIONS)) -> int:
    """The version of a file; 0 if there is nothing in it yet. Raises `StoreUnusable` if it
    comes from a newer version of this program, or from another program."""
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    if tables and application_id != APPLICATION_ID:
        raise StoreUnusable("it is the database of another program")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > newest:
        raise StoreUnusable(
            f"its schema has version {version} and this program knows up to {newest}: "
            "use the newer program that wrote it"
        )
    return int(version)


def migrate(db: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Bring a file to the newest version, each step whole or not at all. Raises what
    `check_version` does."""
    version = check_version(db, len(migrations))
    for number, script in enumerate(migrations[version:], start=version + 1):
        try:
            db.executescript(
                f"BEGIN IMMEDIATE; {script};"
                f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {number};"
                "COMMIT;"
            )
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise
