"""AuthZEN 1.0: the cases of its certification scenario (its numbers are in the comments), with
sessions and tools, and what is ours."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.domain.capacity import StoreLimits
from app.settings import BadSettings, load_settings
from tests.api.test_problems import BrokenStore
from tests.conftest import Api, MakeApi
from tests.support import ManualClock, new_id

pytestmark = pytest.mark.anyio

COUNTS = "/access/v1/evaluation"
CHECKS = "/check/access/v1/evaluation"
ALL = "/check/access/v1/evaluations"
JSON = {"content-type": "application/json"}


def asked(session_id: str, tool: str = "read_file", **more: Any) -> dict[str, Any]:
    return {
        "subject": {"type": "session", "id": session_id},
        "action": {"name": "tools/call"},
        "resource": {"type": "tool", "id": tool},
    } | more


async def opened(api: Api, **terms: Any) -> str:
    return str((await api.create(**terms))["session_id"])


async def test_an_evaluation_permits_and_counts(api: Api) -> None:
    session = await opened(api, call_budget=5)

    answer = await api.post(COUNTS, asked(session))  # 2.2.1

    assert (answer.status_code, answer.json()) == (200, {"decision": True})
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["ratelimit"] == '"budget";r=4'
    assert await api.calls_made(session) == 1


async def test_a_denial_is_200_and_says_why(api: Api) -> None:
    session = await opened(api, call_budget=0)

    answer = await api.post(COUNTS, asked(session))  # 2.2.2, 2.3

    body = answer.json()
    assert (answer.status_code, body["decision"]) == (200, False)
    assert body["context"]["code"] == "budget_exceeded"
    assert body["context"]["agent_message"]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["ratelimit"] == '"budget";r=0'


@pytest.mark.parametrize(
    "more",
    [
        {"context": {"time": "2025-06-27T18:03-07:00", "ip": "192.168.1.1"}},  # 2.2.3
        {"context": {}},
        {"foo": "bar", "futureField": {"nested": True}},  # 2.2.9
        {"action": {"name": "tools/call", "properties": {"method": "GET"}}},  # 2.2.8
        {"context": {"data_sensitivity": "internal"}},
    ],
)
async def test_what_is_not_known_is_ignored(api: Api, more: dict[str, Any]) -> None:
    session = await opened(api)

    answer = await api.post(COUNTS, asked(session, **more))
    queried = await api.post(COUNTS + "?dry_run=true", asked(session, **more))

    assert (answer.json(), queried.json()) == ({"decision": True}, {"decision": True})
    assert await api.calls_made(session) == 2


SUBJECT = {"type": "session", "id": new_id()}
MALFORMED: list[dict[str, Any]] = [
    {"subject": None},
    {"subject": {"id": "x"}},  # 2.4.2
    {"subject": {"type": "session"}},
    {"subject": "alice"},  # 2.4.6
    {"subject": []},
    {"action": {}},
    {"action": {"name": 123}},
    {"resource": {"id": "read_file"}},
    {"resource": {"type": "tool"}},
    {"resource": {"type": "tool", "id": ""}},
    {"resource": {"type": "tool", "id": "read file"}},
    {"context": None},
    {"context": []},
    {"context": {"data_sensitivity": "secret"}},
    {"context": {"data_sensitivity": 1}},
]


@pytest.mark.parametrize("path", [COUNTS, CHECKS, ALL])
async def test_missing_and_malformed_fields_are_400(api: Api, path: str) -> None:
    session = await opened(api)
    bodies = [asked(session) | more for more in MALFORMED]
    bodies += [  # 2.4.1
        {name: part for name, part in asked(session).items() if name != missing}
        for missing in ("subject", "action", "resource")
    ]
    bodies += [[], "x", None, 1]

    answers = [await api.post(path, body) for body in bodies]

    assert {each.status_code for each in answers} == {400}
    assert {each.json()["code"] for each in answers} == {"invalid_check"}
    assert await api.calls_made(session) == 0


@pytest.mark.parametrize(
    ("content", "headers", "code"),
    [
        (b"{}", {"content-type": "text/plain"}, "invalid_check"),  # 2.4.3
        (b"{}", {}, "invalid_check"),
        (b"{}", JSON | {"content-encoding": "gzip"}, "invalid_check"),
        (b"{", JSON, "malformed_json"),  # 2.4.4
        (b"", JSON, "malformed_json"),  # 2.4.5
        (b'{"a":1,"a":1}', JSON, "malformed_json"),
        (b"{}", JSON | {"idempotency-key": ""}, "invalid_check"),
    ],
)
async def test_a_body_that_cannot_be_read_is_400(
    api: Api, content: bytes, headers: dict[str, str], code: str
) -> None:
    answer = await api.client.post(COUNTS, content=content, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (400, code)


@pytest.mark.parametrize(
    "request_id", ["abc-1", "with spaces, and commas", "x" * 255, '{"json":true}']
)
async def test_the_request_id_is_echoed(api: Api, request_id: str) -> None:  # 2.5.1
    session = await opened(api)

    answers = [
        await api.client.post(path, json=body, headers={"x-request-id": request_id})
        for path in (COUNTS, CHECKS, ALL)
        for body in (asked(session), asked(new_id()))
    ]
    found = await api.client.get(
        "/.well-known/authzen-configuration", headers={"x-request-id": request_id}
    )

    assert {each.headers["x-request-id"] for each in [*answers, found]} == {request_id}


@pytest.mark.parametrize("request_id", [[], ["x" * 256], ["caf\xe9"], ["a", "b"]])
async def test_without_a_request_id_one_is_made(api: Api, request_id: list[str]) -> None:
    headers = [(b"x-request-id", each.encode("latin-1")) for each in request_id]  # 2.5.2

    answer = await api.client.post(COUNTS, json=asked(new_id()), headers=headers)

    assert answer.headers["x-request-id"] not in {*request_id, ""}
    assert answer.json()["context"]["request_id"] == answer.headers["x-request-id"]


async def test_a_check_gives_the_same_decision_again_and_counts_nothing(api: Api) -> None:
    session = await opened(api, call_budget=1)  # 2.6

    answers = [(await api.post(CHECKS, asked(session))).json() for _ in range(3)]

    assert answers == [{"decision": True}] * 3
    assert await api.calls_made(session) == 0


async def test_with_a_key_an_evaluation_is_the_same_again_and_counted_once(api: Api) -> None:
    session = await opened(api, call_budget=1)  # 2.6
    headers = {"idempotency-key": "k"}

    answers = [
        await api.client.post(COUNTS, json=asked(session), headers=headers) for _ in range(3)
    ]

    assert [each.json() for each in answers] == [{"decision": True}] * 3
    assert answers[2].headers["idempotency-replayed"] == "true"
    assert await api.calls_made(session) == 1


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"subject": {"type": "session", "id": new_id()}}, "session_not_found"),
        ({"subject": {"type": "session", "id": "x"}}, "session_not_found"),
        ({"subject": {"type": "user", "id": "alice"}}, "invalid_check"),
        ({"action": {"name": "read"}}, "invalid_check"),
        ({"resource": {"type": "record", "id": "read_file"}}, "invalid_check"),
        ({"resource": {"type": "tool", "id": "rm"}}, "tool_not_authorized"),
        ({"context": {"data_sensitivity": "restricted"}}, "sensitivity_exceeded"),
    ],
)
async def test_what_no_session_allows_is_denied(
    api: Api, more: dict[str, Any], code: str
) -> None:
    session = await opened(api)

    for path in (COUNTS, CHECKS, ALL):
        answer = await api.post(path, asked(session) | more)

        assert answer.status_code == 200
        assert answer.json()["decision"] is False
        assert answer.json()["context"]["code"] == code
    assert await api.calls_made(session) == 0


def decisions(answer: httpx.Response) -> list[bool]:
    assert answer.status_code == 200
    assert answer.json().keys() == {"evaluations"}
    return [each["decision"] for each in answer.json()["evaluations"]]


async def test_a_list_of_tools_is_filtered_in_order(api: Api) -> None:
    session = await opened(api, call_budget=1)
    whole = asked(session)
    del whole["resource"]
    tools = ["read_file", "rm", "list_dir"]  # 3.2.1, 3.3

    answer = await api.post(
        ALL, whole | {"evaluations": [{"resource": {"type": "tool", "id": t}} for t in tools]}
    )

    assert decisions(answer) == [True, False, True]
    assert await api.calls_made(session) == 0


async def test_evaluations_may_be_complete_or_take_parts_of_the_whole(api: Api) -> None:
    session = await opened(api)
    items = [
        asked(session),  # 3.2.5
        {"resource": {"id": "list_dir"}},  # 3.2.7
        {"context": {"data_sensitivity": "restricted"}},  # 3.2.6
        {"subject": {"id": new_id()}},
        {"resource": {"id": "a tool"}},
        {"resource": None},
        {"resource": []},
        {},  # 3.4.1
    ]
    whole = asked(session, context={"data_sensitivity": "public"})
    bare = {"subject": whole["subject"], "action": whole["action"]}

    answer = await api.post(ALL, whole | {"evaluations": items})
    failed = await api.post(ALL, bare | {"evaluations": [asked(session), {}]})

    assert decisions(answer) == [True, True, False, False, False, False, False, True]
    assert decisions(failed) == [True, False]
    assert failed.json()["evaluations"][1]["context"]["code"] == "invalid_check"


@pytest.mark.parametrize("more", [{}, {"evaluations": []}])  # 3.4.2, 3.4.3
async def test_without_evaluations_the_whole_is_one(api: Api, more: dict[str, Any]) -> None:
    answer = await api.post(ALL, asked(await opened(api)) | more)

    assert answer.json() == {"decision": True}


@pytest.mark.parametrize(
    ("semantic", "expected"),
    [
        ("execute_all", [True, False, True]),
        ("deny_on_first_deny", [True, False]),
        ("permit_on_first_permit", [True]),
    ],
)
async def test_evaluations_may_stop_early(
    api: Api, semantic: str, expected: list[bool]
) -> None:
    body = asked(await opened(api)) | {
        "evaluations": [{"resource": {"id": tool}} for tool in ("read_file", "rm", "list_dir")],
        "options": {"evaluations_semantic": semantic, "another": 1},
    }

    assert decisions(await api.post(ALL, body)) == expected


@pytest.mark.parametrize(
    "more",
    [
        {"evaluations": {}},
        {"evaluations": [1]},
        {"evaluations": [{}] * 257},
        {"evaluations": [{}], "options": {"evaluations_semantic": "some"}},
        {"evaluations": [{}], "options": []},
    ],
)
async def test_malformed_evaluations_are_400(api: Api, more: dict[str, Any]) -> None:
    answer = await api.post(ALL, asked(await opened(api)) | more)

    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_check")


async def test_evaluations_that_would_count_are_not_offered(api: Api) -> None:
    assert (await api.post("/access/v1/evaluations", asked(new_id()))).status_code == 404


async def test_discovery_leads_to_what_counts_and_to_what_does_not(api: Api) -> None:  # 6
    base = "http://127.0.0.1:8000"

    counts = await api.client.get("/.well-known/authzen-configuration")
    before = await api.client.get("/check/.well-known/authzen-configuration")
    after = await api.client.get("/.well-known/authzen-configuration/check")

    assert counts.headers["content-type"] == "application/json"
    assert counts.json() == {
        "policy_decision_point": base,
        "access_evaluation_endpoint": base + COUNTS,
    }
    assert before.json() == {
        "policy_decision_point": base + "/check",
        "access_evaluation_endpoint": base + CHECKS,
        "access_evaluations_endpoint": base + ALL,
    }
    assert after.json() == before.json()


async def test_the_public_url_is_what_discovery_says(make_api: MakeApi) -> None:
    api = await make_api(public_url="https://arbiter.example.com/pdp/")

    found = await api.client.get("/.well-known/authzen-configuration")

    assert found.json()["policy_decision_point"] == "https://arbiter.example.com/pdp"


@pytest.mark.parametrize("host", ["127.0.0.1/x", "a b", "x?y", 'x"', "u@h", ""])
async def test_discovery_repeats_no_host_that_is_none(make_api: MakeApi, host: str) -> None:
    api = await make_api(allow_unauthenticated=True)

    found = await api.client.get("/.well-known/authzen-configuration", headers={"host": host})

    assert (found.status_code, found.json()["code"]) == (400, "invalid_check")


@pytest.mark.parametrize("url", ["arbiter", "ftp://x", "https://x?y", "https://x/#y", ""])
def test_a_public_url_is_one(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARBITER_PUBLIC_URL", url)

    with pytest.raises(BadSettings, match="ARBITER_PUBLIC_URL"):
        load_settings()


async def test_a_store_that_fails_gives_no_decision(
    make_api: MakeApi, clock: ManualClock
) -> None:
    api = await make_api(store=BrokenStore(StoreLimits(), clock))

    counted = await api.post(COUNTS, asked(new_id()))
    checked = await api.post(CHECKS, asked(new_id()))

    assert (counted.status_code, counted.json()["outcome"]) == (503, "unknown")
    assert (checked.status_code, checked.json()["outcome"]) == (503, "not_recorded")
