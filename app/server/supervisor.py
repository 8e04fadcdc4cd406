"""The parent of several workers."""

from __future__ import annotations

import os
import signal

from typing_extensions import override
from uvicorn.supervisors import Multiprocess

from app.server.sighup import sighup_held_back


class Supervisor(Multiprocess):
    """Starts workers, replaces those that die, and passes SIGHUP on to all of them.

    uvicorn restarts the workers at SIGHUP, which can cut off requests. Here each takes up the
    changes itself. A worker that is still starting has no handler yet, and the signal would
    end it, so it starts with the signal held back.
    """

    @override
    def handle_hup(self) -> None:
        for worker in self.processes:
            if worker.pid is not None and worker.exitcode is None:
                os.kill(worker.pid, signal.SIGHUP)

    @override
    def init_processes(self) -> None:
        with sighup_held_back():
            super().init_processes()

    @override
    def keep_subprocess_alive(self) -> None:
        with sighup_held_back():
            super().keep_subprocess_alive()

    @override
    def handle_ttin(self) -> None:
        with sighup_held_back():
            super().handle_ttin()
