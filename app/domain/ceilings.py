"""What a key may grant at most, so that a stolen key cannot grant everything.

Only requests are judged. A limit that a request leaves out has a default, which is lowered to
the ceiling: nobody asked for more.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NamedTuple

from msgspec.structs import replace

from app.domain.errors import ArbiterError
from app.domain.session import DataSensitivity, Grant
from app.domain.tools import AllowList


@dataclass(frozen=True, slots=True)
class Ceilings:
    """The most that a grant may have; `None` sets no limit."""

    call_budget: int | None = None
    time_limit_secs: int | None = None
    authorized_tools: AllowList | None = None
    """Patterns that must cover every entry of the grant's allow-list."""
    data_sensitivity_ceiling: DataSensitivity | None = None


class Exceeded(NamedTuple):
    """A limit that a grant exceeds."""

    field: str
    """The name of the grant's field."""
    maximum: int | DataSensitivity | None = None
    """The most that it may be, unless it is the allow-list."""
    entries: tuple[int, ...] = ()
    """Positions in the allow-list, from 0, of the entries that are not covered."""


class GrantExceedsKey(ArbiterError):
    """The caller's key may not grant this."""

    def __init__(self, limits: tuple[Exceeded, ...]) -> None:
        super().__init__()
        self.limits = limits
        """Every limit that the grant exceeds."""


def lowered(grant: Grant, ceilings: Ceilings, sent: AbstractSet[str]) -> Grant:
    """Return the grant with its defaults, the fields that are not in `sent`, lowered to the
    ceilings."""
    changes: dict[str, Any] = {}
    budget, secs = ceilings.call_budget, ceilings.time_limit_secs
    tier = ceilings.data_sensitivity_ceiling
    if budget is not None and "call_budget" not in sent:
        changes["call_budget"] = min(grant.call_budget, budget)
    if secs is not None and "time_limit_secs" not in sent:
        changes["time_limit_secs"] = min(grant.time_limit_secs, secs)
    if (
        tier is not None
        and "data_sensitivity_ceiling" not in sent
        and grant.data_sensitivity_ceiling.exceeds(tier)
    ):
        changes["data_sensitivity_ceiling"] = tier
    return replace(grant, **changes)


def exceeded(grant: Grant, ceilings: Ceilings) -> tuple[Exceeded, ...]:
    """Return every limit that the grant exceeds; none means that the key may grant it."""
    found = []
    budget, secs = ceilings.call_budget, ceilings.time_limit_secs
    tools, tier = ceilings.authorized_tools, ceilings.data_sensitivity_ceiling
    if budget is not None and grant.call_budget > budget:
        found.append(Exceeded("call_budget", budget))
    if secs is not None and grant.time_limit_secs > secs:
        found.append(Exceeded("time_limit_secs", secs))
    if tier is not None and grant.data_sensitivity_ceiling.exceeds(tier):
        found.append(Exceeded("data_sensitivity_ceiling", tier))
    if tools is not None and (uncovered := _uncovered(grant.authorized_tools, tools)):
        found.append(Exceeded("authorized_tools", entries=uncovered))
    return tuple(found)


def _uncovered(asked: AllowList, allowed: AllowList) -> tuple[int, ...]:
    # A pattern is matched as if it were a name. Names have no `*`, so only a `*` of the key's
    # pattern can absorb that of the grant's. Whatever then stands for the grant's is absorbed
    # as well: every name that the grant's pattern matches, the key's matches too. A pattern
    # that several of the key's cover only together is refused, which does no harm.
    return tuple(
        index for index, entry in enumerate(asked.entries) if not allowed.allows(entry)
    )
