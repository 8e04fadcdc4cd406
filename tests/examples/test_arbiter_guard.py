"""The guard for Python proxies: it admits, retries as advised, and fails closed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import httpx
import pytest

from app.http.auth import Scope, new_key
from arbiter_guard import (
    MAX_ATTEMPTS,
    MAX_BATCH,
    Arbiter,
    Denied,
    NotAdmitted,
    Session,
    Unavailable,
)
from tests.faults import proxied
from tests.services import StartService
from tests.support import AGENT, session_request

pytestmark = pytest.mark.anyio

SESSION_ID = "0b8f1e6c-3f5d-4b2a-9c7e-2d1a6f4e8b90"
ADMITTED = httpx.Response(200, json={"session_id": SESSION_ID, "calls_remaining": 9})
CREATED = httpx.Response(201, json={"session_id": SESSION_ID})


def problem(
    status: int, code: str, *, headers: dict[str, str] | None = None, **members: Any
) -> httpx.Response:
    body = {"code": code, "title": "Title", "retryable": False, "next_action": "stop"} | members
    return httpx.Response(status, json=body, headers=headers)


OVERLOADED = problem(
    503, "overloaded", headers={"retry-after": "2"}, retryable=True, next_action="wait"
)
UNKNOWN = problem(
    503,
    "store_unavailable",
    headers={"retry-after": "1"},
    retryable=True,
    next_action="retry_with_same_key",
    outcome="unknown",
)
RATE_LIMITED = problem(
    429,
    "rate_limited",
    headers={"retry-after": "5"},
    retryable=True,
    next_action="wait",
    retry_after_secs=5,
    violations=[{"code": "rate_limited", "limit": 1, "used": 1, "requested": 1}],
)
OVER = problem(409, "session_closed", violations=[], agent_message="Stop here.")


class Scripted:
    """An Arbiter that gives these answers in turn, and a clock that only its waits move."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.waits: list[float] = []
        self.secs_per_answer = 0.0
        self.time = 0.0

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.time += self.secs_per_answer
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        # A copy, since a response belongs to one request.
        return httpx.Response(
            answer.status_code, headers=answer.headers, content=answer.content
        )

    async def sleep(self, secs: float) -> None:
        self.waits.append(secs)
        self.time += secs

    @property
    def keys(self) -> list[str | None]:
        return [request.headers.get("idempotency-key") for request in self.requests]

    @asynccontextmanager
    async def session(self, **terms: Any) -> AsyncIterator[Session]:
        """An open session, without a trace of its creation."""
        self.answers.insert(0, CREATED)
        transport = httpx.MockTransport(self.answer)
        async with httpx.AsyncClient(transport=transport, base_url="http://arbiter") as client:
            arbiter = Arbiter(client, sleep=self.sleep, now=lambda: self.time)
            async with arbiter.session(**session_request(**terms)) as session:
                self.requests.clear()
                self.answers.append(ADMITTED)  # The end of the session.
                yield session


async def made(session: Session, tool: str = "read_file", **more: Any) -> bool:
    """Make a call that must be admitted. Return whether it was made."""
    async with session.call(tool, **more):
        return True


async def refused(session: Session) -> NotAdmitted:
    """Make a call that must be refused. Return why."""
    ran = False
    with pytest.raises(NotAdmitted) as caught:
        async with session.call("read_file"):
            ran = True
    assert not ran
    return caught.value


async def test_a_call_names_its_agent_and_its_tier_and_yields_the_session() -> None:
    arbiter = Scripted(ADMITTED, ADMITTED)
    async with arbiter.session() as session:
        assert await made(session)
        async with session.call("read_file", data_sensitivity="public") as state:
            assert state["calls_remaining"] == 9
        sent = [json.loads(request.content) for request in arbiter.requests]

    plain = {"agent_id": AGENT, "tool_name": "read_file"}
    assert sent == [plain, plain | {"data_sensitivity": "public"}]


async def test_every_call_has_a_key_of_its_own() -> None:
    arbiter = Scripted(ADMITTED, ADMITTED)
    async with arbiter.session() as session:
        assert await made(session)
        assert await made(session)
        first, second = arbiter.keys

    assert first
    assert second
    assert first != second


