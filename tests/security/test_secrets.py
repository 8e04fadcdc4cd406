"""Secrets appear in no log, error, response, `repr` or `config`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from app.domain.capacity import StoreLimits
from app.http.auth import Authenticator, Scope, new_key
from app.settings import Settings
from app.store import open_store
from tests import engines
from tests.services import ROOT, StartService
from tests.support import session_request

KEY, TOKEN = new_key("gate", Scope.ADMIN)
SECRET = TOKEN.partition(".")[2]
PASSWORD = "pass-word-of-the-engine"
SECRETS = (SECRET, KEY.digest, PASSWORD)
STORE_URLS = {
    "a password": "redis://user:{}@127.0.0.1:1/0",
    "a password alone": "redis://:{}@127.0.0.1:1/0",
    "a password in the query": "redis://127.0.0.1:1/0?password={}",
    "a cluster": "redis+cluster://user:{}@127.0.0.1:1",
    "sentinels": "redis+sentinel://user:{}@127.0.0.1:1/main",
    "an unknown scheme": "postgres://user:{}@127.0.0.1/",
    "an invalid port": "redis://user:{}@127.0.0.1:many/0",
    "a bracket": "redis://user:{}@[127.0.0.1/0",
}


def run(*arguments: str, **variables: str) -> str:
    """Run a command and return everything it prints."""
    ended = subprocess.run(
        [sys.executable, "-m", "app", *arguments],
        cwd=ROOT,
        env=os.environ | {"ARBITER_PORT": "0"} | variables,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    return ended.stdout + ended.stderr


@pytest.mark.parametrize("url", STORE_URLS.values(), ids=STORE_URLS)
@pytest.mark.parametrize("command", ["serve", "config", "backup"])
def test_a_failing_store_url_is_not_echoed(url: str, command: str, tmp_path: Path) -> None:
    arguments = ["backup", str(tmp_path / "copy")] if command == "backup" else [command]
    said = run(*arguments, ARBITER_STORE_URL=url.format(PASSWORD))

    assert said
    assert PASSWORD not in said


@pytest.mark.parametrize(
    "keys",
    [
        f"gate:proxy:{SECRET}",
        f"gate:{SECRET}",
        SECRET,
        TOKEN,
        f"gate:nobody:{KEY.digest}",
        f"{KEY},{KEY}",
        f"gate:proxy:{KEY.digest}0",
    ],
    ids=["secret for digest", "two parts", "secret", "token", "scope", "twice", "too long"],
)
def test_misconfigured_keys_are_not_echoed(keys: str) -> None:
    said = run(ARBITER_API_KEYS=keys)

    assert "ARBITER_API_KEYS" in said
    assert not [secret for secret in SECRETS if secret in said]


@pytest.mark.parametrize(
    "line",
    [f"gate:proxy:{SECRET}", TOKEN, f"{KEY} {SECRET}", f"{KEY}\n{KEY}"],
    ids=["secret for digest", "token", "secret for a limit", "twice"],
)
def test_a_misconfigured_key_file_is_not_echoed(tmp_path: Path, line: str) -> None:
    file = tmp_path / "keys"
    file.write_text(line)

    said = run(ARBITER_API_KEYS_FILE=str(file))

    assert "ARBITER_API_KEYS_FILE: " in said
    assert not [secret for secret in SECRETS if secret in said]


def test_config_prints_no_secret() -> None:
    url = f"redis://user:{PASSWORD}@127.0.0.1:1/0"
    said = run("config", ARBITER_API_KEYS=str(KEY), ARBITER_STORE_URL=url)

    assert "ARBITER_API_KEYS=gate:admin:***" in said
    assert "redis://user:***@127.0.0.1:1/0" in said
    assert not [secret for secret in SECRETS if secret in said]


def test_no_repr_shows_a_secret() -> None:
    url = f"redis://user:{PASSWORD}@127.0.0.1:1/0"
    settings = Settings(_env_file=None, api_keys=(KEY,), store_url=url)
    holders = [KEY, settings.api_keys, Authenticator([KEY], allow_unauthenticated=False)]
    holders += [open_store(url, StoreLimits())]

    for holder in holders:
        assert not [secret for secret in SECRETS if secret in repr(holder)]
    assert not [secret for secret in (SECRET, KEY.digest) if secret in repr(settings)]
    assert PASSWORD not in repr(settings)


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_running_service_reveals_no_secret(
    start_service: StartService, server: engines.Server, tmp_path: Path, log_format: str
) -> None:
    server.client.config_set("requirepass", PASSWORD)
    audit = tmp_path / "audit.log"
    service = start_service(
        ARBITER_API_KEYS=str(KEY),
        ARBITER_STORE_URL=f"redis://:{PASSWORD}@127.0.0.1:{server.port}/0",
        ARBITER_LOG_FORMAT=log_format,
        ARBITER_LOG_LEVEL="debug",
        ARBITER_AUDIT_LOG=str(audit),
    )
    answers: list[httpx.Response] = []

    def ask(method: str, path: str, token: str = TOKEN, **more: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"}
        answer = httpx.request(method, service.url + path, headers=headers, **more)
        answers.append(answer)
        return answer

    session_id = ask("POST", "/sessions", json=session_request()).json()["session_id"]
    ask("POST", f"/sessions/{session_id}/calls", json={"tool_name": "rm"})
    ask("POST", f"/sessions/{session_id}/calls", json={"tool_name": SECRET, "x": TOKEN})
    ask("GET", "/sessions", token=f"gate.{SECRET}x")
    ask("GET", f"/{SECRET}")
    ask("GET", f"/sessions?cursor={TOKEN}")
    ask("GET", "/metrics")
    # An outage: its errors come from the driver.
    server.client.config_set("requirepass", "another")
    server.client.client_kill_filter(_type="normal", skipme=True)
    ask("POST", f"/sessions/{session_id}/calls", json={"tool_name": "read_file"})
    service.stop()

    said = "".join(service.log) + audit.read_text()
    assert session_id[:8] in said
    for secret in (*SECRETS, TOKEN, session_id):
        assert secret not in said
    for answer in answers:
        assert not [secret for secret in SECRETS if secret in answer.text + str(answer.headers)]
    server.client.config_set("requirepass", "")
