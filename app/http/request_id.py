"""Request ids: sent by the client, or generated."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count
from secrets import token_hex

REQUEST_ID = b"x-request-id"

_ACCEPTED = re.compile(rb"[A-Za-z0-9._-]{1,64}")

# A random prefix and a serial number are unique, and much cheaper than a random id each time.
_prefix = token_hex(6)
_serial = count(1)


def choose_request_id(sent: Sequence[bytes]) -> str:
    """Return the id of a request whose `X-Request-Id` headers have the values `sent`.

    It is the client's if there is exactly one header with 1 to 64 characters of
    `A-Z a-z 0-9 . _ -`. Otherwise it is a new one.
    """
    if len(sent) == 1 and _ACCEPTED.fullmatch(sent[0]):
        return sent[0].decode("ascii")
    return f"{_prefix}-{next(_serial):x}"
