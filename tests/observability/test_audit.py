"""The audit log: its lines, and what happens when they cannot be written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.http.auth import Scope, new_key
from app.observability import audit as audit_module
from app.observability.audit import CLOSED_PER_LINE, NOBODY, Actor, AuditLog
from app.observability.metrics import Metrics
from tests import engines
from tests.engines import until
from tests.services import ROOT, Service, StartService
from tests.support import session_request

AGENT = "7c9e6679-7425-40de-944b-e07fc1f90ae7"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


class Audited:
    """A service with an audit log and two callers."""

    def __init__(self, start_service: StartService, folder: Path, **variables: str) -> None:
        self.file = folder / "audit.log"
        gate, self._gate = new_key("gate", Scope.PROXY)
        ops, self._ops = new_key("ops", Scope.OPERATE)
        self.service: Service = start_service(
            ARBITER_AUDIT_LOG=str(self.file), ARBITER_API_KEYS=f"{gate},{ops}", **variables
        )

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        operates = method != "POST"
        token = self._ops if operates else self._gate
        headers = {"authorization": f"Bearer {token}", "x-request-id": "mine"} | headers
        return httpx.request(method, self.service.url + path, json=body, headers=headers)

    def stop(self) -> list[dict[str, Any]]:
        """Stop the service and return the lines it has written."""
        assert self.service.stop() == 0
        return lines(self.file)


def test_every_decision_and_every_change_is_logged(
    start_service: StartService, tmp_path: Path
) -> None:
    audited = Audited(start_service, tmp_path)
    wanted = session_request(call_budget=3, agent_id=AGENT)
    path = audited.ask("POST", "/sessions", wanted).headers["location"]
    call = {"tool_name": "read_file"}
    audited.ask("POST", f"{path}/calls", call)
    audited.ask("POST", f"{path}/calls", {"tool_name": "rm", "data_sensitivity": "restricted"})
    audited.ask("POST", f"{path}/batch", {"tool_names": ["read_file", "read_file"]})
    audited.ask("POST", f"{path}/calls?dry_run=true", call)
    for _ in range(2):
        audited.ask("DELETE", path)
    audited.ask("POST", f"/sessions/{AGENT}/calls", call)
    audited.ask("DELETE", f"/agents/{AGENT}/sessions")

    written = audited.stop()

    session_id = path.removeprefix("/sessions/")
    told = [(each["event"], each["outcome"]) for each in written]
    assert told == [
        ("start", "done"),
        ("create", "admitted"),
        ("call", "admitted"),
        ("call", "tool_not_authorized"),
        ("batch", "admitted"),
        ("call", "budget_exceeded"),
        ("close", "done"),
        ("close", "session_closed"),
        ("call", "session_not_found"),
        ("close_agent", "done"),
        ("stop", "done"),
    ]
    created, first, denied, batch, dry, closed, *_ = written[1:]
    assert {each.get("session") for each in written[1:8]} == {session_id[:8]}
    assert first["session_sha256"] == sha256(session_id.encode()).hexdigest()
    assert (created["caller"], created["agent_id"]) == ("gate", AGENT)
    assert (first["caller"], first["request_id"]) == ("gate", "mine")
    assert first["tools"] == ["read_file"]
    assert first["before"] == {"calls_made": 0, "rate_window_calls": 0}
    assert first["after"] == {"calls_made": 1, "rate_window_calls": 1}
    assert created["grant"]["authorized_tools"] == wanted["authorized_tools"]
    assert created["grant"]["call_budget"] == 3
    assert denied["violations"] == [
        {"code": "tool_not_authorized", "requested": 1, "tool_indexes": [0]},
        {"code": "sensitivity_exceeded", "ceiling": "internal"},
    ]
    assert dry["violations"] == [
        {"code": "budget_exceeded", "limit": 3, "used": 3, "requested": 1}
    ]
    assert denied["data_sensitivity"] == "restricted"
    assert denied["before"] == denied["after"] == first["after"]
    assert (batch["before"]["calls_made"], batch["after"]["calls_made"]) == (1, 3)
    assert dry["dry_run"]
    assert dry["before"] == dry["after"] == batch["after"]
    assert closed["caller"] == "ops"
    assert written[9]["count"] == 0
    assert session_id not in audited.file.read_text()


def test_the_kill_switch_logs_the_hash_of_each_session(
    start_service: StartService, tmp_path: Path
) -> None:
    audited = Audited(start_service, tmp_path)
    wanted = session_request(agent_id=AGENT)
    made = {
        audited.ask("POST", "/sessions", wanted).json()["session_id"]
        for _ in range(CLOSED_PER_LINE + 1)
    }
    audited.ask("DELETE", f"/agents/{AGENT}/sessions")

    killed = [each for each in audited.stop() if each["event"] == "close_agent"]

    assert [each["count"] for each in killed] == [CLOSED_PER_LINE, 1]
    hashes = [digest for each in killed for digest in each["sessions_sha256"]]
    assert set(hashes) == {sha256(session_id.encode()).hexdigest() for session_id in made}


def test_a_dry_run_that_would_be_admitted_changes_no_counter(
    start_service: StartService, tmp_path: Path
) -> None:
    audited = Audited(start_service, tmp_path)
    path = audited.ask("POST", "/sessions", session_request()).headers["location"]
    audited.ask("POST", f"{path}/calls?dry_run=true", {"tool_name": "read_file"})

    (dry,) = [each for each in audited.stop() if each.get("dry_run")]

    assert dry["outcome"] == "admitted"
    assert dry["before"] == dry["after"] == {"calls_made": 0, "rate_window_calls": 0}


def test_a_replay_is_logged_and_counts_nothing(
    start_service: StartService, tmp_path: Path
) -> None:
    audited = Audited(start_service, tmp_path)
    path = audited.ask("POST", "/sessions", session_request()).headers["location"]
    for _ in range(2):
        audited.ask(
            "POST", f"{path}/calls", {"tool_name": "read_file"}, **{"idempotency-key": "k"}
        )

    *_, replayed, _ = audited.stop()

    assert replayed["outcome"] == "replayed"
    assert replayed["before"] == replayed["after"]


def test_a_call_the_store_could_not_answer_is_logged(
    start_service: StartService, tmp_path: Path, server: engines.Server
) -> None:
    audited = Audited(start_service, tmp_path, ARBITER_STORE_URL=server.url)
    path = audited.ask("POST", "/sessions", session_request()).headers["location"]
    server.pause()
    refused = audited.ask("POST", f"{path}/calls", {"tool_name": "read_file"})
    server.resume()

    *_, failed, _ = audited.stop()

    assert refused.status_code == 503
    assert (failed["event"], failed["outcome"]) == ("call", "store_unavailable")
    assert failed["tools"] == ["read_file"]


def test_sweeps_are_logged(start_service: StartService, tmp_path: Path) -> None:
    audited = Audited(
        start_service,
        tmp_path,
        ARBITER_CLEANUP_INTERVAL_SECS="0.1",
        ARBITER_RETENTION_SECS="0",
    )
    audited.ask("POST", "/sessions", session_request(time_limit_secs=0))
    until(lambda: any(each["event"] == "sweep" for each in lines(audited.file)))

    (swept,) = [each for each in audited.stop() if each["event"] == "sweep"]

    assert swept["count"] == 1


def test_only_the_owner_can_read_the_file(start_service: StartService, tmp_path: Path) -> None:
    audited = Audited(start_service, tmp_path)

    assert audited.file.stat().st_mode & 0o777 == 0o600


def test_a_line_that_a_crash_cut_off_swallows_none(
    start_service: StartService, tmp_path: Path
) -> None:
    (tmp_path / "audit.log").write_text('{"at":"2026-01-01T00:00:00.000000+00:00","ev')
    audited = Audited(start_service, tmp_path)
    audited.service.stop()

    torn, *lines = audited.file.read_text().splitlines()

    assert torn.endswith('"ev')
    assert [json.loads(line)["event"] for line in lines] == ["start", "stop"]


def test_sighup_continues_in_a_new_file(start_service: StartService, tmp_path: Path) -> None:
    audited = Audited(start_service, tmp_path)
    audited.ask("POST", "/sessions", session_request())
    until(lambda: len(lines(audited.file)) == 2)
    moved = audited.file.rename(tmp_path / "audit.log.1")
    audited.service.process.send_signal(1)
    until(audited.file.exists)

    audited.ask("POST", "/sessions", session_request())
    written = audited.stop()

    assert [each["event"] for each in lines(moved)] == ["start", "create"]
    assert [each["event"] for each in written] == ["create", "stop"]


def test_many_sighups_in_a_row_do_no_harm(start_service: StartService, tmp_path: Path) -> None:
    audited = Audited(start_service, tmp_path)
    for _ in range(300):
        audited.service.process.send_signal(1)

    assert httpx.get(f"{audited.service.url}/livez", timeout=10).status_code == 200
    assert [each["event"] for each in audited.stop()] == ["start", "stop"]


def test_a_request_cut_off_at_shutdown_is_logged(
    start_service: StartService, tmp_path: Path, server: engines.Server
) -> None:
    audited = Audited(
        start_service,
        tmp_path,
        ARBITER_STORE_URL=server.url + "?deadline_ms=1500",
        ARBITER_SHUTDOWN_GRACE_SECS="0",
    )
    path = audited.ask("POST", "/sessions", session_request()).headers["location"]
    server.pause()
    with audited.service.connect() as connection:
        head = f"DELETE {path} HTTP/1.1\r\nHost: localhost\r\n"
        head += f"Authorization: Bearer {audited._ops}\r\n"
        connection.sendall(head.encode() + b"\r\n")
        until(lambda: httpx.get(f"{audited.service.url}/livez").status_code == 200)
        written = audited.stop()
    server.resume()

    (cut,) = [each for each in written if each["event"] == "close"]
    assert cut["outcome"] == "shutting_down"


def test_sighup_without_an_audit_log_does_nothing(start_service: StartService) -> None:
    service = start_service()
    service.process.send_signal(1)

    assert httpx.get(f"{service.url}/livez").status_code == 200
    assert service.stop() == 0


def test_stdout_has_the_lines_and_nothing_else(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=os.environ | {"ARBITER_AUDIT_LOG": "stdout", "ARBITER_PORT": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    first = json.loads(process.stdout.readline())
    process.terminate()
    rest, _ = process.communicate(timeout=60)

    assert first["event"] == "start"
    assert json.loads(rest)["event"] == "stop"


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("/nowhere/audit.log", "cannot write the audit log /nowhere/audit.log: No such file"),
        ("/", "cannot write the audit log /: Is a directory"),
        ("audit.log", "ARBITER_AUDIT_LOG: give the absolute path of a file, or stdout"),
        ("", "ARBITER_AUDIT_LOG: give the absolute path of a file, or stdout"),
    ],
)
def test_the_service_does_not_start_with_an_unusable_audit_log(
    target: str, reason: str
) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=os.environ | {"ARBITER_AUDIT_LOG": target, "ARBITER_PORT": "0"},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )

    assert ended.returncode != 0
    assert f"arbiter: {reason}" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.anyio
async def test_a_full_disk_loses_no_more_lines_than_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`/dev/full` fails like a full disk. The log continues once there is room again."""
    monkeypatch.setattr(audit_module, "MAX_WAITING", 100)
    monkeypatch.setattr(audit_module, "RETRY_SECS", 0.01)
    metrics = Metrics()
    log = AuditLog("/dev/full", metrics)
    log.open()
    log.note("create", "admitted", Actor("gate", "0"))
    until(lambda: log._failing)
    for number in range(1, 500):
        log.note("create", "admitted", Actor("gate", str(number)))
    assert metrics.audit_dropped == 399

    # Rotate to a disk that has room.
    log._target = str(tmp_path / "audit.log")
    log.reopen()
    until(lambda: Path(log._target).exists() and not log._waiting)
    await log.aclose()

    written = lines(Path(log._target))
    kept = [each["request_id"] for each in written if each["event"] == "create"]
    (lost,) = [each["count"] for each in written if each["event"] == "lost"]
    assert kept == [str(number) for number in range(101)]
    assert lost == metrics.audit_dropped == 399


@pytest.mark.anyio
async def test_lines_left_unwritten_at_shutdown_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metrics = Metrics()
    log = AuditLog("/dev/full", metrics)
    log.open()
    for _ in range(3):
        log.note("create", "admitted", NOBODY)
    await log.aclose()

    assert metrics.audit_dropped == 3


@pytest.mark.anyio
async def test_a_stalled_reader_does_not_block_the_service(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "CLOSE_WITHIN_SECS", 0.1)
    metrics = Metrics()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = AuditLog(str(pipe), metrics)
    log.open()
    for number in range(100_000):
        log.note("create", "admitted", Actor("gate", str(number)))

    await log.aclose()

    # A pipe holds 64 KiB; the rest is counted as lost.
    assert 98_000 < metrics.audit_dropped < 100_000
    os.close(reader)
