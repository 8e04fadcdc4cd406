"""Request and response headers."""

from __future__ import annotations

import pytest

from app.http.auth import Scope, new_key
from tests.conftest import Api, MakeApi
from tests.support import ManualClock, new_id, session_request

pytestmark = pytest.mark.anyio


class TestRate:
    async def test_calls_report_what_is_left(self, api: Api, clock: ManualClock) -> None:
        session = await api.create(call_budget=100, rate_limit_per_minute=60)
        clock.advance(48.5)

        answer = await api.batch(session["session_id"], *["read_file"] * 43)

        assert answer.headers["ratelimit-policy"] == '"budget";q=100, "window";q=60;w=60'
        assert answer.headers["ratelimit"] == '"budget";r=57, "window";r=17;t=12'

    async def test_without_a_rate_limit_there_is_no_window(self, api: Api) -> None:
        session = await api.create(call_budget=2)

        answer = await api.call(session["session_id"])

        assert answer.headers["ratelimit-policy"] == '"budget";q=2'
        assert answer.headers["ratelimit"] == '"budget";r=1'

    async def test_an_elapsed_window_has_all_its_calls_and_no_reset(
        self, api: Api, clock: ManualClock
    ) -> None:
        session = await api.create(call_budget=1, rate_limit_per_minute=5)
        await api.call(session["session_id"])
        clock.advance(60)

        refused = await api.call(session["session_id"])

        assert refused.json()["code"] == "budget_exceeded"
        assert refused.headers["ratelimit"] == '"budget";r=0, "window";r=5'

    @pytest.mark.parametrize(
        ("terms", "tools", "retry_after", "should_retry", "rated"),
        [
            ({"rate_limit_per_minute": 1}, ["read_file"] * 1, "60", "true", True),
            ({"rate_limit_per_minute": 1}, ["read_file"] * 2, None, "false", True),
            ({"call_budget": 1}, ["read_file"], None, "false", True),
            ({"time_limit_secs": 0}, ["read_file"], None, "false", False),
            ({}, ["rm"], None, "false", False),
        ],
    )
    async def test_a_denial_says_whether_to_retry(
        self,
        api: Api,
        terms: dict[str, int],
        tools: list[str],
        retry_after: str | None,
        should_retry: str,
        rated: bool,
    ) -> None:
        session = await api.create(**terms)
        await api.call(session["session_id"])

        refused = await api.batch(session["session_id"], *tools)

        assert refused.headers.get("retry-after") == retry_after
        assert refused.headers["x-should-retry"] == should_retry
        assert refused.json()["retryable"] is (should_retry == "true")
        assert ("ratelimit" in refused.headers) is rated
        expected = None if retry_after is None else int(retry_after)
        assert refused.json().get("retry_after_secs") == expected


async def test_a_request_that_cannot_pass_later_should_not_be_retried(api: Api) -> None:
    session_id = (await api.create())["session_id"]
    await api.client.delete(f"/sessions/{session_id}")

    for answer, status in (
        (await api.call(session_id), 409),
        (await api.call(new_id()), 404),
        (await api.client.get("/nothing"), 404),
        (await api.client.get(f"/sessions/{new_id()}"), 404),
        (await api.client.get("/sessions/nope"), 404),
    ):
        assert (answer.status_code, answer.headers["x-should-retry"]) == (status, "false")


async def test_every_route_reports_an_unknown_session_alike(api: Api) -> None:
    bodies = [
        (await api.call(new_id())).json(),
        (await api.call("nope")).json(),
        (await api.client.get(f"/sessions/{new_id()}")).json(),
        (await api.client.delete(f"/sessions/{new_id()}")).json(),
    ]

    for body in bodies:
        del body["request_id"], body["instance"]
    assert all(body == bodies[0] for body in bodies)
    assert bodies[0]["next_action"] == "new_session"


