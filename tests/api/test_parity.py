"""Both lanes give the same response, byte for byte, and leave the same state."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from app.api.fast_lane import FastLane
from app.domain.admission import Admitted
from app.domain.errors import StoreUnavailable
from app.domain.session import DataSensitivity
from app.http.auth import ApiKey, new_key
from app.http.auth import Scope as KeyScope
from app.main import create_framework
from app.settings import Settings
from app.store.contract import StoreLimits
from app.store.memory.store import MemoryStore
from tests.http import hostile
from tests.support import AGENT, OTHER_AGENT, ManualClock, a_grant, new_id

pytestmark = pytest.mark.anyio

PLAIN = {"content-type": "application/json", "x-request-id": "r-1"}
CALL = b'{"tool_name":"read_file"}'


class Lane:
    """One lane over its own store."""

    def __init__(self, clock: ManualClock, keys: tuple[ApiKey, ...], *, fast: bool) -> None:
        self.store = MemoryStore(StoreLimits(), clock)
        settings = Settings(_env_file=None, log_format="json", api_keys=keys)
        self.framework = create_framework(settings, self.store)
        app: Any = FastLane(self.framework) if fast else self.framework
        transport = httpx.ASGITransport(app, raise_app_exceptions=True)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000")


class Pair:
    """The two lanes, which get the same requests."""

    def __init__(self, clock: ManualClock, keys: tuple[ApiKey, ...] = ()) -> None:
        self.clock = clock
        self.opened: list[str] = []
        self.lanes = [Lane(clock, keys, fast=fast) for fast in (False, True)]

    async def open(self, **terms: Any) -> str:
        session_id = new_id()
        self.opened.append(session_id)
        # Both lanes must use the same id.
        with patch("app.store.memory.store.uuid.uuid4", return_value=session_id):
            for lane in self.lanes:
                assert isinstance(await lane.store.create(a_grant(**terms)), Admitted)
        return session_id

    async def ask(
        self,
        path: str,
        body: bytes,
        headers: Any = PLAIN,
        method: str = "POST",
    ) -> httpx.Response:
        """Send a request to both lanes, check that they agree, and return the response."""
        seen = []
        for lane in self.lanes:
            request = lane.client.build_request(method, path, content=body, headers=headers)
            answer = await lane.client.send(request)
            held = [await lane.store.get(session_id) for session_id in self.opened]
            seen.append((answer.status_code, sorted(answer.headers.raw), answer.content, held))
        assert seen[0] == seen[1]
        return answer


@pytest.fixture
async def pair(clock: ManualClock) -> AsyncIterator[Pair]:
    async with AsyncExitStack() as stack:
        both = Pair(clock)
        for lane in both.lanes:
            await stack.enter_async_context(lane.client)
        yield both


PLAIN_CALLS = [
    b'{"tool_name":"read_file"}',
    b'{"tool_name": "list_dir"}',
    b' \t\r\n{ "tool_name" :\n"read_file" } \n',
    b'{"tool_name":"rm"}',
    b'{"tool_name":"read_file","agent_id":"%b"}' % AGENT.encode(),
    b'{"tool_name":"read_file", "agent_id" : "%b" }' % AGENT.upper().encode(),
    b'{"tool_name":"read_file","agent_id":"%b"}' % OTHER_AGENT.encode(),
    b'{"agent_id":"%b","tool_name":"read_file"}' % AGENT.encode(),
    *(
        b'{"tool_name":"read_file","data_sensitivity":"%b"}' % tier.encode()
        for tier in DataSensitivity
    ),
    b'{"tool_name":"read_file","agent_id":"%b","data_sensitivity":"public"}' % AGENT.encode(),
    b'{"tool_name":"read_file","data_sensitivity":"public","agent_id":"%b"}' % AGENT.encode(),
    b'{"tool_name":"read\\u005ffile"}',
    b'{"tool_name":"' + b"a" * 128 + b'"}',
]
PLAIN_BATCHES = [
    b'{"tool_names":[]}',
    b'{"tool_names":[ ]}',
    b'{"tool_names":["read_file"]}',
    b'{ "tool_names" : [ "read_file" , "list_dir" ] }',
    b'{"tool_names":["read_file","rm","list_dir","rm"]}',
    b'{"tool_names":["rm"],"agent_id":"%b","data_sensitivity":"restricted"}' % AGENT.encode(),
    json.dumps({"tool_names": ["read_file"] * 4}).encode(),
    json.dumps({"tool_names": ["read_file"] * 256}).encode(),
    json.dumps({"tool_names": ["read_file"] * 257}).encode(),
    b'{"tool_names":["read_file",]}',
    b'{"tool_names":["read_file" "rm"]}',
    b'{"tool_names":"read_file"}',
    b'{"tool_names":["read_file"],"tool_names":[]}',
    b'{"tool_names":[["read_file"]]}',
    b'{"tool_names":["a\\"b"]}',
]


@pytest.mark.parametrize("body", PLAIN_CALLS)
@pytest.mark.parametrize(
    "terms", [{}, {"rate_limit_per_minute": 1}, {"call_budget": 1}, {"call_budget": 300}]
)
async def test_calls(pair: Pair, terms: dict[str, Any], body: bytes) -> None:
    path = f"/sessions/{await pair.open(**terms)}/calls"

    for _ in range(2):
        await pair.ask(path, body)
    pair.clock.advance(59.5)
    await pair.ask(path, body)
    pair.clock.advance(3600)
    await pair.ask(path, body)


@pytest.mark.parametrize("body", PLAIN_BATCHES)
@pytest.mark.parametrize("terms", [{}, {"rate_limit_per_minute": 3}, {"call_budget": 3}])
async def test_batches(pair: Pair, terms: dict[str, Any], body: bytes) -> None:
    path = f"/sessions/{await pair.open(**terms)}/batch"

    for _ in range(2):
        await pair.ask(path, body)


@pytest.mark.parametrize("path", ["calls", "batch"])
@pytest.mark.parametrize("body", [pytest.param(row[1], id=row[0]) for row in hostile.BODIES])
async def test_hostile_bodies(pair: Pair, path: str, body: bytes) -> None:
    session_id = await pair.open()

    for each in (body, body.replace(b'"tool_name"', b'"tool_names"')):
        await pair.ask(f"/sessions/{session_id}/{path}", each)


@pytest.mark.parametrize("name", hostile.TOOL_NAMES)
async def test_hostile_names(pair: Pair, name: str) -> None:
    session_id = await pair.open()

    for text in (json.dumps(name), json.dumps(name, ensure_ascii=False)):
        raw = text.encode("utf-8", "surrogatepass")
        await pair.ask(f"/sessions/{session_id}/calls", b'{"tool_name":%b}' % raw)
        await pair.ask(f"/sessions/{session_id}/batch", b'{"tool_names":["a",%b]}' % raw)


@pytest.mark.parametrize("text", hostile.UUIDS)
async def test_hostile_agents(pair: Pair, text: str) -> None:
    path = f"/sessions/{await pair.open()}/calls"

    await pair.ask(path, json.dumps({"tool_name": "read_file", "agent_id": text}).encode())


@pytest.mark.parametrize(
    "headers",
    [
        *(pytest.param(row[1], id=row[0]) for row in hostile.HEADERS),
        {**PLAIN, "prefer": "return=minimal"},
        {**PLAIN, "prefer": "return=minimal, wait=5"},
        {**PLAIN, "prefer": "return=representation"},
        {**PLAIN, "idempotency-key": "k"},
        {**PLAIN, "content-type": "application/json; charset=utf-8"},
        {**PLAIN, "accept": "text/html", "accept-encoding": "gzip"},
        [*PLAIN.items(), ("x-request-id", "r-2")],
        [*PLAIN.items(), ("prefer", "return=minimal"), ("prefer", "wait=1")],
        [*PLAIN.items(), ("content-type", "application/json")],
    ],
)
async def test_headers(pair: Pair, headers: Any) -> None:
    path = f"/sessions/{await pair.open(call_budget=2)}/calls"
    # Without a valid request id each lane generates one, and they would differ.
    known = [*dict(headers).items()] if isinstance(headers, dict) else list(headers)
    if sum(name == "x-request-id" for name, _ in known) != 1:
        known = [each for each in known if each[0] != "x-request-id"]
        known.append(("x-request-id", "r-1"))

    for _ in range(3):
        await pair.ask(path, CALL, known)


@pytest.mark.parametrize("query", [*hostile.QUERIES, "dry_run=true", "dry_run=false", ""])
async def test_queries(pair: Pair, query: str) -> None:
    await pair.ask(f"/sessions/{await pair.open()}/calls?{query}", CALL)


async def test_paths(pair: Pair) -> None:
    session_id = await pair.open()

    for path in (
        f"/sessions/{new_id()}/calls",
        f"/sessions/{session_id.upper()}/calls",
        f"/sessions/%{ord(session_id[0]):02x}{session_id[1:]}/calls",
        f"/sessions/{session_id}/calls/",
        f"/sessions/{session_id}/call",
        f"//sessions/{session_id}/calls",
        f"/sessions/{session_id}/calls%00",
        f"/sessions/{'a' * 36}/calls",
    ):
        await pair.ask(path, CALL)
    for method in ("GET", "PUT", "DELETE"):
        await pair.ask(f"/sessions/{session_id}/calls", CALL, method=method)


async def test_keys(clock: ManualClock) -> None:
    made = [new_key(scope.value, scope) for scope in KeyScope]
    pair = Pair(clock, tuple(key for key, _ in made))
    path = f"/sessions/{await pair.open()}/calls"
    tokens = [token for _, token in made]
    sent = [f"Bearer {token}" for token in tokens]
    sent += [f"bearer  {tokens[2]}", f"Basic {tokens[2]}", f"Bearer {tokens[2]}x", "", "Bearer"]

    for authorization in sent:
        for _ in range(2):
            await pair.ask(path, CALL, PLAIN | {"authorization": authorization})
    await pair.ask(path, CALL)
    twice = [*PLAIN.items(), ("authorization", sent[2]), ("authorization", sent[2])]
    await pair.ask(path, CALL, twice)
    for lane in pair.lanes:
        await lane.client.aclose()


@pytest.mark.parametrize("error", [StoreUnavailable(), RuntimeError("defect")])
async def test_failures(pair: Pair, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    path = f"/sessions/{await pair.open()}/calls"

    async def fail(*_: Any, **__: Any) -> Any:
        raise error

    for lane in pair.lanes:
        monkeypatch.setattr(lane.store, "record", fail)

    assert (await pair.ask(path, CALL)).status_code in {500, 503}


async def test_both_lanes_are_counted_the_same(pair: Pair) -> None:
    session_id = await pair.open(call_budget=2)
    for body in (CALL, CALL, CALL, b'{"tool_name":"rm"}', b"{}"):
        await pair.ask(f"/sessions/{session_id}/calls", body)

    counted = []
    for lane in pair.lanes:
        metrics = lane.framework.state.metrics
        requests = {key: sum(each.counts) for key, each in metrics.requests.items()}
        counted.append((dict(metrics.decisions), requests))

    assert counted[0] == counted[1]
    assert counted[0][0]["call", "admitted"] == 2


class Closed(FastAPI):
    """A framework lane that must not be reached."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise AssertionError(scope["path"])


