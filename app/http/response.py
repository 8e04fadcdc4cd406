"""HTTP responses as plain values: status, headers and body bytes."""

from __future__ import annotations

from typing import NamedTuple

Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")


class RawResponse(NamedTuple):
    """A complete response, except for the headers that the server adds."""

    status: int
    headers: Headers
    body: bytes = b""


def json_response(status: int, body: bytes, headers: Headers) -> RawResponse:
    """Return a response with a JSON body and its length."""
    headers = [JSON, (b"content-length", b"%d" % len(body)), *headers]
    return RawResponse(status, headers, body)
