"""Stopping without losing a request: first say so, then go on for a while, then stop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from app.observability.logs import get_logger
from app.server.gate import Gate


class Drain:
    """What SIGTERM begins. `/readyz` is 503 at once and every answer ends its connection, so
    that load balancers and clients go elsewhere; `delay_secs` later, or at a second SIGTERM,
    the server is told to stop, which finishes what it has begun."""

    def __init__(self, gate: Gate, retire: Callable[[], None], delay_secs: float) -> None:
        self._gate = gate
        self._retire = retire
        self._delay_secs = delay_secs

    @contextmanager
    def handle_sigterm(self) -> Iterator[None]:
        """Stand in front of the server's own handler, if it has one."""
        stop = signal.getsignal(signal.SIGTERM)
        if not callable(stop):
            # Nobody serves: a test runs the lifespan alone.
            yield
            return
        loop = asyncio.get_running_loop()

        def stop_now() -> None:
            stop(signal.SIGTERM, None)

        def begin() -> None:
            if self._gate.draining:
                stop_now()
                return
            get_logger().info("stopping", delay_secs=self._delay_secs)
            self._retire()
            self._gate.draining = True
            loop.call_later(self._delay_secs, stop_now)

        def on_signal(_: int, __: FrameType | None) -> None:
            loop.call_soon_threadsafe(begin)

        signal.signal(signal.SIGTERM, on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, stop)
