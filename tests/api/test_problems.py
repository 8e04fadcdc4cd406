"""Problems, and what they say to people, programs and agents."""

from __future__ import annotations

from typing import Any

import pytest

from app.api import problem_types
from app.api.problem_types import PROBLEM_TYPES
from app.domain.admission import DenialCode
from app.domain.errors import StoreUnavailable
from app.http import problems
from app.http.problems import ProblemType
from app.store.contract import StoreLimits
from app.store.memory.store import MemoryStore
from tests.conftest import Api, MakeApi
from tests.support import OTHER_AGENT, ManualClock

pytestmark = pytest.mark.anyio


async def test_a_denial_is_a_complete_problem(api: Api) -> None:
    session = await api.create(call_budget=2, rate_limit_per_minute=1)

    answer = await api.client.post(
        f"/sessions/{session['session_id']}/batch",
        json={"tool_names": ["rm", "read_file", "rm"], "data_sensitivity": "restricted"},
        headers={"x-request-id": "r-1"},
    )

    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json() == {
        "type": "/problems/budget_exceeded",
        "title": "Call budget exceeded",
        "status": 429,
        "code": "budget_exceeded",
        "detail": "The session's call budget has too few calls left.",
        "instance": "/requests/r-1",
        "request_id": "r-1",
        "retryable": False,
        "next_action": "new_session",
        "violations": [
            {"code": "budget_exceeded", "limit": 2, "used": 0},
            {"code": "tool_not_authorized", "tool_indexes": [0, 2]},
            {"code": "sensitivity_exceeded"},
            {"code": "rate_limited", "limit": 1, "used": 0},
        ],
        "limit": 2,
        "used": 0,
        "agent_message": (
            "Too few calls are left in the budget of this task; a new session is needed."
        ),
    }


@pytest.mark.parametrize(
    ("terms", "call", "code", "next_action"),
    [
        ({"time_limit_secs": 0}, {}, "session_expired", "new_session"),
        ({"call_budget": 0}, {}, "budget_exceeded", "new_session"),
        ({}, {"tool": "rm"}, "tool_not_authorized", "use_authorized_tool"),
        ({}, {"data_sensitivity": "restricted"}, "sensitivity_exceeded", "lower_sensitivity"),
        ({"rate_limit_per_minute": 0}, {}, "rate_limited", "stop"),
        ({}, {"agent_id": OTHER_AGENT}, "agent_mismatch", "stop"),
    ],
)
async def test_a_denial_says_what_to_do_next(
    api: Api, terms: dict[str, Any], call: dict[str, Any], code: str, next_action: str
) -> None:
    session = await api.create(**terms)

    body = (await api.call(session["session_id"], **call)).json()

    assert (body["code"], body["next_action"]) == (code, next_action)


async def test_the_agent_message_names_no_limits_and_no_tools(api: Api) -> None:
    session = await api.create(call_budget=7, rate_limit_per_minute=7)

    message = (await api.batch(session["session_id"], *["read_file"] * 8)).json()[
        "agent_message"
    ]

    assert "7" not in message
    assert "read_file" not in message
    assert message.count(".") == 1


def test_every_denial_has_a_problem_and_a_message_for_the_agent() -> None:
    for code in DenialCode:
        assert PROBLEM_TYPES[code].agent_message


def test_every_problem_type_is_listed() -> None:
    defined = [
        kind
        for module in (problem_types, problems)
        for kind in vars(module).values()
        if isinstance(kind, ProblemType)
    ]

    assert len(defined) == len(PROBLEM_TYPES)
    assert {kind.code for kind in defined} == PROBLEM_TYPES.keys()


@pytest.mark.parametrize("code", PROBLEM_TYPES)
async def test_the_type_of_a_problem_is_a_page_that_explains_it(api: Api, code: str) -> None:
    page = await api.client.get(f"/problems/{code}")

    assert page.status_code == 200
    assert page.headers["content-type"] == "text/plain; charset=utf-8"
    assert page.text.startswith(f"{code} (HTTP {PROBLEM_TYPES[code].status})")


class BrokenStore(MemoryStore):
    """A store that is unavailable."""

    error: Exception = StoreUnavailable()

    async def record(self, *_: Any, **__: Any) -> Any:
        raise self.error

    async def ping(self) -> None:
        raise self.error


@pytest.fixture
async def broken(make_api: MakeApi, clock: ManualClock) -> Api:
    return await make_api(store=BrokenStore(StoreLimits(), clock))


async def test_an_unavailable_store_is_a_transient_error(broken: Api) -> None:
    session = await broken.create()

    answer = await broken.call(session["session_id"])

    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
    assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("1", "true")
    assert answer.json()["retryable"] is True
    assert answer.json()["next_action"] == "wait"


async def test_a_defect_is_logged_but_its_cause_is_not_sent(
    capsys: pytest.CaptureFixture[str], broken: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BrokenStore, "error", RuntimeError("secret cause"))
    session = await broken.create()

    answer = await broken.call(session["session_id"])

    assert (answer.status_code, answer.json()["code"]) == (500, "internal_error")
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert "secret" not in answer.text
    logged = capsys.readouterr().err
    assert "secret cause" in logged
    assert answer.json()["request_id"] in logged


class TestHealth:
    @pytest.mark.parametrize("path", ["/livez", "/readyz", "/healthz"])
    @pytest.mark.parametrize("method", ["GET", "HEAD"])
    async def test_a_healthy_service_says_so(self, api: Api, path: str, method: str) -> None:
        answer = await api.client.request(method, path)

        assert answer.status_code == 200
        assert answer.headers["content-type"] == "application/json"

    async def test_without_its_store_the_service_lives_but_is_not_ready(
        self, broken: Api
    ) -> None:
        assert (await broken.client.get("/livez")).status_code == 200
        for path in ("/readyz", "/healthz"):
            answer = await broken.client.get(path)
            assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable")
            assert answer.headers["retry-after"] == "1"
