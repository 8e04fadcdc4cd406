"""Changing, pausing and freezing over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from app.http.auth import Scope, new_key
from tests.conftest import Api, MakeApi
from tests.support import AGENT, OTHER_AGENT, ManualClock, session_request

pytestmark = pytest.mark.anyio


async def patch(api: Api, session: dict[str, Any], /, **fields: Any) -> httpx.Response:
    return await api.client.patch(f"/sessions/{session['session_id']}", json=fields)


class TestUpdate:
    @pytest.mark.parametrize(
        ("fields", "changed"),
        [
            ({"call_budget": 7}, {"call_budget": 7, "calls_remaining": 6}),
            ({"call_budget": 0}, {"call_budget": 0, "calls_remaining": 0, "is_active": False}),
            ({"add_calls": 50}, {"call_budget": 1050, "calls_remaining": 1049}),
            ({"time_limit_secs": 60}, {"time_limit_secs": 60}),
            ({"add_secs": 60}, {"time_limit_secs": 3660}),
            ({"authorized_tools": ["x", "y.*"]}, {"authorized_tools": ["x", "y.*"]}),
            (
                {"add_tools": ["rm", "read_file"], "remove_tools": ["list_dir"]},
                {"authorized_tools": ["read_file", "rm"]},
            ),
            ({"rate_limit_per_minute": 5}, {"rate_limit_per_minute": 5}),
            ({"rate_limit_window_secs": 10}, {"rate_limit_window_secs": 10}),
            ({"data_sensitivity_ceiling": "public"}, {"data_sensitivity_ceiling": "public"}),
        ],
    )
    async def test_it_changes_what_is_named_and_nothing_else(
        self, api: Api, fields: dict[str, Any], changed: dict[str, Any]
    ) -> None:
        session = await api.create()
        before = (await api.call(session["session_id"])).json()

        answer = await patch(api, session, **fields)

        after = answer.json()
        assert answer.status_code == 200
        expected = before | changed | {"revision": 2}
        if "time_limit_secs" in changed:
            assert after["expires_at"] != before["expires_at"]
            expected["expires_at"] = after["expires_at"]
        assert after == expected
        assert (await api.client.get(f"/sessions/{session['session_id']}")).json() == after

    async def test_null_removes_the_rate_limit(self, api: Api) -> None:
        session = await api.create(rate_limit_per_minute=0)

        after = (await patch(api, session, rate_limit_per_minute=None)).json()

        assert "rate_limit_per_minute" not in after
        assert (await api.call(session["session_id"])).status_code == 200

    @pytest.mark.parametrize(
        "fields",
        [
            {"call_budget": 1, "add_calls": 1},
            {"time_limit_secs": 1, "add_secs": 1},
            {"authorized_tools": [], "add_tools": ["x"]},
            {"authorized_tools": [], "remove_tools": ["read_file"]},
            {"call_budget": None},
            {"call_budget": "5"},
            {"add_calls": -1},
            {"add_calls": 2_147_483_647},
            {"add_secs": 604_800},
            {"time_limit_secs": 604_801},
            {"remove_tools": ["no_entry"]},
            {"add_tools": ["not a tool"]},
            {"add_tools": [f"tool_{number}" for number in range(255)]},
            {"agent_id": OTHER_AGENT},
            {"expected_revision": None},
        ],
    )
    async def test_what_makes_no_sense_is_refused_and_changes_nothing(
        self, api: Api, fields: dict[str, Any]
    ) -> None:
        session = await api.create()

        answer = await patch(api, session, **fields)

        assert (answer.status_code, answer.json()["code"]) == (422, "validation_failed")
        assert (await api.client.get(f"/sessions/{session['session_id']}")).json() == session

    async def test_a_relative_change_is_safe_to_retry_with_a_key(self, api: Api) -> None:
        session = await api.create()
        path, key = f"/sessions/{session['session_id']}", {"idempotency-key": "k"}

        first = await api.client.patch(path, json={"add_calls": 5}, headers=key)
        again = await api.client.patch(path, json={"add_calls": 5}, headers=key)
        other = await api.client.patch(path, json={"add_calls": 6}, headers=key)

        assert "idempotency-replayed" not in first.headers
        assert again.headers["idempotency-replayed"] == "true"
        assert again.json() == first.json()
        assert first.json()["call_budget"] == 1005
        assert other.json()["code"] == "idempotency_conflict"

    async def test_an_unexpected_revision_is_refused(self, api: Api) -> None:
        session = await api.create()
        await patch(api, session, add_calls=1)

        answer = await patch(api, session, add_calls=1, expected_revision=1)

        assert (answer.status_code, answer.json()["code"]) == (409, "revision_conflict")
        assert answer.json()["revision"] == 2
        accepted = await patch(api, session, add_calls=1, expected_revision=2)
        assert accepted.json()["revision"] == 3

    async def test_a_merge_patch_is_accepted_elsewhere_it_is_not(self, api: Api) -> None:
        session = await api.create()
        kind = {"content-type": "application/merge-patch+json; charset=utf-8"}

        answer = await api.client.patch(
            f"/sessions/{session['session_id']}", content='{"add_calls": 1}', headers=kind
        )
        elsewhere = await api.client.post("/sessions", content="{}", headers=kind)

        assert answer.json()["call_budget"] == 1001
        assert elsewhere.json()["code"] == "unsupported_media_type"

    async def test_an_ended_session_cannot_be_changed(self, api: Api) -> None:
        closed, expired = await api.create(), await api.create(time_limit_secs=0)
        await api.client.delete(f"/sessions/{closed['session_id']}")

        codes = [
            (await patch(api, each, add_calls=1)).json()["code"] for each in (closed, expired)
        ]

        assert codes == ["session_closed", "session_expired"]


class TestPause:
    async def test_a_paused_session_denies_calls_until_it_is_resumed(self, api: Api) -> None:
        session = await api.create()
        path = f"/sessions/{session['session_id']}"

        paused = [await api.client.post(f"{path}/pause") for _ in range(2)]
        denied = await api.call(session["session_id"])
        listed = await api.client.get("/sessions?status=paused")
        resumed = await api.client.post(f"{path}/resume")

        assert paused[0].json() == paused[1].json()
        by = {"at": session["created_at"]}
        expected = {"status": "paused", "is_active": False, "revision": 2, "paused": by}
        assert paused[0].json() == session | expected
        assert denied.json()["since"] == by["at"]
        assert "once somebody resumes it" in denied.json()["detail"]
        assert (denied.status_code, denied.json()["code"]) == (409, "session_paused")
        assert (denied.json()["retryable"], denied.json()["next_action"]) == (
            False,
            "ask_operator",
        )
        assert [each["session_id"] for each in listed.json()["items"]] == [
            session["session_id"]
        ]
        assert resumed.json() == session | {"revision": 3}
        assert (await api.call(session["session_id"])).status_code == 200

    async def test_operators_see_who_paused_a_session_when_and_why(
        self, make_api: MakeApi, clock: ManualClock
    ) -> None:
        keys = {scope: new_key(scope.value, scope) for scope in (Scope.OPERATE, Scope.PROXY)}
        api = await make_api(api_keys=tuple(key for key, _ in keys.values()))
        proxy, operator = (
            {"authorization": f"Bearer {keys[scope][1]}"}
            for scope in (Scope.PROXY, Scope.OPERATE)
        )
        created = await api.client.post("/sessions", json=session_request(), headers=proxy)
        path = created.headers["location"]
        clock.advance(5)

        answers = [
            await api.client.post(f"{path}/pause", json={"reason": reason}, headers=operator)
            for reason in ("looks odd", "another")
        ]
        answers.append(await api.client.get(path, headers=operator))
        unseen = [
            await api.client.get(path, headers=proxy),
            await api.client.post(f"{path}/resume", json={"reason": "ok"}, headers=operator),
        ]

        at = "2026-01-01T12:00:05.000000Z"
        paused = {"at": at, "by": "operate", "reason": "looks odd"}
        assert [each.json()["paused"] for each in answers] == [paused] * 3
        assert not any("paused" in each.json() for each in unseen)

    @pytest.mark.parametrize("verb", ["pause", "resume"])
    async def test_what_comes_with_a_pause_is_checked(self, api: Api, verb: str) -> None:
        path = f"/sessions/{(await api.create())['session_id']}/{verb}"

        answers = [
            await api.post(path, {"why": "x"}),
            await api.post(path, {"reason": 1}),
            await api.post(path, [1]),
            await api.client.post(path, content=b"reason=x"),
        ]

        assert [each.status_code for each in answers] == [422, 422, 422, 415]
        assert answers[0].json()["errors"] == [
            {
                "in": "body",
                "field": "why",
                "detail": "is not known here; use reason",
                "known": ["reason"],
            }
        ]

    async def test_a_denied_change_is_logged_counted_and_listed(
        self, api: Api, capsys: pytest.CaptureFixture[str]
    ) -> None:
        session = await api.create()
        path = f"/sessions/{session['session_id']}"
        await api.client.delete(path)
        denied = [
            await api.client.post(f"{path}/pause"),
            await api.client.post(f"{path}/resume"),
            await api.client.patch(path, json={"add_calls": 1}),
            await api.client.delete(path),
        ]
        listed = (await api.client.get("/denials?code=session_closed")).json()["items"]
        text = (await api.client.get("/metrics")).text
        said = capsys.readouterr().err

        assert [each.status_code for each in denied] == [409] * 4
        verbs = ["pause", "resume", "amend", "close"]
        assert [each["operation"] for each in listed] == verbs[::-1]
        for verb, answer in zip(verbs, denied, strict=True):
            line = f'{{operation="{verb}",outcome="session_closed"}} 1.0'
            assert line in text
            assert answer.json()["request_id"] in said


class TestFreeze:
    async def test_a_frozen_agent_is_denied_everything(self, api: Api) -> None:
        session = await api.create()
        path = f"/agents/{AGENT.upper()}"

        frozen = await api.client.put(f"{path}/freeze", json={"reason": "deletes files"})
        call = await api.call(session["session_id"])
        creation = await api.post("/sessions", session_request())
        read = await api.client.get(path)
        unfrozen = await api.client.delete(f"{path}/freeze")

        state = frozen.json()
        assert state == {
            "agent_id": AGENT,
            "active_sessions": 1,
            "paused_sessions": 0,
            "frozen": True,
            "frozen_at": state["frozen_at"],
            "reason": "deletes files",
        }
        for denied in (call, creation):
            assert (denied.status_code, denied.json()["code"]) == (403, "agent_frozen")
            assert denied.json()["next_action"] == "ask_operator"
        assert read.json() == state
        assert unfrozen.json()["frozen"] is False
        assert "reason" not in unfrozen.json()
        assert (await api.call(session["session_id"])).status_code == 200

    async def test_a_reason_may_be_left_out(self, api: Api) -> None:
        path = f"/agents/{AGENT}/freeze"

        without = await api.client.put(path)
        empty = await api.client.put(path, json={})
        wrong = await api.client.put(path, json={"why": "x"})
        no_json = await api.client.put(path, content="x")

        assert (without.status_code, empty.status_code) == (200, 200)
        assert "reason" not in empty.json()
        assert wrong.json()["code"] == "validation_failed"
        assert no_json.json()["code"] == "unsupported_media_type"

    async def test_frozen_agents_are_listed(self, make_api: MakeApi) -> None:
        ops, token = new_key("ops", Scope.OPERATE)
        api = await make_api(api_keys=(ops,))
        api.client.headers["authorization"] = f"Bearer {token}"
        for agent in (AGENT, OTHER_AGENT):
            await api.client.put(f"/agents/{agent}/freeze", json={"reason": "r"})

        first = (await api.client.get("/agents?frozen=true&limit=1")).json()
        cursor = first["next_cursor"]
        second = (await api.client.get(f"/agents?frozen=true&cursor={cursor}")).json()
        every = (await api.client.get("/agents")).json()
        others = await api.client.get("/agents?frozen=false")

        assert [each["agent_id"] for each in first["items"]] == [OTHER_AGENT]
        assert [each["agent_id"] for each in second["items"]] == [AGENT]
        assert first["items"][0]["frozen_by"] == "ops"
        assert "next_cursor" not in second
        assert every["items"] == first["items"] + second["items"]
        assert others.json()["code"] == "validation_failed"


async def test_changes_need_the_scope_operate(make_api: MakeApi) -> None:
    gate, token = new_key("gate", Scope.PROXY)
    api = await make_api(api_keys=(gate,))
    api.client.headers["authorization"] = f"Bearer {token}"
    path = f"/sessions/{(await api.create())['session_id']}"

    answers = [
        await api.client.patch(path, json={"add_calls": 1}),
        await api.client.post(f"{path}/pause"),
        await api.client.post(f"{path}/resume"),
        await api.client.put(f"/agents/{AGENT}/freeze"),
        await api.client.delete(f"/agents/{AGENT}/freeze"),
        await api.client.get("/agents?frozen=true"),
    ]

    assert {answer.json()["code"] for answer in answers} == {"insufficient_scope"}


async def test_changes_are_counted(api: Api) -> None:
    session = await api.create()
    path = f"/sessions/{session['session_id']}"
    await api.client.post(f"{path}/pause")
    await api.client.put(f"/agents/{AGENT}/freeze")

    text = (await api.client.get("/metrics")).text

    for line in (
        'arbiter_changes_total{kind="pause"} 1.0',
        'arbiter_changes_total{kind="freeze"} 1.0',
        "arbiter_sessions_paused 1.0",
        "arbiter_sessions_active 0.0",
        "arbiter_agents_frozen 1.0",
    ):
        assert line in text
