"""The tables of a SQLite store."""

from __future__ import annotations

import sqlite3

from app.domain.errors import StoreUnusable

APPLICATION_ID = 0x41524254
"""The ASCII codes of ARBT, in the header of every file of this program."""

VERSION = 1
"""The version of the tables, in the header too (`PRAGMA user_version`)."""

# The counters that admissions change are kept apart from the grant, which can be long. Row
# numbers grow, so sessions that are busy at the same time share pages, and a group of
# admissions writes few of them. Instants are microseconds since the Unix epoch.
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
    closed_at INTEGER,
    revision INTEGER NOT NULL,
    -- Who closed and who paused it, as JSON; empty if nobody did.
    marks TEXT NOT NULL,
    paused_at INTEGER
) STRICT;
-- closed_at is included so that counting need not read it from the table.
CREATE INDEX open_by_deadline ON sessions (expires_at, session_id, closed_at)
    WHERE closed_at IS NULL;
CREATE INDEX open_by_agent ON sessions (agent_id, expires_at, session_id, closed_at)
    WHERE closed_at IS NULL;
CREATE INDEX closed_by_deadline ON sessions (expires_at, session_id)
    WHERE closed_at IS NOT NULL;
CREATE INDEX closed_by_agent ON sessions (agent_id, expires_at, session_id)
    WHERE closed_at IS NOT NULL;
CREATE INDEX closings ON sessions (closed_at) WHERE closed_at IS NOT NULL;
CREATE INDEX paused_by_deadline ON sessions (expires_at, session_id)
    WHERE paused_at IS NOT NULL AND closed_at IS NULL;
CREATE INDEX paused_by_agent ON sessions (agent_id, expires_at, session_id)
    WHERE paused_at IS NOT NULL AND closed_at IS NULL;
-- The grant of the session with the same id, as JSON.
CREATE TABLE grants (
    id INTEGER PRIMARY KEY,
    terms TEXT NOT NULL
) STRICT;
-- Admissions and changes by idempotency key, with the counters of the session after each. A
-- change has a digest in place of the admission.
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
-- Creations by idempotency key. They keep the grant and the digest of the request, since they
-- outlive the session.
CREATE TABLE creations (
    caller TEXT NOT NULL,
    agent_id TEXT NOT NULL,
    key TEXT NOT NULL,
    request TEXT NOT NULL,
    forget_at INTEGER NOT NULL,
    session_id TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    terms TEXT NOT NULL,
    UNIQUE (caller, agent_id, key)
) STRICT;
CREATE INDEX forgettings ON creations (forget_at);
CREATE TABLE frozen_agents (
    agent_id TEXT PRIMARY KEY,
    frozen_at INTEGER NOT NULL,
    reason TEXT NOT NULL,
    by TEXT NOT NULL
) STRICT, WITHOUT ROWID;
-- One row: an instant later than any that the store has returned.
CREATE TABLE clock (reserved_until INTEGER NOT NULL) STRICT;
INSERT INTO clock VALUES (0);
"""


def check_version(db: sqlite3.Connection) -> int:
    """The version of a file, 0 if it is empty. Raises `StoreUnusable` if the file has another
    version of the tables, or comes from another program."""
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    if tables and application_id != APPLICATION_ID:
        raise StoreUnusable("it is the database of another program; use another path")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in {0, VERSION}:
        raise StoreUnusable(
            f"its tables have version {version}, and this program supports {VERSION}; use the "
            "program that wrote it"
        )
    return int(version)


def create_tables(db: sqlite3.Connection) -> None:
    """Create the tables in an empty file, in one step. Raises what `check_version` raises, and
    `sqlite3.Error`."""
    if check_version(db) == VERSION:
        return
    try:
        db.executescript(
            f"BEGIN IMMEDIATE; {_TABLES};"
            f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
            "COMMIT;"
        )
    except sqlite3.Error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
