"""Each gateway with its shipped configuration and real traffic: what it lets through is what
was counted, and a denial reaches the client with its reason."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.http.auth import Scope, new_key
from tests.gateways.programs import (
    PROGRAMS,
    SEARCH,
    SHIPPED,
    Gateway,
    Switch,
    Upstream,
    find,
    free_port,
    running_gateway,
    serving,
)
from tests.services import ROOT, Service, StartService, running
from tests.support import AGENT, new_id, session_request

pytestmark = pytest.mark.anyio

KEY, TOKEN = new_key("gate", Scope.PROXY)
BOSS, BOSS_TOKEN = new_key("boss", Scope.ADMIN)
START_SECS = 20
PATIENCE_SECS = 60
"""Longer than any gateway waits for the service."""

Headers = list[tuple[str, str]]


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with running(ARBITER_API_KEYS=f"{KEY},{BOSS}") as made:
        yield made


@pytest.fixture(scope="module")
def switch(service: Service) -> Switch:
    return Switch(service.address)


@pytest.fixture(scope="module")
def switch_port(switch: Switch) -> Iterator[int]:
    with serving(switch.handler) as port:
        yield port


@pytest.fixture(scope="module", params=PROGRAMS)
def gateway(
    request: pytest.FixtureRequest,
    switch_port: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Gateway]:
    name = request.param
    kind = PROGRAMS[name]
    if find(kind.program) is None:
        pytest.skip(f"{kind.program} is missing: {kind.install}")
    upstream = Upstream()
    folder = tmp_path_factory.mktemp(name)
    with (
        serving(upstream.handler) as port,
        running_gateway(
            name, folder, TOKEN, f"127.0.0.1:{switch_port}", f"127.0.0.1:{port}"
        ) as url,
    ):
        wait_for(url, folder / "output")
        yield Gateway(name, url, kind, upstream)


def wait_for(url: str, output: Any) -> None:
    """Wait until a gateway passes on what the service says. Some answer alone before that."""
    until = time.monotonic() + START_SECS
    last = ""
    while time.monotonic() < until:
        try:
            answer = httpx.post(url, headers=call_headers(new_id()), json=CALL)
            last = answer.text
            if answer.status_code == 404 and answer.json()["code"] == "session_not_found":
                return
        except (httpx.HTTPError, ValueError, KeyError) as error:
            last = last or repr(error)
        time.sleep(0.05)
    pytest.fail(f"the gateway did not start: {last} {output.read_text()}")


def call_body(tool: str) -> dict[str, Any]:
    params = {"name": tool, "arguments": {}, "_meta": META}
    return {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params}


META = {
    "io.modelcontextprotocol/protocolVersion": "2026-07-28",
    "io.modelcontextprotocol/clientInfo": {"name": "test", "version": "1"},
    "io.modelcontextprotocol/clientCapabilities": {},
}
"""What every request has since that version. Envoy looks whether it is there."""


CALL = call_body("read_file")


def call_headers(session: str, tool: str = "read_file") -> Headers:
    return [
        ("x-arbiter-session", session),
        ("x-test", session),
        ("mcp-protocol-version", "2026-07-28"),
        ("mcp-method", "tools/call"),
        ("mcp-name", tool),
        ("accept", "application/json, text/event-stream"),
    ]


@pytest.fixture
async def client(gateway: Gateway) -> Any:
    limits = httpx.Limits(max_connections=32)
    async with httpx.AsyncClient(
        base_url=gateway.url, timeout=PATIENCE_SECS, limits=limits
    ) as made:
        yield made


def opened(service: Service, **terms: Any) -> str:
    answer = httpx.post(
        f"{service.url}/sessions",
        json=session_request(**terms),
        headers={"authorization": f"Bearer {TOKEN}"},
    )
    assert answer.status_code == 201
    return str(answer.json()["session_id"])


def calls_made(service: Service, session: str) -> int:
    headers = {"authorization": f"Bearer {TOKEN}"}
    answer = httpx.get(f"{service.url}/sessions/{session}", headers=headers)
    return int(answer.json()["calls_made"])


def as_boss(service: Service, method: str, path: str) -> None:
    body = {} if method == "PUT" else None
    headers = {"authorization": f"Bearer {BOSS_TOKEN}"}
    httpx.request(method, service.url + path, json=body, headers=headers).raise_for_status()


async def call(
    client: httpx.AsyncClient, session: str, tool: str = "read_file", *more: tuple[str, str]
) -> httpx.Response:
    headers = [*call_headers(session, tool), *more]
    return await client.post("/mcp?tool=list_dir", headers=headers, json=call_body(tool))


async def test_racing_clients_never_overspend(
    gateway: Gateway, client: httpx.AsyncClient, service: Service
) -> None:
    session = opened(service, call_budget=50)

    answers = await asyncio.gather(*(call(client, session) for _ in range(120)))

    statuses = [each.status_code for each in answers]
    assert (statuses.count(200), statuses.count(429)) == (50, 70)
    assert gateway.upstream.reached[session] == 50
    assert calls_made(service, session) == 50


async def test_each_denial_reaches_the_client(
    gateway: Gateway, client: httpx.AsyncClient, service: Service
) -> None:
    closed, paused, spent = opened(service), opened(service), opened(service, call_budget=0)
    limited = opened(service, rate_limit_per_minute=0)
    expired, frozen = opened(service, time_limit_secs=0), opened(service)
    as_boss(service, "DELETE", f"/sessions/{closed}")
    as_boss(service, "POST", f"/sessions/{paused}/pause")
    expected = {
        (new_id(), "read_file"): (404, "session_not_found"),
        (closed, "read_file"): (409, "session_closed"),
        (paused, "read_file"): (409, "session_paused"),
        (expired, "read_file"): (408, "session_expired"),
        (spent, "read_file"): (429, "budget_exceeded"),
        (limited, "read_file"): (429, "rate_limited"),
        (frozen, "rm"): (403, "tool_not_authorized"),
        (frozen, "a b"): (400, "invalid_check"),
    }

    answers = [await call(client, session, tool) for session, tool in expected]
    as_boss(service, "PUT", f"/agents/{AGENT}/freeze")
    answers.append(await call(client, frozen))
    as_boss(service, "DELETE", f"/agents/{AGENT}/freeze")

    found = [(each.status_code, each.json()["code"]) for each in answers]
    assert found == [*expected.values(), (403, "agent_frozen")]
    for answer in answers:
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.json()["agent_message"]
        assert answer.json()["status"] == answer.status_code
    assert answers[4].headers["ratelimit"] == '"budget";r=0'
    assert gateway.upstream.reached.keys().isdisjoint({session for session, _ in expected})


async def test_a_wait_reaches_the_client(client: httpx.AsyncClient, service: Service) -> None:
    session = opened(service, rate_limit_per_minute=1)
    await call(client, session)

    answer = await call(client, session)

    assert (answer.status_code, answer.json()["code"]) == (429, "rate_limited")
    assert 0 < int(answer.headers["retry-after"]) <= 60


async def test_the_session_may_be_the_bearer_token(
    client: httpx.AsyncClient, service: Service
) -> None:
    session = opened(service)
    headers = [*call_headers(session)[1:], ("authorization", f"Bearer {session}")]

    answer = await client.post("/mcp", headers=headers, json=CALL)

    assert answer.status_code == 200
    assert calls_made(service, session) == 1


async def test_methods_that_call_no_tool_pass_uncounted(
    gateway: Gateway, client: httpx.AsyncClient, service: Service
) -> None:
    session = opened(service, call_budget=0)
    headers = [
        (name, "tools/list" if name == "mcp-method" else value)
        for name, value in call_headers(session)
        if name != "mcp-name"
    ]
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": META}}

    listed = await client.post("/mcp", headers=headers, json=body)

    assert listed.status_code == 200
    assert gateway.upstream.reached[session] == 1
    assert calls_made(service, session) == 0


async def test_an_old_version_of_mcp_is_not_believed(
    gateway: Gateway, client: httpx.AsyncClient, service: Service
) -> None:
    """It could say tools/list and call a tool. Only a gateway that reads the body knows."""
    session = opened(service, authorized_tools=["read_file"])
    headers = [
        *call_headers(session)[:2],
        ("mcp-protocol-version", "2025-06-18"),
        ("mcp-method", "tools/list"),
        ("accept", "application/json, text/event-stream"),
    ]

    answer = await client.post("/mcp", headers=headers, json=call_body("delete_file"))

    assert answer.status_code == (403 if gateway.name == "envoy-mcp" else 400)
    assert gateway.upstream.reached[session] == 0


FORGED: dict[str, Headers] = {
    "our tool": [("x-arbiter-tool", "read_file")],
    "a tool of a gateway": [("x-mcp-toolname", "read_file")],
    "both twice": [("x-arbiter-tool", "read_file"), ("x-mcp-toolname", "read_file")] * 2,
    "another name first": [("mcp-name", "read_file")],
    "another method": [("mcp-method", "tools/list")],
    "another version": [("mcp-protocol-version", "2026-07-28")],
    "a lower tier": [("x-arbiter-sensitivity", "public")],
    "a name that is stripped": [("connection", "mcp-name, x-arbiter-tool")],
    "a method that is stripped": [("connection", "mcp-method, mcp-name"), *[("te", "x")]],
    "a key that is stripped": [("connection", "x-arbiter-key, x-arbiter-idempotency-key")],
    "a session that is stripped": [("connection", "x-arbiter-session")],
    "underscores": [("x_arbiter_tool", "read_file"), ("mcp_name", "read_file")],
    "a query": [
        ("x-original-url", "/?tool=read_file"),
        ("x-forwarded-uri", "/?tool=read_file"),
    ],
    "a method to override": [("x-http-method-override", "GET")],
}


@pytest.mark.parametrize("how", FORGED)
async def test_a_forged_header_gains_nothing(
    gateway: Gateway, client: httpx.AsyncClient, service: Service, how: str
) -> None:
    session = opened(service, authorized_tools=["read_file"])
    headers = [*FORGED[how], *call_headers(session, "delete_file")]

    answer = await client.post("/mcp", headers=headers, json=call_body("delete_file"))

    assert 400 <= answer.status_code < 500
    assert gateway.upstream.reached[session] == 0
    assert calls_made(service, session) == 0


async def test_two_sessions_or_lists_are_refused(
    gateway: Gateway, client: httpx.AsyncClient, service: Service
) -> None:
    session, other = opened(service), opened(service, call_budget=0)
    plain = call_headers(session)[1:]
    tries: list[Headers] = [
        [("x-arbiter-session", other), ("x-arbiter-session", session)],
        [("x-arbiter-session", session), ("x-arbiter-session", session)],
        [("x-arbiter-session", f"{other}, {session}")],
        [("x-arbiter-session", session), ("authorization", f"Bearer {other}")],
        [("authorization", f"Bearer {session}, Bearer {other}")],
    ]

    answers = [await client.post("/mcp", headers=[*each, *plain], json=CALL) for each in tries]

    assert [each.status_code for each in answers] == [400] * 5
    assert gateway.upstream.reached[session] == 0


async def test_no_key_that_a_client_chooses_makes_calls_free(
    gateway: Gateway, client: httpx.AsyncClient, service: Service
) -> None:
    session = opened(service)
    keys = [
        ("x-arbiter-idempotency-key", "same"),
        ("idempotency-key", "same"),
        ("x-request-id", "same"),
        ("x-arbiter-key", "gate.wrong"),
    ]

    answers = [await call(client, session, "read_file", *keys) for _ in range(3)]

    assert [each.status_code for each in answers] == [200, 200, 200]
    assert calls_made(service, session) == 3


async def test_what_is_behind_and_the_client_see_what_they_should(
    gateway: Gateway, client: httpx.AsyncClient, service: Service
) -> None:
    session = opened(service)

    answer = await call(client, session)

    assert ("ratelimit" in answer.headers) is gateway.kind.rates_admitted
    names = {name for name, _ in gateway.upstream.headers}
    assert {"x-test", "mcp-name"} <= names
    assert names.isdisjoint({"x-arbiter-session", "x-arbiter-key"})
    assert TOKEN not in str(gateway.upstream.headers)


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD"])
async def test_other_methods_are_asked_about_too(
    gateway: Gateway, client: httpx.AsyncClient, service: Service, method: str
) -> None:
    if gateway.name == "envoy-mcp":
        # It lets nothing pass that is not MCP.
        answer = await client.request(method, "/a%20b/../c?x", headers=call_headers(new_id()))
        assert answer.status_code >= 400
        return
    session = opened(service, call_budget=1)

    answers = [
        await client.request(method, "/a%20b/c?x=1", headers=call_headers(session))
        for _ in range(2)
    ]

    assert [each.status_code for each in answers] == [200, 429]
    assert gateway.upstream.reached[session] == 1


async def test_a_large_body_passes(
    gateway: Gateway, client: httpx.AsyncClient, service: Service
) -> None:
    session = opened(service)
    body = call_body("read_file")
    body["params"]["arguments"] = {"text": "x" * (5_000 if "mcp" in gateway.name else 200_000)}

    answer = await client.post("/mcp", headers=call_headers(session), json=body)

    assert answer.status_code == 200


@pytest.mark.parametrize("status", [204, 302, 400, 404, 500, 503])
async def test_only_an_admission_passes(
    gateway: Gateway, client: httpx.AsyncClient, switch: Switch, service: Service, status: int
) -> None:
    session = opened(service)
    switch.status, switch.body = status, b"" if status == 204 else b"{}"
    switch.headers = [("location", "/")]
    try:
        answer = await call(client, session)
    finally:
        switch.status, switch.headers = 0, []

    passes = status == 204 and gateway.kind.passes_2xx
    assert (answer.status_code == 200) is passes
    assert gateway.upstream.reached[session] == passes


async def test_a_store_that_is_lost_reaches_the_client_as_503(
    gateway: Gateway, client: httpx.AsyncClient, switch: Switch, service: Service
) -> None:
    session = opened(service)
    problem = json.dumps({"code": "store_unavailable", "status": 503})
    switch.status, switch.body = 503, problem.encode()
    switch.headers = [("content-type", "application/problem+json"), ("retry-after", "1")]
    if gateway.name == "nginx":
        # It asks for strict answers.
        switch.status, switch.body = 403, b""
        switch.headers += [("x-arbiter-status", "503"), ("x-arbiter-problem", problem)]
    try:
        answer = await call(client, session)
    finally:
        switch.status, switch.headers = 0, []

    assert answer.status_code == 503
    if not gateway.kind.drops_5xx:
        assert answer.text == problem
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"] == "1"
    assert gateway.upstream.reached[session] == 0


async def test_a_service_that_hangs_lets_nothing_through(
    gateway: Gateway, client: httpx.AsyncClient, switch: Switch, service: Service
) -> None:
    if gateway.name == "traefik":
        client.timeout = httpx.Timeout(1)
    session = opened(service)
    switch.hangs.set()
    started = time.monotonic()
    try:
        answer = await call(client, session)
    except httpx.ReadTimeout:
        assert gateway.name == "traefik", "only Traefik waits for 30 seconds"
    else:
        assert answer.status_code in (503, 504)
        assert time.monotonic() - started < 10
    finally:
        switch.hangs.clear()
        switch.released.set()
        await asyncio.sleep(0.1)
        switch.released.clear()

    assert gateway.upstream.reached[session] == 0


async def test_a_reply_that_is_lost_is_charged_once(
    gateway: Gateway, client: httpx.AsyncClient, switch: Switch, service: Service
) -> None:
    session = opened(service)
    for _ in range(3):
        assert (await call(client, session)).status_code == 200
    reached = gateway.upstream.reached[session]

    switch.losses = 1
    answer = await call(client, session)
    switch.losses = 0

    passed = gateway.upstream.reached[session] - reached
    assert passed == (1 if answer.status_code == 200 else 0)
    assert calls_made(service, session) == 4


async def test_a_service_that_is_down_lets_nothing_through(
    service: Service,
    gateway: Gateway,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("down")
    upstream = Upstream()
    with (
        serving(upstream.handler) as port,
        running_gateway(
            gateway.name, folder, TOKEN, f"127.0.0.1:{free_port()}", f"127.0.0.1:{port}"
        ) as url,
    ):
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECS) as client:
            session = new_id()
            answer = None
            for _ in range(200):
                try:
                    answer = await call(client, session)
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
                    continue
                if answer.status_code != 404:
                    break
                await asyncio.sleep(0.05)

    assert answer is not None
    assert answer.status_code == gateway.kind.unavailable
    assert upstream.reached.total() == 0


async def test_a_wrong_key_lets_nothing_through(
    service: Service,
    gateway: Gateway,
    switch_port: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("wrong")
    upstream = Upstream()
    session = opened(service)
    with (
        serving(upstream.handler) as port,
        running_gateway(
            gateway.name,
            folder,
            "gate.wrong",
            f"127.0.0.1:{switch_port}",
            f"127.0.0.1:{port}",
        ) as url,
    ):
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECS) as client:
            answer = None
            for _ in range(200):
                try:
                    answer = await call(client, session)
                except httpx.ConnectError:
                    await asyncio.sleep(0.05)
                    continue
                if answer.status_code != 404:
                    break
                await asyncio.sleep(0.05)

    assert answer is not None
    assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
    assert upstream.reached.total() == 0


def documented() -> str:
    """The commands of the guide that lead from a clone to a call that nginx refuses."""
    page = (ROOT / "docs/integration.md").read_text()
    section = page.partition("### Try it with nginx")[2]
    return section.partition("```sh\n")[2].partition("```")[0]


@pytest.mark.skipif(find("nginx") is None, reason="nginx is missing: apt-get install nginx")
def test_the_commands_of_the_guide_make_nginx_refuse_the_sixth_call(
    start_service: StartService, tmp_path: Path
) -> None:
    open_service = start_service()
    for folder in ("deploy", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    moved = {
        "8000": str(open_service.address[1]),
        "8080": str(free_port()),
        "9000": str(free_port()),
    }
    config = tmp_path / "deploy/gateways/nginx.conf"
    script = documented()
    for old, new in moved.items():
        script = re.sub(rf"\b{old}\b", new, script)
        config.write_text(re.sub(rf":{old}\b", f":{new}", config.read_text()))
    config.write_text(f"user root;\n{config.read_text()}")
    script = script.replace("\nJSON", "\nsleep 1\nJSON")

    typed = subprocess.run(
        ["bash", "-mc", script],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PATH": SEARCH},
        text=True,
        timeout=60,
    )

    assert typed.stdout.split() == ["200"] * 5 + ["429"], typed.stderr
    assert (tmp_path / "gate/tools.log").read_text().count('"GET / HTTP') == 5


SNIPPETS = {
    "nginx": ["nginx.conf"],
    "caddyfile": ["Caddyfile"],
    "haproxy": ["haproxy.cfg"],
    "yaml": ["traefik-routes.yml", "envoy.yaml"],
}


@pytest.mark.parametrize("language", SNIPPETS)
def test_what_the_guide_shows_is_in_the_configurations(language: str) -> None:
    page = (ROOT / "docs/integration.md").read_text()
    shown = re.findall(rf"^```{language}\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)

    for block, file in zip(shown, SNIPPETS[language], strict=True):
        shipped = {line.strip() for line in (SHIPPED / file).read_text().splitlines()}
        assert {line.strip() for line in block.splitlines()} <= shipped
