"""SIGHUP and a changed key file: taken up while requests go on, on every store."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.http.auth import ApiKey, Scope, new_key
from tests.conftest import PATIENTLY
from tests.engines import single, until
from tests.services import StartService, running
from tests.support import session_request

OLD, OLD_TOKEN = new_key("gate", Scope.PROXY)
NEW, NEW_TOKEN = new_key("gate", Scope.PROXY)
OPS, OPS_TOKEN = new_key("ops", Scope.ADMIN)
WORKERS = 2
STORES = ["memory", "redis with workers"]


class Rotated:
    """A service with a key file."""

    def __init__(self, start: StartService, folder: Path, store: str, **variables: str) -> None:
        self.file = folder / "keys"
        self.write(OLD)
        self.workers = 1
        if store != "memory":
            self.workers = WORKERS
            variables["ARBITER_STORE_URL"] = single().url + PATIENTLY
            variables["ARBITER_WORKERS"] = str(WORKERS)
        self.service = start(
            ARBITER_API_KEYS=str(OPS), ARBITER_API_KEYS_FILE=str(self.file), **variables
        )
        # Every worker, not only the first that is ready.
        until(lambda: len(self.logged("starting")) == self.workers)
        self.session = self.ask("POST", "/sessions", json=session_request()).json()[
            "session_id"
        ]

    def ask(
        self, method: str, path: str, token: str = OPS_TOKEN, **more: Any
    ) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"}
        return httpx.request(
            method, self.service.url + path, headers=headers, timeout=30, **more
        )

    def write(self, *keys: ApiKey | str) -> None:
        new = self.file.with_suffix(".new")
        new.write_text("".join(f"{key}\n" for key in keys))
        new.rename(self.file)

    def logged(self, event: str) -> list[str]:
        return [line for line in [*self.service.log] if f'"event": "{event}"' in line]

    def reload(self, event: str = "API keys reloaded") -> None:
        """Send SIGHUP, and wait until each worker has logged the event once more."""
        expected = len(self.logged(event)) + self.workers
        self.service.process.send_signal(signal.SIGHUP)
        until(lambda: len(self.logged(event)) >= expected)

    def call(self, token: str) -> int:
        path = f"/sessions/{self.session}/calls"
        return self.ask("POST", path, token, json={"tool_name": "read_file"}).status_code

    def call_each_worker(self, token: str) -> set[int]:
        # Each on a new connection, and any worker may take it.
        return {self.call(token) for _ in range(20)}

    @contextmanager
    def under_load(self) -> Iterator[list[str]]:
        """Read the session with a key that stays, from two clients that keep their connection
        and two that do not. Yield what they got instead of 200."""
        lost: list[str] = []
        served = [0, 0, 0, 0]
        over = threading.Event()

        def load(number: int) -> None:
            lasting = number % 2 == 0
            headers = {"authorization": f"Bearer {OPS_TOKEN}"}
            with httpx.Client(base_url=self.service.url, headers=headers, timeout=30) as client:
                while not over.is_set():
                    try:
                        answer = client.get(
                            f"/sessions/{self.session}",
                            headers={} if lasting else {"connection": "close"},
                        )
                    except httpx.HTTPError as error:
                        lost.append(repr(error))
                    else:
                        served[number] += 1
                        if answer.status_code != 200:
                            lost.append(answer.text)

        threads = [threading.Thread(target=load, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        until(lambda: all(served))
        try:
            yield lost
            before = served.copy()
            until(lambda: all(now > then for now, then in zip(served, before, strict=True)))
        finally:
            over.set()
            for thread in threads:
                thread.join(timeout=30)


@pytest.mark.parametrize("store", STORES)
def test_a_key_is_rotated_without_losing_a_request_or_a_session(
    start_service: StartService, tmp_path: Path, store: str
) -> None:
    rotated = Rotated(start_service, tmp_path, store)
    with rotated.under_load() as lost:
        assert rotated.call_each_worker(OLD_TOKEN) == {200}
        assert rotated.call_each_worker(NEW_TOKEN) == {401}

        rotated.write(OLD, NEW)
        rotated.reload()
        assert rotated.call_each_worker(OLD_TOKEN) == {200}
        assert rotated.call_each_worker(NEW_TOKEN) == {200}

        rotated.write(NEW)
        rotated.reload()
        assert rotated.call_each_worker(OLD_TOKEN) == {401}
        assert rotated.call_each_worker(NEW_TOKEN) == {200}

    assert lost == []
    session = rotated.ask("GET", f"/sessions/{rotated.session}").json()
    assert session["calls_made"] == 80
    # Nothing was restarted, and the parent is alive.
    assert len(rotated.logged("starting")) == rotated.workers
    assert rotated.service.stop() == 0
    said = "".join(rotated.service.log)
    assert '"keys": 3' in said
    for secret in (OLD_TOKEN, NEW_TOKEN, OLD.digest, NEW.digest, OPS.digest):
        assert secret.rpartition(".")[2] not in said


@pytest.mark.parametrize("store", STORES)
def test_a_change_of_the_file_needs_no_signal(
    start_service: StartService, tmp_path: Path, store: str
) -> None:
    rotated = Rotated(start_service, tmp_path, store)

    rotated.write(NEW)
    until(lambda: len(rotated.logged("API keys reloaded")) == rotated.workers)

    assert rotated.call_each_worker(OLD_TOKEN) == {401}
    assert rotated.call_each_worker(NEW_TOKEN) == {200}


@pytest.mark.parametrize("store", STORES)
def test_a_faulty_file_changes_nothing_but_the_log(
    start_service: StartService, tmp_path: Path, store: str
) -> None:
    rotated = Rotated(start_service, tmp_path, store)

    rotated.write(NEW, f"gate:nobody:{NEW.digest}")
    rotated.reload("API keys not reloaded")

    assert rotated.call_each_worker(OLD_TOKEN) == {200}
    assert rotated.call_each_worker(NEW_TOKEN) == {401}
    faults = rotated.logged("API keys not reloaded")
    assert len(faults) == rotated.workers
    assert all(f"{rotated.file}, line 2: " in each for each in faults)
    assert NEW.digest not in "".join(rotated.service.log)


def test_ceilings_follow_the_file(start_service: StartService, tmp_path: Path) -> None:
    rotated = Rotated(start_service, tmp_path, "memory")
    request = session_request(call_budget=11)
    assert rotated.ask("POST", "/sessions", OLD_TOKEN, json=request).status_code == 201

    rotated.write(f"{OLD} max_call_budget=10")
    rotated.reload()

    refused = rotated.ask("POST", "/sessions", OLD_TOKEN, json=request)
    assert (refused.status_code, refused.json()["code"]) == (403, "grant_exceeds_key")


def test_the_log_level_follows_sighup(tmp_path: Path) -> None:
    def admitted() -> int:
        return sum('"event": "calls admitted"' in line for line in [*service.log])

    env_file = tmp_path / ".env"
    with running(folder=tmp_path) as service, httpx.Client(base_url=service.url) as client:
        path = client.post("/sessions", json=session_request()).headers["location"]

        def reload(level: str, event: str) -> None:
            seen = sum(f'"event": "{event}"' in line for line in [*service.log])
            env_file.write_text(f"ARBITER_LOG_LEVEL={level}\n")
            service.process.send_signal(signal.SIGHUP)
            until(lambda: sum(f'"event": "{event}"' in line for line in [*service.log]) > seen)

        def call() -> None:
            answer = client.post(f"{path}/calls", json={"tool_name": "read_file"})
            assert answer.status_code == 200

        call()
        reload("debug", "log level reloaded")
        call()
        until(lambda: admitted() == 1)
        # A fault changes nothing but the log, and the rest is still reloaded.
        reload("loud", "log level not reloaded")
        call()
        until(lambda: admitted() == 2)
        reload("info", "log level reloaded")
        call()
        assert service.stop() == 0

    assert admitted() == 2


def children(pid: int) -> list[int]:
    """Return the workers of a parent."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(each)
        for each in found
        if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]


