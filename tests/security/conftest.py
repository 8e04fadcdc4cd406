"""One service for a whole table of attacks."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.services import Service, running
from tests.support import session_request


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running() as started:
        yield started


@pytest.fixture
def session_id(service: Service) -> str:
    created = httpx.post(f"{service.url}/sessions", json=session_request(call_budget=9))
    return str(created.json()["session_id"])
