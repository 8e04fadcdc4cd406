"""The Lua scripts, each with what stands before it."""

from __future__ import annotations

from hashlib import sha1
from pathlib import Path

_FOLDER = Path(__file__).parent / "lua"


class Script:
    """A script, and the name by which an engine that has run it knows it."""

    def __init__(self, name: str, *before: str) -> None:
        parts = [(_FOLDER / f"{part}.lua").read_text() for part in ("prelude", *before, name)]
        self.text = "\n".join(parts).encode()
        self.sha = sha1(self.text, usedforsecurity=False).hexdigest()


ADMIT = Script("admit", "session_state")
SESSION_CREATE = Script("session_create", "session_state")
SESSION_READ = Script("session_read", "session_state")
SESSION_CLOSE = Script("session_close", "session_state")
SESSION_SWEEP = Script("session_sweep", "session_state")
INDEX_CLAIM = Script("index_claim")
INDEX_CONFIRM = Script("index_confirm")
INDEX_WITHDRAW = Script("index_withdraw")
INDEX_DOUBT = Script("index_doubt")
INDEX_CLOSE = Script("index_close")
INDEX_DUE = Script("index_due")
INDEX_LEAVE = Script("index_leave")
INDEX_SWEEP = Script("index_sweep")
INDEX_COUNT = Script("index_count")
INDEX_PAGE = Script("index_page")
AGENT_CLAIM = Script("agent_claim")
AGENT_CONFIRM = Script("agent_confirm")
AGENT_DOUBT = Script("agent_doubt")
AGENT_CLOSE = Script("agent_close")
AGENT_FORGET = Script("agent_forget")
AGENT_COUNT = Script("agent_count")
READY = Script("ready")
