"""Responses, as bytes, to requests that do not reach the application."""

from __future__ import annotations

from collections.abc import Iterable

from app.http.dispatch import common_headers
from app.http.problems import OVERLOADED, Occurrence, Refused, refused_response
from app.http.request_id import REQUEST_ID, choose_request_id
from app.http.response import Headers
from app.server.exchange import CLOSE, Exchange, encode_response

_ID_DIGIT = "~"
"""Placeholder for a character of the request id, which cannot contain it."""


def refusal(
    refused: Refused, exchange: Exchange | None, root_path: str, server_headers: Headers
) -> bytes:
    """The response that closes a connection. `exchange` has the request, if one has begun."""
    fields = [] if exchange is None else exchange.fields
    sent = [value for name, value in fields if name == REQUEST_ID]
    request_id = choose_request_id(sent)
    response = refused_response(refused, Occurrence(request_id, root_path))
    if exchange is not None and exchange.method == b"HEAD":
        response = response._replace(body=b"")
    return encode_response(response, server_headers, [*common_headers(request_id), CLOSE])


class LoadShedResponse:
    """The 503 of load shedding, complete but for the request id: it is sent most when there is
    least time. It is encoded again whenever the server's headers change, once a second."""

    def __init__(self) -> None:
        self._headers: Headers = []
        self._parts: dict[tuple[str, int], list[bytes]] = {}

    def answer(
        self, fields: Iterable[tuple[bytes, bytes]], root_path: str, server_headers: Headers
    ) -> bytes:
        """The response to the request with these header fields."""
        sent = [value for name, value in fields if name == REQUEST_ID]
        request_id = choose_request_id(sent).encode()
        if server_headers is not self._headers:
            self._headers = server_headers
            self._parts.clear()
        parts = self._parts.get((root_path, len(request_id)))
        if parts is None:
            parts = self._encode(root_path, len(request_id))
            self._parts[root_path, len(request_id)] = parts
        return request_id.join(parts)

    def _encode(self, root_path: str, id_length: int) -> list[bytes]:
        request_id = _ID_DIGIT * id_length
        response = refused_response(Refused(OVERLOADED), Occurrence(request_id, root_path))
        encoded = encode_response(response, self._headers, common_headers(request_id))
        return encoded.split(request_id.encode())
