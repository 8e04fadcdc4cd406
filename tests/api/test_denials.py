"""`GET /denials`: why was that refused?"""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from app.domain.advice import DenialCode
from app.http.auth import Scope, new_key
from app.observability import denials as denials_module
from tests.conftest import Api, MakeApi
from tests.support import AGENT, OTHER_AGENT, new_id, session_request

pytestmark = pytest.mark.anyio


async def denials(api: Api, **query: Any) -> list[dict[str, Any]]:
    answer = await api.client.get("/denials", params=query)
    assert answer.status_code == 200, answer.text
    items: list[dict[str, Any]] = answer.json()["items"]
    return items


async def test_a_denied_batch_is_told_with_the_violations_of_its_problem(api: Api) -> None:
    session_id = (await api.create(call_budget=1))["session_id"]
    problem = (await api.batch(session_id, "read_file", "rm")).json()

    (told,) = await denials(api)

    assert datetime.fromisoformat(told.pop("at")).utcoffset() is not None
    assert told == {
        "operation": "batch",
        "code": "budget_exceeded",
        "session_id": session_id,
        "agent_id": AGENT,
        "caller": "",
        "request_id": problem["request_id"],
        "tools": ["read_file", "rm"],
        "dry_run": False,
        "violations": problem["violations"],
    }


async def test_denials_of_every_operation_are_listed_newest_first(make_api: MakeApi) -> None:
    api = await make_api(max_active_sessions_per_agent=1)
    session_id, unknown = (await api.create())["session_id"], new_id()
    await api.post("/sessions", session_request())
    await api.call(session_id, "rm")
    await api.client.post(
        f"/sessions/{session_id}/batch?dry_run=true", json={"tool_names": ["rm", "rm"]}
    )
    await api.call(unknown)
    await api.client.delete(f"/sessions/{session_id}")
    await api.client.delete(f"/sessions/{session_id}")
    await api.client.delete(f"/sessions/{unknown}")

    told = await denials(api)

    assert [
        (each["operation"], each["code"], each.get("session_id"), each.get("agent_id"))
        for each in told
    ] == [
        ("close", "session_not_found", unknown, None),
        ("close", "session_closed", session_id, AGENT),
        ("call", "session_not_found", unknown, None),
        ("batch", "tool_not_authorized", session_id, AGENT),
        ("call", "tool_not_authorized", session_id, AGENT),
        ("create", "too_many_sessions", None, AGENT),
    ]
    assert [each["dry_run"] for each in told] == [False, False, False, True, False, False]


async def test_a_reused_idempotency_key_is_listed(api: Api) -> None:
    headers = {"idempotency-key": "k"}
    session_id = (await api.create())["session_id"]
    for budget in (1, 2):
        wanted = session_request(call_budget=budget, agent_id=OTHER_AGENT)
        await api.client.post("/sessions", json=wanted, headers=headers)
    for tool in ("read_file", "list_dir"):
        path = f"/sessions/{session_id}/calls"
        await api.client.post(path, json={"tool_name": tool}, headers=headers)

    told = await denials(api, code="idempotency_conflict")

    assert [each["operation"] for each in told] == ["call", "create"]
    assert (told[0]["session_id"], told[1]["agent_id"]) == (session_id, OTHER_AGENT)


async def test_what_was_admitted_is_not_listed(api: Api) -> None:
    session_id = (await api.create())["session_id"]
    await api.call(session_id)
    await api.client.delete(f"/sessions/{session_id}")

    assert await denials(api) == []


async def test_a_mismatch_is_listed_for_the_agent_of_the_session(api: Api) -> None:
    """The agent that a caller names in an unknown session is all that is known."""
    session_id, unknown = (await api.create())["session_id"], new_id()
    await api.call(session_id, agent_id=OTHER_AGENT)
    await api.call(unknown, agent_id=OTHER_AGENT)

    assert [each["session_id"] for each in await denials(api, agent_id=AGENT)] == [session_id]
    assert [each["session_id"] for each in await denials(api, agent_id=OTHER_AGENT)] == [
        unknown
    ]


