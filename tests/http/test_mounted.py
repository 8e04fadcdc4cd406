"""Behind a path prefix: mounted in another application, or by a server's `--root-path`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from app.main import create_app
from app.settings import Settings
from tests.support import session_request

pytestmark = pytest.mark.anyio

PREFIX = "/team/arbiter"


def service(**settings: Any) -> Any:
    return create_app(Settings(_env_file=None, log_format="json", **settings))


@asynccontextmanager
async def client_of(app: Any, **transport: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app, raise_app_exceptions=False, **transport),
        base_url="http://127.0.0.1:8000",
    ) as client:
        yield client


@pytest.fixture(params=["mounted", "root path", "root path, not stripped by the proxy"])
async def client(request: pytest.FixtureRequest) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a started service, whose paths begin as the service sees them."""
    app = service()
    async with app.framework.router.lifespan_context(app.framework):
        if request.param == "mounted":
            outer = Starlette(routes=[Mount(PREFIX, app)])
            async with client_of(outer) as client:
                client.base_url = httpx.URL(f"http://127.0.0.1:8000{PREFIX}")
                yield client
        else:
            async with client_of(app, root_path=PREFIX) as client:
                if request.param != "root path":
                    client.base_url = httpx.URL(f"http://127.0.0.1:8000{PREFIX}")
                yield client


async def test_paths_in_answers_have_the_prefix(client: httpx.AsyncClient) -> None:
    created = await client.post("/sessions", json=session_request())
    session = created.headers["location"].removeprefix(PREFIX)
    denied = await client.post(f"{session}/calls", json={"tool_name": "rm"})
    refused = await client.post(f"{session}/calls", json={})
    nowhere = await client.get("/nowhere")
    not_allowed = await client.put("/livez")
    root = await client.get("/")

    assert created.headers["location"].startswith(f"{PREFIX}/sessions/")
    assert root.headers["location"] == f"{PREFIX}/docs"
    problems = [denied, refused, nowhere, not_allowed]
    assert [each.status_code for each in problems] == [403, 422, 404, 405]
    for each in problems:
        problem = each.json()
        assert problem["type"] == f"{PREFIX}/problems/{problem['code']}"
        page = await client.get(problem["type"].removeprefix(PREFIX))
        assert page.text.startswith(problem["code"])


async def test_an_application_that_was_not_started_says_so() -> None:
    outer = Starlette(routes=[Mount(PREFIX, service())])
    async with client_of(outer) as client:
        answers = [
            await client.get(f"{PREFIX}/readyz"),
            await client.post(f"{PREFIX}/sessions", json=session_request()),
            await client.get(f"{PREFIX}/docs"),
        ]

    for each in answers:
        problem = each.json()
        assert (each.status_code, problem["code"]) == (500, "internal_error")
        assert "must run its lifespan" in problem["detail"]
        assert problem["outcome"] == "not_recorded"
