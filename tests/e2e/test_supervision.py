"""The parent of workers, and starts that do not go as usual."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from tests import engines
from tests.conftest import PATIENTLY
from tests.engines import until
from tests.services import ROOT, Service, StartService
from tests.support import session_request


def logged(service: Service, event: str) -> list[str]:
    return [line for line in [*service.log] if f'"event": "{event}"' in line]


def workers_of(service: Service) -> list[int]:
    """The ids of the processes with the parent's socket, but for the parent."""
    children = Path(f"/proc/{service.process.pid}/task/{service.process.pid}/children")
    found = [int(pid) for pid in children.read_text().split()]
    return [pid for pid in found if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.fixture
def service(start_service: StartService, server: engines.Server) -> Service:
    service = start_service(ARBITER_STORE_URL=server.url + PATIENTLY, ARBITER_WORKERS="2")
    until(lambda: len(logged(service, "starting")) == 2)
    return service


def create(service: Service) -> int:
    with suppress(httpx.TransportError):
        return httpx.post(f"{service.url}/sessions", json=session_request()).status_code
    return 0


def test_a_worker_that_dies_while_the_store_is_away_comes_back_with_it(
    service: Service, server: engines.Server
) -> None:
    until(lambda: logged(service, "all workers have started"))
    dead = workers_of(service)[0]
    server.kill()
    os.kill(dead, signal.SIGKILL)
    until(lambda: len(logged(service, "worker cannot start")) >= 2)
    assert service.process.poll() is None

    server.start()

    until(lambda: len(logged(service, "starting")) == 3)
    assert len(workers_of(service)) == 2
    until(lambda: create(service) == 201)
    assert service.stop() == 0


def test_workers_stop_when_their_parent_has_been_killed(service: Service) -> None:
    workers = workers_of(service)
    assert len(workers) == 2
    service.process.kill()
    service.process.wait(timeout=30)

    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    with pytest.raises(ConnectionRefusedError):
        service.connect()


def test_a_worker_that_stops_alone_leaves_its_connections_to_the_others(
    service: Service,
) -> None:
    service.process.send_signal(signal.SIGTTOU)
    until(lambda: len(workers_of(service)) == 1)

    assert [create(service) for _ in range(20)] == [201] * 20


def test_a_second_signal_to_the_parent_ends_the_delay(
    start_service: StartService, server: engines.Server
) -> None:
    service = start_service(
        ARBITER_STORE_URL=server.url + PATIENTLY,
        ARBITER_WORKERS="2",
        ARBITER_SHUTDOWN_DELAY_SECS="600",
    )
    until(lambda: len(logged(service, "starting")) == 2)
    service.process.terminate()
    until(lambda: len(logged(service, "stopping")) == 2)

    assert service.stop() == 0


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ignored_variables_of_kubernetes_take_one_line_of_the_log(
    start_service: StartService, server: engines.Server, workers: str
) -> None:
    service = start_service(
        ARBITER_STORE_URL=server.url + PATIENTLY,
        ARBITER_WORKERS=workers,
        ARBITER_SERVICE_HOST="10.96.7.1",
        ARBITER_PORT_8000_TCP="tcp://10.96.7.1:8000",
    )
    until(lambda: len(logged(service, "starting")) == int(workers))

    (line,) = logged(service, "variables of a Kubernetes Service ignored")
    assert "ARBITER_PORT_8000_TCP" in line


def starting(**variables: str) -> subprocess.Popen[str]:
    """Start the service without waiting for anything."""
    return subprocess.Popen(
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=os.environ | {"ARBITER_PORT": "0", "ARBITER_LOG_FORMAT": "json"} | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def holds_back_sighup(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    (blocked,) = (line for line in status.splitlines() if line.startswith("SigBlk:"))
    return bool(int(blocked.split()[1], 16) & 1 << (signal.SIGHUP - 1))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_sighup_during_the_start_is_heeded_after_it(
    server: engines.Server, workers: str
) -> None:
    process = starting(ARBITER_STORE_URL=server.url + PATIENTLY, ARBITER_WORKERS=workers)
    try:
        until(lambda: holds_back_sighup(process.pid))
        process.send_signal(signal.SIGHUP)
        assert process.stderr is not None
        assert any("log level reloaded" in line for line in process.stderr)
        process.terminate()
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_start_that_waits_for_the_store_can_be_stopped(workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}?deadline_ms=60000"
        process = starting(ARBITER_STORE_URL=url, ARBITER_WORKERS=workers)
        try:
            with silent.accept()[0]:
                process.terminate()
                _, said = process.communicate(timeout=30)
        finally:
            process.kill()
            process.communicate(timeout=30)

    assert process.returncode == 0
    assert "Traceback" not in said


def test_every_address_is_of_ipv4_too(start_service: StartService) -> None:
    service = start_service(ARBITER_HOST="::", ARBITER_ALLOW_UNAUTHENTICATED="true")
    port = service.url.rpartition(":")[2]

    for host in ("127.0.0.1", "[::1]"):
        assert httpx.get(f"http://{host}:{port}/livez").status_code == 200
