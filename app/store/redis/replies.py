"""The names of the keys, and what the scripts about sessions tell (`lua/session_state.lua`).

All that belongs to a session is in one slot of a cluster, chosen by the first 16 hex digits of
its id; what belongs to an agent is in the agent's, and the index of all in one of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import sha256
from typing import Any

from app.domain.admission import (
    KEY_CONFLICT,
    NO_SESSION,
    Admission,
    Admitted,
    DenialCode,
    Denied,
    already_closed,
    check_usable,
    denial,
    violation,
)
from app.domain.session import Grant, Session
from app.store.codec import to_grant
from app.store.contract import IdempotencyKey

GRANTS_KEPT = 16_384
"""Grants of the latest sessions that are kept decoded."""

_PREFIX = "arbiter"
ALL = f"{_PREFIX}:{{index}}:sessions"
DOUBTFUL = f"{_PREFIX}:{{index}}:doubtful"
CLOSED = f"{_PREFIX}:{{index}}:closed"
CLOSINGS = f"{_PREFIX}:{{index}}:closings"
CREATIONS = f"{_PREFIX}:{{index}}:creations"
SWEEPER = f"{_PREFIX}:{{index}}:sweeper"
READY = f"{_PREFIX}:{{index}}:ready"

ID_CHARS = 36


def session_keys(session_id: str) -> tuple[str, str, str]:
    """The session, its grant, and its remembered admissions."""
    slot = session_id.replace("-", "")[:16]
    key = f"{_PREFIX}:{{{slot}}}:{session_id}"
    return key, f"{key}:grant", f"{key}:replays"


def sweep_key(session_id: str) -> str:
    """A mark that the session was looked for in vain, and must not be created any more."""
    return f"{session_keys(session_id)[0]}:swept"


def agent_keys(agent_id: str) -> tuple[str, str, str]:
    """The agent's open sessions, those of them that are in doubt, and the closed ones."""
    key = f"{_PREFIX}:{{{agent_id}}}"
    return f"{key}:open", f"{key}:doubtful", f"{key}:closed"


def creation_key(digest: str) -> str:
    """The creation with an idempotency key."""
    return f"{_PREFIX}:{{index}}:creation:{digest}"


def key_field(idempotency: IdempotencyKey) -> str:
    """An idempotency key as one text, different for different keys."""
    caller, key = idempotency
    return f"{len(caller)}:{caller}:{key}"


def key_digest(idempotency: IdempotencyKey | None) -> str:
    """The same, short; empty if there is no key."""
    return "" if idempotency is None else sha256(key_field(idempotency).encode()).hexdigest()


class Grants:
    """Grants never change: those of the latest sessions need not be told again."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Grant] = OrderedDict()

    def get(self, session_id: str) -> Grant | None:
        """The grant, if it is known."""
        return self._known.get(session_id)

    def keep(self, session_id: str, grant: Grant) -> None:
        """Remember a grant for a while."""
        self._known[session_id] = grant
        if len(self._known) > GRANTS_KEPT:
            self._known.popitem(last=False)

    def forget(self, session_id: str) -> None:
        """The session is gone."""
        self._known.pop(session_id, None)

    def session(self, session_id: str, reply: list[Any], grant: Grant | None) -> Session | None:
        """The session of a reply; `None` if it went away together with its grant."""
        _, now, created_at, expires_at, made, start, calls, closed, told, *_ = reply
        if grant is None:
            if not told:
                return None
            grant = to_grant(told)
            self.keep(session_id, grant)
        closed_at = closed if closed != b"" else None
        return Session(
            session_id, grant, created_at, expires_at, now, made, start, calls, closed_at
        )


def decision(reply: list[Any], session: Session | None, admission: Admission) -> Any:
    """What `admit.lua` decided."""
    outcome = reply[0].decode()
    if outcome == DenialCode.IDEMPOTENCY_CONFLICT.value:
        return KEY_CONFLICT
    if session is None:
        return NO_SESSION
    if outcome in {"admitted", "replayed"}:
        return Admitted(session, replayed=outcome == "replayed")
    found: list[bytes] = reply[9]
    if not found:
        return check_usable(session, admission.agent_id, session.as_of)
    places = tuple(reply[10])
    violations = tuple(violation(DenialCode(code.decode()), session, places) for code in found)
    return denial(session, len(admission.tool_names), violations)


def closing(reply: list[Any], session: Session | None) -> Session | Denied:
    """What `session_close.lua` did."""
    if session is None:
        return NO_SESSION
    return already_closed(session) if reply[0] == b"session_closed" else session
