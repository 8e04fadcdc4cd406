"""Problems, and what they say to people, programs and agents."""

from __future__ import annotations

from typing import Any

import pytest

from app.api import problem_types
from app.api.problem_types import AGENT_MESSAGES, PROBLEM_TYPES
from app.domain.advice import DenialCode
from app.domain.capacity import StoreLimits
from app.domain.errors import (
    ShuttingDown,
    StoreUnavailable,
    StoreUnreachable,
    TransientError,
)
from app.http import problems
from app.http.auth import Scope, new_key
from app.http.problems import ProblemType
from app.store.memory.store import MemoryStore
from tests.conftest import Api, MakeApi
from tests.support import AGENT, OTHER_AGENT, START, ManualClock, session_request

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
        "detail": "Call budget: 2 of 2 calls left, 3 requested. The tools at positions 0 and 2 "
        "(counting from 0) are not on the allow-list. Sensitivity: at most internal data "
        "allowed, restricted requested. Rate window of 60 s: 1 of 1 calls left, 3 requested. "
        "No window can hold that many: send at most 1 at a time.",
        "agent_id": session["agent_id"],
        "session_ref": session["session_id"][:8],
        "instance": "/requests/r-1",
        "request_id": "r-1",
        "retryable": False,
        "next_action": "use_authorized_tool",
        "violations": [
            {"code": "budget_exceeded", "limit": 2, "used": 0, "requested": 3},
            {"code": "tool_not_authorized", "tool_indexes": [0, 2]},
            {"code": "sensitivity_exceeded", "ceiling": "internal"},
            {"code": "rate_limited", "limit": 1, "used": 0, "requested": 3},
        ],
        "limit": 2,
        "used": 0,
        "requested": 3,
        "agent_message": (
            "This tool is not available in this task; use one of the tools that are."
        ),
    }


