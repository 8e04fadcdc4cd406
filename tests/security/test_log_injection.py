"""Nothing that a client sends can forge, break or colour a log line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from app.http.auth import Scope, new_key
from tests.services import Service, running
from tests.support import session_request

FORGED = '{"event": "session closed", "level": "info"}'
TEXTS = {
    "a new line": f"tidy up\n{FORGED}",
    "a carriage return": f"tidy up\r{FORGED}",
    "line separators": f"tidy up\u2028{FORGED}\u2029{FORGED}\x85{FORGED}",
    "escape sequences": "tidy \x1b[2K\x1b[1A\x1b]0;owned\x07 up",
    "a C1 control": "tidy \x9b2J up",
    "backspaces": "tidy\b\b\b\b up",
    "right to left": "tidy \u202e\u2066 up",
    "NUL": "tidy \0 up",
    "formats": "%s %(event)s {event} {0.__class__} ${jndi:ldap://127.0.0.1/a}",
    "quotes": '"}, {"event": "session closed"',
}


class Logged:
    """A service that logs everything it can."""

    def __init__(self, service: Service, audit: Path, token: str) -> None:
        self.service = service
        self._audit = audit
        self._token = token

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> int:
        headers = {"authorization": f"Bearer {self._token}"} | headers
        content = None if body is None else json.dumps(body)
        headers |= {"content-type": "application/json"}
        return httpx.request(
            method, self.service.url + path, content=content, headers=headers
        ).status_code

    def lines(self) -> list[str]:
        # Not `splitlines`, which splits at more characters than those that end a log line.
        return [*self.service.log, *self._audit.read_text().split("\n")[:-1]]


@pytest.fixture(scope="module", params=["json", "console"])
def logged(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Logged]:
    key, token = new_key("gate", Scope.ADMIN)
    audit = tmp_path_factory.mktemp("audit") / "audit.log"
    with running(
        ARBITER_LOG_FORMAT=request.param,
        ARBITER_LOG_LEVEL="debug",
        ARBITER_API_KEYS=str(key),
        ARBITER_AUDIT_LOG=str(audit),
    ) as service:
        yield Logged(service, audit, token)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_client_input_cannot_forge_a_line(logged: Logged, text: str) -> None:
    logged.ask("POST", "/sessions", session_request(declared_intent=text))
    logged.ask("POST", "/sessions", session_request(agent_id=text))
    logged.ask("POST", "/sessions", session_request(authorized_tools=[text]))
    logged.ask("POST", "/sessions", session_request(delegation_chain_snapshot=[text]))
    logged.ask("POST", "/sessions", {text: text})
    quoted = quote(text, safe="")
    for path in ("/", "/sessions/", "/agents/", "/sessions?cursor="):
        logged.ask("GET", path + quoted)
    logged.ask("GET", "/sessions", **{"x-request-id": "%0a" + FORGED})
    raw = text.encode("utf-8").replace(b"\n", b" ").replace(b"\r", b" ")
    for head in (b"GET / HTTP/1.1\r\nHost: " + raw, b"GET /" + raw, raw):
        logged.service.exchange(head + b"\r\n\r\n")

    for line in logged.lines():
        text_of_line = line.removesuffix("\n")
        assert text_of_line.isprintable(), repr(line)
        if text_of_line.startswith("{"):
            event = json.loads(text_of_line)
            assert event["event"] != "session closed"


def test_the_logs_were_written(logged: Logged) -> None:
    """Make sure that the test above does not pass on empty logs."""
    logged.ask("POST", "/sessions", session_request())

    assert any("session created" in line for line in logged.lines())
    assert any('"create"' in line for line in logged.lines())
