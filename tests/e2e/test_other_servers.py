"""Servers other than our own that people run ASGI applications with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress

import httpx
import pytest

from tests.conftest import PATIENTLY
from tests.engines import single
from tests.services import ROOT, running
from tests.support import session_request

SERVERS = {
    "uvicorn": ("uvicorn", "app.main:app", "--port", "{port}"),
    "uvicorn, factory": ("uvicorn", "--factory", "app.main:application", "--port", "{port}"),
    "granian": ("granian", "--interface", "asgi", "--port", "{port}", "app.main:app"),
    "hypercorn": ("hypercorn", "--bind", "127.0.0.1:{port}", "app.main:application()"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_it_serves_over_a_shared_store(name: str, free_port: int) -> None:
    command = [each.format(port=free_port) for each in SERVERS[name]]
    store = single().url + PATIENTLY
    with (
        running(
            "-m", *command, ARBITER_PORT=str(free_port), ARBITER_STORE_URL=store
        ) as service,
        httpx.Client(base_url=service.url) as client,
    ):
        created = client.post("/sessions", json=session_request(call_budget=1))
        calls = f"{created.headers['location']}/calls"
        answers = [client.post(calls, json={"tool_name": "read_file"}) for _ in range(2)]
        document = client.get("/openapi.json")

        assert [each.status_code for each in answers] == [200, 429]
        assert document.json()["info"]["title"] == "Arbiter"
        assert service.stop() in {0, -15}


@pytest.mark.parametrize("name", ["granian", "hypercorn"])
def test_it_refuses_workers_over_a_memory_store(name: str, free_port: int) -> None:
    """Both start a worker process even if it is the only one; the service cannot tell."""
    command = [each.format(port=free_port) for each in SERVERS[name]]
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.startswith("arbiter: "))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)

    assert "a server that starts worker processes cannot be used with the memory store" in said
