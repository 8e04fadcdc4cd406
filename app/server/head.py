"""What the head of a request must be, so that it can be understood in one way only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from app.http.problems import MALFORMED_REQUEST, Refused

MAX_FIELDS = 64
MAX_BYTES = 16_384
"""Of request line and header fields together."""

_FIELD_OVERHEAD = len(b": \r\n")
_VERSIONS = frozenset({"1.0", "1.1"})
# A host of any kind, and perhaps a port (RFC 9110, section 7.2).
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=\[\]:-]+")
_UPGRADE_FIELDS = frozenset({b"upgrade", b"http2-settings"})

Fields = Sequence[tuple[bytes, bytes]]


def size_bytes(url: bytes, fields: Fields) -> int:
    """The size of the head without the method, the version and spaces."""
    return len(url) + sum(len(name) + len(value) + _FIELD_OVERHEAD for name, value in fields)


def validate(fields: Fields, version: str) -> Refused | None:
    """Return why the fields, whose names are in lower case, are refused, or `None`.

    The parser has already refused syntax errors, and a Content-Length that is repeated,
    malformed or beside a Transfer-Encoding.
    """
    hosts = [value for name, value in fields if name == b"host"]
    codings = [value for name, value in fields if name == b"transfer-encoding"]
    # Health checkers still send HTTP/1.0, which has no Host.
    if len(hosts) != 1 and not (version == "1.0" and not hosts):
        return _malformed("Send exactly one Host (RFC 9112, section 3.2).")
    if not all(map(_HOST.fullmatch, hosts)):
        return _malformed("The Host is not valid.")
    chunked = [coding.strip().lower() == b"chunked" for coding in codings]
    if not all(chunked) or (chunked and version == "1.0"):
        return _malformed("The only transfer coding supported is chunked, in HTTP/1.1.")
    return None if version in _VERSIONS else _malformed("Send HTTP/1.1.")


def validate_target(method: bytes, url: bytes, received: bytes) -> Refused | None:
    """Return why the request line is refused, or `None`. `received` holds at least the line.

    The parser accepts all of these: a fragment, which never belongs in a request (RFC 9112,
    section 3.2); `*`, which only OPTIONS may ask for (section 3.2.4); and RTSP, whose requests
    look like those of HTTP.
    """
    if url == b"*" and method != b"OPTIONS":
        return _malformed("The target * is for OPTIONS only; write a path.")
    if b"#" in url:
        return _malformed("The target has a fragment (#); leave it out.")
    if b"RTSP/" in received and re.search(re.escape(url) + rb" +RTSP/", received):
        return _malformed("Send HTTP/1.1.")
    return None


def without_upgrade(method: bytes, url: bytes, version: str, fields: Fields) -> bytes:
    """The head of a request as if it did not offer an upgrade (RFC 9110, section 7.8)."""
    lines = [b"%b %b HTTP/%b" % (method, url, version.encode())]
    for name, value in fields:
        if name == b"connection":
            options = b", ".join(_without_upgrade_options(value.split(b",")))
            if options:
                lines.append(b"connection: " + options)
        elif name not in _UPGRADE_FIELDS:
            lines.append(name + b": " + value)
    return b"\r\n".join([*lines, b"", b""])


def _without_upgrade_options(options: Iterable[bytes]) -> Iterable[bytes]:
    return (option for option in options if option.strip().lower() not in _UPGRADE_FIELDS)


def _malformed(detail: str) -> Refused:
    return Refused(MALFORMED_REQUEST, detail)