async def test_plain_requests_are_served_by_the_fast_lane_alone(clock: ManualClock) -> None:
    lane = Lane(clock, (), fast=True)
    created = await lane.store.create(a_grant())
    assert isinstance(created, Admitted)
    lane.framework.__class__ = Closed
    path = f"/sessions/{created.session.session_id}"

    for where, body in (
        ("calls", CALL),
        ("calls", b'{"tool_name": "rm"}'),
        ("batch", b'{"tool_names": ["read_file", "list_dir"], "data_sensitivity": "public"}'),
    ):
        request = f"{path}/{where}"
        answer = await lane.client.post(request, content=body, headers=PLAIN)
        assert answer.status_code in {200, 403}
    with pytest.raises(AssertionError, match="/calls"):
        await lane.client.post(f"{path}/calls", content=b"{}", headers=PLAIN)
    await lane.client.aclose()


async def test_a_body_in_pieces_is_replayed_completely(pair: Pair) -> None:
    session_id = await pair.open()
    answers = []
    for lane in pair.lanes:

        async def pieces() -> AsyncIterator[bytes]:
            for at in range(0, len(CALL), 5):
                yield CALL[at : at + 5]

        answers.append(
            await lane.client.post(
                f"/sessions/{session_id}/calls",
                content=pieces(),
                headers=PLAIN | {"content-length": str(len(CALL))},
            )
        )

    assert [each.status_code for each in answers] == [200, 200]
    assert answers[0].content == answers[1].content
