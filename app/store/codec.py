"""Domain values as JSON, for stores on disk or in another process."""

from __future__ import annotations

from typing import Any

import msgspec

from app.domain.admission import Admission
from app.domain.lifecycle import Amendment
from app.domain.session import ClosedBy, Grant
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
_closed_by = msgspec.json.Decoder(ClosedBy)
_admissions = msgspec.json.Decoder(Admission)


def to_text(value: Grant | Admission | ClosedBy | Amendment) -> str:
    """Encode a value as JSON."""
    return _encoder.encode(value).decode()


def to_grant(text: str) -> Grant:
    """Decode a grant that `to_text` encoded."""
    return _grants.decode(text)


def to_closed_by(text: str) -> ClosedBy:
    """Decode who closed a session, which `to_text` encoded."""
    return _closed_by.decode(text)


def to_admission(text: str) -> Admission:
    """Decode an admission that `to_text` encoded."""
    return _admissions.decode(text)
