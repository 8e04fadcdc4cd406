"""The tables of a SQLite store, and the migration of older files."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from app.domain.errors import StoreUnusable

APPLICATION_ID = 0x41524254
"""The ASCII codes of ARBT, in the header of every file of this program."""

# The counters that admissions change are kept apart from the grant, which never changes and
# can be long. Row numbers grow, so sessions that are busy at the same time share pages, and a
# group of admissions writes few of them. Instants are microseconds since the Unix epoch.
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
-- The grant of the session with the same id, as JSON.
CREATE TABLE grants (
    id INTEGER PRIMARY KEY,
    terms TEXT NOT NULL
) STRICT;
-- Admissions by idempotency key, with the counters of the session after each.
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
-- Creations by idempotency key. They keep the whole session, since they outlive it.
CREATE TABLE creations (
    caller TEXT NOT NULL,
    key TEXT NOT NULL,
    forget_at INTEGER NOT NULL,
    session TEXT NOT NULL,
    UNIQUE (caller, key)
) STRICT;
CREATE INDEX forgettings ON creations (forget_at);
-- One row: an instant later than any that the store has returned.
CREATE TABLE clock (reserved_until INTEGER NOT NULL) STRICT;
INSERT INTO clock VALUES (0);
"""

# Terms have a revision. A creation is found by caller, agent and key, and must have the same
# request, of which a digest is kept. The digest of older creations is not known.
_REVISIONS = """
ALTER TABLE sessions ADD COLUMN revision INTEGER NOT NULL DEFAULT 1;
UPDATE sessions SET revision = 2 WHERE closed_at IS NOT NULL;
CREATE TABLE new_creations (
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
INSERT INTO new_creations
    SELECT caller, session ->> '$.grant.agent_id', key, '', forget_at,
        session ->> '$.session_id', session ->> '$.created_at', session -> '$.grant'
    FROM creations;
DROP TABLE creations;
ALTER TABLE new_creations RENAME TO creations;
CREATE INDEX forgettings ON creations (forget_at);
"""

# Who closed a session and how, as JSON; paused sessions; frozen agents. What a replay's
# `admission` holds can also be the digest of a change.
_CHANGES = """
ALTER TABLE sessions ADD COLUMN closed_by TEXT;
ALTER TABLE sessions ADD COLUMN paused_at INTEGER;
CREATE INDEX paused_by_deadline ON sessions (expires_at, session_id)
    WHERE paused_at IS NOT NULL AND closed_at IS NULL;
CREATE INDEX paused_by_agent ON sessions (agent_id, expires_at, session_id)
    WHERE paused_at IS NOT NULL AND closed_at IS NULL;
CREATE TABLE frozen_agents (
    agent_id TEXT PRIMARY KEY,
    frozen_at INTEGER NOT NULL,
    reason TEXT NOT NULL,
    by TEXT NOT NULL
) STRICT, WITHOUT ROWID;
"""

MIGRATIONS = (_TABLES, _REVISIONS, _CHANGES)
"""Scripts in order. The version of a file is the number of scripts applied to it."""


def check_version(db: sqlite3.Connection, newest: int = len(MIGRATIONS)) -> int:
    """The version of a file, 0 if it is empty. Raises `StoreUnusable` if the file comes from
    a newer version of this program, or from another program."""
    (tables,) = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    if tables and application_id != APPLICATION_ID:
        raise StoreUnusable("it is the database of another program; use another path")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > newest:
        raise StoreUnusable(
            f"its schema has version {version}, and this program supports up to {newest}; "
            "use the newer program that wrote it"
        )
    return int(version)


def migrate(db: sqlite3.Connection, migrations: Sequence[str] = MIGRATIONS) -> None:
    """Bring a file to the newest version. Each step is atomic. Raises what `check_version`
    raises, and `sqlite3.Error`."""
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
