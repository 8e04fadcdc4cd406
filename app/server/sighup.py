"""SIGHUP: take up what has changed outside, without a restart."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handle_sighup(*actions: Callable[[], None]) -> Iterator[None]:
    """Run the actions in the event loop at SIGHUP. Signals in quick succession are one.

    Without a handler the signal would end the process.
    """
    if threading.current_thread() is not threading.main_thread():
        # Only the main thread can set signal handlers; a test may run the lifespan in another.
        yield
        return
    loop = asyncio.get_running_loop()
    due = False

    def run() -> None:
        nonlocal due
        due = False
        for action in actions:
            action()

    def on_signal(_: int, __: FrameType | None) -> None:
        nonlocal due
        if not due:
            due = True
            loop.call_soon_threadsafe(run)

    before = signal.signal(signal.SIGHUP, on_signal)
    # A worker starts with the signal held back (`app.server.supervisor`).
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.signal(signal.SIGHUP, before)


@contextmanager
def sighup_held_back() -> Iterator[None]:
    """Hold SIGHUP back, in this process and in those that it starts meanwhile. Each gets the
    signal when it lets it through again."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