class TestPrefer:
    @pytest.mark.parametrize(
        "prefer",
        ["return=minimal", 'Return="minimal"', "wait=5, return=minimal", "return=minimal; x=1"],
    )
    async def test_a_caller_can_do_without_the_body(self, api: Api, prefer: str) -> None:
        session = await api.create()

        answer = await api.client.post(
            f"/sessions/{session['session_id']}/calls",
            json={"tool_name": "read_file"},
            headers={"prefer": prefer},
        )

        assert (answer.status_code, answer.content) == (204, b"")
        assert answer.headers["preference-applied"] == "return=minimal"
        assert answer.headers["ratelimit"] == '"budget";r=999'
        assert await api.calls_made(session["session_id"]) == 1

    @pytest.mark.parametrize(
        "prefer",
        ["return=representation", "respond-async", "", "return=representation, return=minimal"],
    )
    async def test_other_preferences_are_ignored(self, api: Api, prefer: str) -> None:
        session = await api.create()

        answer = await api.client.post(
            f"/sessions/{session['session_id']}/calls",
            json={"tool_name": "read_file"},
            headers={"prefer": prefer},
        )

        assert answer.status_code == 200
        assert "preference-applied" not in answer.headers

    async def test_a_denial_keeps_its_body(self, api: Api) -> None:
        session = await api.create()

        answer = await api.client.post(
            f"/sessions/{session['session_id']}/calls",
            json={"tool_name": "rm"},
            headers={"prefer": "return=minimal"},
        )

        assert answer.json()["code"] == "tool_not_authorized"


class TestRequestId:
    @pytest.mark.parametrize("sent", ["abc", "A.b_c-9", "x" * 64])
    async def test_a_request_id_is_echoed(self, api: Api, sent: str) -> None:
        answer = await api.client.get("/nothing", headers={"x-request-id": sent})

        assert answer.headers["x-request-id"] == sent
        assert answer.json()["request_id"] == sent

    @pytest.mark.parametrize(
        "sent", ["", "x" * 65, "a b", "a\x7fb", 'a"b', "é".encode("latin-1")]
    )
    async def test_an_invalid_request_id_is_replaced(self, api: Api, sent: str | bytes) -> None:
        answer = await api.client.get("/livez", headers=[(b"x-request-id", sent)])

        assert answer.status_code == 200
        assert answer.headers["x-request-id"] not in (sent, "")

    async def test_several_request_ids_are_replaced(self, api: Api) -> None:
        headers = [("x-request-id", "first"), ("x-request-id", "second")]

        answer = await api.client.get("/nothing", headers=headers)

        assert answer.headers["x-request-id"] == answer.json()["request_id"]
        assert answer.headers["x-request-id"] not in {"first", "second"}

    async def test_requests_have_different_ids(self, api: Api) -> None:
        answers = [await api.client.get("/livez") for _ in range(3)]

        assert len({each.headers["x-request-id"] for each in answers}) == 3


async def test_no_response_may_be_cached(api: Api) -> None:
    session = await api.create()

    for answer in (
        await api.call(session["session_id"]),
        await api.client.get("/livez"),
        await api.client.get("/nothing"),
        await api.client.get("/problems/rate_limited"),
    ):
        assert answer.headers["cache-control"] == "no-store"


