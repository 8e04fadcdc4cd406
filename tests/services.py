"""The service as a real process, started as an operator would, on a free port."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent
START_SECS = 30
ADDRESS = re.compile(r'address(?:": "|=)(http://[^\s"]+)')
"""The address in the first line of the log, in either format."""


class Service:
    """A running `python -m app`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.url = ""
        self.log: list[str] = []

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return host, int(port)

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, timeout=START_SECS)

    def exchange(self, *sent: bytes) -> bytes:
        """Send the pieces on one connection and return everything received until it ends."""
        with self.connect() as connection:
            with suppress(ConnectionError):
                for piece in sent:
                    connection.sendall(piece)
            return received_on(connection)

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        self.process.terminate()
        return self.process.wait(timeout=30)


def received_on(connection: socket.socket) -> bytes:
    """Return everything received until the connection is closed or reset."""
    received = b""
    with suppress(ConnectionError):
        while chunk := connection.recv(65_536):
            received += chunk
    return received


@contextmanager
def running(*command: str, folder: Path = ROOT, **variables: str) -> Iterator[Service]:
    """Run the service in `folder`: start it, wait until it is ready, and kill it at the end."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("ARBITER_")}
    environment |= {"ARBITER_PORT": "0", "ARBITER_LOG_FORMAT": "json"}
    environment |= {"PYTHONPATH": str(ROOT)} | variables
    process = subprocess.Popen(
        [sys.executable, *(command or ("-m", "app"))],
        cwd=folder,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    service = Service(process)
    started = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            service.log.append(line)
            if not service.url and (address := ADDRESS.search(line)):
                service.url = address[1]
                started.set()
        started.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert started.wait(START_SECS), "the service did not start"
        # uvicorn itself logs the address before it listens.
        with httpx.Client(transport=httpx.HTTPTransport(retries=10)) as client:
            ready = client.get(f"{service.url}/readyz", timeout=START_SECS)
        assert ready.status_code == 200
        yield service
    finally:
        # The whole process group: workers would outlive their parent.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)
        reader.join(timeout=30)
        if process.stderr is not None:
            process.stderr.close()


StartService = Callable[..., Service]
