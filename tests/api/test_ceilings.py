"""Keys that may not grant everything, over HTTP."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import httpx
import pytest

from app.domain.capacity import StoreLimits
from app.domain.ceilings import Ceilings
from app.domain.session import DataSensitivity
from app.domain.tools import AllowList
from app.http.auth import ApiKey, Scope
from app.store.memory.store import MemoryStore
from tests.conftest import Api, MakeApi
from tests.support import ManualClock, session_request

pytestmark = pytest.mark.anyio

CEILINGS = Ceilings(1000, 600, AllowList.of(["fs.*", "read_file"]), DataSensitivity.INTERNAL)
BELOW_THE_DEFAULTS = Ceilings(10, 60, None, DataSensitivity.PUBLIC)
BUDGET = ("call_budget", "This key may grant at most 1000 calls.")
TIME = ("time_limit_secs", "This key may grant at most 600 seconds.")
TIER = ("data_sensitivity_ceiling", "This key may grant at most the tier internal.")
UNCOVERED = "No tool or pattern that this key may grant covers this entry."


def keys(ceilings: Ceilings | None, scope: Scope = Scope.PROXY) -> tuple[ApiKey, ...]:
    return (ApiKey("gate", scope, sha256(b"secret").hexdigest(), ceilings),)


async def create(api: Api, *, retry_key: str | None = None, **fields: Any) -> httpx.Response:
    headers = {"authorization": "Bearer gate.secret"}
    if retry_key is not None:
        headers["idempotency-key"] = retry_key
    request = {"authorized_tools": ["read_file"]} | fields
    return await api.client.post("/sessions", json=session_request(**request), headers=headers)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"call_budget": 1000, "time_limit_secs": 600, "data_sensitivity_ceiling": "internal"},
        {"call_budget": 0, "time_limit_secs": 0, "data_sensitivity_ceiling": "public"},
        {"authorized_tools": []},
        {"authorized_tools": ["fs.*", "fs.list", "fs.l*"]},
        {"rate_limit_per_minute": 2_147_483_647},
    ],
)
async def test_a_key_grants_up_to_its_limits(make_api: MakeApi, fields: dict[str, Any]) -> None:
    api = await make_api(api_keys=keys(CEILINGS))

    answer = await create(api, **fields)

    assert answer.status_code == 201
    assert {name: answer.json()[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("fields", "errors"),
    [
        ({"call_budget": 1001}, [BUDGET]),
        ({"time_limit_secs": 601}, [TIME]),
        ({"data_sensitivity_ceiling": "restricted"}, [TIER]),
        (
            {"authorized_tools": ["fs.x", "*", "read_file", "read_*"]},
            [("authorized_tools/1", UNCOVERED), ("authorized_tools/3", UNCOVERED)],
        ),
        (
            {
                "authorized_tools": ["rm"] * 256,
                "call_budget": 2_147_483_647,
                "time_limit_secs": 604_801,
                "data_sensitivity_ceiling": "confidential",
            },
            [
                BUDGET,
                TIME,
                TIER,
                *((f"authorized_tools/{index}", UNCOVERED) for index in range(20)),
            ],
        ),
    ],
)
@pytest.mark.parametrize("scope", [Scope.PROXY, Scope.ADMIN])
async def test_a_grant_beyond_is_refused_with_every_limit_that_it_exceeds(
    make_api: MakeApi, fields: dict[str, Any], errors: list[tuple[str, str]], scope: Scope
) -> None:
    api = await make_api(api_keys=keys(CEILINGS, scope))

    answer = await create(api, **fields)

    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (403, "grant_exceeds_key")
    assert answer.headers["x-should-retry"] == "false"
    assert (problem["retryable"], problem["next_action"]) == (False, "ask_operator")
    assert problem["agent_message"]
    assert problem["errors"] == [
        {"in": "body", "field": field, "detail": detail} for field, detail in errors
    ]


async def test_a_default_is_lowered_to_the_limit(make_api: MakeApi) -> None:
    api = await make_api(api_keys=keys(BELOW_THE_DEFAULTS))

    session = (await create(api)).json()

    assert (session["call_budget"], session["time_limit_secs"]) == (10, 60)
    assert session["data_sensitivity_ceiling"] == "public"


@pytest.mark.parametrize(
    "fields",
    [
        {"call_budget": 1000},
        {"time_limit_secs": 3600},
        {"data_sensitivity_ceiling": "internal"},
    ],
)
async def test_a_default_that_is_sent_is_judged(
    make_api: MakeApi, fields: dict[str, Any]
) -> None:
    api = await make_api(api_keys=keys(BELOW_THE_DEFAULTS))

    answer = await create(api, **fields)

    assert answer.json()["code"] == "grant_exceeds_key"
    assert [each["field"] for each in answer.json()["errors"]] == list(fields)


async def test_the_lower_of_the_keys_and_the_servers_limit_counts(make_api: MakeApi) -> None:
    api = await make_api(api_keys=keys(CEILINGS), max_time_limit_secs=60)

    assert (await create(api)).json()["time_limit_secs"] == 60
    assert (await create(api, time_limit_secs=61)).json()["code"] == "validation_failed"
    assert (await create(api, time_limit_secs=601)).json()["code"] == "grant_exceeds_key"


async def test_a_key_without_limits_grants_everything(make_api: MakeApi) -> None:
    api = await make_api(api_keys=keys(None))

    answer = await create(
        api, authorized_tools=["*"], call_budget=2_147_483_647, time_limit_secs=604_800
    )

    assert answer.status_code == 201


@pytest.mark.parametrize("fields", [{}, {"call_budget": 1000}])
async def test_a_retry_gets_the_first_answer_although_the_limits_were_lowered(
    make_api: MakeApi, clock: ManualClock, fields: dict[str, Any]
) -> None:
    store = MemoryStore(StoreLimits(), clock)
    before = await make_api(store=store, api_keys=keys(CEILINGS))
    first = await create(before, retry_key="k", **fields)
    after = await make_api(store=store, api_keys=keys(BELOW_THE_DEFAULTS))

    again = await create(after, retry_key="k", **fields)
    other = await create(after, retry_key="k", call_budget=1001)
    new = await create(after, retry_key="new", call_budget=1000)

    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["idempotency-replayed"] == "true"
    assert other.json()["code"] == "idempotency_conflict"
    assert new.json()["code"] == "grant_exceeds_key"


async def test_a_refused_grant_leaves_nothing_behind(make_api: MakeApi) -> None:
    api = await make_api(api_keys=keys(CEILINGS, Scope.ADMIN))
    await create(api, retry_key="k", call_budget=1001)

    listed = await api.client.get("/sessions", headers={"authorization": "Bearer gate.secret"})
    corrected = await create(api, retry_key="k", call_budget=1000)

    assert listed.json() == {"items": []}
    assert corrected.status_code == 201
