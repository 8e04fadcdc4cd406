"""Logs: one line per event, nothing secret, nothing forged."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from app.http.auth import Scope, new_key
from app.observability.logs import LogLimit, configure_logs, get_logger
from tests.conftest import MakeApi
from tests.support import AGENT, session_request

pytestmark = pytest.mark.anyio


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    ours = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    return [each for each in ours if not each["event"].startswith("HTTP Request")]


async def test_the_life_of_a_session_is_logged_at_info(
    capsys: pytest.CaptureFixture[str], make_api: MakeApi
) -> None:
    api = await make_api()
    session_id = (await api.create())["session_id"]
    await api.call(session_id)
    await api.call(session_id, "rm")
    await api.client.delete(f"/sessions/{session_id}")
    await api.client.delete(f"/agents/{AGENT}/sessions")

    told = lines(capsys)

    assert [each["event"] for each in told] == [
        "starting",
        "session created",
        "calls denied",
        "session closed",
        "agent closed",
    ]
    assert told[0]["address"] == "http://127.0.0.1:8000"
    assert (told[0]["store"], told[0]["authentication"]) == ("memory://", "off")
    assert told[2]["reason"] == "tool_not_authorized"
    assert {each["level"] for each in told} == {"info"}


async def test_admitted_calls_are_logged_at_debug_only(
    capsys: pytest.CaptureFixture[str], make_api: MakeApi
) -> None:
    api = await make_api(log_level="debug")
    await api.call((await api.create())["session_id"])

    told = [each for each in lines(capsys) if each["event"] == "calls admitted"]

    assert [each["level"] for each in told] == ["debug"]
    assert told[0]["tool_names"] == ["read_file"]


async def test_no_log_holds_a_whole_session_id(
    capsys: pytest.CaptureFixture[str], make_api: MakeApi
) -> None:
    api = await make_api(log_level="debug")
    session_id = (await api.create())["session_id"]
    await api.call(session_id)
    await api.call(session_id, "rm")
    await api.client.delete(f"/sessions/{session_id}")

    told = [line for line in capsys.readouterr().err.splitlines() if "HTTP Request" not in line]

    assert any(session_id[:8] in line for line in told)
    assert not any(session_id in line for line in told)


async def test_a_denial_can_be_found_by_its_request_id(
    capsys: pytest.CaptureFixture[str], make_api: MakeApi
) -> None:
    gate, token = new_key("gate", Scope.PROXY)
    api = await make_api(api_keys=(gate,))
    api.client.headers["authorization"] = f"Bearer {token}"
    session_id = (await api.create(call_budget=1))["session_id"]
    answer = await api.batch(session_id, "read_file", "rm")

    (told,) = [each for each in lines(capsys) if each["event"] == "calls denied"]

    assert answer.json()["instance"].endswith(told["request_id"])
    assert (told["caller"], told["tools"]) == ("gate", ["read_file", "rm"])
    assert told["violations"] == ["budget_exceeded 0+2>1", "tool_not_authorized at 1"]


async def test_refused_requests_leave_a_line_and_are_counted(
    capsys: pytest.CaptureFixture[str], make_api: MakeApi
) -> None:
    gate, token = new_key("gate", Scope.PROXY)
    ops, ops_token = new_key("ops", Scope.OPERATE)
    api = await make_api(api_keys=(gate, ops))
    for sent, path, body in (
        (f"gate.{'x' * 43}", "/sessions", session_request()),
        (token, "/sessions", session_request(call_budget="secret")),
        (ops_token, "/sessions", session_request()),
    ):
        api.client.headers["authorization"] = f"Bearer {sent}"
        await api.client.post(path, json=body)

    told = [each for each in lines(capsys) if each["event"] == "request refused"]
    scraped = (await api.client.get("/metrics")).text

    assert [(each["reason"], each["caller"]) for each in told] == [
        ("unauthenticated", ""),
        ("validation_failed", "gate"),
        ("insufficient_scope", "ops"),
    ]
    assert all(each["client"] == "127.0.0.1" and each["request_id"] for each in told)
    assert "secret" not in str(told)
    for each in told:
        assert f'arbiter_http_refused_total{{code="{each["reason"]}"}} 1.0' in scraped


async def test_client_input_cannot_forge_a_line(
    capsys: pytest.CaptureFixture[str], make_api: MakeApi
) -> None:
    api = await make_api(log_level="debug")
    forged = 'x\n{"event": "forged"}\r\x1b[31m'
    await api.post("/sessions", session_request(declared_intent=forged, agent_id=forged))
    session_id = (await api.create(declared_intent=forged))["session_id"]
    await api.call(session_id, forged)
    await api.client.get("/x", headers=[(b"x-request-id", forged.encode())])

    told = lines(capsys)

    assert told
    assert all(each["event"] != "forged" for each in told)


def test_the_terminal_format_escapes_control_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    configure_logs("console", "info")

    get_logger().info("event", intent="a\nb\x1b[31mc")

    (line,) = capsys.readouterr().err.splitlines()
    assert "\\n" in line
    assert "\x1b[31mc" not in line


def test_records_of_libraries_use_the_same_format(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")

    logging.getLogger("some.library").warning("hello %s", "you")

    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["event"] == "hello you"
    assert json.loads(line)["level"] == "warning"


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_records_below_the_level_are_dropped(
    capsys: pytest.CaptureFixture[str], level: str
) -> None:
    configure_logs("json", level)  # type: ignore[arg-type]

    for each in ("debug", "info", "warning", "error"):
        getattr(get_logger(), each)(each)

    told = [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()]
    order = ["debug", "info", "warning", "error"]
    assert told == order[order.index(level) :]


def test_denials_are_logged_a_few_times_a_second(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    now = [100.0]
    limit = LogLimit(2, lambda: now[0])

    admitted = [limit.admits("rate_limited") for _ in range(5)]
    others = [limit.admits("session_closed") for _ in range(2)]
    now[0] += 1
    again = limit.admits("rate_limited")

    assert admitted == [True, True, False, False, False]
    assert others == [True, True]
    assert again
    (told,) = lines(capsys)
    assert (told["event"], told["reason"], told["lines"]) == (
        "log lines left out",
        "rate_limited",
        3,
    )
