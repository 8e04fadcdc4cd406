"""Several service processes over one engine, which is killed, paused or failed over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests import engines
from tests.conftest import PATIENTLY
from tests.engines import Cluster, Server
from tests.services import Service, StartService
from tests.support import session_request

pytestmark = pytest.mark.anyio

_log = logging.getLogger(__name__)
READ = {"tool_name": "read_file"}
MOST_OUTAGE_SECS = 5


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.stop()


async def a_session(client: httpx.AsyncClient, **fields: object) -> str:
    created = await client.post("/sessions", json=session_request(**fields))
    return f"{created.raise_for_status().headers['location']}/calls"


@pytest.mark.parametrize("kind", ["single", "cluster"])
async def test_500_racing_calls_through_two_processes_admit_exactly_50(
    start_service: StartService, kind: str
) -> None:
    url = engines.single().url if kind == "single" else engines.cluster().url
    services = [start_service(ARBITER_STORE_URL=url + PATIENTLY) for _ in range(2)]
    limits = httpx.Limits(max_connections=50)
    async with httpx.AsyncClient(limits=limits, timeout=30) as client:
        created = await client.post(
            f"{services[0].url}/sessions", json=session_request(call_budget=50)
        )
        path = f"{created.headers['location']}/calls"
        answers = await asyncio.gather(
            *(client.post(f"{services[n % 2].url}{path}", json=READ) for n in range(500))
        )

    made = [answer.json()["calls_made"] for answer in answers if answer.status_code == 200]
    assert sorted(made) == list(range(1, 51))
    assert sum(answer.status_code == 429 for answer in answers) == 450


class Load:
    """Clients that call without pause and record every answer."""

    def __init__(self, service: Service, paths: list[str]) -> None:
        self.client = httpx.AsyncClient(base_url=service.url, timeout=10)
        self.statuses: Counter[int] = Counter()
        self.told: dict[str, list[int]] = {path: [] for path in paths}
        self._going = True
        self._answered = asyncio.Event()
        self._workers = [asyncio.create_task(self._call(path)) for path in paths * 2]

    async def _call(self, path: str) -> None:
        while self._going:
            answer = await self.client.post(path, json=READ)
            self.statuses[answer.status_code] += 1
            self._answered.set()
            if answer.status_code == 200:
                self.told[path].append(answer.json()["calls_made"])

    async def more(self, status: int, answers: int) -> None:
        """Wait for `answers` more answers with this status."""
        wanted = self.statuses[status] + answers
        while self.statuses[status] < wanted:
            self._answered.clear()
            await self._answered.wait()

    async def stop(self) -> None:
        self._going = False
        await asyncio.gather(*self._workers)
        await self.client.aclose()


Harm = Callable[[Server], None]


@pytest.mark.parametrize(
    ("harm", "repair"),
    [(Server.kill, Server.start), (Server.pause, Server.resume)],
    ids=["SIGKILL", "SIGSTOP"],
)
async def test_an_engine_outage_under_load_is_503_until_it_is_over(
    start_service: StartService, server: Server, harm: Harm, repair: Harm
) -> None:
    service = start_service(ARBITER_STORE_URL=server.url)
    async with httpx.AsyncClient(base_url=service.url, timeout=10) as client:
        paths = [await a_session(client, call_budget=10**6) for _ in range(4)]
        load = Load(service, paths)
        await load.more(200, 200)
        await asyncio.to_thread(harm, server)
        await load.more(503, 50)
        ready = await client.get("/readyz")
        assert ready.status_code == 503
        assert ready.headers["retry-after"] == "1"
        assert (await client.get("/livez")).status_code == 200
        assert "arbiter_store_up 0.0" in (await client.get("/metrics")).text

        await asyncio.to_thread(repair, server)
        while (await client.get("/readyz")).status_code != 200:
            pass
        new = await a_session(client)
        assert (await client.post(new, json=READ)).json()["calls_made"] == 1
        if harm is Server.pause:
            await load.more(200, 100)
        await load.stop()

    # 404 is correct: an engine that restarts has kept nothing.
    assert load.statuses.keys() <= {200, 503, 404}
    for told in load.told.values():
        assert len(told) == len(set(told))


async def test_a_cluster_failover_under_load_takes_at_most_5_seconds(
    start_service: StartService, cluster: Cluster, record_property: Callable[..., None]
) -> None:
    service = start_service(ARBITER_STORE_URL=cluster.url)
    async with httpx.AsyncClient(base_url=service.url, timeout=10) as client:
        budget = 10**6
        paths = [await a_session(client, call_budget=budget) for _ in range(12)]
        spent = await a_session(client, call_budget=20)
        load = Load(service, paths)
        await load.more(200, 300)
        statuses = [(await client.post(spent, json=READ)).status_code for _ in range(21)]
        before = Counter(statuses)[200]

        cluster.servers[0].kill()
        failed_at = time.monotonic()
        served = await all_served(client, paths)
        outage_secs = time.monotonic() - failed_at
        await load.more(200, 300)
        await load.stop()
        after = [(await client.post(spent, json=READ)).status_code for _ in range(20)]

    record_property("outage_secs", round(outage_secs, 2))
    over = max(0, before + Counter(after)[200] - 20)
    record_property("over_admitted", over)
    twice = sum(len(told) - len(set(told)) for told in load.told.values())
    record_property("answers_forgotten_by_the_failover", twice)
    _log.info("outage %.2f s, %d over budget, %d forgotten", outage_secs, over, twice)
    assert served
    assert outage_secs <= MOST_OUTAGE_SECS
    assert load.statuses.keys() <= {200, 503}


async def all_served(client: httpx.AsyncClient, paths: list[str]) -> bool:
    """Wait until every session is served again."""
    async with asyncio.timeout(30):
        for path in paths:
            while (await client.post(path, json=READ)).status_code != 200:
                pass
    return True
