"""What goes over a connection, and when: reading that can be held, writing that is watched."""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios

from typing_extensions import override
from uvicorn.protocols.http.flow_control import FlowControl


class HoldableFlow(FlowControl):
    """Flow control that others do not resume while it is held: uvicorn's own does so whenever
    an application asks for its body."""

    held = False

    @override
    def resume_reading(self) -> None:
        if not self.held:
            super().resume_reading()

    def hold(self) -> None:
        """Read no more until released."""
        self.held = True
        self.pause_reading()

    def release(self) -> None:
        """Read on."""
        self.held = False
        self.resume_reading()


def unsent_bytes(transport: asyncio.Transport) -> int:
    """What the client has not taken yet: here, and in the system's buffer, which can hold
    megabytes and asks for more only when a third of them has gone."""
    here = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    try:
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        # Not every system tells.
        return here
    return here + int.from_bytes(queued, sys.byteorder)