async def test_denials_are_found_by_session_agent_and_code(api: Api) -> None:
    first = (await api.create(call_budget=0))["session_id"]
    second = (await api.create(agent_id=OTHER_AGENT))["session_id"]
    await api.call(first)
    await api.call(second, "rm")
    await api.call(second, "rm", agent_id=AGENT)

    assert len(await denials(api)) == 3
    assert len(await denials(api, session_id=second)) == 2
    assert len(await denials(api, agent_id=OTHER_AGENT.upper())) == 2
    assert len(await denials(api, session_id=second, code="agent_mismatch")) == 1
    assert await denials(api, session_id=first, code="agent_mismatch") == []
    assert len(await denials(api, limit=1)) == 1


async def test_the_name_of_the_key_and_the_request_id_say_who_was_denied(
    make_api: MakeApi,
) -> None:
    gate, token = new_key("gate", Scope.PROXY)
    ops, ops_token = new_key("ops", Scope.OPERATE)
    api = await make_api(api_keys=(gate, ops))
    api.client.headers["authorization"] = f"Bearer {token}"
    path = f"/sessions/{new_id()}/calls"
    headers = {"x-request-id": "r-1"}
    await api.client.post(path, json={"tool_name": "rm"}, headers=headers)
    api.client.headers["authorization"] = f"Bearer {ops_token}"

    (told,) = await denials(api)

    assert (told["caller"], told["request_id"]) == ("gate", "r-1")


@pytest.mark.parametrize("code", list(DenialCode))
async def test_every_code_of_a_denial_can_be_asked_for(api: Api, code: str) -> None:
    assert await denials(api, code=code) == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("code=validation_failed", "code"),
        ("code=", "code"),
        ("code=RATE_LIMITED", "code"),
        (f"session_id={AGENT.upper()}", "session_id"),
        ("session_id=7c9e6679", "session_id"),
        ("agent_id=7c9e6679", "agent_id"),
        ("limit=0", "limit"),
        ("limit=501", "limit"),
        ("limit=ten", "limit"),
        ("cursor=x", "cursor"),
        ("request_id=a%20b", "request_id"),
        ("since=yesterday", "since"),
    ],
)
async def test_a_filter_that_cannot_match_is_refused(api: Api, query: str, field: str) -> None:
    answer = await api.client.get(f"/denials?{query}")

    assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
    assert [each["field"] for each in answer.json()["errors"]] == [field]


async def test_a_denial_is_found_by_its_request_and_time(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = (await api.create(call_budget=0))["session_id"]
    first, second = [(await api.call(session_id)).json() for _ in range(2)]

    async def found(query: str) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = (await api.client.get(f"/denials?{query}")).json()[
            "items"
        ]
        return items

    (by_id,) = await found(f"request_id={first['request_id']}")
    newest, oldest = await found("")

    assert by_id == oldest
    assert newest["request_id"] == second["request_id"]
    assert await found(f"since={newest['at']}") in ([newest], [newest, oldest])
    assert await found(f"since={oldest['at']}") == [newest, oldest]
    assert await found("since=2100-01-01T00:00:00Z") == []


async def test_100_denials_are_listed_unless_the_limit_says_otherwise(api: Api) -> None:
    session_id = (await api.create(call_budget=0))["session_id"]
    for _ in range(101):
        await api.call(session_id)

    assert len(await denials(api)) == 100
    assert len(await denials(api, limit=500)) == 101


async def test_the_memory_is_bounded(
    make_api: MakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(denials_module, "MAX_DENIALS", 2)
    api = await make_api()
    session_id = (await api.create())["session_id"]
    for tool in ("first", "second", "third"):
        await api.call(session_id, tool)

    assert [each["tools"] for each in await denials(api)] == [["third"], ["second"]]
