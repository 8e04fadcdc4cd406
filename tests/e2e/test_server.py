"""The service as a process: starting, racing, stopping and idling."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.store import scheme_of
from tests.services import ROOT, Service, StartService
from tests.support import session_request

pytestmark = pytest.mark.anyio


def cpu_secs(service: Service) -> float:
    """Return the CPU time that the process has used."""
    fields = Path(f"/proc/{service.process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_first_log_line_describes_the_service(start_service: StartService) -> None:
    service = start_service()

    first = json.loads(service.log[0])

    assert first["event"] == "starting"
    assert (first["address"], first["store"]) == (service.url, "memory://")
    assert first["authentication"] == "off"


def test_it_starts_and_stops_cleanly(start_service: StartService) -> None:
    service = start_service()
    httpx.post(f"{service.url}/sessions", json=session_request()).raise_for_status()

    assert service.stop() == 0
    service.process.wait()


def test_a_taken_port_is_reported_in_one_sentence(start_service: StartService) -> None:
    service = start_service()

    second = subprocess.run(
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=os.environ | {"ARBITER_PORT": service.url.rpartition(":")[2]},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )

    assert second.returncode == 1
    assert second.stderr.startswith("arbiter: cannot listen on 127.0.0.1, port ")
    assert "Address already in use; ARBITER_HOST and ARBITER_PORT" in second.stderr


@pytest.mark.parametrize("store", ["memory://", "sqlite://{folder}/sessions.db"], ids=scheme_of)
async def test_500_racing_calls_on_a_budget_of_50_admit_exactly_50(
    start_service: StartService, tmp_path: Path, store: str
) -> None:
    service = start_service(ARBITER_STORE_URL=store.format(folder=tmp_path))
    limits = httpx.Limits(max_connections=50)
    async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=30) as client:
        created = await client.post("/sessions", json=session_request(call_budget=50))
        session_id = created.json()["session_id"]

        async def call() -> httpx.Response:
            return await client.post(
                f"/sessions/{session_id}/calls", json={"tool_name": "read_file"}
            )

        answers = await asyncio.gather(*(call() for _ in range(500)))

    made = [answer.json()["calls_made"] for answer in answers if answer.status_code == 200]
    assert sorted(made) == list(range(1, 51))
    assert sum(answer.status_code == 429 for answer in answers) == 450


def test_ended_sessions_are_swept_while_it_runs(start_service: StartService) -> None:
    service = start_service(ARBITER_CLEANUP_INTERVAL_SECS="0.1", ARBITER_RETENTION_SECS="0")
    created = httpx.post(f"{service.url}/sessions", json=session_request(time_limit_secs=0))
    path = created.headers["location"]

    with httpx.Client(base_url=service.url) as client:
        answers = (client.get(path).status_code for _ in range(20_000))
        assert 404 in answers


@pytest.mark.parametrize(
    "options", [[], ["--http", "app.server.protocol:LimitedProtocol"]], ids=["plain", "limited"]
)
def test_uvicorn_serves_and_logs_no_session_ids(free_port: int, options: list[str]) -> None:
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(free_port)]
    command += options
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        transport = httpx.HTTPTransport(retries=10)
        with httpx.Client(
            transport=transport, base_url=f"http://127.0.0.1:{free_port}"
        ) as client:
            session_id = client.post("/sessions", json=session_request()).json()["session_id"]
            called = client.post(
                f"/sessions/{session_id}/calls", json={"tool_name": "read_file"}
            )
            large = client.get("/livez", headers={f"x-{n}": "a" for n in range(65)})
    finally:
        process.terminate()
        said, _ = process.communicate(timeout=60)

    assert called.status_code == 200
    assert large.status_code == (431 if options else 200)
    assert session_id[:8] in said
    assert session_id not in said


@pytest.mark.parametrize(
    ("options", "variables"),
    [
        (["--lifespan", "off"], {}),
        (["--lifespan=off"], {}),
        ([], {"UVICORN_LIFESPAN": "off"}),
    ],
)
def test_uvicorn_without_lifespan_does_not_start(
    free_port: int, options: list[str], variables: dict[str, str]
) -> None:
    command = [sys.executable, "-m", "uvicorn", "app.main:app", "--port", str(free_port)]

    process = subprocess.run(
        [*command, *options],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        timeout=60,
        text=True,
        check=False,
    )

    assert process.returncode == 2
    assert "lifespan" in process.stderr
    assert "Traceback" not in process.stderr


def test_an_idle_service_uses_no_cpu(start_service: StartService) -> None:
    service = start_service()
    before = cpu_secs(service)

    # Real time has to pass here: the service must have some in which to use the CPU.
    with pytest.raises(subprocess.TimeoutExpired):
        service.process.wait(timeout=2)

    assert cpu_secs(service) - before <= 0.05
