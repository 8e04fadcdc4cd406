"""The Lua scripts, each with the text that runs before it."""

from __future__ import annotations

from hashlib import sha1
from pathlib import Path

_FOLDER = Path(__file__).parent / "lua"


class Script:
    """A script, and the digest by which an engine that has run it knows it."""

    def __init__(self, name: str, *before: str) -> None:
        parts = [(_FOLDER / f"{part}.lua").read_text() for part in (*before, name)]
        self.text = "\n".join(parts).encode()
        self.sha = sha1(self.text, usedforsecurity=False).hexdigest()


ADMIT = Script("admit", "prelude")
AGENT = Script("agent", "prelude")
CHANGE = Script("change", "prelude")
CLOSE_AGENT = Script("close_agent", "prelude")
COUNT = Script("count", "prelude")
CREATE = Script("create", "prelude")
DUE = Script("due", "prelude")
FIND_CREATION = Script("find_creation", "prelude")
FROZEN = Script("frozen", "prelude")
LAYOUT = Script("layout")
PAGE = Script("page", "prelude")
READ = Script("read", "prelude")
SWEEP = Script("sweep", "prelude")
