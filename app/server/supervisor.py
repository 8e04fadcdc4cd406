"""The parent of several workers.

uvicorn's own parent restarts its workers at SIGHUP, which can cut off requests. It kills a
worker that takes more than five seconds to start, and ends the service when a replacement
cannot reach its store. This one differs in that:

- A worker may take its time to start. One that cannot start ends the service only if the
  service has not been up yet, because then the configuration is wrong. Later it is tried again.
- SIGHUP is passed on to the workers, each of which takes up the changes itself.
- A stop loses no connection. The workers notice when their parent is gone, and stop too.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import threading
from functools import cached_property
from multiprocessing.connection import Connection, wait
from time import monotonic

from typing_extensions import override
from uvicorn.config import STARTUP_FAILURE, Config
from uvicorn.supervisors import Multiprocess
from uvicorn.supervisors.multiprocess import Process

from app.observability.logs import get_logger
from app.server.drain import DrainingServer
from app.server.sighup import sighup_held_back

BAD_SETTINGS = 2
"""The exit code of a worker that cannot use its settings."""

RETRY_SECS, MAX_RETRY_SECS = 1.0, 10.0
"""How long after a start that failed the next one follows: twice as long each time."""

JOIN_SECS = 0.2
"""How often a parent that waits for its workers to end looks for signals."""


class Worker(Process):
    """A worker, as its parent sees it, and as it runs.

    `lifeline` is readable once the whole service is to stop: its other end belongs to the
    parent alone, and is closed then, at the latest when the parent ends.
    """

    def __init__(
        self,
        config: Config,
        sockets: list[socket.socket],
        lifeline: Connection,
        patience: float,
    ) -> None:
        self._lifeline = lifeline
        self._must_start_by = monotonic() + patience
        self._is_asked = False
        self.has_started = False
        self.retry_at: float | None = None
        """When to replace it, if it could not start. An instant of the monotonic clock."""
        super().__init__(config, sockets)

    # In the worker.

    @cached_property
    def _draining_server(self) -> DrainingServer:
        return DrainingServer(self.config, self._lifeline.poll)

    @property
    @override
    def server(self) -> DrainingServer:
        return self._draining_server

    @override
    def target(self, sockets: list[socket.socket] | None = None) -> None:
        threading.Thread(target=_stop_with_parent, daemon=True).start()
        super().target(sockets)

    # In the parent.

    def is_well(self) -> bool:
        """Return whether the worker answers, or may still be starting."""
        if not self.process.is_alive():
            return False
        if self.has_started:
            return self.ping(self.config.timeout_worker_healthcheck)
        self.has_started = self._says_started()
        return self.has_started or monotonic() < self._must_start_by

    def _says_started(self) -> bool:
        """Ask once, and look for the answer without waiting: it comes when the worker has
        imported the service."""
        try:
            if not self._is_asked:
                self.parent_conn.send(b"ping")
                self._is_asked = True
            if not self.parent_conn.poll():
                return False
            self._is_asked = False
            return bool(self.parent_conn.recv())
        except (OSError, EOFError):
            return False

    def signal(self, number: int) -> None:
        """Send a signal, if the worker still runs."""
        if self.pid is not None and self.exitcode is None:
            os.kill(self.pid, number)


def _stop_with_parent() -> None:
    """Stop this worker when its parent has gone: nobody else would."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


class Supervisor(Multiprocess):
    """Starts workers, each of which may take `start_timeout_secs`, and replaces those that
    end."""

    processes: list[Worker]  # type: ignore[assignment]  # it makes them all

    def __init__(
        self, config: Config, sockets: list[socket.socket], start_timeout_secs: float
    ) -> None:
        super().__init__(config, sockets)
        self._start_timeout_secs = start_timeout_secs
        self._lifeline, self._held = multiprocessing.Pipe(duplex=False)
        self._has_been_up = False
        self._failures: dict[int, int] = {}
        """For each place, the starts that have failed since the last one that has not."""
        self.has_failed = False
        """Whether the service ended because it could not start."""

    def _start_worker(self) -> Worker:
        worker = Worker(self.config, self.sockets, self._lifeline, self._start_timeout_secs)
        # A worker that is still starting has no handler yet, and the signal would end it.
        with sighup_held_back():
            worker.start()
        return worker

    @override
    def init_processes(self) -> None:
        self.processes = [self._start_worker() for _ in range(self.processes_num)]

    @override
    def keep_subprocess_alive(self) -> None:
        for place, worker in enumerate(self.processes):
            if self.should_exit.is_set():
                return
            if worker.is_well():
                if worker.has_started:
                    self._failures.pop(place, None)
                continue
            if worker.process.is_alive():
                get_logger().error("worker does not answer", worker=worker.pid)
                worker.kill()
            worker.join()
            if not worker.has_started and not self._may_try_again(place, worker):
                continue
            get_logger().warning("worker ended", worker=worker.pid, code=worker.exitcode)
            self.processes[place] = self._start_worker()
        if all(worker.has_started for worker in self.processes):
            if not self._has_been_up:
                get_logger().info("all workers have started", workers=len(self.processes))
            self._has_been_up = True

    def _may_try_again(self, place: int, worker: Worker) -> bool:
        """Return whether to replace a worker that could not start, now."""
        cannot_start = worker.exitcode in {STARTUP_FAILURE, BAD_SETTINGS}
        if cannot_start and not self._has_been_up:
            self.has_failed = True
            self.should_exit.set()
            return False
        now = monotonic()
        if worker.retry_at is None:
            failures = self._failures.get(place, 0)
            self._failures[place] = failures + 1
            delay_secs = min(RETRY_SECS * 2**failures, MAX_RETRY_SECS)
            get_logger().error("worker cannot start", worker=worker.pid, retry_secs=delay_secs)
            worker.retry_at = now + delay_secs
        return now >= worker.retry_at

    @override
    def terminate_all(self) -> None:
        # Close these first: then a worker that gets the signal sees that the whole service
        # stops, and the last worker to close its copy of a socket closes the socket.
        self._held.close()
        for each in self.sockets:
            each.close()
        for worker in self.processes:
            worker.signal(signal.SIGTERM)

    @override
    def join_all(self) -> None:
        while running := [
            each.process.sentinel for each in self.processes if each.process.is_alive()
        ]:
            wait(running, timeout=JOIN_SECS)
            again = [each for each in self.signal_queue if each in _STOPPING]
            self.signal_queue.clear()
            for number in again:
                # A second signal ends the delay before the stop.
                for worker in self.processes:
                    worker.signal(number)

    @override
    def handle_hup(self) -> None:
        for worker in self.processes:
            worker.signal(signal.SIGHUP)

    @override
    def handle_ttin(self) -> None:
        self.processes_num += 1
        self.processes.append(self._start_worker())


_STOPPING = frozenset({signal.SIGTERM, signal.SIGINT})
