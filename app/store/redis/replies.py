"""Sessions as the scripts keep and return them (`lua/prelude.lua`)."""

from __future__ import annotations

import struct
from collections import OrderedDict
from typing import Any

from app.domain.admission import (
    NO_SESSION,
    Admission,
    Admitted,
    Denied,
    agent_frozen,
    check_usable,
    denial,
    key_conflict,
    violation,
)
from app.domain.advice import DenialCode
from app.domain.session import (
    MICROSECONDS,
    AgentState,
    Freeze,
    Grant,
    Session,
    Terms,
    Usage,
)
from app.store.codec import to_grant, to_marks, to_text

TERMS_KEPT = 16_384
"""Sessions whose terms are cached."""

_TERMS = struct.Struct(">9d")
_USAGE = struct.Struct(">4d")
_WHOLE = 6
"""The parts of a reply with a session, at least."""

_NONE = -1.0
"""Stands for no rate limit, and for a session that is not closed or not paused."""


def pack_terms(terms: Terms) -> tuple[bytes, str]:
    """The terms as the scripts keep them: packed, and the grant as text."""
    grant = terms.grant
    numbers = _TERMS.pack(
        terms.created_at,
        terms.expires_at,
        _NONE if terms.closed_at is None else terms.closed_at,
        terms.rev,
        grant.call_budget,
        _NONE if grant.rate_limit_per_minute is None else grant.rate_limit_per_minute,
        grant.rate_limit_window_secs * MICROSECONDS,
        grant.data_sensitivity_ceiling.rank,
        _NONE if terms.paused_at is None else terms.paused_at,
    )
    patterns = " ".join(tool for tool in grant.authorized_tools.entries if "*" in tool)
    return numbers + f"{grant.agent_id}{patterns}".encode(), to_text(grant)


def exact_tools(grant: Grant) -> list[str]:
    """The tools that the scripts keep as fields."""
    return [tool for tool in grant.authorized_tools.entries if "*" not in tool]


def unpack_usage(packed: bytes) -> tuple[Usage, int]:
    """The usage of a session, and the instant that it is of."""
    made, start, calls, as_of = map(int, _USAGE.unpack(packed))
    return Usage(made, start, calls), as_of


class TermsCache:
    """The terms of the latest sessions. The scripts do not send a revision that is known."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, Terms] = OrderedDict()

    def get(self, session_id: str) -> Terms | None:
        """The latest terms seen, if they are cached."""
        return self._known.get(session_id)

    def keep(self, session_id: str, terms: Terms) -> None:
        """Cache terms."""
        self._known[session_id] = terms
        if len(self._known) > TERMS_KEPT:
            self._known.popitem(last=False)

    def session(self, session_id: str, reply: list[Any], known: Terms | None) -> Session | None:
        """The session of a reply to a script that was told of the revision `known`; `None` if
        the reply has no session."""
        if len(reply) < _WHOLE:
            return None
        _, _, packed_usage, packed, grant, marked = reply[:6]
        if packed:
            created, expires, closed, rev, *_, paused = _TERMS.unpack_from(packed)
            closed_at = None if closed == _NONE else int(closed)
            paused_at = None if paused == _NONE else int(paused)
            marks = to_marks(marked)
            known = Terms(
                to_grant(grant),
                int(created),
                int(expires),
                closed_at,
                int(rev),
                marks.closed_by,
                paused_at,
                marks.paused_by,
            )
            self.keep(session_id, known)
        assert known is not None  # noqa: S101 - the script sent what was not known
        usage, as_of = unpack_usage(packed_usage)
        return Session(session_id, known, usage, as_of)


def decision(
    reply: list[Any], session: Session | None, admission: Admission
) -> Admitted | Denied:
    """What `admit.lua` decided."""
    outcome = reply[0].decode()
    if outcome == DenialCode.IDEMPOTENCY_CONFLICT.value:
        _, first_used_at = unpack_usage(reply[1])
        return key_conflict(first_used_at)
    if session is None:
        return NO_SESSION
    if outcome in {"admitted", "replayed"}:
        return Admitted(session, replayed=outcome == "replayed")
    frozen = outcome == DenialCode.AGENT_FROZEN.value
    unusable = check_usable(session, admission.agent_id, session.as_of, frozen=frozen)
    if unusable is not None:
        return unusable
    codes, positions = reply[6:]
    violations = tuple(
        violation(DenialCode(code.decode()), session, admission, tuple(positions))
        for code in codes
    )
    return denial(session, len(admission.tool_names), violations)


def freeze(text: bytes) -> Freeze | None:
    """The freeze of an agent as the scripts keep it, `None` if it is empty."""
    if not text:
        return None
    frozen_at, by, reason = text.decode().split("|", 2)
    return Freeze(int(frozen_at), reason, by)


def agent(reply: list[Any]) -> AgentState:
    """What `agent.lua` returned."""
    running, paused, text = reply
    return AgentState(running - paused, paused, freeze(text))


def creation(reply: list[Any]) -> Admitted | Denied | None:
    """What was answered to an earlier creation with the same key, if there was one."""
    outcome = reply[0]
    if outcome == b"conflict":
        return key_conflict(reply[1])
    if outcome == b"frozen":
        return agent_frozen()
    if outcome != b"replayed":
        return None
    session_id, created_at, grant = reply[1:]
    return Admitted(
        Session.opened(session_id.decode(), to_grant(grant), created_at), replayed=True
    )
