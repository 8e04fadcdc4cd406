"""Reading a request in the one way it can be meant.

FastAPI's own parsing takes the last of duplicate keys, NaN, other encodings and several
spellings of one id, so that two readers of a request could understand two different things.
Handlers get a `StrictRequest`, which reads each part once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qsl

import jiter
from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope

from app.http.auth import NOBODY
from app.http.problems import (
    MALFORMED_JSON,
    PAYLOAD_TOO_LARGE,
    UNSUPPORTED_MEDIA_TYPE,
    FieldError,
    Refused,
    Repeat,
    invalid_field,
    invalid_fields,
    unknown_field,
)

MAX_BODY_BYTES = 65_536

MAX_UNKNOWN = 20
"""Parameters that are named in one response as not known."""

_READS = frozenset({"GET", "HEAD"})
_IDEMPOTENT = frozenset({"PUT", "DELETE"})
"""RFC 9110, section 9.2.2."""

_MERGE_PATCH = "application/merge-patch+json"
_PLACE = re.compile(r" at (line \d+ column \d+)$")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_PLAIN_DIGITS = len(str(MAX_BODY_BYTES)) - 1


class StrictRequest(Request):
    """A request as handlers see it. FastAPI recognises the type and passes it on."""

    body: Any = None
    """The parsed body, and then the model of the route."""
    caller = NOBODY
    """Who sent the request, once the key has been checked."""
    echoed_id = ""
    """What the response repeats as its `X-Request-Id`, if it is not the id itself."""
    path_value = ""
    """The part of the path that the route leaves open."""
    query: Mapping[str, Any] = MappingProxyType({})
    """The query parameters that are valid."""
    query_errors: Sequence[FieldError] = ()
    """What is wrong with others."""
    safety: Repeat | None = None
    """What happens if the request is repeated, if its route knows better than its method."""
    records = True
    """Whether the request may record something, unless its method or query says not."""

    def __init__(self, scope: Scope, request_id: str, services: Any) -> None:
        # Not the parent's, which copies what nothing here uses.
        self.scope = scope
        self.request_id = request_id
        self.services = services
        """What the application offers to its routes."""
        self.fields: Sequence[tuple[bytes, bytes]] = scope["headers"]
        """All header fields, their names in lower case."""
        self._last = dict(self.fields)
        self._is_repeated = len(self._last) != len(self.fields)

    @property
    def root_path(self) -> str:
        """Where this service is mounted, without a slash at the end."""
        found: str = self.scope.get("root_path", "")
        return found

    @property
    def repeat(self) -> Repeat:
        """What happens if the request is repeated."""
        method = self.scope["method"]
        if method in _READS or not self.records or self.query.get("dry_run") is True:
            return Repeat.READS
        if self.safety is Repeat.HARMLESS:
            return Repeat.HARMLESS
        if method in _IDEMPOTENT:
            return Repeat.HARMLESS
        if self.has_header(b"idempotency-key"):
            return Repeat.KEYED
        return self.safety or Repeat.MAY_COUNT_TWICE

    @property
    def has_body(self) -> bool:
        """Whether the request says that it has a body (RFC 9112, section 6)."""
        length = self._last.get(b"content-length", b"0")
        return length.strip(b"0") != b"" or b"transfer-encoding" in self._last

    def has_header(self, name: bytes) -> bool:
        """Whether there is a header field with this name, which is in lower case."""
        return name in self._last

    def header_values(self, name: bytes) -> list[bytes]:
        """The values of all header fields with this name, which is in lower case."""
        if self._is_repeated:
            return [value for each, value in self.fields if each == name]
        return [self._last[name]] if name in self._last else []

    def header_texts(self, name: bytes) -> list[str]:
        """The same as text (RFC 9110, section 5.5)."""
        return [value.decode("latin-1") for value in self.header_values(name)]

    async def read_json(self, receive: Receive) -> Any:
        """Read and parse the body. Raises `Refused`, or `ClientDisconnect`."""
        if self._is_repeated or self._last.get(b"content-type") != b"application/json":
            patches = self.scope["method"] == "PATCH"
            check_content_type(self.header_texts(b"content-type"), patches=patches)
        if b"content-encoding" in self._last:
            check_content_encoding(self.header_texts(b"content-encoding"))
        message = await receive()
        body: bytes = message.get("body", b"")
        if message.get("more_body", False) or message["type"] != "http.request":
            body = await self._read_rest(message, receive)
        if len(body) > MAX_BODY_BYTES:
            raise Refused(PAYLOAD_TOO_LARGE)
        if not body and b"upgrade" in self._last:
            # Other servers than ours lose it.
            raise malformed("The server lost the body. Send no Upgrade (curl: --http1.1).")
        return parse_json(body)

    async def _read_rest(self, message: Message, receive: Receive) -> bytes:
        """Read the body from its first message on. Our own server sends it in one."""
        length = self._last.get(b"content-length", b"")
        if len(length) > _PLAIN_DIGITS and length.isdigit() and int(length) > MAX_BODY_BYTES:
            raise Refused(PAYLOAD_TOO_LARGE)
        body, more = b"", True
        while more and len(body) <= MAX_BODY_BYTES:
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if more:
                message = await receive()
        return body


def parse_query(sent: bytes, known: Sequence[str]) -> dict[str, str]:
    """The parameters of a query. Raises `Refused` for one that is unknown or repeated."""
    pairs = parse_qsl(sent.decode("latin-1"), keep_blank_values=True)
    found = dict(pairs)
    if unknown := [name for name in found if name not in known][:MAX_UNKNOWN]:
        raise invalid_fields([unknown_field("query", name, known) for name in unknown])
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        (twice, *_) = (name for name in found if names.count(name) > 1)
        raise invalid_field("query", twice, "must be sent only once")
    return found


def check_content_type(values: Iterable[str], *, patches: bool = False) -> None:
    """Raises `Refused` unless exactly one header says JSON, in UTF-8 if it says a charset. One
    that `patches` may also say that it is a merge patch (RFC 7396)."""
    match list(values):
        case [value]:
            media_type, _, parameters = value.partition(";")
        case _:
            raise Refused(UNSUPPORTED_MEDIA_TYPE)
    charset = parameters.strip().lower().replace('"', "")
    media_type = media_type.strip().lower()
    known = media_type == "application/json" or (patches and media_type == _MERGE_PATCH)
    if not known or charset not in {"", "charset=utf-8"}:
        raise Refused(UNSUPPORTED_MEDIA_TYPE)


def check_content_encoding(values: Iterable[str]) -> None:
    """Raises `Refused` for a body that is compressed or coded in any other way (RFC 9110,
    section 8.4)."""
    if any(value.strip().lower() != "identity" for value in values):
        raise Refused(
            UNSUPPORTED_MEDIA_TYPE, "Send the body as it is, without a Content-Encoding."
        )


def parse_json(body: bytes) -> Any:
    """The value of a JSON text (RFC 8259) in UTF-8 without a byte order mark, in which no
    object has a key twice (RFC 7493, section 2.3). Raises `Refused`."""
    try:
        return jiter.from_json(body, catch_duplicate_keys=True, allow_inf_nan=False)
    except ValueError as error:
        raise malformed(_detail(body, str(error))) from None


def _detail(body: bytes, message: str) -> str:
    """What is wrong, for a person. The parser's own message can repeat the input."""
    if not body:
        return "The body is empty. Send a JSON object."
    if body.startswith(_BYTE_ORDER_MARK):
        return "The body starts with a byte order mark. Leave it out."
    if message.startswith("Detected duplicate key"):
        return "An object in the body has the same key twice."
    if message.startswith("recursion limit"):
        return "The body is nested too deeply."
    if message.startswith("number out of range"):
        return "A number in the body has too many digits."
    place = _PLACE.search(message)
    return f"The body is not valid JSON ({place[1] if place else 'at its end'})."


def malformed(detail: str) -> Refused:
    """The refusal of a body that is not JSON."""
    return Refused(MALFORMED_JSON, detail)
