"""Domain values as JSON, for stores on disk or in another process."""

from __future__ import annotations

from typing import Any

import msgspec

from app.domain.admission import Admission
from app.domain.session import Grant
from app.domain.tools import AllowList


def _encode_hook(value: Any) -> Any:
    if isinstance(value, AllowList):
        return value.entries
    raise NotImplementedError(type(value))


def _decode_hook(kind: type, value: Any) -> Any:
    if kind is AllowList:
        return AllowList.of(value)
    raise NotImplementedError(kind)


_encoder = msgspec.json.Encoder(enc_hook=_encode_hook)
_grants = msgspec.json.Decoder(Grant, dec_hook=_decode_hook)
_admissions = msgspec.json.Decoder(Admission)


def to_text(value: Grant | Admission) -> str:
    """Encode a value as JSON."""
    return _encoder.encode(value).decode()


def to_grant(text: str) -> Grant:
    """Decode a grant that `to_text` encoded."""
    return _grants.decode(text)


def to_admission(text: str) -> Admission:
    """Decode an admission that `to_text` encoded."""
    return _admissions.decode(text)
