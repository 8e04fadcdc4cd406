"""A whole answer in one write, past uvicorn's two-message `send`.

Measured under load, uvicorn's own `send` took a third of the time of a call: it checks
every header against two patterns and handles the body in a second step. Our answers need
neither: they are whole, and every header is made by us.

This reaches into uvicorn's request cycle. Anything but the very class it was written for,
or a connection in any but the ordinary state, is left to the ASGI way; the end-to-end tests
compare both byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from app.http.response import Headers, RawResponse

CLOSE = (b"connection", b"close")


def encode_response(response: RawResponse, before: Headers, after: Headers) -> bytes:
    """The bytes of an answer, with headers before and after its own."""
    lines = map(b": ".join, (*before, *response.headers, *after))
    return b"%b%b\r\n\r\n%b" % (
        STATUS_LINE[response.status],
        b"\r\n".join(lines),
        response.body,
    )


def send_directly(send: Callable[..., Any], response: RawResponse, extra: Headers) -> bool:
    """Write the answer with its headers and `extra`. False if nothing was written, and the
    answer has to be sent the ASGI way."""
    cycle = getattr(send, "__self__", None)
    if (
        type(cycle) is not RequestResponseCycle
        or cycle.response_started
        or cycle.disconnected
        or cycle.access_log
        or cycle.flow.write_paused
    ):
        return False
    if not cycle.keep_alive:
        extra = [*extra, CLOSE]
    cycle.response_started = cycle.response_complete = True
    cycle.waiting_for_100_continue = False
    cycle.transport.write(encode_response(response, cycle.default_headers, extra))
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True