@pytest.mark.parametrize(
    ("failure", "waits"),
    [(OVERLOADED, [2]), (UNKNOWN, [1]), (RATE_LIMITED, [5])],
    ids=["overloaded", "unknown", "rate limited"],
)
async def test_a_request_that_can_pass_later_is_repeated_as_it_was(
    failure: httpx.Response, waits: list[float]
) -> None:
    arbiter = Scripted(failure, ADMITTED)
    async with arbiter.session() as session:
        assert await made(session)
        first, second = arbiter.requests

    assert arbiter.waits == waits
    assert first.headers["idempotency-key"] == second.headers["idempotency-key"]
    assert first.content == second.content


@pytest.mark.parametrize(
    "failure", [httpx.ConnectError("refused"), httpx.ReadTimeout(""), httpx.ReadError("reset")]
)
async def test_a_request_without_an_answer_is_repeated_with_its_key(failure: Exception) -> None:
    arbiter = Scripted(failure, failure, ADMITTED)
    async with arbiter.session() as session:
        assert await made(session)
        assert len(set(arbiter.keys)) == 1

    first, second = arbiter.waits
    assert 0 < first < second < 1


async def test_a_denial_is_not_repeated_and_says_why() -> None:
    violations = [{"code": "budget_exceeded", "limit": 3, "used": 3, "requested": 1}]
    denial = problem(
        429,
        "budget_exceeded",
        next_action="new_session",
        violations=violations,
        agent_message="No more.",
        request_id="abc-1",
        detail="None left.",
    )
    arbiter = Scripted(denial)
    async with arbiter.session() as session:
        why = await refused(session)

    assert isinstance(why, Denied)
    assert (why.code, why.next_action, why.retryable) == (
        "budget_exceeded",
        "new_session",
        False,
    )
    assert (why.violations, why.retry_after_secs) == (violations, None)
    assert (why.agent_message, why.request_id) == ("No more.", "abc-1")
    assert str(why) == "budget_exceeded: None left."
    assert arbiter.waits == []


async def test_an_unknown_outcome_that_must_not_be_repeated_is_not() -> None:
    arbiter = Scripted(problem(503, "store_unavailable", outcome="unknown"))
    async with arbiter.session() as session:
        why = await refused(session)

    assert isinstance(why, Unavailable)
    assert arbiter.waits == []


async def test_a_wait_longer_than_the_patience_is_a_denial_at_once() -> None:
    arbiter = Scripted(
        problem(429, "rate_limited", retryable=True, next_action="wait", retry_after_secs=60)
    )
    async with arbiter.session() as session:
        why = await refused(session)

    assert isinstance(why, Denied)
    assert (why.retryable, why.retry_after_secs) == (True, 60)
    assert arbiter.waits == []


@pytest.mark.parametrize("failure", [UNKNOWN, httpx.ConnectError("refused")])
async def test_it_gives_up_after_a_few_attempts(failure: httpx.Response | Exception) -> None:
    arbiter = Scripted(*[failure] * MAX_ATTEMPTS)
    async with arbiter.session() as session:
        why = await refused(session)

    assert isinstance(why, Unavailable)
    assert why.retryable
    assert len(arbiter.waits) == MAX_ATTEMPTS - 1


async def test_slow_answers_end_the_patience() -> None:
    arbiter = Scripted(OVERLOADED, OVERLOADED)
    async with arbiter.session() as session:
        arbiter.secs_per_answer = 4
        why = await refused(session)

    assert isinstance(why, Unavailable)
    assert arbiter.waits == [2]


async def test_an_answer_that_never_ends_ends_the_patience() -> None:
    async def trickle() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.Event().wait()

    async def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=trickle())

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://arbiter") as client:
        hurried = Arbiter(client, patience_secs=0.01)
        with pytest.raises(Unavailable) as caught, anyio.fail_after(30):
            await hurried.ask("POST", "/sessions", {}, expected=201)

    assert caught.value.code == "no_answer"


