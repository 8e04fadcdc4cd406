"""What the parent makes of its workers. Real ones are in `tests/e2e/test_supervision.py`."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from uvicorn.config import STARTUP_FAILURE
from uvicorn.supervisors.multiprocess import SIGNALS

from app.server import supervisor
from app.server.supervisor import MAX_RETRY_SECS, RETRY_SECS, Supervisor, Worker

PATIENCE = 60.0


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeWorker:
    """A worker as its parent sees it."""

    class process:  # noqa: N801 - the attribute of a real one
        @staticmethod
        def is_alive() -> bool:
            return False

    pid = 1

    def __init__(self) -> None:
        self.well = True
        self.has_started = False
        self.retry_at: float | None = None
        self.exitcode: int | None = None

    def is_well(self) -> bool:
        return self.well

    def join(self) -> None:
        pass

    def end(self, code: int) -> None:
        self.well, self.exitcode = False, code


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(supervisor, "monotonic", clock)
    return clock


@pytest.fixture
def parent(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervisor]:
    before = {each: signal.getsignal(each) for each in SIGNALS}
    config = uvicorn.Config("app.main:app", workers=2, log_config=None)
    parent = Supervisor(config, [], PATIENCE)
    monkeypatch.setattr(parent, "_start_worker", FakeWorker)
    parent.init_processes()
    yield parent
    for number, handler in before.items():
        signal.signal(number, handler)


def fakes(parent: Supervisor) -> list[Any]:
    return list(parent.processes)


@pytest.mark.parametrize("code", [STARTUP_FAILURE, supervisor.BAD_SETTINGS])
def test_a_first_start_that_fails_ends_the_service(parent: Supervisor, code: int) -> None:
    fakes(parent)[0].end(code)
    parent.keep_subprocess_alive()

    assert parent.should_exit.is_set()
    assert parent.has_failed


def test_a_worker_that_has_served_is_replaced_at_once(parent: Supervisor) -> None:
    first, second = fakes(parent)
    first.has_started = second.has_started = True
    parent.keep_subprocess_alive()
    first.end(-9)
    parent.keep_subprocess_alive()

    assert fakes(parent)[0] is not first
    assert fakes(parent)[1] is second


@pytest.mark.parametrize("code", [STARTUP_FAILURE, supervisor.BAD_SETTINGS])
def test_later_a_start_that_fails_is_tried_again_less_and_less_often(
    parent: Supervisor, clock: Clock, code: int
) -> None:
    for each in fakes(parent):
        each.has_started = True
    parent.keep_subprocess_alive()
    fakes(parent)[0].end(-9)
    parent.keep_subprocess_alive()
    delays = []
    for _ in range(6):
        failed = fakes(parent)[0]
        failed.end(code)
        started = clock.now
        while fakes(parent)[0] is failed:
            parent.keep_subprocess_alive()
            clock.now += 0.5
        delays.append(clock.now - started - 0.5)

    assert delays == [RETRY_SECS, 2.0, 4.0, 8.0, MAX_RETRY_SECS, MAX_RETRY_SECS]
    assert not parent.should_exit.is_set()


def test_workers_that_cannot_start_wait_together(parent: Supervisor, clock: Clock) -> None:
    for each in fakes(parent):
        each.has_started = True
    parent.keep_subprocess_alive()
    for each in fakes(parent):
        each.has_started = False
        each.end(STARTUP_FAILURE)
    failed = fakes(parent)
    parent.keep_subprocess_alive()
    assert fakes(parent) == failed

    clock.now += RETRY_SECS
    parent.keep_subprocess_alive()

    assert all(each.well for each in fakes(parent))


def test_a_worker_may_take_its_time_to_start(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = uvicorn.Config("app.main:app", log_config=None)
    here, there = supervisor.multiprocessing.Pipe(duplex=False)
    with socket.socket() as unused, here, there:
        worker = Worker(config, [unused], here, PATIENCE)
        monkeypatch.setattr(worker.process, "is_alive", lambda: True)
        clock.now += PATIENCE - 0.1
        assert worker.is_well()

        clock.now += 0.1
        assert not worker.is_well()

        worker.child_conn.recv()
        worker.child_conn.send(True)
        assert worker.is_well()
        assert worker.has_started
