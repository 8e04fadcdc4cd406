"""The cost of durability: calls per second beside the memory store, and the time to start with
a full file."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from app.domain.capacity import StoreLimits
from app.store.sqlite.file import Location
from app.store.sqlite.store import SqliteStore
from bench.in_process import a_grant
from bench.load import Load, Target
from bench.servers import start_secs, stored

CONNECTIONS = (1, 32, 128)
_AT_ONCE = 1000

TakeTurns = Callable[[dict[str, Target]], dict[str, list[Load]]]


def row_name(store: str, connections: int) -> str:
    """Return the name of a contestant's row."""
    unit = "connection" if connections == 1 else "connections"
    return f"{store}, {connections} {unit}"


def compare_stores(scratch: Path, take_turns: TakeTurns) -> dict[str, list[Load]]:
    """Load every store at every number of connections."""
    file = scratch / "sessions"
    stores = {
        "memory": "memory://",
        "SQLite, normal": f"sqlite://{file}-normal.db?synchronous=normal",
        "SQLite, full": f"sqlite://{file}-full.db",
    }
    with ExitStack() as stack:
        contestants = {}
        for name, url in stores.items():
            target = stack.enter_context(stored(scratch, url))
            for connections in CONNECTIONS:
                contestant = target._replace(connections=connections)
                contestants[row_name(name, connections)] = contestant
        return take_turns(contestants)


def starting(sessions: int, scratch: Path) -> dict[str, float]:
    """Measure the seconds from start to ready, over an empty file and a full one."""
    file = scratch / "full.db"
    asyncio.run(_fill(file, sessions))
    return {
        "start_with_no_sessions_secs": start_secs(f"sqlite://{scratch}/empty.db"),
        f"start_with_{sessions}_sessions_secs": start_secs(f"sqlite://{file}"),
        "file_bytes_per_session": file.stat().st_size / sessions,
    }


async def _fill(file: Path, sessions: int) -> None:
    store = SqliteStore(Location(file, "normal"), StoreLimits(max_sessions=sessions))
    await store.open()
    for first in range(0, sessions, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, sessions))
        await asyncio.gather(*(store.create(a_grant(n)) for n in numbers))
    await store.aclose()
