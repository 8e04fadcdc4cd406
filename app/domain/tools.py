"""Tool names, and the allow-list that says which of them a session may call.

A tool name is 1 to 128 characters of `A-Z a-z 0-9 _ . / : @ -`, compared byte for byte.
An entry of an allow-list is such a name, or a pattern in which `*` stands for any run of
characters, the empty one included.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

TOOL_NAME_PATTERN = r"^[A-Za-z0-9_./:@-]{1,128}$"
TOOL_ENTRY_PATTERN = r"^[A-Za-z0-9_./:@*-]{1,128}$"
MAX_ENTRIES = 256
MAX_BATCH = 256


class AllowList:
    """An immutable, compiled allow-list. Make one with `AllowList.of`.

    Exact names cost one set look-up however many there are. Patterns cost one comparison
    each, and none of them can be made to backtrack: a regular expression built from a
    caller's `a*a*a*…` could hold the process for minutes.
    """

    __slots__ = ("_exact", "_globs", "_hash", "_prefixes", "entries")

    def __init__(self, entries: tuple[str, ...]) -> None:
        self.entries = entries
        self._hash = hash(entries)
        self._exact = frozenset(entry for entry in entries if "*" not in entry)
        globs = [tuple(entry.split("*")) for entry in entries if "*" in entry]
        # `fs.*` is by far the commonest shape; str.startswith tests all of them in one call.
        self._prefixes = tuple(first for first, *rest in globs if rest == [""])
        self._globs = tuple(pieces for pieces in globs if pieces[1:] != ("",))

    @classmethod
    def of(cls, entries: Iterable[str]) -> AllowList:
        """The allow-list with these entries. Equal ones are one object while they are among
        the latest, since most sessions of a platform share a few of them."""
        return _compiled(tuple(entries))

    def allows(self, name: str) -> bool:
        """Whether a session with this allow-list may call the tool `name`."""
        return (
            name in self._exact
            or name.startswith(self._prefixes)
            or any(_matches(pieces, name) for pieces in self._globs)
        )

    def allows_all(self, names: tuple[str, ...]) -> bool:
        """Whether every one of `names` may be called; true of none at all."""
        return self._exact.issuperset(names) or all(map(self.allows, {*names}))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, AllowList) and self.entries == other.entries

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"AllowList.of({self.entries!r})"


@lru_cache(maxsize=4096)
def _compiled(entries: tuple[str, ...]) -> AllowList:
    return AllowList(entries)


def _matches(pieces: tuple[str, ...], name: str) -> bool:
    """Whether `name` is the pieces in order with anything between them.

    Taking the leftmost place for each middle piece is enough: any other choice leaves
    less room for the pieces after it.
    """
    first, *middle, last = pieces
    end = len(name) - len(last)
    at = len(first)
    if at > end or not name.startswith(first) or not name.endswith(last):
        return False
    for piece in middle:
        found = name.find(piece, at, end)
        if found < 0:
            return False
        at = found + len(piece)
    return True
