"""Metrics: every event is counted once, and no label comes from a client."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from app import __version__
from tests.conftest import Api
from tests.support import ManualClock, new_id

pytestmark = pytest.mark.anyio

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(api: Api) -> Samples:
    answer = await api.client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def decisions(samples: Samples) -> dict[tuple[str, str], float]:
    return {
        (labels[0][1], labels[1][1]): value
        for (name, labels), value in samples.items()
        if name == "arbiter_decisions_total"
    }


async def test_decisions_are_counted_by_operation_and_outcome(api: Api) -> None:
    session = await api.create(call_budget=3)
    session_id = session["session_id"]
    for _ in range(2):
        await api.client.post(
            f"/sessions/{session_id}/calls",
            json={"tool_name": "read_file"},
            headers={"idempotency-key": "k"},
        )
    await api.call(session_id, "rm")
    await api.batch(session_id, "read_file", "list_dir")
    await api.batch(session_id, "read_file")
    await api.call(new_id())
    await api.client.post(
        f"/sessions/{session_id}/calls?dry_run=true", json={"tool_name": "read_file"}
    )

    assert decisions(await scrape(api)) == {
        ("create", "admitted"): 1,
        ("call", "admitted"): 1,
        ("call", "replayed"): 1,
        ("call", "tool_not_authorized"): 1,
        ("call", "session_not_found"): 1,
        ("batch", "admitted"): 1,
        ("batch", "budget_exceeded"): 1,
        ("dry_run", "budget_exceeded"): 1,
    }


async def test_sessions_are_counted_as_they_come_and_go(api: Api, clock: ManualClock) -> None:
    agent = "99999999-2222-4333-8444-555555555555"
    await api.create(time_limit_secs=10)
    await api.client.delete(f"/sessions/{(await api.create())['session_id']}")
    await api.create(agent_id=agent)
    await api.client.delete(f"/agents/{agent}/sessions")
    await api.create()

    samples = await scrape(api)
    assert samples["arbiter_sessions_active", ()] == 2
    assert samples["arbiter_sessions_created_total", ()] == 4
    assert samples["arbiter_sessions_ended_total", (("reason", "closed"),)] == 1
    assert samples["arbiter_sessions_ended_total", (("reason", "agent_closed"),)] == 1

    clock.advance(10)
    assert (await scrape(api))["arbiter_sessions_active", ()] == 1


async def test_requests_are_timed_by_route_and_status(api: Api) -> None:
    session_id = (await api.create())["session_id"]
    await api.call(session_id)
    await api.call(session_id, "rm")
    await api.client.get("/nothing/here")
    await api.client.request("BREW", "/sessions")

    samples = await scrape(api)

    def count(method: str, route: str, status: str) -> float:
        labels = (("method", method), ("route", route), ("status", status))
        return samples["arbiter_http_request_duration_seconds_count", labels]

    assert count("POST", "/sessions", "201") == 1
    assert count("POST", "/sessions/{session_id}/calls", "200") == 1
    assert count("POST", "/sessions/{session_id}/calls", "403") == 1
    assert count("GET", "unmatched", "404") == 1
    assert count("other", "/sessions", "405") == 1


async def test_no_label_comes_from_a_client(api: Api) -> None:
    canary = "canary-7f3a"
    session_id = (await api.create(authorized_tools=["*"], declared_intent=canary))[
        "session_id"
    ]
    await api.call(session_id, canary)
    await api.client.get(f"/{canary}")
    await api.client.get(f"/sessions/{canary}")
    await api.client.request(canary, "/sessions")
    await api.client.get("/livez", headers={"x-request-id": canary})

    text = (await api.client.get("/metrics")).text

    assert canary not in text.lower()
    assert session_id not in text


async def test_the_version_is_exported(api: Api) -> None:
    assert (await scrape(api))["arbiter_build_info", (("version", __version__),)] == 1
