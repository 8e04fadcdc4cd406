"""What a key may grant at most."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from app.domain.ceilings import Ceilings, Exceeded, exceeded, lowered
from app.domain.session import DataSensitivity
from app.domain.tools import AllowList
from tests.support import a_grant

PUBLIC, INTERNAL = DataSensitivity.PUBLIC, DataSensitivity.INTERNAL
RESTRICTED = DataSensitivity.RESTRICTED


def for_tools(*patterns: str) -> Ceilings:
    return Ceilings(authorized_tools=AllowList.of(patterns))


@pytest.mark.parametrize(
    ("ceilings", "terms", "expected"),
    [
        (Ceilings(), {"call_budget": 2_147_483_647}, ()),
        (Ceilings(call_budget=5), {"call_budget": 5}, ()),
        (Ceilings(call_budget=5), {"call_budget": 6}, (Exceeded("call_budget", 5),)),
        (Ceilings(call_budget=0), {"call_budget": 0}, ()),
        (Ceilings(call_budget=0), {"call_budget": 1}, (Exceeded("call_budget", 0),)),
        (Ceilings(time_limit_secs=60), {"time_limit_secs": 60}, ()),
        (
            Ceilings(time_limit_secs=60),
            {"time_limit_secs": 61},
            (Exceeded("time_limit_secs", 60),),
        ),
        (
            Ceilings(data_sensitivity_ceiling=INTERNAL),
            {"data_sensitivity_ceiling": INTERNAL},
            (),
        ),
        (
            Ceilings(data_sensitivity_ceiling=PUBLIC),
            {"data_sensitivity_ceiling": INTERNAL},
            (Exceeded("data_sensitivity_ceiling", PUBLIC),),
        ),
        # No ceiling on rates.
        (Ceilings(5, 60, AllowList.of(["*"]), RESTRICTED), {"call_budget": 5}, None),
        (
            Ceilings(5, 60, AllowList.of(["x"]), PUBLIC),
            {"call_budget": 6, "time_limit_secs": 61},
            (
                Exceeded("call_budget", 5),
                Exceeded("time_limit_secs", 60),
                Exceeded("data_sensitivity_ceiling", PUBLIC),
                Exceeded("authorized_tools", entries=(0, 1)),
            ),
        ),
    ],
)
def test_every_limit_that_is_exceeded_is_named(
    ceilings: Ceilings, terms: dict[str, Any], expected: tuple[Exceeded, ...] | None
) -> None:
    found = exceeded(a_grant(**({"time_limit_secs": 60} | terms)), ceilings)

    assert found == (expected or ())


@pytest.mark.parametrize(
    ("allowed", "asked", "covered"),
    [
        (["read"], ["read"], True),
        (["read"], ["write"], False),
        (["read"], ["read*"], False),
        (["read"], ["*"], False),
        (["fs.*"], ["fs.read", "fs.*", "fs.r*", "fs.*.x", "fs."], True),
        (["fs.*"], ["fs*"], False),
        (["fs.*"], ["*"], False),
        (["fs.*"], ["*.fs.x"], False),
        (["*"], ["*", "a", "*a*"], True),
        (["**"], ["*"], True),
        (["*.read"], ["fs.read", "*.read", "*s.read"], True),
        (["*.read"], ["*read", "fs.*"], False),
        (["a*b*c"], ["a*b*c", "abc", "a*bc", "axb*c", "a**b*c"], True),
        (["a*b*c"], ["a*c"], False),
        (["fs.*", "read"], ["fs.x", "read"], True),
        (["fs.*"], [], True),
    ],
)
def test_every_entry_of_the_allow_list_must_be_covered(
    allowed: list[str], asked: list[str], covered: bool
) -> None:
    for entry in asked:
        found = exceeded(a_grant(entry), for_tools(*allowed))
        assert (found == ()) is covered, entry


def test_a_covered_pattern_matches_no_name_that_the_key_may_not_grant() -> None:
    """All patterns and names over a small alphabet: the rule lets nothing through."""
    texts = ["".join(t) for n in range(1, 5) for t in itertools.product("ab*", repeat=n)]
    names = ["".join(t) for n in range(1, 6) for t in itertools.product("ab", repeat=n)]
    matched = {
        text: {name for name in names if re.fullmatch(text.replace("*", ".*"), name)}
        for text in texts
    }

    for allowed in texts:
        for asked in texts:
            if not exceeded(a_grant(asked), for_tools(allowed)):
                assert matched[asked] <= matched[allowed], (asked, allowed)


@pytest.mark.parametrize("sent", [False, True])
@pytest.mark.parametrize("field", ["call_budget", "time_limit_secs"])
def test_only_a_default_is_lowered(field: str, sent: bool) -> None:
    grant = a_grant()
    ceilings = Ceilings(call_budget=7, time_limit_secs=7)

    found = lowered(grant, ceilings, {field} if sent else set())

    assert getattr(found, field) == (getattr(grant, field) if sent else 7)


def test_a_ceiling_above_a_default_does_not_raise_it() -> None:
    ceilings = Ceilings(10_000, 10_000, AllowList.of(["*"]), RESTRICTED)

    assert lowered(a_grant(), ceilings, frozenset()) == a_grant()


def test_a_tier_that_is_left_out_is_lowered() -> None:
    ceilings = Ceilings(data_sensitivity_ceiling=PUBLIC)

    assert lowered(a_grant(), ceilings, set()).data_sensitivity_ceiling is PUBLIC
    assert not exceeded(lowered(a_grant(), ceilings, set()), ceilings)
