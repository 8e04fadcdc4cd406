"""What durability costs: calls per second next to the memory store, and starting with a full
file."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from app.store.contract import StoreLimits
from app.store.sqlite.file import Location
from app.store.sqlite.store import SqliteStore
from bench.in_process import a_grant
from bench.load import Load, Target
from bench.servers import start_secs, stored

CONNECTIONS = (1, 32, 128)
_AT_ONCE = 1000

TakeTurns = Callable[[dict[str, Target]], dict[str, list[Load]]]


def row_name(store: str, connections: int) -> str:
    """What a contestant is called."""
    return f"{store}, {connections} connections"


def compare_stores(scratch: Path, take_turns: TakeTurns) -> dict[str, list[Load]]:
    """Calls per second of every store at every number of connections."""
    file = scratch / "sessions"
    stores = {
        "memory": "memory://",
        "sqlite, normal": f"sqlite://{file}-normal.db?synchronous=normal",
        "sqlite, full": f"sqlite://{file}-full.db",
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
    """Seconds from start to ready, over an empty file and a full one."""
    file = scratch / "full.db"
    asyncio.run(_fill(file, sessions))
    return {
        "start_with_no_session_secs": start_secs(f"sqlite://{scratch}/empty.db"),
        f"start_with_{sessions}_sessions_secs": start_secs(f"sqlite://{file}"),
        "file_bytes_per_session": file.stat().st_size / sessions,
    }


async def _fill(file: Path, sessions: int) -> None:
    store = SqliteStore(Location(file, "normal"), StoreLimits(max_sessions=sessions))
    await store.open()
    for first in range(0, sessions, _AT_ONCE):
        numbers = range(first, min(first + _AT_ONCE, sessions))
        await asyncio.gather(*(store.create(str(uuid.uuid4()), a_grant(n)) for n in numbers))
    await store.aclose()