def has_open(pid: int, file: Path) -> bool:
    """Return whether a process has the file open."""
    opened = Path(f"/proc/{pid}/fd").iterdir()
    return any(os.path.realpath(each) == str(file) for each in opened)


def test_a_worker_that_is_still_starting_survives_sighup(
    start_service: StartService, tmp_path: Path
) -> None:
    rotated = Rotated(start_service, tmp_path, "redis with workers")
    parent = rotated.service.process.pid
    before = children(parent)
    assert len(before) == WORKERS

    os.kill(before[0], signal.SIGKILL)
    started: set[int] = set()

    def signalled_until_started() -> bool:
        started.update(children(parent))
        rotated.service.process.send_signal(signal.SIGHUP)
        return len(rotated.logged("starting")) == WORKERS + 1

    until(signalled_until_started)
    rotated.write(NEW)
    rotated.reload()

    assert len(started - {*before}) == 1
    assert len(rotated.logged("starting")) == WORKERS + 1
    until(lambda: rotated.call_each_worker(NEW_TOKEN) == {200})


def test_workers_continue_their_audit_log_in_a_new_file(
    start_service: StartService, tmp_path: Path
) -> None:
    log = tmp_path / "audit.log"
    rotated = Rotated(start_service, tmp_path, "redis with workers", ARBITER_AUDIT_LOG=str(log))
    until(lambda: '"create"' in log.read_text())
    moved = log.rename(tmp_path / "audit.log.1")

    rotated.reload()
    workers = children(rotated.service.process.pid)
    until(lambda: not any(has_open(worker, moved) for worker in workers))
    rotated.call_each_worker(OLD_TOKEN)
    rotated.service.stop()

    def events(file: Path) -> list[str]:
        return [json.loads(line)["event"] for line in file.read_text().splitlines()]

    assert sorted(events(moved)) == ["create", "start", "start"]
    assert sorted(events(log)) == ["call"] * 20 + ["stop"] * 2
