"""One service for a whole table of attacks."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.services import Service, running
from tests.support import session_request

LANES = ("true", "false")


@pytest.fixture(scope="module", params=LANES, ids=["fast", "framework"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with running(ARBITER_FAST_LANE=request.param) as started:
        yield started


@pytest.fixture
def session_id(service: Service) -> str:
    created = httpx.post(f"{service.url}/sessions", json=session_request(call_budget=9))
    return str(created.json()["session_id"])
