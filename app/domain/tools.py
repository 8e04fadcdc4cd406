"""Tool names, and the allow-list of the tools that a session may call.

A tool name is 1 to 128 characters of `A-Z a-z 0-9 _ . / : @ -`, compared byte for byte.
An entry of an allow-list is a tool name, or a pattern in which `*` matches any run of
characters, including none.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

TOOL_NAME_PATTERN = r"^[A-Za-z0-9_./:@-]{1,128}$"
TOOL_ENTRY_PATTERN = r"^[A-Za-z0-9_./:@*-]{1,128}$"
MAX_ENTRIES = 256
MAX_BATCH = 256


class AllowList:
    """An immutable, compiled allow-list. Create one with `AllowList.of`.

    All exact names together cost one set look-up. Each pattern costs one comparison and
    never backtracks: a regular expression built from a caller's `a*a*a*…` could block the
    process for minutes.
    """

    __slots__ = ("_exact", "_globs", "_hash", "_prefixes", "entries")

    def __init__(self, entries: tuple[str, ...]) -> None:
        self.entries = entries
        self._hash = hash(entries)
        self._exact = frozenset(entry for entry in entries if "*" not in entry)
        globs = [tuple(entry.split("*")) for entry in entries if "*" in entry]
        # Most patterns look like `fs.*`, and one call of str.startswith tests all of those.
        self._prefixes = tuple(first for first, *rest in globs if rest == [""])
        self._globs = tuple(pieces for pieces in globs if pieces[1:] != ("",))

    @classmethod
    def of(cls, entries: Iterable[str]) -> AllowList:
        """The allow-list with these entries. The most recent ones are cached and shared,
        because most sessions of a platform use the same few."""
        return _compiled(tuple(entries))

    def allows(self, name: str) -> bool:
        """Return whether a session with this allow-list may call the tool `name`."""
        return (
            name in self._exact
            or name.startswith(self._prefixes)
            or (bool(self._globs) and any(_matches(pieces, name) for pieces in self._globs))
        )

    def allows_all(self, names: tuple[str, ...]) -> bool:
        """Return whether a session may call every tool in `names`; true if there are none."""
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
    """Return whether `name` consists of `pieces` in order, with anything between them.

    The leftmost match of each middle piece is enough: a later one leaves less room for the
    pieces after it.
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
