"""API keys, scopes, and the protection of a service without keys."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import httpx
import pytest

from app.http.auth import (
    ApiKey,
    Authenticator,
    KeyRing,
    Scope,
    Unauthenticated,
    is_loopback,
    new_key,
)
from tests.conftest import Api, MakeApi
from tests.support import AGENT, new_id, session_request

pytestmark = pytest.mark.anyio

SECRET = "s" * 43


def key(name: str, scope: Scope, secret: str = SECRET) -> ApiKey:
    return ApiKey(name, scope, sha256(secret.encode()).hexdigest())


KEYS = (key("boss", Scope.ADMIN), key("ops", Scope.OPERATE), key("gate", Scope.PROXY))

ROUTES = [
    ("POST", "/sessions", {"admin", "proxy"}),
    ("GET", "/sessions", {"admin", "operate"}),
    ("GET", f"/sessions/{AGENT}", {"admin", "operate", "proxy"}),
    ("DELETE", f"/sessions/{AGENT}", {"admin", "operate", "proxy"}),
    ("POST", f"/sessions/{AGENT}/calls", {"admin", "proxy"}),
    ("POST", f"/sessions/{AGENT}/batch", {"admin", "proxy"}),
    ("GET", f"/agents/{AGENT}", {"admin", "operate"}),
    ("DELETE", f"/agents/{AGENT}/sessions", {"admin", "operate"}),
    ("GET", "/metrics", {"admin", "operate"}),
    ("GET", "/denials", {"admin", "operate"}),
    ("GET", "/replica", {"admin", "operate"}),
    ("PATCH", "/replica", {"admin"}),
    ("POST", "/access/v1/evaluation", {"admin", "proxy"}),
    ("POST", "/check/access/v1/evaluation", {"admin", "proxy"}),
    ("POST", "/check/access/v1/evaluations", {"admin", "proxy"}),
]
PUBLIC = [
    *("/livez", "/readyz", "/healthz", "/openapi.json", "/docs", "/problems/rate_limited"),
    "/.well-known/authzen-configuration",
    "/check/.well-known/authzen-configuration",
]

WRONG = [
    [],
    [("authorization", "")],
    [("authorization", "Bearer")],
    [("authorization", "Bearer ")],
    [("authorization", "Bearer gate")],
    [("authorization", "Bearer gate.")],
    [("authorization", f"Bearer .{SECRET}")],
    [("authorization", f"Bearer {SECRET}")],
    [("authorization", f"Bearer gate.{SECRET}x")],
    [("authorization", f"Bearer gate.{SECRET[:-1]}")],
    [("authorization", f"Bearer Gate.{SECRET}")],
    [("authorization", f"Bearer nobody.{SECRET}")],
    [("authorization", f"Basic gate.{SECRET}")],
    [("authorization", f"gate.{SECRET}")],
    [("authorization", f"Bearer gate.{sha256(SECRET.encode()).hexdigest()}")],
    [("authorization", f"Bearer gate.{SECRET}")] * 2,
    [("x-api-key", f"gate.{SECRET}")],
    [("authorization", b"Bearer gate.\xff\xfe")],
    [("authorization", b"Bearer \xff.\xff")],
]
"""Headers without a valid API key."""


@pytest.fixture
async def guarded(make_api: MakeApi) -> Api:
    return await make_api(api_keys=KEYS)


@pytest.mark.parametrize("headers", WRONG)
async def test_every_route_refuses_a_request_without_a_valid_key(
    guarded: Api, headers: list[tuple[str, str]]
) -> None:
    for method, path, _ in ROUTES:
        answer = await guarded.client.request(method, path, headers=headers)

        assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert SECRET not in answer.text


@pytest.mark.parametrize("name", ["boss", "ops", "gate"])
@pytest.mark.parametrize(("method", "path", "scopes"), ROUTES)
async def test_a_key_may_do_only_what_its_scope_allows(
    guarded: Api, name: str, method: str, path: str, scopes: set[str]
) -> None:
    scope = {"boss": "admin", "ops": "operate", "gate": "proxy"}[name]

    answer = await guarded.client.request(
        method, path, headers={"authorization": f"bearer {name}.{SECRET}"}
    )

    if scope in scopes:
        assert answer.status_code not in {401, 403}
    else:
        assert (answer.status_code, answer.json()["code"]) == (403, "insufficient_scope")
        assert answer.headers["x-should-retry"] == "false"
        assert "insufficient_scope" in answer.headers["www-authenticate"]


@pytest.mark.parametrize("path", PUBLIC)
async def test_public_pages_need_no_key(guarded: Api, path: str) -> None:
    assert (await guarded.client.get(path)).status_code == 200


async def test_the_key_is_checked_before_the_body(guarded: Api) -> None:
    answer = await guarded.client.post("/sessions", content=b"{not json")

    assert answer.status_code == 401


async def test_a_name_may_have_two_secrets_while_it_is_rotated(make_api: MakeApi) -> None:
    api = await make_api(
        api_keys=(key("gate", Scope.PROXY, "old"), key("gate", Scope.PROXY, "new"))
    )

    statuses = {
        secret: (
            await api.client.post(
                "/sessions",
                json=session_request(),
                headers={"authorization": f"Bearer gate.{secret}"},
            )
        ).status_code
        for secret in ("old", "new", "other")
    }

    assert statuses == {"old": 201, "new": 201, "other": 401}


@pytest.mark.parametrize(
    ("added", "says"),
    [
        (key("gate", Scope.PROXY, "old"), "twice"),
        (key("gate", Scope.ADMIN, "new"), "same scope"),
        (replace(key("gate", Scope.PROXY, "new"), ceilings=1), "same limits"),
    ],
)
def test_two_secrets_of_a_name_differ_in_nothing_else(added: ApiKey, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refusal:
        KeyRing([key("gate", Scope.PROXY, "old"), added])

    assert added.digest not in str(refusal.value)


def test_a_name_has_no_three_secrets() -> None:
    with pytest.raises(ValueError, match="three API keys"):
        KeyRing(key("gate", Scope.PROXY, secret) for secret in ("a", "b", "c"))


class TestReplacedKeys:
    OLD = b"Bearer gate.old"
    NEW = b"Bearer gate.new"

    @pytest.fixture
    def authenticator(self) -> Authenticator:
        return Authenticator([key("gate", Scope.PROXY, "old")], allow_unauthenticated=True)

    def test_replaced_keys_are_accepted_and_others_refused_at_once(
        self, authenticator: Authenticator
    ) -> None:
        # The header is cached now, and must be forgotten.
        authenticator.identify(self.OLD, None)

        authenticator.replace_keys([key("gate", Scope.ADMIN, "new")])

        assert authenticator.identify(self.NEW, None).scope is Scope.ADMIN
        with pytest.raises(Unauthenticated):
            authenticator.identify(self.OLD, None)

    @pytest.mark.parametrize("keys", [[], [key("gate", Scope.PROXY)] * 2])
    def test_keys_that_cannot_be_used_change_nothing(
        self, authenticator: Authenticator, keys: list[ApiKey]
    ) -> None:
        with pytest.raises(ValueError, match="API key"):
            authenticator.replace_keys(keys)

        assert authenticator.enabled
        assert authenticator.identify(self.OLD, None).name == "gate"
        with pytest.raises(Unauthenticated):
            authenticator.identify(None, None)


async def test_two_keys_work_side_by_side_during_a_rotation(make_api: MakeApi) -> None:
    api = await make_api(
        api_keys=(key("gate-1", Scope.PROXY, "old"), key("gate-2", Scope.PROXY, "new"))
    )

    for token in ("gate-1.old", "gate-2.new"):
        answer = await api.client.post(
            "/sessions", json=session_request(), headers={"authorization": f"Bearer {token}"}
        )
        assert answer.status_code == 201
    crossed = await api.client.post("/sessions", headers={"authorization": "Bearer gate-1.new"})
    assert crossed.status_code == 401


class TestWithoutKeys:
    @pytest.mark.parametrize(
        "host", ["10.0.0.5", "192.168.1.1", "[2001:db8::1]", "example.org"]
    )
    async def test_a_service_without_keys_serves_loopback_only(
        self, api: Api, host: str
    ) -> None:
        for method, path, _ in ROUTES:
            answer = await api.client.request(method, f"http://{host}:8000{path}")
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated")
        assert (await api.client.get(f"http://{host}:8000/livez")).status_code == 200

    @pytest.mark.parametrize(
        "name",
        [
            "localhost",
            "LocalHost:80",
            "127.0.0.1",
            "127.0.0.1:9999",
            "[::1]",
            "[::1]:8000",
        ],
    )
    async def test_a_loopback_name_in_host_is_served(self, api: Api, name: str) -> None:
        answer = await api.client.get("/livez", headers={"host": name})

        assert answer.status_code == 200

    @pytest.mark.parametrize(
        "name",
        [
            "attacker.example",
            "attacker.example:8000",
            "localhost.attacker.example",
            "127.0.0.1.attacker.example",
            "127.0.0.2",
            "localhost:",
            "localhost:x",
            "::1",
            "",
        ],
    )
    async def test_any_other_host_is_refused_on_every_path(self, api: Api, name: str) -> None:
        # DNS rebinding: a web page reaches loopback under its own host name.
        session = await api.create()
        call = f"/sessions/{session['session_id']}/calls"

        for method, path in (("GET", "/livez"), ("GET", "/docs"), ("POST", call)):
            answer = await api.client.request(
                method,
                path,
                json={"tool_name": "read_file"} if path == call else None,
                headers={"host": name},
            )
            assert (answer.status_code, answer.json()["code"]) == (421, "misdirected_request")
        assert await api.calls_made(session["session_id"]) == 0

    async def test_with_keys_any_host_is_served(self, make_api: MakeApi) -> None:
        api = await make_api(api_keys=KEYS)

        answer = await api.client.get("/livez", headers={"host": "arbiter.example"})

        assert answer.status_code == 200

    async def test_a_service_opened_on_purpose_serves_any_host(self, make_api: MakeApi) -> None:
        api = await make_api(allow_unauthenticated=True)

        answer = await api.client.get(f"/agents/{AGENT}", headers={"host": "arbiter.example"})

        assert answer.status_code == 200

    @pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
    async def test_on_loopback_no_key_is_needed(self, api: Api, host: str) -> None:
        answer = await api.client.get(f"http://{host}:8000/sessions/{new_id()}")

        assert answer.status_code == 404

    async def test_it_can_be_opened_on_purpose(self, make_api: MakeApi) -> None:
        api = await make_api(allow_unauthenticated=True)

        answer = await api.client.get(f"http://10.0.0.5:8000/agents/{AGENT}")

        assert answer.status_code == 200


def test_a_new_key_is_accepted_and_its_configuration_hides_the_secret() -> None:
    made, token = new_key("gate", Scope.PROXY)
    name, _, secret = token.partition(".")

    caller = Authenticator([made], allow_unauthenticated=False).identify(
        f"Bearer {token}".encode(), ("10.0.0.5", 8000)
    )

    assert (caller.name, caller.scope, name) == ("gate", Scope.PROXY, "gate")
    assert len(secret) == 43
    assert secret not in str(made)
    assert made.digest not in repr(made)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "gate",
        "gate:proxy",
        "gate:proxy:xyz",
        "gate:boss:" + "0" * 64,
        "a b:proxy:" + "0" * 64,
        "gate:proxy:" + "0" * 63,
        "gate:proxy:" + "A" * 64,
        ":proxy:" + "0" * 64,
        "g:p:r:o",
    ],
)
def test_a_malformed_key_is_refused_without_repeating_it(text: str) -> None:
    with pytest.raises(ValueError, match=r"API key") as refusal:
        ApiKey.parse(text)

    assert not text or text not in str(refusal.value)


def test_secrets_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []

    def spy(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return left == right

    monkeypatch.setattr("app.http.auth.compare_digest", spy)
    authenticator = Authenticator(KEYS, allow_unauthenticated=False)
    for token in (f"gate.{SECRET}", "gate.wrong", "nobody.wrong", "", "gate"):
        try:
            authenticator.identify(f"Bearer {token}".encode(), None)
        except Unauthenticated:
            continue

    # Two for each: as many as a name can have.
    assert compared == [(32, 32)] * 10


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback_is_recognised(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


async def test_the_metrics_route_serves_a_scraper_with_its_key(guarded: Api) -> None:
    answer: httpx.Response = await guarded.client.get(
        "/metrics", headers={"authorization": f"Bearer ops.{SECRET}"}
    )

    assert "arbiter_build_info" in answer.text