@pytest.mark.parametrize(
    "answer",
    [
        problem(403, "agent_frozen", next_action="call_a_friend", new_field={"a": 1}),
        problem(429, "moon_is_full", next_action="call_a_friend", retryable=True),
        problem(
            403, "tool_not_authorized", violations=[{"code": "new", "why": []}], title=None
        ),
        httpx.Response(418, json={"code": "teapot"}),
    ],
)
async def test_what_a_later_server_says_is_a_denial(answer: httpx.Response) -> None:
    arbiter = Scripted(answer)
    async with arbiter.session() as session:
        why = await refused(session)

    assert isinstance(why, Denied)
    assert why.code == answer.json()["code"]
    assert why.problem.items() >= answer.json().items()
    assert arbiter.waits == []


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, content=b""),
        httpx.Response(200, content=b"<html>Sign in</html>"),
        httpx.Response(200, content=b"\xff\xfe"),
        httpx.Response(200, content=b"[" * 100_000),
        httpx.Response(200, json=[]),
        httpx.Response(200, json="yes"),
        httpx.Response(200, json={"ok": True}),
        httpx.Response(200, json={"session_id": None}),
        httpx.Response(201, json={"session_id": SESSION_ID}),
        httpx.Response(204),
        httpx.Response(302, headers={"location": "/login"}),
        httpx.Response(403, json=[1]),
        httpx.Response(403, json={"code": "denied", "violations": 5}),
        httpx.Response(429, json={"code": "denied", "retry_after_secs": "9" * 5_000}),
        httpx.Response(502, content=b"<html>Bad gateway</html>"),
        httpx.Response(500, json={}),
    ],
)
async def test_nonsense_is_no_admission(answer: httpx.Response) -> None:
    arbiter = Scripted(answer)
    async with arbiter.session() as session:
        why = await refused(session)

    assert isinstance(why, Unavailable)
    assert why.code == "not_understood"
    assert arbiter.waits == []


async def test_an_answer_that_cannot_be_decoded_is_not_repeated() -> None:
    arbiter = Scripted(httpx.DecodingError("not gzip"))
    async with arbiter.session() as session:
        why = await refused(session)

    assert isinstance(why, Unavailable)
    assert arbiter.waits == []


async def test_a_guarded_function_runs_only_if_admitted() -> None:
    arbiter = Scripted(ADMITTED, OVER, ADMITTED)
    async with arbiter.session() as session:

        @session.call("read_file")
        async def read(name: str) -> str:
            return name.upper()

        assert await read("a") == "A"
        with pytest.raises(Denied):
            await read("b")
        assert await read("c") == "C"
        assert len(set(arbiter.keys)) == 3


async def test_the_session_is_closed_at_the_end_even_after_an_error() -> None:
    arbiter = Scripted()
    with pytest.raises(RuntimeError, match="the task failed"):
        async with arbiter.session():
            raise RuntimeError("the task failed")

    (closing,) = arbiter.requests
    assert (closing.method, closing.url.path) == ("DELETE", f"/sessions/{SESSION_ID}")


async def test_a_session_is_closed_only_once() -> None:
    arbiter = Scripted()
    async with arbiter.session() as session:
        await session.close()

    assert len(arbiter.requests) == 1


@pytest.mark.parametrize(
    ("answer", "logged"),
    [
        (OVER, 0),
        (problem(404, "session_not_found"), 0),
        (problem(403, "insufficient_scope", next_action="ask_operator"), 0),
        (problem(500, "internal_error"), 1),
    ],
)
async def test_only_a_session_that_stays_open_is_logged(
    answer: httpx.Response, logged: int, caplog: pytest.LogCaptureFixture
) -> None:
    arbiter = Scripted()
    async with arbiter.session():
        arbiter.answers[:] = [answer]

    warnings = [each for each in caplog.records if each.name == "arbiter_guard"]
    assert len(warnings) == logged
    assert not any(SESSION_ID in each.getMessage() for each in warnings)


async def test_without_a_session_nothing_runs() -> None:
    async def answer(request: httpx.Request) -> httpx.Response:
        return problem(401, "unauthenticated", next_action="ask_operator")

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://arbiter") as client:
        with pytest.raises(Denied) as caught:
            async with Arbiter(client).session(**session_request()):
                pytest.fail("there is no session")

    assert caught.value.code == "unauthenticated"


