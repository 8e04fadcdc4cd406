"""Real processes: the service as an operator starts it, on a port of its own."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parent.parent.parent
START_SECS = 30


class Service:
    """A running `python -m app`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.log: list[str] = []

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=30)


@contextmanager
def running(**variables: str) -> Iterator[Service]:
    """Start the service, wait until it answers, and end it."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ARBITER_")}
    environment |= {"ARBITER_PORT": "0", "ARBITER_LOG_FORMAT": "json"} | variables
    process = subprocess.Popen(
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    service = Service(process)
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            service.log.append(line)
            if '"event": "starting"' in line:
                service.url = json.loads(line)["address"]
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(START_SECS), "the service did not start"
        assert httpx.get(f"{service.url}/readyz", timeout=START_SECS).status_code == 200
        yield service
    finally:
        # Its workers too, which would go on without it.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        reader.join(timeout=30)
        if process.stderr is not None:
            process.stderr.close()


StartService = Callable[..., Service]


@pytest.fixture
def free_port() -> int:
    """For servers that cannot be asked which port they took."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start_service() -> Iterator[StartService]:
    with ExitStack() as stack:

        def start(**variables: str) -> Service:
            return stack.enter_context(running(**variables))

        yield start
