"""The request id: the one that the client sent, or a new one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from secrets import token_hex

REQUEST_ID = b"x-request-id"

_ACCEPTED = re.compile(rb"[A-Za-z0-9._-]{1,64}")

# A random prefix and a serial number: unique, and much cheaper than random every time.
_prefix = token_hex(6)
_serial = count(1)


def choose_request_id(sent: Sequence[bytes]) -> str:
    """The id of a request whose `X-Request-Id` headers have the values `sent`.

    It is the client's if there is exactly one, of 1 to 64 characters `A-Z a-z 0-9 . _ -`; else
    a new one.
    """
    if len(sent) == 1 and _ACCEPTED.fullmatch(sent[0]):
        return sent[0].decode("ascii")
    return f"{_prefix}-{next(_serial):x}"
