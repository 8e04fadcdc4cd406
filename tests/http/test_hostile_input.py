"""Invalid input is refused with a clear problem. Nothing is echoed and nothing changes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.conftest import Api
from tests.http import hostile
from tests.support import AGENT, session_request

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
CANARY = "canary-7f3a"


def check(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Check that the response is a complete problem. Return its body."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["code"] == code
    assert body["status"] == status
    assert body["type"] == f"/problems/{code}"
    assert body["request_id"] == answer.headers["x-request-id"]
    assert {"title", "detail", "instance"} <= body.keys()
    assert CANARY not in answer.text
    return body


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [pytest.param(*row[1:], id=row[0]) for row in hostile.BODIES],
)
async def test_an_invalid_body_is_refused(
    api: Api, body: bytes, status: int, code: str
) -> None:
    session = await api.create()

    answer = await api.client.post(
        f"/sessions/{session['session_id']}/calls", content=body, headers=JSON
    )

    check(answer, status, code)
    assert await api.calls_made(session["session_id"]) == 0


@pytest.mark.parametrize("name", hostile.TOOL_NAMES)
async def test_an_invalid_tool_name_is_refused(api: Api, name: str) -> None:
    session = await api.create(authorized_tools=["*"])
    session_id = session["session_id"]

    check(await api.call(session_id, name), 422, "validation_failed")
    body = check(await api.batch(session_id, "read_file", name), 422, "validation_failed")

    assert body["errors"][0]["field"] == "tool_names/1"
    assert await api.calls_made(session_id) == 0


@pytest.mark.parametrize("name", [n for n in hostile.TOOL_NAMES if "*" not in n])
async def test_an_invalid_tool_name_cannot_be_authorised(api: Api, name: str) -> None:
    answer = await api.post("/sessions", session_request(authorized_tools=[name]))

    check(answer, 422, "validation_failed")


@pytest.mark.parametrize(("field", "value"), hostile.CREATIONS)
async def test_a_creation_with_an_invalid_field_is_refused(
    api: Api, field: str, value: object
) -> None:
    answer = await api.post("/sessions", session_request(**{field: value}))

    body = check(answer, 422, "validation_failed")
    assert body["errors"][0]["in"] == "body"
    assert (await api.client.get("/sessions")).json() == {"items": []}


@pytest.mark.parametrize("field", ["agent_id", "declared_intent", "authorized_tools"])
async def test_a_creation_needs_its_required_fields(api: Api, field: str) -> None:
    request = session_request()
    del request[field]

    body = check(await api.client.post("/sessions", json=request), 422, "validation_failed")

    assert body["errors"] == [{"in": "body", "field": field, "detail": "Field required"}]


@pytest.mark.parametrize("text", hostile.UUIDS)
async def test_an_agent_id_in_a_body_or_query_must_be_a_uuid(api: Api, text: str) -> None:
    session = await api.create()

    check(
        await api.client.post("/sessions", json=session_request(agent_id=text)),
        422,
        "validation_failed",
    )
    check(await api.call(session["session_id"], agent_id=text), 422, "validation_failed")
    check(
        await api.client.get("/sessions", params={"agent_id": text}), 422, "validation_failed"
    )


@pytest.mark.parametrize(
    "text", [text for text in hostile.UUIDS if text.isprintable() and text]
)
async def test_a_malformed_session_id_in_a_path_is_not_found(api: Api, text: str) -> None:
    for answer in (
        await api.call(text),
        await api.client.get(f"/sessions/{text}"),
        await api.client.delete(f"/sessions/{text}"),
    ):
        assert answer.status_code == 404
        assert answer.json()["code"] in {"session_not_found", "not_found"}


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("text", ["7c9e6679", f"{AGENT}0", AGENT.replace("-", ""), "x" * 36])
async def test_an_agent_id_in_a_path_must_be_a_uuid(api: Api, method: str, text: str) -> None:
    path = f"/agents/{text}" if method == "GET" else f"/agents/{text}/sessions"

    body = check(await api.client.request(method, path), 422, "validation_failed")

    assert [(each["in"], each["field"]) for each in body["errors"]] == [("path", "agent_id")]


async def test_other_spellings_of_a_session_id_are_not_aliases(api: Api) -> None:
    session_id: str = (await api.create())["session_id"]

    for alias in (
        session_id.upper(),
        session_id.replace("-", ""),
        f"{{{session_id}}}",
        f"urn:uuid:{session_id}",
        f"%{ord(session_id[0]):02x}{session_id[1:]}",
        f"{session_id}/",
    ):
        for answer in (
            await api.client.get(f"/sessions/{alias}"),
            await api.client.delete(f"/sessions/{alias}"),
        ):
            assert answer.status_code == 404, alias
    assert (await api.call(session_id)).status_code == 200


async def test_a_percent_encoded_path_is_not_an_alias(api: Api) -> None:
    session = await api.create()
    url = f"/%73essions/{session['session_id']}/calls"

    answer = await api.client.post(url, json={"tool_name": "read_file"})

    check(answer, 404, "not_found")
    assert await api.calls_made(session["session_id"]) == 0


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [pytest.param(*row[1:], id=row[0]) for row in hostile.HEADERS],
)
async def test_invalid_headers_are_refused(
    api: Api, headers: list[tuple[str, str]], status: int, code: str
) -> None:
    session = await api.create()

    answer = await api.client.post(
        f"/sessions/{session['session_id']}/calls",
        content=b'{"tool_name":"read_file"}',
        headers=headers,
    )

    check(answer, status, code)
    assert await api.calls_made(session["session_id"]) == 0


@pytest.mark.parametrize(
    "content_type",
    ["application/json; charset=utf-8", "Application/JSON", 'application/json;charset="UTF-8"'],
)
async def test_the_json_content_type_can_be_written_in_several_ways(
    api: Api, content_type: str
) -> None:
    session = await api.create()

    answer = await api.client.post(
        f"/sessions/{session['session_id']}/calls",
        content=b'{"tool_name":"read_file"}',
        headers={"content-type": content_type},
    )

    assert answer.status_code == 200


@pytest.mark.parametrize("query", hostile.QUERIES)
async def test_an_invalid_query_of_a_call_is_refused(api: Api, query: str) -> None:
    session = await api.create()

    answer = await api.client.post(
        f"/sessions/{session['session_id']}/calls?{query}", json={"tool_name": "read_file"}
    )

    check(answer, 422, "validation_failed")
    assert await api.calls_made(session["session_id"]) == 0


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=501",
        "limit=5.0",
        "limit=+5",
        "limit=1_0",
        "limit=%D9%A5",
        "limit=",
        "status=dead",
        "status=",
        "cursor=x",
        "cursor=",
        "page=2",
        "limit=5&limit=6",
    ],
)
async def test_an_invalid_query_of_a_list_is_refused(api: Api, query: str) -> None:
    check(await api.client.get(f"/sessions?{query}"), 422, "validation_failed")


async def test_rejected_input_is_never_echoed(api: Api) -> None:
    session_id = (await api.create())["session_id"]

    for answer in (
        await api.call(session_id, f"{CANARY} !"),
        await api.call(session_id, "read_file", **{f"{CANARY} x": 1}),
        await api.call(session_id, agent_id=CANARY),
        await api.call(session_id, data_sensitivity=CANARY),
        await api.call(session_id, CANARY),
        await api.client.post(f"/sessions/{session_id}/calls?{CANARY}%20x=1", json={}),
        await api.client.post("/sessions", content=CANARY, headers=JSON),
        await api.client.post("/sessions", json={f"{CANARY} x": {CANARY: [CANARY]}}),
        await api.client.post("/sessions", json={}, headers={"content-type": CANARY}),
        await api.client.post("/sessions", json={}, headers={"idempotency-key": f'"{CANARY}'}),
        await api.client.get(f"/sessions?cursor={CANARY}"),
        await api.client.get(f"/{CANARY}"),
        await api.client.get(f"/sessions/{CANARY}"),
        await api.client.get(f"/agents/{CANARY}"),
        await api.client.get(f"/problems/{CANARY}"),
        await api.client.request(CANARY.upper(), "/sessions"),
    ):
        assert 400 <= answer.status_code < 500
        assert CANARY not in answer.text.lower()


async def test_a_response_lists_at_most_20_errors(api: Api) -> None:
    session = await api.create()

    answer = await api.batch(session["session_id"], *["bad name"] * 256)

    assert len(check(answer, 422, "validation_failed")["errors"]) == 20


async def test_a_body_without_a_length_is_limited_too(api: Api) -> None:
    session = await api.create()
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while sent < 10_000_000:
            sent += 4096
            yield b" " * 4096

    answer = await api.client.post(
        f"/sessions/{session['session_id']}/calls", content=endless(), headers=JSON
    )

    check(answer, 413, "payload_too_large")
    assert sent <= 2 * 65_536


async def test_a_body_of_exactly_the_limit_is_accepted(api: Api) -> None:
    session = await api.create()
    body = json.dumps({"tool_name": "read_file"}).encode().ljust(65_536)

    answer = await api.client.post(
        f"/sessions/{session['session_id']}/calls", content=body, headers=JSON
    )

    assert answer.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", "/sessions", "GET, HEAD, POST"),
        ("PUT", f"/sessions/{AGENT}", "DELETE, GET, HEAD, PATCH"),
        ("GET", f"/sessions/{AGENT}/calls", "POST"),
        ("DELETE", "/livez", "GET, HEAD"),
        ("POST", "/openapi.json", "GET, HEAD"),
        ("OPTIONS", "/sessions", "GET, HEAD, POST"),
    ],
)
async def test_allow_lists_the_methods_of_the_path(
    api: Api, method: str, path: str, allow: str
) -> None:
    answer = await api.client.request(method, path)

    check(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allow


@pytest.mark.parametrize("path", ["/session", "/sessions/", "/problems/nope", "//sessions"])
async def test_other_paths_are_not_found(api: Api, path: str) -> None:
    check(await api.client.get(f"http://127.0.0.1:8000{path}"), 404, "not_found")
