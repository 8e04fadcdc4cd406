"""Transitions: the changes of a session's terms.

A transition is a pure function of the session and the instant. It returns new terms, the same
object if nothing changes, or a `Denied` if the change is not allowed. Stores apply it
atomically (`SessionStore.change`). What a transition does not name stays: no change refills a
budget or a rate window.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import msgspec
from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from app.domain.admission import Denied, already_closed, expired
from app.domain.advice import DenialCode, NextAction
from app.domain.ceilings import Ceilings, GrantExceedsKey, exceeded
from app.domain.errors import InvalidField
from app.domain.session import (
    MAX_INT32,
    MICROSECONDS,
    ClosedBy,
    DataSensitivity,
    Grant,
    PausedBy,
    Session,
    Terms,
)
from app.domain.tools import MAX_ENTRIES, AllowList

Transition = Callable[[Session, int], Terms | Denied]
"""Called with the session, and the instant of the change in microseconds. May raise an
`ArbiterError` that is not transient."""


class Changed(NamedTuple):
    """The session was changed, or was already as it was wanted."""

    session: Session
    replayed: bool = False
    """Whether an earlier request with the same idempotency key made the change. The session is
    then as it is now."""


def close(by: ClosedBy) -> Transition:
    """End the session for good. An expired one can be closed too, a closed one cannot."""

    def transition(session: Session, now: int) -> Terms | Denied:
        if session.terms.closed_at is not None:
            return already_closed(session.at(now))
        return session.terms.changed(closed_at=now, closed_by=by)

    return transition


def pause(by: PausedBy) -> Transition:
    """Hold the session: it admits no calls until it is resumed. Its time limit keeps running.
    One that is paused stays as it is."""

    def transition(session: Session, now: int) -> Terms | Denied:
        ended = check_running(session, now)
        if ended is not None:
            return ended
        if session.terms.paused_at is not None:
            return session.terms
        return session.terms.changed(paused_at=now, paused_by=by)

    return transition


def resume(session: Session, now: int) -> Terms | Denied:
    """Let a paused session admit calls again."""
    if session.terms.paused_at is None:
        return check_running(session, now) or session.terms
    return check_running(session, now) or session.terms.changed(paused_at=None, paused_by=None)


def check_running(session: Session, now: int) -> Denied | None:
    """The denial if the session has ended, which no change can undo."""
    if session.terms.closed_at is not None:
        return already_closed(session.at(now))
    if now >= session.terms.expires_at:
        return expired(session.at(now))
    return None


class Amendment(msgspec.Struct, frozen=True, kw_only=True):
    """New terms for a session. What is left out stays as it is."""

    call_budget: int | None = None
    add_calls: int | None = None
    time_limit_secs: int | None = None
    add_secs: int | None = None
    authorized_tools: tuple[str, ...] | None = None
    add_tools: tuple[str, ...] = ()
    remove_tools: tuple[str, ...] = ()
    rate_limit_per_minute: int | UnsetType | None = UNSET
    """`None` removes the limit."""
    rate_limit_window_secs: int | None = None
    data_sensitivity_ceiling: DataSensitivity | None = None
    expected_revision: int | None = None
    """Refuse the change if the terms have another revision."""


def amend(
    amendment: Amendment, max_time_limit_secs: int, ceilings: Ceilings | None = None
) -> Transition:
    """Change the terms of a running session. The time limit counts from the creation; one that
    has passed already expires the session now.

    The transition raises `InvalidField` for a sum beyond what a session may have, and for a
    tool to remove that is not an entry of the allow-list, and `GrantExceedsKey` for terms
    beyond the `ceilings` of the caller's key.
    """

    def transition(session: Session, now: int) -> Terms | Denied:
        ended = check_running(session, now)
        if ended is not None:
            return ended
        terms = session.terms
        if amendment.expected_revision not in (None, terms.rev):
            return Denied(DenialCode.REVISION_CONFLICT, NextAction.FIX_REQUEST, session.at(now))
        grant = _amended(terms.grant, amendment, max_time_limit_secs)
        if grant == terms.grant:
            return terms
        if ceilings is not None and (limits := exceeded(grant, ceilings)):
            raise GrantExceedsKey(limits)
        expires_at = terms.expires_at
        if grant.time_limit_secs != terms.grant.time_limit_secs:
            wanted = terms.created_at + grant.time_limit_secs * MICROSECONDS
            expires_at = max(wanted, now)
        return terms.changed(grant=grant, expires_at=expires_at)

    return transition


def _amended(grant: Grant, amendment: Amendment, max_time_limit_secs: int) -> Grant:
    limit = amendment.rate_limit_per_minute
    window, ceiling = amendment.rate_limit_window_secs, amendment.data_sensitivity_ceiling
    return replace(
        grant,
        call_budget=_sum(
            "add_calls",
            grant.call_budget,
            amendment.call_budget,
            amendment.add_calls,
            MAX_INT32,
        ),
        time_limit_secs=_sum(
            "add_secs",
            grant.time_limit_secs,
            amendment.time_limit_secs,
            amendment.add_secs,
            max_time_limit_secs,
        ),
        authorized_tools=_tools(grant.authorized_tools, amendment),
        rate_limit_per_minute=grant.rate_limit_per_minute if limit is UNSET else limit,
        rate_limit_window_secs=grant.rate_limit_window_secs if window is None else window,
        data_sensitivity_ceiling=(
            grant.data_sensitivity_ceiling if ceiling is None else ceiling
        ),
    )


def _sum(field: str, before: int, absolute: int | None, more: int | None, most: int) -> int:
    if more is None:
        return before if absolute is None else absolute
    if before + more > most:
        raise InvalidField("body", field, f"At most {most} are possible in all.")
    return before + more


def _tools(before: AllowList, amendment: Amendment) -> AllowList:
    if amendment.authorized_tools is not None:
        return AllowList.of(amendment.authorized_tools)
    removed = _entries_to_remove(amendment.remove_tools, before.entries)
    kept = [entry for entry in before.entries if entry not in removed]
    kept += [entry for entry in dict.fromkeys(amendment.add_tools) if entry not in kept]
    if len(kept) > MAX_ENTRIES:
        raise InvalidField("body", "add_tools", f"At most {MAX_ENTRIES} entries are possible.")
    return AllowList.of(kept)


def _entries_to_remove(removed: tuple[str, ...], entries: Collection[str]) -> frozenset[str]:
    """The entries to remove. One that a pattern covers would stay allowed, so it is refused."""
    for index, entry in enumerate(removed):
        if entry not in entries:
            raise InvalidField(
                "body",
                f"remove_tools/{index}",
                "is not an entry of authorized_tools. A tool that a pattern covers can only be "
                "removed with the pattern.",
            )
    return frozenset(removed)
