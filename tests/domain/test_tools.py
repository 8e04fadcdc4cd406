"""Allow-lists."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.tools import AllowList


@pytest.mark.parametrize(
    ("entry", "name", "allowed"),
    [
        ("read_file", "read_file", True),
        ("read_file", "Read_file", False),
        ("read_file", "read_file2", False),
        ("*", "anything/at:all@1.0-x", True),
        ("fs.*", "fs.read", True),
        ("fs.*", "fs.", True),
        ("fs.*", "fs", False),
        ("fs.*", "xfs.read", False),
        ("*.read", "fs.read", True),
        ("*.read", "fs.read.x", False),
        ("a*z", "az", True),
        ("a*z", "a-z", True),
        ("a*z", "a", False),
        ("aa*aa", "aaa", False),
        ("aa*aa", "aaaa", True),
        ("a*b*c", "a1b2c", True),
        ("a*b*c", "acb", False),
        ("a*bc*bc", "a-bc-bc", True),
        ("a*bc*bc", "a-bc", False),
        ("**", "x", True),
        ("a**", "a", True),
        ("a.b", "axb", False),
    ],
)
def test_an_entry_allows_only_the_names_it_matches(
    entry: str, name: str, allowed: bool
) -> None:
    assert AllowList.of([entry]).allows(name) is allowed
    assert AllowList.of(["other", entry, "x.*"]).allows_all((name, name)) is allowed


def test_an_empty_allow_list_allows_nothing_but_an_empty_batch() -> None:
    nothing = AllowList.of([])

    assert not nothing.allows("read_file")
    assert not nothing.allows_all(("read_file",))
    assert nothing.allows_all(())


def test_one_unauthorised_tool_denies_the_whole_batch() -> None:
    allow_list = AllowList.of(["read_file", "fs.*"])

    assert allow_list.allows_all(("read_file", "fs.x", "read_file"))
    assert not allow_list.allows_all(("read_file", "fs.x", "delete_file"))


def test_a_pattern_full_of_stars_does_not_backtrack() -> None:
    hostile = AllowList.of(["a*" * 63 + "b"])

    assert not hostile.allows("a" * 128)


def test_equal_allow_lists_are_the_same_object() -> None:
    assert AllowList.of(["a", "b*"]) is AllowList.of(("a", "b*"))
    assert AllowList.of(["a", "b*"]) != AllowList.of(["b*", "a"])


def by_definition(pattern: str, name: str) -> bool:
    """Match by the definition: slowly, but obviously correctly."""
    if not pattern:
        return not name
    if pattern[0] == "*":
        return by_definition(pattern[1:], name) or (
            bool(name) and by_definition(pattern, name[1:])
        )
    return bool(name) and name[0] == pattern[0] and by_definition(pattern[1:], name[1:])


@given(pattern=st.text("ab*", min_size=1, max_size=7), name=st.text("ab", max_size=8))
def test_patterns_match_as_defined(pattern: str, name: str) -> None:
    assert AllowList.of([pattern]).allows(name) is by_definition(pattern, name)
