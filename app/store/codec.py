"""Domain values as the stores on a disk or in another process keep them: JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from app.domain.admission import Admission
from app.domain.session import Grant, Session
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
_sessions = msgspec.json.Decoder(Session, dec_hook=_decode_hook)
_admissions = msgspec.json.Decoder(Admission)


def to_text(value: Grant | Session | Admission) -> str:
    """The value as JSON."""
    return _encoder.encode(value).decode()


def to_grant(text: str) -> Grant:
    """The grant that `to_text` wrote."""
    return _grants.decode(text)


def to_session(text: str) -> Session:
    """The session that `to_text` wrote."""
    return _sessions.decode(text)


def to_admission(text: str) -> Admission:
    """The admission that `to_text` wrote."""
    return _admissions.decode(text)
