"""The fixtures that run one suite over every store."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import AsyncExitStack, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from app.api.openapi import Problem
from app.api.problem_types import PROBLEM_TYPES
from app.domain.capacity import StoreLimits
from app.main import create_app
from app.settings import Settings
from app.store.clock import Clock
from app.store.contract import SessionStore
from app.store.memory.store import MemoryStore
from app.store.redis.store import RedisStore
from app.store.redis.url import RedisUrl
from app.store.sqlite.file import Location
from app.store.sqlite.store import SqliteStore
from tests import engines
from tests.services import Service, StartService, running
from tests.support import ManualClock, session_request


def sqlite_store(limits: StoreLimits, clock: Clock, folder: Path) -> SessionStore:
    # FULL only helps in a power cut, which no test here simulates.
    return SqliteStore(Location(folder / "sessions.db", "normal"), limits, clock)


PATIENTLY = "?deadline_ms=10000"
"""A deadline so long that a slow test machine does not change a decision."""


def _fresh(folder: Path) -> bool:
    """Return whether this is the first store in the folder."""
    mark = folder / "used"
    fresh = not mark.exists()
    mark.touch()
    return fresh


def redis_store(limits: StoreLimits, clock: Clock, folder: Path) -> SessionStore:
    if _fresh(folder):
        engines.single().client.flushall()
    return RedisStore(RedisUrl.parse(engines.single().url + PATIENTLY), limits, clock)


def cluster_store(limits: StoreLimits, clock: Clock, folder: Path) -> SessionStore:
    if _fresh(folder):
        engines.cluster().flush()
    return RedisStore(RedisUrl.parse(engines.cluster().url + PATIENTLY), limits, clock)


STORES: dict[str, Callable[[StoreLimits, Clock, Path], SessionStore]] = {
    "memory": lambda limits, clock, _: MemoryStore(limits, clock),
    "sqlite": sqlite_store,
    "redis": redis_store,
    "cluster": cluster_store,
}
"""How to make each backend for a test, in its own folder. A new backend is one more line."""

HTTP_STORES = ["memory", "sqlite", "redis"]
"""The stores that HTTP is tested over. A cluster differs only below the contract."""

DURABLE = ["sqlite", "redis", "cluster"]
"""Backends that outlive the process: a new store in the same folder has the old sessions."""

MakeStore = Callable[..., Awaitable[SessionStore]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="fail skipped tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and item.config.getoption("--no-skips"):
        report.outcome = "failed"
    return report


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def no_ambient_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("ARBITER_"):
            monkeypatch.delenv(name)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def server() -> Iterator[engines.Server]:
    """A server that this test alone uses, and may kill or pause."""
    made = engines.Server()
    yield made
    made.resume()
    made.stop()


@pytest.fixture
def free_port() -> int:
    """A free port, for servers that do not report the port they chose."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def start_service() -> Iterator[StartService]:
    with ExitStack() as stack:

        def start(**variables: str) -> Service:
            return stack.enter_context(running(**variables))

        yield start


@pytest.fixture(params=STORES)
async def make_store(
    request: pytest.FixtureRequest, clock: ManualClock, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[MakeStore]:
    """Make and open stores with the given limits; close them after the test."""
    async with AsyncExitStack() as stack:

        async def make(**limits: Any) -> SessionStore:
            folder = tmp_path_factory.mktemp("store")
            store = STORES[request.param](StoreLimits(**limits), clock, folder)
            await store.open()
            stack.push_async_callback(store.aclose)
            return store

        yield make


@pytest.fixture
async def store(make_store: MakeStore) -> SessionStore:
    return await make_store()


@dataclass
class Api:
    """A running application and its client."""

    client: httpx.AsyncClient

    async def post(self, path: str, body: Any) -> httpx.Response:
        """Post JSON in ASCII, which can express any string, even lone surrogates."""
        return await self.client.post(
            path, content=json.dumps(body), headers={"content-type": "application/json"}
        )

    async def create(self, **fields: Any) -> dict[str, Any]:
        answer = await self.post("/sessions", session_request(**fields))
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def call(
        self, session_id: str, tool: str = "read_file", **more: Any
    ) -> httpx.Response:
        return await self.post(f"/sessions/{session_id}/calls", {"tool_name": tool} | more)

    async def batch(self, session_id: str, *tools: str, **more: Any) -> httpx.Response:
        return await self.post(f"/sessions/{session_id}/batch", {"tool_names": tools} | more)

    async def calls_made(self, session_id: str) -> int:
        return int((await self.client.get(f"/sessions/{session_id}")).json()["calls_made"])


_PROBLEM = Problem.model_json_schema()


async def check_problem(answer: httpx.Response) -> None:
    """Check a problem against its schema, its page and its headers."""
    if answer.headers.get("content-type") != "application/problem+json":
        return
    await answer.aread()
    if answer.request.method == "HEAD":
        return
    problem = answer.json()
    jsonschema.validate(problem, _PROBLEM)
    assert problem.keys() <= _PROBLEM["properties"].keys()
    kind = PROBLEM_TYPES[problem["code"]]
    assert (problem["type"], problem["title"]) == (kind.path, kind.title)
    assert problem["status"] == answer.status_code == kind.status
    assert answer.headers["x-should-retry"] == str(problem["retryable"]).lower()
    assert problem["instance"] == f"/requests/{answer.headers['x-request-id']}"
    waits = {"wait", "retry_with_same_key"}
    assert problem["retryable"] == (problem["next_action"] in waits)


MakeApi = Callable[..., Awaitable[Api]]


@pytest.fixture(params=HTTP_STORES)
async def make_api(
    request: pytest.FixtureRequest,
    clock: ManualClock,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[MakeApi]:
    """Start the application with the given settings, over every store; stop it
    after the test."""
    backend = request.param
    # It would scan every object of the test run each time, which adds up to minutes.
    monkeypatch.setattr("app.main.short_pauses", nullcontext)
    async with AsyncExitStack() as stack:

        async def make(*, store: SessionStore | None = None, **settings: Any) -> Api:
            chosen = Settings(_env_file=None, **({"log_format": "json"} | settings))
            limits = StoreLimits(
                chosen.retention_secs,
                chosen.max_sessions,
                chosen.max_active_sessions_per_agent,
            )
            folder = tmp_path_factory.mktemp("store")
            app = create_app(chosen, store or STORES[backend](limits, clock, folder))
            framework = app.framework
            await stack.enter_async_context(framework.router.lifespan_context(framework))
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            client = httpx.AsyncClient(
                transport=transport,
                base_url="http://127.0.0.1:8000",
                event_hooks={"response": [check_problem]},
            )
            await stack.enter_async_context(client)
            return Api(client)

        yield make


@pytest.fixture
async def api(make_api: MakeApi) -> Api:
    return await make_api()
