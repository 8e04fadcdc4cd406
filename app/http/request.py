"""Reading a request in the one way it can be meant: content type, body and query.

FastAPI's own parsing takes the last of duplicate keys, NaN, other encodings and several
spellings of one id. Two readers of such a request could understand two different things.
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
    """A request whose body is read and parsed by our rules."""

    async def load_body(self) -> None:
        """Read and parse the body. Raises `Refused`."""
        check_content_type(self.headers.getlist("content-type"))
        self._body = await self._read()
        if not self._body and "upgrade" in self.headers:
            raise _malformed(
                "The body was not read: send the request without an Upgrade header "
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
    """Raises `Refused` for a query parameter that is unknown or repeated."""
    names = [name for name, _ in request.query_params.multi_items()]
    if unknown := set(names) - known:
        takes = f"it takes {', '.join(sorted(known))}" if known else "it takes none"
        raise invalid_field("query", "", f"{len(unknown)} unknown parameter(s); {takes}")
    for name in known:
        if names.count(name) > 1:
            raise invalid_field("query", name, "must not be given more than once")


def check_content_type(values: list[str]) -> None:
    """Raises `Refused` unless exactly one header says JSON, in UTF-8 if it says a charset."""
    media_type, _, parameters = (values[0] if len(values) == 1 else "").partition(";")
    charset = parameters.strip().lower().replace('"', "")
    if media_type.strip().lower() != "application/json" or charset not in {
        "",
        "charset=utf-8",
    }:
        raise Refused(UNSUPPORTED_MEDIA_TYPE)


def parse_json(body: bytes) -> Any:
    """The value of a JSON text (RFC 8259) in UTF-8 without a byte order mark, in which no
    object has a key twice (RFC 7493, section 2.3). Raises `Refused`."""
    if not body:
        raise _malformed("The body is empty; send a JSON object.")
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError:
        raise _malformed("The body is not UTF-8.") from None
    if text.startswith("\ufeff"):
        raise _malformed("The body starts with a byte order mark.")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_constant)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise _malformed(f"The body is not valid JSON ({where}).") from None
    except RecursionError:
        raise _malformed("The body is nested too deeply.") from None
    except ValueError:
        # int() refuses numbers of thousands of digits, whose conversion takes seconds.
        raise _malformed("A number in the body has too many digits.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise _malformed("An object in the body has a key twice.")
    return made


def _constant(_: str) -> NoReturn:
    raise _malformed("NaN and Infinity are not JSON.")


def _malformed(detail: str) -> Refused:
    return Refused(MALFORMED_JSON, detail)
