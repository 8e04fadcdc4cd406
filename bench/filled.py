"""`python -m bench.filled SESSIONS FILE`: serve as `python -m app` does, over a memory store
that already holds that many sessions. The call paths of a sample are written to the file."""

from __future__ import annotations

import asyncio
import random
import sys
import uuid
from pathlib import Path

import uvicorn

from app.cli import server_config
from app.domain.admission import Admitted
from app.domain.capacity import StoreLimits
from app.domain.session import Grant
from app.domain.tools import AllowList
from app.main import create_app
from app.settings import load_settings
from app.store.memory.store import MemoryStore
from bench.servers import SESSION

AGENT = str(SESSION["agent_id"])
SESSIONS_PER_AGENT = 10
ASKED = 20_000
"""Size of the sample: more sessions than the service keeps encoded. With a table of a million
paths the load generator itself would pause for 100 ms to collect garbage."""


async def fill(store: MemoryStore, sessions: int) -> list[str]:
    """Create sessions in the store and return their ids."""
    ids = []
    agent = ""
    for number in range(sessions):
        if number % SESSIONS_PER_AGENT == 0:
            # The first is known to the forms that name their agent.
            agent = str(uuid.uuid4()) if number else AGENT
        created = await store.create(
            Grant(
                agent_id=agent,
                declared_intent=f"bench task {number}",
                authorized_tools=AllowList.of(("read_file", "list_dir", "fs.read")),
                time_limit_secs=3600 + number % 3600,
                call_budget=2_000_000_000,
                rate_limit_per_minute=2_000_000_000,
            )
        )
        assert isinstance(created, Admitted)
        ids.append(created.session.session_id)
    return ids


def main() -> None:
    sessions, paths = int(sys.argv[1]), Path(sys.argv[2])
    settings = load_settings()
    store = MemoryStore(StoreLimits(max_sessions=settings.max_sessions))
    ids = asyncio.run(fill(store, sessions))
    asked = random.sample(ids, min(sessions, ASKED))
    paths.write_text("".join(f"/sessions/{each}/calls\n" for each in asked))
    app = create_app(settings, store)
    config = server_config(app, settings)
    config.port = settings.port
    uvicorn.Server(config).run()


if __name__ == "__main__":
    main()
