"""`ARBITER_WORKERS`: several processes behind one port, over one engine."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys

import httpx
import pytest

from tests.conftest import PATIENTLY
from tests.engines import single
from tests.services import ROOT, Service, StartService
from tests.support import session_request

pytestmark = pytest.mark.anyio

WORKERS = 2


@pytest.fixture
def service(start_service: StartService) -> Service:
    return start_service(
        ARBITER_STORE_URL=single().url + PATIENTLY, ARBITER_WORKERS=str(WORKERS)
    )


async def test_workers_share_budgets_and_add_up_their_metrics(service: Service) -> None:
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as client:
        created = await client.post("/sessions", json=session_request(call_budget=50))
        path = f"{created.headers['location']}/calls"

        async def on_its_own_connection() -> list[int]:
            async with httpx.AsyncClient(base_url=service.url, timeout=30) as one:
                answers = [
                    await one.post(path, json={"tool_name": "read_file"}) for _ in range(10)
                ]
            return [each.json()["calls_made"] for each in answers if each.status_code == 200]

        told = await asyncio.gather(*(on_its_own_connection() for _ in range(20)))
        made = sorted(number for each in told for number in each)

        assert made == list(range(1, 51))
        # Each worker publishes its counts every second.
        while (await admitted(client), await denied(client)) != (50, 150):
            pass


async def test_a_change_of_a_process_concerns_the_worker_that_answers(
    service: Service,
) -> None:
    async with httpx.AsyncClient(base_url=service.url, timeout=30) as one:
        changed = (await one.patch("/replica", json={"draining": True})).json()
        again = (await one.get("/replica")).json()
    draining = {}
    while len(draining) < WORKERS:
        async with httpx.AsyncClient(base_url=service.url, timeout=30) as another:
            state = (await another.get("/replica")).json()
        draining[state["pid"]] = state["draining"]

    assert again == changed
    assert [pid for pid in draining if draining[pid]] == [changed["pid"]]


async def counted(client: httpx.AsyncClient, outcome: str) -> int:
    text = (await client.get("/metrics")).text
    found = re.search(
        rf'arbiter_decisions_total{{operation="call",outcome="{outcome}"}} (\d+)', text
    )
    return int(found[1]) if found else 0


async def admitted(client: httpx.AsyncClient) -> int:
    return await counted(client, "admitted")


async def denied(client: httpx.AsyncClient) -> int:
    return await counted(client, "budget_exceeded")


def test_workers_stop_with_their_parent(service: Service) -> None:
    started = [line for line in service.log if '"event": "starting"' in line]
    assert started

    assert service.stop() == 0

    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/livez")


@pytest.mark.parametrize("store", ["redis://127.0.0.1:1", "memory://"])
def test_workers_that_cannot_start_end_the_service(store: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=os.environ
        | {"ARBITER_STORE_URL": store, "ARBITER_WORKERS": "2", "ARBITER_PORT": "0"},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )

    assert done.returncode != 0
    said = {
        "redis://127.0.0.1:1": "cannot use redis://127.0.0.1:1: there is no connection",
        "memory://": "ARBITER_WORKERS must be 1 with the memory store",
    }
    assert f"arbiter: {said[store]}" in done.stderr
    assert "Traceback" not in done.stderr
