"""Stop without losing a request: report not ready, go on serving for a while, then stop."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn
from typing_extensions import override

from app.observability.logs import get_logger
from app.server.gate import Gate

_SO_ATTACH_FILTER = 26
"""Linux, asm-generic/socket.h."""

_DROP_SYN = (
    # Classic BPF (linux/filter.h): load the byte with the flags, and drop what has SYN set.
    struct.pack("@HBBI", 0x30, 0, 0, 13),
    struct.pack("@HBBI", 0x45, 0, 1, 0x02),
    struct.pack("@HBBI", 0x06, 0, 0, 0),
    struct.pack("@HBBI", 0x06, 0, 0, 0xFFFFFFFF),
)


class DrainingServer(uvicorn.Server):
    """A server that answers every connection the system has let in before it stops.

    uvicorn closes the listening socket at once, which resets the connections in its backlog.
    Here they are accepted first, while the system holds new connections back. Their clients
    are refused before they have sent anything.

    Workers share the socket. So it is held back only if `service_stops`: a worker that stops
    alone leaves its connections to the others.
    """

    def __init__(
        self, config: uvicorn.Config, service_stops: Callable[[], bool] = lambda: True
    ) -> None:
        super().__init__(config)
        self._service_stops = service_stops

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # It may have been told to stop while it imported the service.
        if not self.should_exit:
            await super().startup(sockets)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._service_stops():
            for each in sockets or []:
                hold_back_connections(each)
            # The event loop accepts one connection a turn.
            for _ in range(self.config.backlog + 1):
                await asyncio.sleep(0)
        await super().shutdown(sockets)


@contextmanager
def ending_at_once() -> Iterator[None]:
    """End the process at SIGTERM or SIGINT within this block, which waits for the store.

    It may wait in a thread, which cannot be cancelled. Nothing has been served yet, so there is
    nothing to finish.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_signal(_: int, __: FrameType | None) -> None:
        # Nothing is logged: the handler may run while a line is being written, under its lock.
        os._exit(0)

    before = {number: signal.signal(number, on_signal) for number in _STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_STOPPING = (signal.SIGTERM, signal.SIGINT)


def hold_back_connections(listening: socket.socket) -> None:
    """Make a listening socket take no new connections, while its backlog can be accepted.

    A packet filter drops every SYN. Clients send theirs again until the socket is closed, and
    are then refused. Without packet filters the backlog is only made as short as possible, and
    a connection can still slip in.
    """
    listening.listen(0)
    program = ctypes.create_string_buffer(b"".join(_DROP_SYN))
    described = struct.pack("@HP", len(_DROP_SYN), ctypes.addressof(program))
    with suppress(OSError):
        listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, described)


class Drain:
    """The way from SIGTERM to the stop.

    `/readyz` is 503 at once and every response closes its connection, so that load balancers
    and clients go elsewhere. After `delay_secs`, or at a second SIGTERM, the server stops and
    finishes the requests in flight.
    """

    def __init__(self, gate: Gate, retire: Callable[[], None], delay_secs: float) -> None:
        self._gate = gate
        self._retire = retire
        self._delay_secs = delay_secs

    @contextmanager
    def handle_sigterm(self) -> Iterator[None]:
        """Handle SIGTERM before the server's own handler does, if there is one."""
        stop = signal.getsignal(signal.SIGTERM)
        if not callable(stop):
            # No server: a test runs the lifespan alone.
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
