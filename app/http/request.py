"""Strict reading of requests: content type, content encoding, body and query.

FastAPI accepts NaN, other encodings and duplicate keys, of which the last one wins. Two parsers
could understand such a request differently.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fastapi import Request

from app.http.problems import (
    MALFORMED_JSON,
    PAYLOAD_TOO_LARGE,
    UNSUPPORTED_MEDIA_TYPE,
    Refused,
    invalid_field,
)

MAX_BODY_BYTES = 65_536


class StrictRequest(Request):
    """A request whose body is parsed strictly."""

    async def load_body(self) -> None:
        """Read and parse the body. Raises `Refused`."""
        check_content_type(self.headers.getlist("content-type"))
        check_content_encoding(self.headers.getlist("content-encoding"))
        self._body = await self._read()
        if not self._body and "upgrade" in self.headers:
            raise _malformed(
                "The body could not be read. Send the request without an Upgrade header "
                "(curl: --http1.1)."
            )
        self._json = parse_json(self._body)

    async def _read(self) -> bytes:
        length = self.headers.get("content-length", "")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise Refused(PAYLOAD_TOO_LARGE)
        chunks, size = [], 0
        async for chunk in self.stream():
            size += len(chunk)
            if size > MAX_BODY_BYTES:
                raise Refused(PAYLOAD_TOO_LARGE)
            chunks.append(chunk)
        return b"".join(chunks)


def check_query(request: Request, known: set[str]) -> None:
    """Raise `Refused` if a query parameter is unknown or repeated."""
    names = [name for name, _ in request.query_params.multi_items()]
    if set(names) - known:
        takes = f"takes only {', '.join(sorted(known))}" if known else "takes none"
        raise invalid_field("query", "", f"has unknown parameters; this route {takes}")
    for name in known:
        if names.count(name) > 1:
            raise invalid_field("query", name, "must be sent only once")


def check_content_type(values: list[str]) -> None:
    """Raise `Refused` unless there is exactly one `Content-Type`, and it is JSON. Its charset,
    if any, must be UTF-8."""
    media_type, _, parameters = (values[0] if len(values) == 1 else "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if media_type.strip().lower() != "application/json" or charset not in {
        "",
        "charset=utf-8",
    }:
        raise Refused(UNSUPPORTED_MEDIA_TYPE)


def check_content_encoding(values: list[str]) -> None:
    """Raise `Refused` if the body has a content coding (RFC 9110, section 8.4)."""
    if any(value.strip().lower() != "identity" for value in values):
        raise Refused(
            UNSUPPORTED_MEDIA_TYPE,
            "The body is encoded. Send it uncompressed, without Content-Encoding.",
        )


def parse_json(body: bytes) -> Any:
    """Parse JSON (RFC 8259) in UTF-8. Raises `Refused` if it is malformed, starts with a byte
    order mark, or has a duplicate key in an object (RFC 7493, section 2.3)."""
    if not body:
        raise _malformed("The body is empty; send a JSON object.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("The body is not UTF-8; encode the JSON as UTF-8.") from None
    if text.startswith("\ufeff"):
        raise _malformed("The body starts with a byte order mark; leave it out.")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _malformed(f"The body is not valid JSON ({where}).") from None
    except RecursionError:
        raise _malformed("The body is nested too deeply.") from None
    except ValueError:
        # int() refuses numbers with thousands of digits, whose conversion would take seconds.
        raise _malformed("A number in the body has too many digits.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _malformed("An object in the body has a duplicate key; send each key once.")
    return made


def _constant(_: str) -> NoReturn:
    raise _malformed("The body has NaN or Infinity, which JSON does not allow.")


def _malformed(detail: str) -> Refused:
    return Refused(MALFORMED_JSON, detail)