class TestIdempotencyKey:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("k-1", "k-1"),
            ("k-1", '"k-1"'),
            ('"a\\"b\\\\c"', '"a\\"b\\\\c"'),
            ("x" * 255, "x" * 255),
        ],
    )
    async def test_a_repeated_call_gets_the_first_response(
        self, api: Api, clock: ManualClock, first: str, second: str
    ) -> None:
        session = await api.create(rate_limit_per_minute=9)
        url = f"/sessions/{session['session_id']}/calls"
        call = {"tool_name": "read_file"}
        answer = await api.client.post(url, json=call, headers={"idempotency-key": first})
        await api.call(session["session_id"])
        clock.advance(7)

        again = await api.client.post(
            url,
            content=b'{ "tool_name" : "read_file" }',
            headers={"idempotency-key": second, "content-type": "application/json"},
        )

        assert (again.status_code, again.content) == (200, answer.content)
        assert again.headers["ratelimit"] == answer.headers["ratelimit"]
        assert again.headers["idempotency-replayed"] == "true"
        assert "idempotency-replayed" not in answer.headers
        assert await api.calls_made(session["session_id"]) == 2

    async def test_a_different_request_with_the_same_key_is_a_conflict(self, api: Api) -> None:
        session = await api.create()
        url = f"/sessions/{session['session_id']}"
        key = {"idempotency-key": "k"}
        await api.client.post(f"{url}/calls", json={"tool_name": "read_file"}, headers=key)

        for path, body in (
            ("calls", {"tool_name": "list_dir"}),
            ("batch", {"tool_names": ["read_file"]}),
        ):
            answer = await api.client.post(f"{url}/{path}", json=body, headers=key)
            assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_conflict")
        assert await api.calls_made(session["session_id"]) == 1

    async def test_a_repeated_creation_makes_one_session(self, api: Api) -> None:
        key = {"idempotency-key": "k"}
        first = await api.client.post("/sessions", json=session_request(), headers=key)

        again = await api.client.post("/sessions", json=session_request(), headers=key)
        other = await api.client.post(
            "/sessions", json=session_request(call_budget=1), headers=key
        )

        assert (again.status_code, again.content) == (201, first.content)
        assert again.headers["location"] == first.headers["location"]
        assert again.headers["idempotency-replayed"] == "true"
        assert other.json()["code"] == "idempotency_conflict"
        assert len((await api.client.get("/sessions")).json()["items"]) == 1

    @pytest.mark.parametrize(
        "key", ["", "x" * 256, '"open', '"a"b', '""', "tab\there", b"\xe9"]
    )
    async def test_a_call_with_an_invalid_key_is_refused_and_not_counted(
        self, api: Api, key: str | bytes
    ) -> None:
        session = await api.create()

        answer = await api.client.post(
            f"/sessions/{session['session_id']}/calls",
            json={"tool_name": "read_file"},
            headers=[(b"idempotency-key", key)],
        )

        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
        assert answer.json()["errors"][0]["field"] == "Idempotency-Key"
        assert await api.calls_made(session["session_id"]) == 0

    async def test_two_keys_are_refused(self, api: Api) -> None:
        answer = await api.client.post(
            "/sessions",
            json=session_request(),
            headers=[("idempotency-key", "a"), ("idempotency-key", "b")],
        )

        assert answer.status_code == 422

    async def test_equal_keys_of_two_callers_are_different_keys(
        self, make_api: MakeApi
    ) -> None:
        keys, tokens = zip(*(new_key(name, Scope.PROXY) for name in "ab"), strict=True)
        api = await make_api(api_keys=keys)
        made = [
            await api.client.post(
                "/sessions",
                json=session_request(),
                headers={"idempotency-key": "k", "authorization": f"Bearer {token}"},
            )
            for token in tokens
        ]

        assert made[0].json()["session_id"] != made[1].json()["session_id"]


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip", "GZIP", ""])
async def test_an_encoded_body_is_refused_and_not_counted(api: Api, coding: str) -> None:
    session = await api.create()
    path = f"/sessions/{session['session_id']}/calls"

    answer = await api.client.post(
        path, json={"tool_name": "read_file"}, headers={"content-encoding": coding}
    )

    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")
    assert "Content-Encoding" in answer.json()["detail"]
    assert await api.calls_made(session["session_id"]) == 0


async def test_the_identity_coding_is_accepted(api: Api) -> None:
    session = await api.create()
    path = f"/sessions/{session['session_id']}/calls"

    answer = await api.client.post(
        path, json={"tool_name": "read_file"}, headers={"content-encoding": "Identity"}
    )

    assert answer.status_code == 200


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/sessions", "/metrics", "/openapi.json", "/docs", "/"]
)
async def test_head_responds_like_get_without_a_body(api: Api, path: str) -> None:
    get, head = await api.client.get(path), await api.client.head(path)

    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers.keys() == get.headers.keys()


async def test_head_of_a_session_responds_like_get(api: Api) -> None:
    session = await api.create()
    path = f"/sessions/{session['session_id']}"

    assert (await api.client.head(path)).status_code == 200
    assert (await api.client.head(f"/sessions/{new_id()}")).status_code == 404
    wrong = await api.client.head(f"{path}/calls")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


async def test_allow_lists_head_beside_get(api: Api) -> None:
    answer = await api.client.put(f"/sessions/{new_id()}")

    assert answer.headers["allow"] == "DELETE, GET, HEAD, PATCH"
