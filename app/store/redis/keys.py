"""Where everything is in Redis: cells, and the keys in them.

There are 256 cells, `c00` to `cff`. The cell is the hash tag of every key, so everything in a
cell is in one slot, and a script about one session or one agent is one atomic step. An agent's
cell is the first byte of the SHA-256 of its id. A session id begins with its agent's cell, so
that a call finds its cell by the id alone.
"""

from __future__ import annotations

import uuid
from functools import lru_cache
from hashlib import sha256
from typing import NamedTuple

from app.domain.idempotency import CreationKey, IdempotencyKey

LAYOUT = "arbiter:layout"
LAYOUT_VERSION = "1"

CELLS = tuple(f"{number:02x}" for number in range(256))


@lru_cache(maxsize=16_384)
def cell_of_agent(agent_id: str) -> str:
    """The cell of an agent and of all its sessions."""
    return sha256(agent_id.encode()).hexdigest()[:2]


def cell_of_session(session_id: str) -> str:
    """The cell that a session id names."""
    return session_id[:2]


def new_session_id(agent_id: str) -> str:
    """A random UUID v4 whose first two digits are the agent's cell."""
    return cell_of_agent(agent_id) + str(uuid.uuid4())[2:]


def prefix(cell: str) -> str:
    """What all keys of a cell begin with. Scripts make the keys of sessions from it."""
    return f"arbiter:{{c{cell}}}:"


def session_keys(session_id: str) -> tuple[str, str, str]:
    """The cell's clock, the session, and its remembered admissions."""
    start = prefix(cell_of_session(session_id))
    return f"{start}clock", f"{start}session:{session_id}", f"{start}replays:{session_id}"


class IndexKeys(NamedTuple):
    """The cell's clock, and sessions by deadline: of the cell or of an agent in it."""

    clock: str
    open: str
    paused: str
    """Those of the open ones that are paused."""
    closed: str


def agent_keys(agent_id: str) -> IndexKeys:
    """The indexes of an agent."""
    start = prefix(cell_of_agent(agent_id))
    names = (f"{start}{index}:{agent_id}" for index in IndexKeys._fields[1:])
    return IndexKeys(f"{start}clock", *names)


def cell_keys(cell: str) -> IndexKeys:
    """The indexes of a cell."""
    start = prefix(cell)
    return IndexKeys(*(f"{start}{name}" for name in IndexKeys._fields))


def creation_key(agent_id: str, idempotency: CreationKey | None) -> str:
    """The creation remembered by an idempotency key; the cell's prefix if there is no key."""
    start = prefix(cell_of_agent(agent_id))
    if idempotency is None:
        return start
    field = f"{agent_id}:{replay_field(IdempotencyKey(*idempotency[:2]))}"
    return f"{start}creation:{sha256(field.encode()).hexdigest()}"


def replay_field(idempotency: IdempotencyKey) -> str:
    """An idempotency key as one text, different for different keys."""
    caller, key = idempotency
    return f"{len(caller)}:{caller}:{key}"
