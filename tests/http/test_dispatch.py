"""The same handlers, whichever way a request comes: through the dispatcher, or through FastAPI
when the service is mounted in another application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.domain.capacity import StoreLimits
from app.main import create_app
from app.settings import Settings
from app.store.memory.store import MemoryStore
from tests.support import AGENT, ManualClock, session_request

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["dispatched", "mounted"])
async def client(
    request: pytest.FixtureRequest, clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[httpx.AsyncClient]:
    settings = Settings(_env_file=None, log_format="json")
    served = create_app(settings, MemoryStore(StoreLimits(), clock))
    app: Any = served
    base = "http://127.0.0.1:8000"
    if request.param == "mounted":
        app = FastAPI()
        app.mount("/arbiter", served)
        base += "/arbiter"

        monkeypatch.setattr(served, "_find", lambda *_: (None, ""))
    async with served.framework.router.lifespan_context(served.framework):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base) as made:
            yield made


async def test_a_session_lives_its_life(client: httpx.AsyncClient) -> None:
    created = await client.post("/sessions", json=session_request(call_budget=2))
    path = f"/sessions/{created.json()['session_id']}"
    call = {"tool_name": "read_file"}

    answers = [
        await client.get(path),
        await client.head(path),
        await client.post(f"{path}/calls", json=call),
        await client.post(f"{path}/calls?dry_run=true", json=call),
        await client.post(f"{path}/batch", json={"tool_names": ["rm"]}),
        await client.get("/sessions", params={"agent_id": AGENT, "limit": 1}),
        await client.get(f"/agents/{AGENT.upper()}"),
        await client.delete(f"/agents/{AGENT}/sessions"),
        await client.post(f"{path}/calls", json=call),
    ]

    assert created.status_code == 201
    assert [each.status_code for each in answers] == [
        *(200, 200, 200, 200, 403, 200, 200, 200, 409)
    ]
    assert answers[1].content == b""
    assert answers[6].json() == {
        "agent_id": AGENT,
        "active_sessions": 1,
        "paused_sessions": 0,
        "frozen": False,
    }
    assert all(each.headers["cache-control"] == "no-store" for each in answers)
    assert len({each.headers["x-request-id"] for each in answers}) == len(answers)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code"),
    [
        ("GET", "/nothing", b"", 404, "not_found"),
        ("GET", "/sessions/", b"", 404, "not_found"),
        ("GET", "/sessions/x", b"", 404, "session_not_found"),
        ("GET", f"/sessions/{AGENT}?x=1", b"", 422, "validation_failed"),
        ("GET", f"/sessions/%{ord(AGENT[0]):x}{AGENT[1:]}", b"", 404, "not_found"),
        ("GET", "/agents/x", b"", 422, "validation_failed"),
        ("PUT", "/sessions", b"", 405, "method_not_allowed"),
        ("POST", "/sessions", b"{", 400, "malformed_json"),
        ("POST", "/sessions", b"{}", 422, "validation_failed"),
    ],
)
async def test_errors_are_the_same_problems(
    client: httpx.AsyncClient, method: str, path: str, body: bytes, status: int, code: str
) -> None:
    answer = await client.request(
        method, path, content=body, headers={"content-type": "application/json"}
    )

    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["x-request-id"] == problem["request_id"]


async def test_a_tree_takes_every_method_and_everything_below(
    client: httpx.AsyncClient,
) -> None:
    created = await client.post("/sessions", json=session_request(call_budget=3))
    headers = {
        "x-arbiter-session": created.json()["session_id"],
        "x-arbiter-tool": "read_file",
    }

    answers = [
        await client.request(method, f"/authz/{path}", headers=headers)
        for method, path in (
            ("GET", "native"),
            ("HEAD", "native/"),
            ("BREW", "native/a/b%20c?d=e"),
            ("DELETE", "strict"),
            ("GET", "nothing/native"),
            ("GET", ""),
        )
    ]

    assert [each.status_code for each in answers] == [200, 200, 200, 403, 404, 404]
    assert answers[3].headers["x-arbiter-status"] == "429"


async def test_authzen_echoes_any_request_id_and_knows_where_it_is(
    client: httpx.AsyncClient,
) -> None:
    sent = {"x-request-id": "one, two"}

    answer = await client.get("/.well-known/authzen-configuration", headers=sent)

    assert answer.headers["x-request-id"] == "one, two"
    assert answer.json()["policy_decision_point"] == str(client.base_url).rstrip("/")


async def test_a_defect_is_an_internal_error(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(MemoryStore, "get", broken)

    answer = await client.get(f"/sessions/{AGENT}")

    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert "a defect" not in answer.text