@pytest.mark.parametrize(
    ("terms", "call", "code", "next_action"),
    [
        ({"time_limit_secs": 0}, {}, "session_expired", "new_session"),
        ({"call_budget": 0}, {}, "budget_exceeded", "ask_operator"),
        ({}, {"tool": "rm"}, "tool_not_authorized", "use_authorized_tool"),
        ({}, {"data_sensitivity": "restricted"}, "sensitivity_exceeded", "lower_sensitivity"),
        ({"rate_limit_per_minute": 0}, {}, "rate_limited", "ask_operator"),
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
    """A store that is unavailable, except for creating sessions."""

    error: Exception = StoreUnavailable()

    async def fail(self, *_: Any, **__: Any) -> Any:
        raise self.error

    record = get = change = close_sessions_for_agent = freeze = ping = fail


@pytest.fixture
async def broken(make_api: MakeApi, clock: ManualClock) -> Api:
    return await make_api(store=BrokenStore(StoreLimits(), clock))


REQUESTS = {
    "call": ("POST", "/sessions/{id}/calls", {}),
    "keyed call": ("POST", "/sessions/{id}/calls", {"idempotency-key": "k"}),
    "dry run": ("POST", "/sessions/{id}/calls?dry_run=true", {}),
    "read": ("GET", "/sessions/{id}", {}),
    "close": ("DELETE", "/sessions/{id}", {}),
    "pause": ("POST", "/sessions/{id}/pause", {}),
    "resume": ("POST", "/sessions/{id}/resume", {}),
    "freeze": ("PUT", f"/agents/{AGENT}/freeze", {}),
    "absolute change": ("PATCH", "/sessions/{id}", {"call_budget": "7"}),
    "relative change": ("PATCH", "/sessions/{id}", {"add_calls": "7"}),
    "kill switch": ("DELETE", f"/agents/{AGENT}/sessions", {}),
    "readiness": ("GET", "/readyz", {}),
}


@pytest.mark.parametrize(
    ("request_", "outcome", "retryable", "next_action"),
    [
        ("call", "unknown", False, "stop"),
        ("keyed call", "unknown", True, "retry_with_same_key"),
        ("dry run", "not_recorded", True, "wait"),
        ("read", "not_recorded", True, "wait"),
        ("close", "unknown", True, "wait"),
        ("pause", "unknown", True, "wait"),
        ("resume", "unknown", True, "wait"),
        ("freeze", "unknown", True, "wait"),
        ("absolute change", "unknown", True, "wait"),
        ("relative change", "unknown", False, "stop"),
        ("kill switch", "unknown", True, "wait"),
        ("readiness", "not_recorded", True, "wait"),
    ],
)
@pytest.mark.parametrize("error", [StoreUnavailable(), ShuttingDown(), StoreUnreachable()])
async def test_what_is_unknown_is_called_unknown(
    broken: Api,
    monkeypatch: pytest.MonkeyPatch,
    error: TransientError,
    request_: str,
    outcome: str,
    retryable: bool,
    next_action: str,
) -> None:
    monkeypatch.setattr(BrokenStore, "error", error)
    session = await broken.create()
    method, path, headers = REQUESTS[request_]
    body: dict[str, Any] | None = {"tool_name": "read_file"} if "calls" in path else None
    if method == "PATCH":
        body, headers = {name: int(value) for name, value in headers.items()}, {}

    answer = await broken.client.request(
        method, path.format(id=session["session_id"]), json=body, headers=headers
    )

    if not error.outcome_unknown:
        outcome, retryable, next_action = "not_recorded", True, "wait"
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (503, error.code)
    assert problem["outcome"] == outcome
    assert (problem["retryable"], problem["next_action"]) == (retryable, next_action)
    assert ("retry-after" in answer.headers) == retryable
    said = "Nothing was recorded." if outcome == "not_recorded" else "may have"
    assert said in problem["detail"]
    assert problem.get("retry_after_secs") == (1 if retryable else None)
    if outcome == "unknown" and request_ == "relative change":
        assert "its revision has grown if it was" in problem["detail"]


async def test_a_closed_session_says_when_and_to_operators_by_whom(make_api: MakeApi) -> None:
    keys = {scope: new_key(scope.value, scope) for scope in Scope}
    api = await make_api(api_keys=tuple(key for key, _ in keys.values()))
    api.client.headers["authorization"] = f"Bearer {keys[Scope.ADMIN][1]}"
    closed, killed = await api.create(), await api.create()
    await api.client.delete(f"/sessions/{closed['session_id']}")
    await api.client.delete(f"/agents/{AGENT}/sessions")

    found = {}
    for scope, (_, token) in keys.items():
        api.client.headers["authorization"] = f"Bearer {token}"
        for session in (closed, killed):
            path = f"/sessions/{session['session_id']}"
            method = "DELETE" if scope is Scope.OPERATE else "POST"
            body = None if scope is Scope.OPERATE else {"tool_name": "read_file"}
            path += "" if scope is Scope.OPERATE else "/calls"
            problem = (await api.client.request(method, path, json=body)).json()
            assert problem["code"] == "session_closed"
            assert problem["closed_at"] in problem["detail"]
            found[scope.value, problem["closed_by"]] = problem.get("closed_by_key")

    assert found == {
        ("admin", "close"): "admin",
        ("admin", "kill_switch"): "admin",
        ("operate", "close"): "admin",
        ("operate", "kill_switch"): "admin",
        ("proxy", "close"): None,
        ("proxy", "kill_switch"): None,
    }


async def test_an_expired_session_says_since_when(api: Api) -> None:
    session = await api.create(time_limit_secs=0)

    problem = (await api.call(session["session_id"])).json()

    assert problem["expires_at"] == session["expires_at"]
    assert session["expires_at"] in problem["detail"]


async def test_a_denial_says_whose_it_is(make_api: MakeApi) -> None:
    api = await make_api(max_active_sessions_per_agent=1)
    session = await api.create()
    whose = {"agent_id": AGENT, "session_ref": session["session_id"][:8]}
    path = f"/sessions/{session['session_id']}"
    denied = [
        await api.call(session["session_id"], "rm"),
        await api.call(session["session_id"], agent_id=OTHER_AGENT),
        await api.client.patch(path, json={"add_calls": 1, "expected_revision": 9}),
    ]
    too_many = (await api.post("/sessions", session_request())).json()
    await api.client.put(f"/agents/{AGENT}/freeze")
    frozen = [
        await api.call(session["session_id"]),
        await api.post("/sessions", session_request()),
    ]
    unknown = (await api.call(OTHER_AGENT)).json()

    for each in denied:
        assert each.json() | whose == each.json()
    assert too_many["agent_id"] == AGENT
    assert "session_ref" not in too_many
    assert "once one of them is closed" in too_many["detail"]
    since = (await api.client.get(f"/agents/{AGENT}")).json()["frozen_at"]
    for each in frozen:
        problem = each.json()
        assert (problem["agent_id"], problem["since"]) == (AGENT, since)
        assert "once somebody lifts the freeze" in problem["detail"]
        assert problem["retryable"] is False
    assert unknown.keys().isdisjoint({"agent_id", "session_ref"})


async def test_a_conflict_says_when_the_key_was_first_used(
    api: Api, clock: ManualClock
) -> None:
    key = {"idempotency-key": "k"}
    session = await api.create()
    path = f"/sessions/{session['session_id']}"
    for route, first, other in (
        ("/sessions", session_request(), session_request(call_budget=5)),
        (f"{path}/calls", {"tool_name": "read_file"}, {"tool_name": "list_dir"}),
    ):
        await api.client.post(route, json=first, headers=key)
        clock.advance(60)
        problem = (await api.client.post(route, json=other, headers=key)).json()

        at = f"2026-01-01T12:0{(clock.now - START) // 60_000_000 - 1}:00.000000Z"
        assert problem["detail"] == (
            f"This idempotency key was first used at {at}, for another request."
        )


async def test_a_batch_that_no_window_can_hold_says_what_fits(api: Api) -> None:
    session = await api.create(rate_limit_per_minute=2)

    problem = (await api.batch(session["session_id"], *["read_file"] * 3)).json()

    assert problem["next_action"] == "split_batch"
    assert "No window can hold that many: send at most 2 at a time." in problem["detail"]


async def test_a_mistake_of_the_program_is_not_the_agents(api: Api) -> None:
    session = await api.create()
    path = f"/sessions/{session['session_id']}/calls"

    for body in ({"tool": "a"}, {}, {"tool_name": 5}, {"tool_name": "a b", "x": 1}):
        problem = (await api.post(path, body)).json()
        assert problem["next_action"] == "fix_request"
        assert problem["agent_message"] == "This tool cannot be reached now; stop here."

    assert (await api.post(path, {"tool": "a", "b c": 1})).json()["errors"] == [
        {"in": "body", "field": "tool_name", "detail": "Field required"},
        {
            "in": "body",
            "field": "tool",
            "detail": "is not known here; use agent_id, data_sensitivity, tool_name",
            "known": ["agent_id", "data_sensitivity", "tool_name"],
        },
        {
            "in": "body",
            "field": "",
            "detail": "is not known here; use agent_id, data_sensitivity, tool_name",
            "known": ["agent_id", "data_sensitivity", "tool_name"],
        },
    ]


async def test_no_sentence_to_an_agent_speaks_of_sessions() -> None:
    for kind in PROBLEM_TYPES.values():
        assert "session" not in (kind.agent_message or "")
    for message in AGENT_MESSAGES.values():
        assert "session" not in message


async def test_a_name_that_is_no_tool_has_a_sentence_for_the_agent(api: Api) -> None:
    session = await api.create()

    problem = (await api.call(session["session_id"], "read file")).json()

    assert (problem["code"], problem["next_action"]) == (
        "validation_failed",
        "use_authorized_tool",
    )
    assert (
        problem["agent_message"] == "There is no tool with this name; use a tool's exact name."
    )


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
