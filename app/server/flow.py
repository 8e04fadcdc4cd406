"""How much of a connection is unread and unsent."""

from __future__ import annotations

import asyncio
import fcntl
import sys
import termios


def unread_bytes(transport: asyncio.Transport) -> int:
    """Bytes that the client has sent and we have not read; 0 where the system does not say."""
    connection = transport.get_extra_info("socket")
    try:
        queued = fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4))
    except (OSError, ValueError):
        return 0
    return int.from_bytes(queued, sys.byteorder)


def unsent_bytes(transport: asyncio.Transport) -> int:
    """Bytes that the client has not taken yet, in our buffer and in the system's. The system's
    can hold megabytes, and reports room only when a third of it is free."""
    here = transport.get_write_buffer_size()
    connection = transport.get_extra_info("socket")
    try:
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
    except (OSError, ValueError):
        # Not every system says, nor does a socket that is closed.
        return here
    return here + int.from_bytes(queued, sys.byteorder)
