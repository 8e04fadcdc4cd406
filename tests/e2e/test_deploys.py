"""Graceful shutdown, and rolling restarts behind a real load balancer."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests import engines
from tests.conftest import PATIENTLY
from tests.engines import until
from tests.services import ROOT, Service, StartService, received_on
from tests.support import session_request

pytestmark = pytest.mark.anyio

HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")
READY = b"GET /readyz HTTP/1.1\r\nHost: localhost\r\n\r\n"
READ = b"GET /sessions/7c9e6679-7425-40de-944b-e07fc1f90ae7 HTTP/1.1\r\nHost: localhost\r\n\r\n"


def terminate(service: Service) -> None:
    service.process.send_signal(signal.SIGTERM)


def ready(service: Service) -> int:
    return httpx.get(f"{service.url}/readyz").status_code


def test_a_stopping_service_is_not_ready_and_still_serves(start_service: StartService) -> None:
    service = start_service(ARBITER_SHUTDOWN_DELAY_SECS="60")
    terminate(service)
    until(lambda: ready(service) == 503)

    problem = httpx.get(f"{service.url}/readyz")
    served = httpx.post(f"{service.url}/sessions", json=session_request())

    assert problem.json()["code"] == "shutting_down"
    assert problem.headers["retry-after"] == "1"
    assert httpx.get(f"{service.url}/livez").status_code == 200
    assert served.status_code == 201
    # A client with a persistent connection reconnects, to another replica.
    assert served.headers["connection"] == "close"
    assert any('"event": "stopping"' in line for line in service.log)


def test_a_second_signal_stops_it_at_once(start_service: StartService) -> None:
    service = start_service(ARBITER_SHUTDOWN_DELAY_SECS="60")
    terminate(service)
    until(lambda: ready(service) == 503)

    assert service.stop() == 0


def test_it_stops_when_the_delay_is_over(start_service: StartService) -> None:
    service = start_service(ARBITER_SHUTDOWN_DELAY_SECS="0.5")

    assert service.stop() == 0


def reconnect_until_refused(service: Service, served: list[int], lost: list[str]) -> None:
    """Send each request on a new connection, until connections are refused."""
    while True:
        try:
            connection = service.connect()
        except ConnectionRefusedError:
            return
        with connection:
            try:
                connection.sendall(READ.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
                received = received_on(connection)
            except OSError as error:
                received = repr(error).encode()
        if received.startswith(b"HTTP/1.1 404 "):
            served.append(1)
        else:
            lost.append(repr(received))


@pytest.mark.parametrize("workers", ["1", "2"])
def test_clients_that_reconnect_during_a_stop_lose_no_request(
    start_service: StartService, server: engines.Server, workers: str
) -> None:
    for _ in range(5):
        service = start_service(
            ARBITER_STORE_URL=server.url + PATIENTLY, ARBITER_WORKERS=workers
        )
        served: list[int] = []
        lost: list[str] = []
        clients = [
            threading.Thread(target=reconnect_until_refused, args=(service, served, lost))
            for _ in range(16)
        ]
        for client in clients:
            client.start()
        until(lambda served=served: len(served) > 50)
        terminate(service)
        for client in clients:
            client.join(timeout=30)

        assert lost == []
        assert service.process.wait(timeout=30) == 0


def test_stopping_workers_are_not_ready(
    start_service: StartService, server: engines.Server
) -> None:
    service = start_service(
        ARBITER_STORE_URL=server.url + PATIENTLY,
        ARBITER_WORKERS="2",
        ARBITER_SHUTDOWN_DELAY_SECS="1",
    )
    terminate(service)

    until(lambda: ready(service) == 503)
    assert service.process.wait(timeout=30) == 0


def test_requests_in_flight_are_finished(
    start_service: StartService, server: engines.Server
) -> None:
    service = start_service(ARBITER_STORE_URL=server.url + PATIENTLY)
    with service.connect() as waiting, service.connect() as half:
        server.pause()
        waiting.sendall(READ)
        half.sendall(READ[:20])
        until(lambda: httpx.get(f"{service.url}/livez").status_code == 200)
        terminate(service)
        until(lambda: any('"event": "stopping"' in line for line in service.log))
        server.resume()
        # The service still waits for this one, up to its deadline.
        half.sendall(READ[20:])

        assert received_on(waiting).startswith(b"HTTP/1.1 404 ")
        assert received_on(half).startswith(b"HTTP/1.1 404 ")
    assert service.process.wait(timeout=30) == 0


def test_requests_past_the_grace_period_are_cut_off(
    start_service: StartService, server: engines.Server
) -> None:
    service = start_service(
        ARBITER_STORE_URL=server.url + "?deadline_ms=1500", ARBITER_SHUTDOWN_GRACE_SECS="1"
    )
    with service.connect() as waiting:
        server.pause()
        waiting.sendall(READ)
        until(lambda: httpx.get(f"{service.url}/livez").status_code == 200)

        assert service.stop() == 0
        received = received_on(waiting)

    server.resume()
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert json.loads(body)["code"] == "shutting_down"
    assert not any("Traceback" in line for line in service.log)


@contextmanager
def balancer(folder: Path, port: int, replicas: list[Service]) -> Iterator[str]:
    """Run HAProxy with the shipped configuration on other addresses; yield its address."""
    assert HAPROXY is not None
    shipped = (ROOT / "deploy/haproxy.cfg").read_text()
    names = ("replica-one:8000", "replica-two:8000")
    for name, replica in zip(names, replicas, strict=True):
        shipped = shipped.replace(name, replica.url.removeprefix("http://"))
    config = folder / "haproxy.cfg"
    config.write_text(shipped.replace("bind :8080", f"bind 127.0.0.1:{port}"))
    process = subprocess.Popen(
        [HAPROXY, "-db", "-f", config], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(timeout=30)


@pytest.mark.skipif(HAPROXY is None, reason="HAProxy is missing: apt-get install haproxy")
async def test_a_rolling_restart_loses_no_request(
    start_service: StartService, server: engines.Server, tmp_path: Path, free_port: int
) -> None:
    settings = {
        "ARBITER_STORE_URL": server.url + PATIENTLY,
        "ARBITER_SHUTDOWN_DELAY_SECS": "4",
    }
    replicas = [start_service(**settings) for _ in range(2)]
    statuses: list[int] = []
    finished = False
    with balancer(tmp_path, free_port, replicas) as address:
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            until(lambda: answers(address))
            created = await client.post("/sessions", json=session_request(call_budget=10**6))
            path = created.headers["location"]

            async def call_for_ever() -> None:
                while not finished:
                    body = {"tool_name": "read_file"}
                    statuses.append((await client.post(f"{path}/calls", json=body)).status_code)

            callers = [asyncio.create_task(call_for_ever()) for _ in range(8)]
            for replica in replicas:
                terminate(replica)
                code = await asyncio.to_thread(replica.process.wait, 60)
                assert code == 0
                port = replica.url.rpartition(":")[2]
                again = await asyncio.to_thread(start_service, ARBITER_PORT=port, **settings)
                # Once it gets requests, the balancer has noticed it.
                await asyncio.to_thread(until, lambda replica=again: served(replica) > 0)
            finished = True
            await asyncio.gather(*callers)
            session = (await client.get(path)).json()

    assert set(statuses) == {200}
    assert len(statuses) > 100
    assert session["calls_made"] == len(statuses)


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/readyz").status_code == 200
    except httpx.ConnectError:
        return False


def served(service: Service) -> float:
    """Return the number of calls that this replica has admitted."""
    text = httpx.get(f"{service.url}/metrics").text
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith('arbiter_decisions_total{operation="call"')
    )
