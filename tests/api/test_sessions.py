"""The life of a session over HTTP."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import Any

import pytest

from app.domain.capacity import StoreLimits
from app.store.memory.store import MemoryStore
from tests.conftest import Api, MakeApi
from tests.support import AGENT, OTHER_AGENT, ManualClock, new_id, session_request

pytestmark = pytest.mark.anyio


class TestCreate:
    async def test_a_session_is_created_with_the_defaults(self, api: Api) -> None:
        answer = await api.client.post("/sessions", json=session_request())

        body = answer.json()
        assert answer.status_code == 201
        assert answer.headers["location"] == f"/sessions/{body['session_id']}"
        assert body == {
            "session_id": body["session_id"],
            "agent_id": AGENT,
            "declared_intent": "read and analyse files",
            "delegation_chain_snapshot": [],
            "authorized_tools": ["read_file", "list_dir"],
            "time_limit_secs": 3600,
            "call_budget": 1000,
            "rate_limit_window_secs": 60,
            "data_sensitivity_ceiling": "internal",
            "created_at": "2026-01-01T12:00:00.000000Z",
            "expires_at": "2026-01-01T13:00:00.000000Z",
            "revision": 1,
            "calls_made": 0,
            "calls_remaining": 1000,
            "rate_window_start": "2026-01-01T12:00:00.000000Z",
            "rate_window_calls": 0,
            "status": "active",
            "is_active": True,
        }

    async def test_every_term_can_be_set(self, api: Api) -> None:
        terms = {
            "delegation_chain_snapshot": ["user:ann", "agent:Ω"],
            "time_limit_secs": 60,
            "call_budget": 2_147_483_647,
            "rate_limit_per_minute": 0,
            "rate_limit_window_secs": 86_400,
            "data_sensitivity_ceiling": "restricted",
            "authorized_tools": ["fs.*", "a/b:c@1-2"],
            "declared_intent": 'quote " and \n newline and \u2028',
        }

        body = await api.create(**terms)

        assert {name: body[name] for name in terms} == terms

    async def test_an_agent_id_is_kept_in_lower_case(self, api: Api) -> None:
        assert (await api.create(agent_id=AGENT.upper()))["agent_id"] == AGENT

    async def test_the_server_bounds_the_time_limit(self, make_api: MakeApi) -> None:
        api = await make_api(max_time_limit_secs=60)

        assert (await api.create())["time_limit_secs"] == 60
        assert (await api.create(time_limit_secs=60))["time_limit_secs"] == 60
        answer = await api.client.post("/sessions", json=session_request(time_limit_secs=61))
        assert answer.status_code == 422
        assert answer.json()["errors"] == [
            {
                "in": "body",
                "field": "time_limit_secs",
                "detail": "This server allows at most 60 seconds.",
            }
        ]

    async def test_too_many_sessions_of_an_agent_are_refused(self, make_api: MakeApi) -> None:
        api = await make_api(max_active_sessions_per_agent=1)
        await api.create()

        answer = await api.client.post("/sessions", json=session_request())

        assert answer.status_code == 429
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers
        body = answer.json()
        assert (body["code"], body["limit"], body["used"]) == ("too_many_sessions", 1, 1)

    async def test_a_retry_gets_the_first_answer_although_the_maximum_was_lowered(
        self, make_api: MakeApi, clock: ManualClock
    ) -> None:
        store = MemoryStore(StoreLimits(), clock)
        key = {"idempotency-key": "k"}
        for request in (session_request(), session_request(time_limit_secs=3600)):
            before = await make_api(store=store)
            first = await before.client.post("/sessions", json=request, headers=key)
            after = await make_api(store=store, max_time_limit_secs=60)

            again = await after.client.post("/sessions", json=request, headers=key)
            longer = session_request(time_limit_secs=3600)
            new = await after.client.post("/sessions", json=longer)
            changed = request | {"time_limit_secs": 61}
            other = await after.client.post("/sessions", json=changed, headers=key)

            assert (again.status_code, again.content) == (201, first.content)
            assert again.headers["idempotency-replayed"] == "true"
            assert new.json()["code"] == "validation_failed"
            assert other.json()["code"] == "idempotency_conflict"
            key = {"idempotency-key": "another"}

    async def test_a_full_service_says_so(self, make_api: MakeApi) -> None:
        api = await make_api(max_sessions=1)
        await api.create()

        answer = await api.client.post("/sessions", json=session_request())

        assert answer.status_code == 503
        assert answer.json()["code"] == "session_limit_reached"
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["x-should-retry"] == "true"


class TestUse:
    async def test_create_and_use_session(self, api: Api) -> None:
        session = await api.create()

        answer = await api.call(session["session_id"])

        assert answer.status_code == 200
        assert answer.json() == session | {
            "calls_made": 1,
            "calls_remaining": 999,
            "rate_window_calls": 1,
        }
        read = await api.client.get(f"/sessions/{session['session_id']}")
        assert read.json() == answer.json()

    @pytest.mark.parametrize(
        ("terms", "tools", "status", "code"),
        [
            ({"call_budget": 0}, ["read_file"], 429, "budget_exceeded"),
            ({"call_budget": 3}, ["read_file"] * 4, 429, "budget_exceeded"),
            ({}, ["read_file", "delete_file"], 403, "tool_not_authorized"),
            ({"rate_limit_per_minute": 3}, ["read_file"] * 4, 429, "rate_limited"),
            ({"rate_limit_per_minute": 0}, ["read_file"], 429, "rate_limited"),
            ({"time_limit_secs": 0}, [], 408, "session_expired"),
        ],
    )
    async def test_a_denied_batch_costs_nothing(
        self, api: Api, terms: dict[str, Any], tools: list[str], status: int, code: str
    ) -> None:
        session = await api.create(**terms)

        answer = await api.batch(session["session_id"], *tools)

        assert (answer.status_code, answer.json()["code"]) == (status, code)
        assert await api.calls_made(session["session_id"]) == 0

    async def test_an_empty_batch_succeeds_and_costs_nothing(self, api: Api) -> None:
        session = await api.create()

        answer = await api.batch(session["session_id"])

        assert (answer.status_code, answer.json()["calls_made"]) == (200, 0)

    async def test_the_rate_limit_lasts_for_its_window(
        self, api: Api, clock: ManualClock
    ) -> None:
        session = await api.create(rate_limit_per_minute=2)
        await api.batch(session["session_id"], "read_file", "list_dir")
        clock.advance(48.5)

        refused = await api.call(session["session_id"])

        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "12"
        clock.advance(int(refused.headers["retry-after"]))
        assert (await api.call(session["session_id"])).status_code == 200

    async def test_a_session_expires_by_the_clock(self, api: Api, clock: ManualClock) -> None:
        session = await api.create(time_limit_secs=10)
        clock.advance(10)

        answer = await api.call(session["session_id"])

        assert (answer.status_code, answer.json()["code"]) == (408, "session_expired")
        read = (await api.client.get(f"/sessions/{session['session_id']}")).json()
        assert (read["status"], read["is_active"]) == ("expired", False)

    async def test_another_agent_cannot_use_the_session(self, api: Api) -> None:
        session = await api.create()

        mine = await api.call(session["session_id"], agent_id=AGENT.upper())
        theirs = await api.call(session["session_id"], agent_id=OTHER_AGENT)

        assert mine.status_code == 200
        assert (theirs.status_code, theirs.json()["code"]) == (403, "agent_mismatch")

    async def test_a_call_on_data_above_the_ceiling_is_denied(self, api: Api) -> None:
        session = await api.create(data_sensitivity_ceiling="internal")

        below = await api.call(session["session_id"], data_sensitivity="internal")
        above = await api.call(session["session_id"], data_sensitivity="confidential")

        assert below.status_code == 200
        assert (above.status_code, above.json()["code"]) == (403, "sensitivity_exceeded")
        assert above.json()["next_action"] == "lower_sensitivity"

    @pytest.mark.parametrize("path", ["calls", "batch"])
    async def test_a_dry_run_answers_and_records_nothing(self, api: Api, path: str) -> None:
        session = await api.create(call_budget=1)
        body = {"calls": {"tool_name": "read_file"}, "batch": {"tool_names": ["read_file"]}}
        url = f"/sessions/{session['session_id']}/{path}"

        dry = await api.client.post(url, params={"dry_run": "true"}, json=body[path])
        assert (dry.status_code, dry.json()["calls_made"]) == (200, 1)
        assert await api.calls_made(session["session_id"]) == 0

        real = await api.client.post(url, params={"dry_run": "false"}, json=body[path])
        assert (real.status_code, real.json()["calls_made"]) == (200, 1)
        again = await api.client.post(url, params={"dry_run": "true"}, json=body[path])
        assert (again.status_code, again.json()["code"]) == (429, "budget_exceeded")

    async def test_unknown_sessions_are_not_found(self, api: Api) -> None:
        for answer in (
            await api.call(new_id()),
            await api.batch(new_id()),
            await api.client.get(f"/sessions/{new_id()}"),
            await api.client.delete(f"/sessions/{new_id()}"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "session_not_found")

    async def test_racing_calls_never_overspend(self, api: Api) -> None:
        session = await api.create(call_budget=50)

        answers = await asyncio.gather(*(api.call(session["session_id"]) for _ in range(500)))

        admitted = [each.json()["calls_made"] for each in answers if each.status_code == 200]
        assert sorted(admitted) == list(range(1, 51))
        refused = [each.json()["code"] for each in answers if each.status_code != 200]
        assert refused == ["budget_exceeded"] * 450


class TestEnd:
    async def test_a_closed_session_cannot_be_used_or_closed_again(self, api: Api) -> None:
        session = await api.create()
        url = f"/sessions/{session['session_id']}"

        closed = await api.client.delete(url)

        assert closed.status_code == 200
        assert (closed.json()["status"], closed.json()["is_active"]) == ("closed", False)
        for answer in (await api.client.delete(url), await api.call(session["session_id"])):
            assert (answer.status_code, answer.json()["code"]) == (409, "session_closed")

    async def test_an_expired_session_can_be_closed(self, api: Api) -> None:
        session = await api.create(time_limit_secs=0)

        closed = await api.client.delete(f"/sessions/{session['session_id']}")

        assert (closed.status_code, closed.json()["status"]) == (200, "closed")

    async def test_the_kill_switch_closes_every_active_session_of_the_agent(
        self, api: Api
    ) -> None:
        mine = [(await api.create())["session_id"] for _ in range(3)]
        other = (await api.create(agent_id=OTHER_AGENT))["session_id"]
        await api.client.delete(f"/sessions/{mine[0]}")
        await api.create(time_limit_secs=0)

        counted = await api.client.get(f"/agents/{AGENT}")
        killed = await api.client.delete(f"/agents/{AGENT}/sessions")

        assert counted.json() == {
            "agent_id": AGENT,
            "active_sessions": 2,
            "paused_sessions": 0,
            "frozen": False,
        }
        assert (killed.status_code, killed.json()) == (200, {"agent_id": AGENT, "closed": 2})
        assert (await api.call(mine[1])).status_code == 409
        assert (await api.call(other)).status_code == 200
        again = await api.client.delete(f"/agents/{AGENT}/sessions")
        assert again.json()["closed"] == 0

    async def test_the_kill_switch_accepts_an_agent_id_in_any_case(self, api: Api) -> None:
        session = await api.create(agent_id=AGENT.upper())

        counted = await api.client.get(f"/agents/{AGENT.upper()}")
        killed = await api.client.delete(f"/agents/{AGENT.upper()}/sessions")

        assert counted.json() == {
            "agent_id": AGENT,
            "active_sessions": 1,
            "paused_sessions": 0,
            "frozen": False,
        }
        assert (killed.status_code, killed.json()) == (200, {"agent_id": AGENT, "closed": 1})
        assert (await api.call(session["session_id"])).status_code == 409

    async def test_an_agent_never_seen_has_no_sessions(self, api: Api) -> None:
        answer = await api.client.get(f"/agents/{OTHER_AGENT}")

        assert answer.json() == {
            "agent_id": OTHER_AGENT,
            "active_sessions": 0,
            "paused_sessions": 0,
            "frozen": False,
        }


class TestList:
    async def test_sessions_are_listed_by_deadline_page_by_page(self, api: Api) -> None:
        made = [
            (await api.create(time_limit_secs=secs))["session_id"] for secs in (50, 10, 40, 30)
        ]
        seen: list[str] = []
        params: dict[str, Any] = {"limit": 3}
        while params is not None:
            page = (await api.client.get("/sessions", params=params)).json()
            seen += [each["session_id"] for each in page["items"]]
            cursor = page.get("next_cursor")
            params = None if cursor is None else {"limit": 3, "cursor": cursor}

        assert seen == [made[1], made[3], made[2], made[0]]

    async def test_sessions_are_filtered_by_agent_and_status(
        self, api: Api, clock: ManualClock
    ) -> None:
        expired = (await api.create(time_limit_secs=1))["session_id"]
        active = (await api.create())["session_id"]
        await api.create(agent_id=OTHER_AGENT)
        clock.advance(2)

        async def found(**params: str) -> list[str]:
            page = await api.client.get("/sessions", params=params)
            return [each["session_id"] for each in page.json()["items"]]

        assert await found(agent_id=AGENT) == [expired, active]
        assert await found(agent_id=AGENT.upper(), status="active") == [active]
        assert await found(status="expired") == [expired]
        assert await found(status="closed") == []

    async def test_an_empty_list_has_no_cursor(self, api: Api) -> None:
        assert (await api.client.get("/sessions")).json() == {"items": []}


async def test_instants_are_rfc_3339(api: Api, clock: ManualClock) -> None:
    clock.advance(0.000001)

    created = (await api.create())["created_at"]

    assert created == "2026-01-01T12:00:00.000001Z"
    assert datetime.fromisoformat(created)


class TestFilters:
    async def test_sessions_can_be_found_by_tool_budget_and_deadline(self, api: Api) -> None:
        short = await api.create(authorized_tools=["rm"], call_budget=3, time_limit_secs=60)
        long = await api.create(authorized_tools=["r*"], time_limit_secs=3600)

        async def found(**query: Any) -> list[str]:
            answer = await api.client.get("/sessions", params=query)
            assert answer.status_code == 200, answer.text
            return [each["session_id"] for each in answer.json()["items"]]

        both = [short["session_id"], long["session_id"]]
        assert await found(tool="rm") == both
        assert await found(tool="read") == both[1:]
        assert await found(max_calls_remaining=3) == both[:1]
        assert await found(expires_before=long["expires_at"]) == both[:1]
        offset = long["expires_at"].replace("Z", "+00:00")
        assert await found(expires_before=offset, tool="rm") == both[:1]
        plain = await api.client.get(f"/sessions?expires_before={offset}")
        assert len(plain.json()["items"]) == 1

    @pytest.mark.parametrize(
        "query",
        [
            {"tool": "not a tool"},
            {"tool": "a*"},
            {"max_calls_remaining": "-1"},
            {"max_calls_remaining": "1.0"},
            {"expires_before": "tomorrow"},
            {"expires_before": "2026-01-01"},
            {"expires_before": "2026-01-01T12:00:00"},
            {"expires_before": "2026-13-01T12:00:00Z"},
        ],
    )
    async def test_a_filter_that_makes_no_sense_is_refused(
        self, api: Api, query: dict[str, str]
    ) -> None:
        answer = await api.client.get("/sessions", params=query)

        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
        (error,) = answer.json()["errors"]
        assert (error["in"], error["field"]) == ("query", *query)
