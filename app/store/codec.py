"""Domain values as JSON, for stores on disk or in another process."""

from __future__ import annotations

from typing import Any

import msgspec

from app.domain.admission import Admission
from app.domain.lifecycle import Amendment
from app.domain.session import Grant, Marks, Terms
from app.domain.tools import AllowList


def encode_hook(value: Any) -> Any:
    """How msgspec encodes what it does not know."""
    if isinstance(value, AllowList):
        return value.entries
    raise NotImplementedError(type(value))


def _decode_hook(kind: type, value: Any) -> Any:
    if kind is AllowList:
        return AllowList.of(value)
    raise NotImplementedError(kind)


_encoder = msgspec.json.Encoder(enc_hook=encode_hook)
_grants = msgspec.json.Decoder(Grant, dec_hook=_decode_hook)
_marks = msgspec.json.Decoder(Marks)
_NO_MARKS = Marks()


def to_text(value: Grant | Admission | Marks | Amendment) -> str:
    """Encode a value as JSON."""
    return _encoder.encode(value).decode()


def to_grant(text: str) -> Grant:
    """Decode a grant that `to_text` encoded."""
    return _grants.decode(text)


def marks_of(terms: Terms) -> str:
    """Encode who closed and who paused a session; empty if nobody did."""
    marks = Marks(terms.closed_by, terms.paused_by)
    return "" if marks == _NO_MARKS else to_text(marks)


def to_marks(text: str | bytes) -> Marks:
    """Decode what `marks_of` encoded."""
    return _marks.decode(text) if text else _NO_MARKS
