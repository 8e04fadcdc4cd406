"""What the head of a request must be, so that it can be understood in one way only."""

from __future__ import annotations

import re
from collections.abc import Sequence

from app.http.problems import MALFORMED_REQUEST, Refused

MAX_FIELDS = 64
MAX_BYTES = 16_384
"""Of request line and header fields together."""

_FIELD_OVERHEAD = len(b": \r\n")
_VERSIONS = frozenset({"1.0", "1.1"})
# A host, of any kind, and perhaps a port (RFC 9110, section 7.2).
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=\[\]:-]*")

Fields = Sequence[tuple[bytes, bytes]]


def size_bytes(url: bytes, fields: Fields) -> int:
    """How large the head is, but for the method, the version and spaces."""
    return len(url) + sum(len(name) + len(value) + _FIELD_OVERHEAD for name, value in fields)


def validate(fields: Fields, version: str) -> Refused | None:
    """What is wrong with the fields, whose names are in lower case, if anything is.

    The parser has refused already what is not HTTP, and lengths that are twice there, odd, or
    beside a transfer coding.
    """
    hosts = [value for name, value in fields if name == b"host"]
    codings = [value for name, value in fields if name == b"transfer-encoding"]
    # Health checkers still send HTTP/1.0, which knows no Host.
    if len(hosts) != 1 and not (version == "1.0" and not hosts):
        return _malformed("Send exactly one Host (RFC 9112, section 3.2).")
    if not all(map(_HOST.fullmatch, hosts)):
        return _malformed("The Host is not valid.")
    chunked = [coding.strip().lower() == b"chunked" for coding in codings]
    if not all(chunked) or (chunked and version == "1.0"):
        return _malformed(
            "The only transfer coding that is understood is chunked, in HTTP/1.1."
        )
    return None if version in _VERSIONS else _malformed("Send HTTP/1.1.")


def _malformed(detail: str) -> Refused:
    return Refused(MALFORMED_REQUEST, detail)
