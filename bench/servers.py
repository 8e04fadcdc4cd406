"""The contestants: server processes on one core, each on its own port."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from app.http.auth import Scope, new_key
from bench.load import LOAD_CORE, SERVER_CORE, Target, pinned

SESSION = {
    "agent_id": "7c9e6679-7425-40de-944b-e07fc1f90ae7",
    "declared_intent": "bench",
    "authorized_tools": ["read_file", "list_dir", "fs.read"],
    "call_budget": 2_000_000_000,
    "rate_limit_per_minute": 2_000_000_000,
}
CALL = '{"tool_name":"read_file"}'
BATCH_SIZE = 16
START_SECS = 180
STORED_SESSIONS = 1000


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _process(
    command: list[str], port: int, path: str, cores: str = SERVER_CORE, **variables: str
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*pinned(cores), sys.executable, *command],
        env=os.environ | variables,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + START_SECS
        while True:
            try:
                httpx.get(f"http://127.0.0.1:{port}{path}")
                break
            except httpx.ConnectError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command} did not start") from None
                time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        process.wait(timeout=60)


@contextmanager
def peer(name: str, scratch: Path) -> Iterator[Target]:
    """Run a peer from `bench/peers`, with one session if it keeps sessions."""
    port = free_port()
    command = ["-m", "uvicorn", f"bench.peers.{name}:app", "--port", str(port)]
    command += ["--no-access-log", "--loop", "uvloop", "--http", "httptools"]
    with _process(command, port, "/") as process:
        paths = scratch / f"{name}.paths"
        answer = httpx.post(f"http://127.0.0.1:{port}/sessions", json=SESSION).json()
        paths.write_text(f"/sessions/{answer['session_id']}/calls\n")
        yield Target(port, paths, CALL, "none", pid=process.pid)


@contextmanager
def ours(scratch: Path, *, sessions: int = 1, **variables: str) -> Iterator[Target]:
    """Run the service with production defaults and a key, over a store with sessions."""
    port = free_port()
    key, token = new_key("gate", Scope.PROXY)
    paths = scratch / f"ours-{port}.paths"
    with _process(
        ["-m", "bench.filled", str(sessions), str(paths)],
        port,
        "/readyz",
        **_settings(port, str(key), "memory://"),
        **variables,
    ) as process:
        yield Target(port, paths, CALL, f"Bearer {token}", pid=process.pid)


@contextmanager
def stored(scratch: Path, store_url: str, workers: int = 1) -> Iterator[Target]:
    """Run the service as an operator would, over its own store with some sessions."""
    port = free_port()
    key, token = new_key("gate", Scope.PROXY)
    authorization = f"Bearer {token}"
    paths = scratch / f"stored-{port}.paths"
    settings = _settings(port, str(key), store_url) | {
        "ARBITER_WORKERS": str(workers),
        # Some runs use more connections than the default limit; none of them must be shed.
        "ARBITER_MAX_REQUESTS_IN_FLIGHT": "1024",
    }
    # One worker has the same core as every contestant; several have both cores.
    cores = SERVER_CORE if workers == 1 else f"{SERVER_CORE},{LOAD_CORE}"
    with _process(["-m", "app"], port, "/readyz", cores, **settings):
        base, headers = f"http://127.0.0.1:{port}", {"authorization": authorization}
        with httpx.Client(base_url=base, headers=headers) as client:
            made = [client.post("/sessions", json=SESSION) for _ in range(STORED_SESSIONS)]
        paths.write_text("".join(f"{each.headers['location']}/calls\n" for each in made))
        yield Target(port, paths, CALL, authorization)


def start_secs(store_url: str) -> float:
    """Return the seconds from starting the service until it is ready."""
    port = free_port()
    started = time.perf_counter()
    with _process(["-m", "app"], port, "/readyz", **_settings(port, "", store_url)):
        return time.perf_counter() - started


def _settings(port: int, keys: str, store_url: str) -> dict[str, str]:
    return {
        "ARBITER_PORT": str(port),
        "ARBITER_API_KEYS": keys,
        "ARBITER_LOG_FORMAT": "json",
        "ARBITER_STORE_URL": store_url,
    }


def batches(target: Target, scratch: Path) -> Target:
    """Return the same target, but for batches."""
    paths = scratch / f"batch-{target.port}.paths"
    paths.write_text(target.paths.read_text().replace("/calls", "/batch"))
    body = json.dumps({"tool_names": ["read_file"] * BATCH_SIZE})
    return target._replace(paths=paths, body=body)
