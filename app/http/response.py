"""A whole HTTP response: status, headers and body bytes."""

from __future__ import annotations

from typing import NamedTuple

Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")


class RawResponse(NamedTuple):
    """A whole response, except for the headers that the server itself adds."""

    status: int
    headers: Headers
    body: bytes = b""


def json_response(status: int, body: bytes, headers: Headers) -> RawResponse:
    """A response with a JSON body."""
    headers = [JSON, (b"content-length", b"%d" % len(body)), *headers]
    return RawResponse(status, headers, body)
