"""Responses, as bytes, to requests that do not reach the application."""

from __future__ import annotations

from collections.abc import Iterable

from app.http.dispatch import common_headers
from app.http.problems import OVERLOADED, Refused, refused_response
from app.http.request_id import REQUEST_ID, choose_request_id
from app.http.response import Headers
from app.server.exchange import CLOSE, Exchange, encode_response

_ID_DIGIT = "~"
"""Placeholder for a character of the request id, which cannot contain it."""


def refusal(refused: Refused, message: Exchange | None, server_headers: Headers) -> bytes:
    """The response that closes a connection. `message` is the request, if one has begun."""
    fields = [] if message is None else message.fields
    sent = [value for name, value in fields if name == REQUEST_ID]
    request_id = choose_request_id(sent)
    response = refused_response(refused, request_id)
    if message is not None and message.method == b"HEAD":
        response = response._replace(body=b"")
    return encode_response(response, server_headers, [*common_headers(request_id), CLOSE])


class LoadShedResponse:
    """The 503 of load shedding, complete but for the request id: it is sent most when there is
    least time. It is encoded again whenever the server's headers change, once a second."""

    def __init__(self) -> None:
        self._headers: Headers = []
        self._parts: dict[int, list[bytes]] = {}

    def answer(self, fields: Iterable[tuple[bytes, bytes]], server_headers: Headers) -> bytes:
        """The response to the request with these header fields."""
        sent = [value for name, value in fields if name == REQUEST_ID]
        request_id = choose_request_id(sent).encode()
        if server_headers is not self._headers:
            self._headers = server_headers
            self._parts.clear()
        parts = self._parts.get(len(request_id))
        if parts is None:
            parts = self._parts[len(request_id)] = self._encode(len(request_id))
        return request_id.join(parts)

    def _encode(self, id_length: int) -> list[bytes]:
        request_id = _ID_DIGIT * id_length
        response = refused_response(Refused(OVERLOADED), request_id)
        encoded = encode_response(response, self._headers, common_headers(request_id))
        return encoded.split(request_id.encode())
