"""The request headers that change what a route does."""

from __future__ import annotations

import re
from collections.abc import Iterable

from app.http.problems import VALIDATION_FAILED, ProblemType, invalid_field

MAX_IDEMPOTENCY_KEY_CHARS = 255

_PRINTABLE = re.compile(r"[ -~]{1,255}")
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')


def idempotency_key(
    values: Iterable[str],
    header: str = "Idempotency-Key",
    kind: ProblemType = VALIDATION_FAILED,
) -> str | None:
    """Return the key in the headers of this name, or `None` if there are none.

    A key is 1 to 255 printable ASCII characters, bare or as an RFC 8941 string
    (draft-ietf-httpapi-idempotency-key-header-07, section 2). Both forms mean the same key.
    Raises `Refused`, with `kind`, for anything else.
    """
    match list(values):
        case []:
            return None
        case [value]:
            key = value
        case _:
            raise invalid_field("header", header, "must be sent only once", kind)
    if key.startswith('"'):
        quoted = _QUOTED.fullmatch(key)
        if quoted is None:
            detail = "is not a valid quoted string; escape inner quotes and close the last one"
            raise invalid_field("header", header, detail, kind)
        key = re.sub(r"\\(.)", r"\1", quoted[1])
    if not _PRINTABLE.fullmatch(key):
        detail = "must be 1 to 255 printable ASCII characters"
        raise invalid_field("header", header, detail, kind)
    return key


def wants_minimal(values: Iterable[str]) -> bool:
    """Return whether the `Prefer` headers ask for `return=minimal` (RFC 7240, section 4.2).

    The first `return` counts. Unknown preferences are ignored, as section 2 requires.
    """
    for preference in ",".join(values).split(","):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "return":
            return value.strip().strip('"').lower() == "minimal"
    return False