async def test_only_the_allow_list_takes_tools_off_a_list() -> None:
    violations = [
        {"code": "budget_exceeded", "limit": 0, "used": 0, "requested": 3},
        {"code": "tool_not_authorized", "tool_indexes": [1]},
        {"code": "rate_limited", "limit": 0, "used": 0, "requested": 3},
        {"code": "moon_is_full", "tool_indexes": [0]},
    ]
    denial = problem(
        429, "budget_exceeded", violations=violations, retryable=True, next_action="wait"
    )
    arbiter = Scripted(denial)
    async with arbiter.session() as session:
        allowed = await session.allowed(
            ["a", "b", "not a name", "", "é", "x" * 129, "a\n", "c"]
        )
        (asked,) = arbiter.requests

    assert allowed == {"a", "c"}
    assert json.loads(asked.content) == {"agent_id": AGENT, "tool_names": ["a", "b", "c"]}
    assert asked.url.query == b"dry_run=true"
    assert "idempotency-key" not in asked.headers


async def test_a_tool_violation_without_positions_leaves_no_tool() -> None:
    arbiter = Scripted(
        problem(403, "tool_not_authorized", violations=[{"code": "tool_not_authorized"}])
    )
    async with arbiter.session() as session:
        assert await session.allowed(["a", "b"]) == set()


async def test_a_list_of_no_tools_asks_nothing() -> None:
    arbiter = Scripted()
    async with arbiter.session() as session:
        assert await session.allowed([" "]) == set()
        assert arbiter.requests == []


async def test_the_tools_of_a_session_that_is_over_cannot_be_listed() -> None:
    arbiter = Scripted(OVER)
    async with arbiter.session() as session:
        with pytest.raises(Denied) as caught:
            await session.allowed(["a"])

    assert caught.value.agent_message == "Stop here."


async def test_a_lost_reply_is_charged_once(start_service: StartService) -> None:
    service = start_service()
    waits: list[float] = []
    async with (
        proxied(service.address[1]) as network,
        httpx.AsyncClient(base_url=service.url) as operator,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{network.port}", timeout=1) as client,
    ):

        async def repaired(secs: float) -> None:
            waits.append(secs)
            network.drop_replies = False

        network.drop_replies = True
        async with Arbiter(client, sleep=repaired).session(**session_request()) as session:
            network.drop_replies = True
            async with session.call("read_file") as state:
                assert state["calls_made"] == 1
        (kept,) = (await operator.get("/sessions")).json()["items"]

    assert len(waits) == 2
    assert (kept["calls_made"], kept["status"]) == (1, "closed")


async def test_a_real_service_is_understood(start_service: StartService) -> None:
    proxy_key, proxy_token = new_key("gate", Scope.PROXY)
    operator_key, operator_token = new_key("ops", Scope.OPERATE)
    service = start_service(ARBITER_API_KEYS=f"{proxy_key},{operator_key}")
    names = [f"tool_{n}" for n in range(2 * MAX_BATCH)]
    async with (
        httpx.AsyncClient(
            base_url=service.url, headers={"authorization": f"Bearer {proxy_token}"}
        ) as client,
        httpx.AsyncClient(
            base_url=service.url, headers={"authorization": f"Bearer {operator_token}"}
        ) as operator,
    ):
        terms = session_request(
            authorized_tools=["tool_1*"], call_budget=2, rate_limit_per_minute=2
        )
        async with Arbiter(client).session(**terms) as session:
            assert await session.allowed(names) == {n for n in names if n.startswith("tool_1")}
            with pytest.raises(Denied) as forbidden:
                await made(session, "delete_file")
            with pytest.raises(Denied) as unspeakable:
                await made(session, "\ud800 no name")
            with pytest.raises(Denied) as sensitive:
                await made(session, "tool_1", data_sensitivity="restricted")
            assert await made(session, "tool_1")
            assert await made(session, "tool_1")
            with pytest.raises(Denied) as spent:
                await made(session, "tool_1")
            assert await session.allowed(["tool_1", "tool_2"]) == {"tool_1"}
            (kept,) = (await operator.get("/sessions")).json()["items"]

    assert kept["calls_made"] == 2
    assert forbidden.value.next_action == "use_authorized_tool"
    assert unspeakable.value.agent_message
    assert sensitive.value.next_action == "lower_sensitivity"
    assert [each["code"] for each in spent.value.violations] == [
        "budget_exceeded",
        "rate_limited",
    ]
    assert spent.value.agent_message
    assert spent.value.request_id
