"""What gateways ask at /authz, and what they get."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from typing import Any

import httpx
import pytest

from app.api.gateways import FREE_METHODS
from app.api.problem_types import PROBLEM_TYPES
from app.domain.capacity import StoreLimits
from app.http.auth import Scope, new_key
from app.settings import BadSettings, load_settings
from tests.api.test_problems import BrokenStore
from tests.conftest import Api, MakeApi
from tests.support import AGENT, ManualClock, new_id

pytestmark = pytest.mark.anyio

GATE, TOKEN = new_key("gate", Scope.PROXY)
OPS, OPS_TOKEN = new_key("ops", Scope.OPERATE)
VERSION = ("mcp-protocol-version", "2026-07-28")
TOOL = ("x-arbiter-tool", "read_file")
Headers = list[tuple[str, str]]


async def ask(
    api: Api, *headers: tuple[str, str], path: str = "/authz/native", method: str = "GET"
) -> httpx.Response:
    return await api.client.request(method, path, headers=list(headers))


async def opened(api: Api, **terms: Any) -> tuple[str, str]:
    """Open a session. Return the header that names it."""
    return ("x-arbiter-session", (await api.create(**terms))["session_id"])


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "OPTIONS", "PROPFIND", "BREW"])
@pytest.mark.parametrize("profile", ["native", "strict", "mcp"])
async def test_an_admitted_request_is_200_without_a_body_and_counted(
    api: Api, method: str, profile: str
) -> None:
    session = await opened(api, call_budget=5, rate_limit_per_minute=3)

    answer = await ask(api, session, TOOL, path=f"/authz/{profile}", method=method)

    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-length"] == "0"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["ratelimit"] == '"budget";r=4, "window";r=2;t=60'
    assert answer.headers["ratelimit-policy"] == '"budget";q=5, "window";q=3;w=60'
    assert await api.calls_made(session[1]) == 1


async def test_racing_gateways_never_overspend(api: Api) -> None:
    session = await opened(api, call_budget=5)

    answers = await asyncio.gather(*(ask(api, session, TOOL) for _ in range(20)))

    assert sorted(each.status_code for each in answers) == [200] * 5 + [429] * 15
    assert await api.calls_made(session[1]) == 5


@pytest.mark.parametrize(
    "path",
    [
        "/authz/native/",
        "/authz/native/tools/delete_file",
        "/authz/native/a%20b/%2e%2e/x",
        "/authz/native?tool=list_dir&dry_run=true",
        "/authz/native/authz/strict?x",
    ],
)
async def test_path_and_query_below_the_profile_change_nothing(api: Api, path: str) -> None:
    session = await opened(api)

    answer = await ask(api, session, TOOL, path=path)

    assert answer.status_code == 200
    assert await api.calls_made(session[1]) == 1


@pytest.mark.parametrize(
    "header",
    [
        ("prefer", "return=minimal"),
        ("content-encoding", "gzip"),
        ("content-type", "text/plain"),
        ("idempotency-key", "k"),
        ("idempotency-key", ""),
        ("x-request-id", "same"),
        ("x-original-uri", "/?tool=x"),
    ],
)
async def test_other_headers_change_nothing(api: Api, header: tuple[str, str]) -> None:
    session = await opened(api)

    answers = [await ask(api, session, TOOL, header, method="POST") for _ in range(2)]

    assert [each.status_code for each in answers] == [200, 200]
    assert await api.calls_made(session[1]) == 2


async def test_a_large_body_is_not_read(api: Api) -> None:
    session = await opened(api)

    answer = await api.client.post(
        "/authz/native", content=b"x" * 1_000_000, headers=[session, TOOL]
    )

    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["/authz", "/authz/", "/authz/other", "/authz/Native/x"])
async def test_an_unknown_profile_is_not_found(api: Api, path: str) -> None:
    session = await opened(api)

    assert code(await ask(api, session, TOOL, path=path)) == (404, "not_found")
    assert await api.calls_made(session[1]) == 0


async def test_the_session_may_be_the_bearer_token(api: Api) -> None:
    _, session_id = await opened(api)

    answers = [
        await ask(api, ("authorization", f"{scheme} {session_id}"), TOOL)
        for scheme in ("Bearer", "bearer", "BEARER ")
    ]

    assert [each.status_code for each in answers] == [200, 200, 200]


async def test_a_bearer_token_that_is_no_uuid_belongs_to_what_is_behind(api: Api) -> None:
    session = await opened(api)
    upstream = [
        "Bearer a.b.c",
        "Basic dXNlcjpwYXNz",
        'Digest username="x", realm="y"',
        "Bearer",
        "",
    ]

    answers = [await ask(api, session, TOOL, ("authorization", each)) for each in upstream]
    alone = [await ask(api, TOOL, ("authorization", each)) for each in upstream]

    assert [each.status_code for each in answers] == [200] * 5
    assert [code(each) for each in alone] == [(400, "invalid_check")] * 5


async def test_the_same_session_may_come_both_ways(api: Api) -> None:
    session = await opened(api)

    answer = await ask(api, session, TOOL, ("authorization", f"Bearer {session[1]}"))

    assert answer.status_code == 200


def twice(*header: str) -> Headers:
    return [(header[0], header[1])] * 2


BASE64_EMPTY = ("mcp-name", "=?base64??=")
CALL: Headers = [VERSION, ("mcp-method", "tools/call")]
WRONG: dict[str, Headers] = {
    "no session": [TOOL, ("x-arbiter-session", "")],
    "two sessions": [TOOL, ("authorization", f"Bearer {AGENT}")],
    "a session twice": [TOOL, ("x-arbiter-session", AGENT)],
    "a list of bearers": [TOOL, ("authorization", f"Bearer {AGENT}, Bearer {AGENT}")],
    "authorization twice": [TOOL, *twice("authorization", "Basic x")],
    "no tool": [],
    "an empty tool": [("x-arbiter-tool", "")],
    "a tool twice": twice("x-arbiter-tool", "read_file"),
    "two tools": [TOOL, ("x-arbiter-tool", "list_dir")],
    "a list of tools": [("x-arbiter-tool", "read_file, list_dir")],
    "a tool with a comma": [("x-arbiter-tool", "read_file,")],
    "a tool with a space": [("x-arbiter-tool", "read file")],
    "a tool not in ASCII": [("x-arbiter-tool", "caf\xe9")],
    "a tool too long": [("x-arbiter-tool", "x" * 129)],
    "an empty tool beside another": [("x-arbiter-tool", ""), ("x-mcp-toolname", "read_file")],
    "an empty tool beside a free method": [
        *(("x-arbiter-tool", ""), VERSION, ("mcp-method", "ping")),
    ],
    "an empty tool of a gateway": [("x-mcp-toolname", "")],
    "another tool of a gateway": [
        *(*CALL, ("mcp-name", "delete_file"), ("x-mcp-toolname", "read_file")),
    ],
    "another tool of a gateway beside ours": [
        *(TOOL, *CALL, ("mcp-name", "delete_file"), ("x-mcp-toolname", "read_file")),
    ],
    "a call without a name": CALL,
    "a call with an empty name": [*CALL, ("mcp-name", "")],
    "a call with an empty name in base64": [*CALL, BASE64_EMPTY],
    "bad base64": [*CALL, ("mcp-name", "=?base64?cmVhZF9maWx!?=")],
    "base64 in capitals": [*CALL, ("mcp-name", "=?BASE64?cmVhZF9maWxl?=")],
    "a name twice": [*CALL, *twice("mcp-name", "read_file")],
    "a method twice": [VERSION, *twice("mcp-method", "ping")],
    "a list of methods": [VERSION, ("mcp-method", "ping,ping")],
    "an unknown method": [VERSION, ("mcp-method", "resources/read")],
    "an empty method": [VERSION, ("mcp-method", "")],
    "a method in capitals": [VERSION, ("mcp-method", "PING")],
    "the version twice": [*twice(*VERSION), ("mcp-method", "ping")],
    "no version": [("mcp-method", "tools/call"), ("mcp-name", "read_file")],
    "no version for a free method": [("mcp-method", "ping")],
    "an old version": [
        *(("mcp-protocol-version", "2025-06-18"), ("mcp-method", "tools/list")),
    ],
    "a version in words": [("mcp-protocol-version", "latest"), ("mcp-method", "ping")],
    "a longer version": [("mcp-protocol-version", "2026-07-28x"), ("mcp-method", "ping")],
    "an unknown tier": [TOOL, ("x-arbiter-sensitivity", "secret")],
    "an empty tier": [TOOL, ("x-arbiter-sensitivity", "")],
    "a tier twice": [TOOL, *twice("x-arbiter-sensitivity", "public")],
    "an empty key": [TOOL, ("x-arbiter-idempotency-key", "")],
    "a key twice": [TOOL, *twice("x-arbiter-idempotency-key", "k")],
    "a key not in ASCII": [TOOL, ("x-arbiter-idempotency-key", "caf\xe9")],
    "a key too long": [TOOL, ("x-arbiter-idempotency-key", "x" * 256)],
}


@pytest.mark.parametrize("what", WRONG)
async def test_wrong_headers_are_400_and_cost_nothing(api: Api, what: str) -> None:
    session = await opened(api, authorized_tools=["*"])
    headers = WRONG[what] if what == "no session" else [session, *WRONG[what]]
    raw = [(name, value.encode("latin-1")) for name, value in headers]

    answer = await api.client.get("/authz/native", headers=raw)
    strict = await api.client.get("/authz/strict", headers=raw)

    assert code(answer) == (400, "invalid_check")
    assert answer.json()["agent_message"]
    assert "errors" in answer.json()
    assert (strict.status_code, strict.headers["x-arbiter-status"]) == (403, "400")
    assert await api.calls_made(session[1]) == 0


@pytest.mark.parametrize(
    ("headers", "agent_message", "next_action"),
    [
        ([], "This tool cannot be reached now; stop here.", "fix_request"),
        (
            [("mcp-protocol-version", "2025-06-18"), ("mcp-method", "initialize")],
            "This tool cannot be reached now; stop here.",
            "fix_request",
        ),
        (
            [("x-arbiter-tool", "")],
            "This tool cannot be reached now; stop here.",
            "fix_request",
        ),
        (
            [("x-arbiter-tool", "no such tool")],
            "There is no tool with this name; use a tool's exact name.",
            "use_authorized_tool",
        ),
    ],
    ids=["no tool", "an older MCP", "an empty tool", "a wrong name"],
)
async def test_a_mistake_of_the_gateway_is_not_the_agents(
    api: Api, headers: Headers, agent_message: str, next_action: str
) -> None:
    session = (await api.create())["session_id"]

    problem = (
        await api.client.get(
            "/authz/native", headers=[("x-arbiter-session", session), *headers]
        )
    ).json()

    assert problem["code"] == "invalid_check"
    assert (problem["agent_message"], problem["next_action"]) == (agent_message, next_action)


async def test_a_session_that_does_not_exist_is_not_found(api: Api) -> None:
    names = [new_id(), new_id().upper(), "x"]

    answers = [await ask(api, TOOL, ("x-arbiter-session", each)) for each in names]

    assert [code(each) for each in answers] == [(404, "session_not_found")] * 3


@pytest.mark.parametrize("name", ["read_file", "=?base64?cmVhZF9maWxl?="])
async def test_a_call_of_mcp_names_its_tool(api: Api, name: str) -> None:
    session = await opened(api, authorized_tools=["read_file"])

    admitted = await ask(api, session, *CALL, ("mcp-name", name))
    named_twice = await ask(
        api, session, *CALL, ("mcp-name", name), ("x-mcp-toolname", "read_file")
    )
    other = f"=?base64?{b64encode(b'delete_file').decode()}?="
    denied = await ask(api, session, *CALL, ("mcp-name", other))

    assert [admitted.status_code, named_twice.status_code] == [200, 200]
    assert code(denied) == (403, "tool_not_authorized")
    assert await api.calls_made(session[1]) == 2


async def test_the_tool_of_the_gateway_comes_first(api: Api) -> None:
    session = await opened(api, authorized_tools=["read_file"])

    ours = await ask(api, session, TOOL, *CALL, ("mcp-name", "delete_file"))
    unknown = await ask(api, session, ("x-mcp-toolname", "read_file"), ("mcp-method", "ping"))

    assert [ours.status_code, unknown.status_code] == [200, 200]
    assert await api.calls_made(session[1]) == 2


@pytest.mark.parametrize("method", [*sorted(FREE_METHODS), "notifications/cancelled"])
async def test_methods_that_call_no_tool_pass_uncounted(api: Api, method: str) -> None:
    session = await opened(api, call_budget=0, rate_limit_per_minute=0)

    answer = await ask(
        api, session, ("mcp-protocol-version", "2027-01-01"), ("mcp-method", method)
    )

    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["ratelimit"].startswith('"budget";r=0')
    assert await api.calls_made(session[1]) == 0


async def test_a_free_method_needs_a_session_that_can_be_used(
    api: Api, clock: ManualClock
) -> None:
    ping = [VERSION, ("mcp-method", "ping")]
    running = await opened(api, time_limit_secs=60)
    paused, closed = await opened(api), await opened(api)
    await api.client.post(f"/sessions/{paused[1]}/pause")
    await api.client.delete(f"/sessions/{closed[1]}")
    found = [code(await ask(api, each, *ping)) for each in (paused, closed)]
    found.append(code(await ask(api, ("x-arbiter-session", new_id()), *ping)))
    await api.client.put(f"/agents/{AGENT}/freeze", json={})
    found.append(code(await ask(api, running, *ping)))
    await api.client.delete(f"/agents/{AGENT}/freeze")
    clock.advance(60)
    found.append(code(await ask(api, running, *ping)))

    assert found == [
        (409, "session_paused"),
        (409, "session_closed"),
        (404, "session_not_found"),
        (403, "agent_frozen"),
        (408, "session_expired"),
    ]


async def test_an_operator_may_add_free_methods(make_api: MakeApi) -> None:
    api = await make_api(authz_free_methods="resources/read, prompts/get")
    session = await opened(api)

    answers = [
        await ask(api, session, VERSION, ("mcp-method", method))
        for method in ("resources/read", "prompts/get", "ping")
    ]

    assert [each.status_code for each in answers] == [200, 200, 200]


@pytest.mark.parametrize("methods", ["tools/call", "ping,,x", "a b", "ping,tools/call", "*"])
def test_the_calls_themselves_are_never_free(
    methods: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARBITER_AUTHZ_FREE_METHODS", methods)

    with pytest.raises(BadSettings, match="ARBITER_AUTHZ_FREE_METHODS"):
        load_settings()


async def test_the_tier_is_checked(api: Api) -> None:
    session = await opened(api)

    answers = [
        await ask(api, session, TOOL, ("x-arbiter-sensitivity", tier))
        for tier in ("internal", "restricted")
    ]

    assert [each.status_code for each in answers] == [200, 403]


async def test_a_retry_of_a_gateway_is_charged_once(api: Api) -> None:
    session = await opened(api)
    key = ("x-arbiter-idempotency-key", 'a, "b"')

    answers = [await ask(api, session, TOOL, key) for _ in range(3)]
    other = await ask(api, session, ("x-arbiter-tool", "list_dir"), key)

    assert [each.status_code for each in answers] == [200] * 3
    assert [each.headers.get("idempotency-replayed") for each in answers] == [
        *(None, "true", "true"),
    ]
    assert code(other) == (422, "idempotency_conflict")
    assert await api.calls_made(session[1]) == 1


async def test_a_strict_denial_says_all_in_headers(api: Api) -> None:
    session = await opened(api, rate_limit_per_minute=1)

    await ask(api, session, TOOL)
    native = await ask(api, session, TOOL, ("x-request-id", "r"))
    strict = await ask(api, session, TOOL, ("x-request-id", "r"), path="/authz/strict/x")

    assert (strict.status_code, strict.content) == (403, b"")
    assert strict.headers["x-arbiter-status"] == "429"
    assert strict.headers["x-arbiter-problem"] == native.text
    assert strict.headers["x-arbiter-message"] == native.json()["agent_message"]
    for name in ("ratelimit", "ratelimit-policy", "retry-after", "x-should-retry"):
        assert strict.headers[name] == native.headers[name]


def test_what_an_agent_is_told_can_stand_in_any_text() -> None:
    for kind in PROBLEM_TYPES.values():
        for text in (kind.agent_message or "", kind.title):
            assert text.isascii()
            assert not {*text} & {*'"\\'}


async def test_a_denial_of_mcp_is_an_error_of_json_rpc(api: Api) -> None:
    session = await opened(api)
    tool = ("x-arbiter-tool", "rm")

    native = await ask(api, session, tool, ("x-request-id", "r"))
    answer = await ask(api, session, tool, ("x-request-id", "r"), path="/authz/mcp")

    problem = native.json()
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == {
        "jsonrpc": "2.0",
        "id": None,
        "error": {"code": -32001, "message": problem["agent_message"], "data": problem},
    }


@pytest.fixture
async def guarded(make_api: MakeApi, clock: ManualClock) -> tuple[Api, tuple[str, str]]:
    api = await make_api(api_keys=(GATE, OPS))
    api.client.headers["authorization"] = f"Bearer {TOKEN}"
    session = await opened(api)
    del api.client.headers["authorization"]
    return api, session


KEY = ("x-arbiter-key", TOKEN)


async def test_a_gateway_sends_its_key(guarded: tuple[Api, tuple[str, str]]) -> None:
    api, session = guarded

    assert (await ask(api, KEY, session, TOOL)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([], (401, "unauthenticated")),
        ([("x-arbiter-key", "")], (401, "unauthenticated")),
        ([("x-arbiter-key", f"Bearer {TOKEN}")], (401, "unauthenticated")),
        ([("x-arbiter-key", TOKEN + "x")], (401, "unauthenticated")),
        ([("authorization", f"Bearer {TOKEN}")], (401, "unauthenticated")),
        ([("x-arbiter-key", OPS_TOKEN)], (403, "insufficient_scope")),
        ([KEY, KEY], (400, "invalid_check")),
        ([("x-arbiter-key", f"{TOKEN}, {TOKEN}")], (400, "invalid_check")),
    ],
)
async def test_the_key_is_checked_before_the_session(
    guarded: tuple[Api, tuple[str, str]], headers: Headers, expected: tuple[int, str]
) -> None:
    api, session = guarded

    native = await ask(api, *headers, ("x-arbiter-session", "nothing"))
    strict = await ask(api, *headers, session, TOOL, path="/authz/strict")

    assert code(native) == expected
    assert strict.status_code == (401 if expected[0] == 401 else 403)
    assert strict.headers["x-arbiter-status"] == str(expected[0])


async def test_without_keys_only_loopback_is_served(api: Api) -> None:
    elsewhere = httpx.ASGITransport(api.client._transport.app)  # type: ignore[attr-defined]
    base = "http://192.0.2.1:8000"
    async with httpx.AsyncClient(transport=elsewhere, base_url=base) as client:
        answer = await client.get("/authz/native", headers=[TOOL])

    assert code(answer) == (401, "unauthenticated")
    assert "loopback" in answer.json()["detail"]


async def test_a_key_is_ignored_where_there_are_none(api: Api) -> None:
    session = await opened(api)

    answer = await ask(api, session, TOOL, ("x-arbiter-key", "a,b"), ("x-arbiter-key", "c"))

    assert answer.status_code == 200


async def test_gateways_may_send_any_host(api: Api) -> None:
    session = await opened(api)
    host = ("host", "api.example.com")

    assert (await ask(api, session, TOOL, host)).status_code == 200
    assert (await ask(api, session, host, path="/sessions")).status_code == 421
    assert (await ask(api, session, host, path="/authz")).status_code == 421


@pytest.mark.parametrize("profile", ["native", "strict", "mcp"])
async def test_a_store_that_fails_admits_nothing(
    make_api: MakeApi, clock: ManualClock, profile: str
) -> None:
    api = await make_api(store=BrokenStore(StoreLimits(), clock))

    answer = await ask(api, TOOL, ("x-arbiter-session", new_id()), path=f"/authz/{profile}")

    assert answer.status_code == (403 if profile == "strict" else 503)
    assert answer.headers.get("x-arbiter-status", "503") == "503"


@pytest.mark.parametrize(
    ("headers", "outcome", "retryable"),
    [
        ([TOOL], "unknown", False),
        ([TOOL, ("x-arbiter-idempotency-key", "k")], "unknown", True),
        ([VERSION, ("mcp-method", "ping")], "not_recorded", True),
    ],
)
async def test_a_get_that_counts_may_have_an_unknown_outcome(
    make_api: MakeApi, clock: ManualClock, headers: Headers, outcome: str, *, retryable: bool
) -> None:
    api = await make_api(store=BrokenStore(StoreLimits(), clock))

    problem = (await ask(api, *headers, ("x-arbiter-session", new_id()))).json()

    assert (problem["outcome"], problem["retryable"]) == (outcome, retryable)


async def test_denials_of_gateways_are_listed_like_others(api: Api) -> None:
    session = await opened(api)

    await ask(api, session, ("x-arbiter-tool", "rm"))

    (denial,) = (await api.client.get("/denials")).json()["items"]
    assert (denial["operation"], denial["tools"]) == ("call", ["rm"])


async def test_requests_of_gateways_are_measured_under_one_label(api: Api) -> None:
    session = await opened(api)

    for path in ("/authz/native/a", "/authz/native/b"):
        await ask(api, session, TOOL, path=path, method="BREW")

    metrics = (await api.client.get("/metrics")).text
    assert 'route="/authz/{profile}"' in metrics
    assert "BREW" not in metrics
