"""The audit log: one JSON line for every decision and every change in a session's life.

A request only appends an entry to a queue in memory. A separate thread encodes and writes the
entries in small batches, so it never holds the interpreter lock for long. The queue is bounded.
Once it is full, because writing fails or falls behind, new entries are dropped and counted, and
a `lost` line in the log records how many are missing at that point.

A session id is a capability, so none is written whole. A line has its first characters, and
its SHA-256 to find the lines of a known id.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from app.domain.admission import Admission, Admitted, Denied, Violation
from app.domain.errors import AuditUnusable
from app.domain.session import Grant, Session
from app.observability.logs import get_logger, short
from app.observability.metrics import Metrics
from app.store.codec import encode_hook

STDOUT = "stdout"
MAX_WAITING = 65_536
"""Most entries that may wait to be written, a few hundred bytes each."""

LINES_AT_ONCE = 64
CLOSED_PER_LINE = 100
"""Sessions in one line about a kill switch."""

WRITE_EVERY_SECS = 0.1
RETRY_SECS = 1.0
CLOSE_WITHIN_SECS = 5.0


class Actor(msgspec.Struct, frozen=True, gc=False):
    """Who caused an event, and with which request."""

    caller: str
    """The name of the API key; empty if the service runs without keys."""
    request_id: str


NOBODY = Actor("", "")
"""The actor of events that no request caused, such as sweeps."""


class Counters(msgspec.Struct):
    """A session's counters at one instant."""

    calls_made: int
    rate_window_calls: int


class Figures(msgspec.Struct, omit_defaults=True):
    """A rule that failed, and by how much."""

    code: str
    limit: int | None = None
    used: int | None = None
    requested: int | None = None
    ceiling: str = ""
    tool_indexes: tuple[int, ...] = ()


class Line(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One line of the log. Fields with their default value are left out."""

    at: str
    """RFC 3339, UTC."""
    event: str
    """`create`, `call`, `batch`, `close`, `amend`, `pause`, `resume`, `close_agent`, `freeze`,
    `unfreeze`, `replica`, `sweep`, `start`, `stop` or `lost`."""
    outcome: str = ""
    """`admitted`, `replayed`, `done`, or the code of the denial or problem."""
    caller: str = ""
    request_id: str = ""
    session: str = ""
    session_sha256: str = ""
    agent_id: str = ""
    tools: tuple[str, ...] = ()
    data_sensitivity: str = ""
    dry_run: bool = False
    violations: list[Figures] = []
    grant: Grant | None = None
    """What a session was created with, or allows after a change."""
    revision: int | None = None
    """Of the terms, after a change."""
    reason: str = ""
    """Why an agent was frozen, or a session paused or resumed."""
    before: Counters | None = None
    after: Counters | None = None
    count: int | None = None
    """Sessions affected or, for `lost`, lines missing."""
    sessions_sha256: list[str] = []
    """The sessions that a kill switch closed."""
    outcome_unknown: bool = False
    """Whether the request may have been recorded although it failed."""
    changed: dict[str, bool | str] = {}
    """What an operator changed about a process, and to what."""
    pid: int | None = None
    """The process that was changed."""


class Entry(NamedTuple):
    """One event, as the request records it."""

    at: float
    event: str
    outcome: str
    actor: Actor
    session_id: str = ""
    agent_id: str = ""
    admission: Admission | None = None
    session: Session | None = None
    """The session after the decision."""
    counted: int = 0
    """Calls that the decision added to its counters."""
    dry_run: bool = False
    violations: tuple[Violation, ...] = ()
    closed: tuple[str, ...] = ()
    """Ids of sessions that were closed together."""
    outcome_unknown: bool = False
    reason: str = ""
    number: int | None = None
    """Sessions or lines that the event is about."""
    changed: Mapping[str, bool | str] = MappingProxyType({})
    pid: int | None = None


class AuditLog:
    """Writes entries to `target`: the path of a file, or `stdout`. The file is created with
    mode 600 and appended to; several processes can share it."""

    def __init__(
        self, target: str, metrics: Metrics, now: Callable[[], float] = time.time
    ) -> None:
        self._target = target
        self._metrics = metrics
        self._now = now
        self._waiting: deque[Entry] = deque()
        self._told_lost = 0
        self._unwritten = b""
        self._file = -1
        self._mid_line = False
        self._losing = threading.Lock()
        self._failing = False
        self._reopen = False
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="audit", daemon=True)

    def open(self) -> None:
        """Open the target and start the thread. Raises `AuditUnusable` if that fails."""
        try:
            self._file = self._opened()
        except OSError as error:
            raise AuditUnusable(
                f"cannot write the audit log {self._target}: {error.strerror}"
            ) from error
        self._thread.start()

    def reopen(self) -> None:
        """Have the thread reopen the file, after a rotation."""
        self._reopen = True

    async def aclose(self) -> None:
        """Write the waiting entries and stop. What is left after `CLOSE_WITHIN_SECS` is
        counted as lost."""
        self._closing = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join, CLOSE_WITHIN_SECS)
        left = len(self._waiting) + self._unwritten.count(b"\n")
        if left:
            self._lose(left)
            get_logger().error("audit log closed with lines unwritten", lines=left)

    # Called in the event loop.

    def note(self, event: str, outcome: str, actor: Actor, **details: object) -> None:
        """Record an event that is not an admission; `details` are fields of `Entry`."""
        self._add(Entry(self._now(), event, outcome, actor, **details))  # type: ignore[arg-type]

    def note_decision(
        self,
        session_id: str,
        admission: Admission,
        decision: Admitted | Denied,
        actor: Actor,
        *,
        dry_run: bool,
    ) -> None:
        """Record the decision on a call or a batch."""
        operation = admission.operation.value
        if isinstance(decision, Denied):
            entry = Entry(
                self._now(),
                operation,
                decision.code.value,
                actor,
                session_id,
                admission=admission,
                session=decision.session,
                dry_run=dry_run,
                violations=decision.violations,
            )
        else:
            replayed = decision.replayed
            entry = Entry(
                self._now(),
                operation,
                "replayed" if replayed else "admitted",
                actor,
                session_id,
                admission=admission,
                session=decision.session,
                counted=0 if replayed else len(admission.tool_names),
                dry_run=dry_run,
            )
        self._add(entry)

    def note_kill(self, agent_id: str, closed: list[str], actor: Actor) -> None:
        """Record the use of a kill switch, with the sessions it closed, some to a line."""
        for first in range(0, max(len(closed), 1), CLOSED_PER_LINE):
            some = tuple(closed[first : first + CLOSED_PER_LINE])
            self.note(
                "close_agent", "done", actor, agent_id=agent_id, closed=some, number=len(some)
            )

    def _add(self, entry: Entry) -> None:
        if len(self._waiting) < MAX_WAITING:
            self._waiting.append(entry)
        else:
            self._lose(1)

    def _lose(self, lines: int) -> None:
        with self._losing:
            self._metrics.audit_dropped += lines

    # Run by the thread.

    def _run(self) -> None:
        while not (self._closing and not self._waiting and not self._unwritten):
            if self._reopen:
                self._try_to_reopen()
            if not self._waiting and not self._unwritten:
                self._wake.wait(WRITE_EVERY_SECS)
                self._wake.clear()
            elif not self._try_to_write():
                if self._closing:
                    break
                self._wake.wait(RETRY_SECS)
                self._wake.clear()
        if self._target != STDOUT:
            os.close(self._file)

    def _opened(self) -> int:
        if self._target == STDOUT:
            return sys.stdout.fileno()
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        file = os.open(self._target, flags, 0o600)
        if _is_torn(self._target):
            # A crash cut the last line off. The next one must not be a part of it.
            os.write(file, b"\n")
        return file

    def _try_to_reopen(self) -> None:
        self._reopen = False
        if self._target == STDOUT:
            return
        try:
            new = self._opened()
        except OSError as error:
            get_logger().error("audit log cannot be reopened", reason=error.strerror)
            return
        # A half-written line belongs to the old file. If it cannot be finished, it is lost.
        if self._mid_line and not self._try_to_write():
            _, _, self._unwritten = self._unwritten.partition(b"\n")
            self._lose(1)
        self._mid_line = False
        os.close(self._file)
        self._file = new

    def _try_to_write(self) -> bool:
        """Write up to `LINES_AT_ONCE` lines and return whether that succeeded."""
        if not self._unwritten:
            self._unwritten = self._next_lines()
        try:
            while self._unwritten:
                written = os.write(self._file, self._unwritten)
                self._mid_line = self._unwritten[written - 1 : written] != b"\n"
                self._unwritten = self._unwritten[written:]
        except OSError as error:
            if not self._failing:
                get_logger().error("audit log cannot be written", reason=error.strerror)
            self._failing = True
            return False
        if self._failing:
            get_logger().info("audit log can be written again")
        self._failing = False
        return True

    def _next_lines(self) -> bytes:
        number = min(LINES_AT_ONCE, len(self._waiting))
        lines = [_line(self._waiting.popleft()) for _ in range(number)]
        lost = self._metrics.audit_dropped - self._told_lost
        if lost and len(self._waiting) < MAX_WAITING // 2:
            self._told_lost += lost
            lines.append(_line(Entry(self._now(), "lost", "", NOBODY, number=lost)))
        return b"".join(map(_encode, lines))


def _is_torn(path: str) -> bool:
    """Return whether a file ends within a line; False if it cannot be read."""
    try:
        if not Path(path).is_file():
            return False
        with Path(path).open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"
    except OSError:
        # It is empty, or not ours to read.
        return False


_ENCODER = msgspec.json.Encoder(enc_hook=encode_hook)


_TERMS_EVENTS = frozenset({"create", "amend", "pause", "resume"})
"""Events whose lines have the whole terms."""


def _encode(line: Line) -> bytes:
    """The line in printable ASCII: a grant holds text that a client chose."""
    encoded = _ENCODER.encode(line)
    if not encoded.isascii():
        encoded = json.dumps(msgspec.json.decode(encoded), separators=(",", ":")).encode()
    return encoded.replace(b"\x7f", b"\\u007f") + b"\n"


def _digest(session_id: str) -> str:
    return sha256(session_id.encode()).hexdigest()


def _line(entry: Entry) -> Line:
    line = Line(
        at=datetime.fromtimestamp(entry.at, UTC).isoformat(timespec="microseconds"),
        event=entry.event,
        outcome=entry.outcome,
        caller=entry.actor.caller,
        request_id=entry.actor.request_id,
        agent_id=entry.agent_id,
        dry_run=entry.dry_run,
        violations=[
            Figures(
                each.code.value,
                each.limit,
                each.used,
                each.requested,
                each.ceiling or "",
                each.tool_indexes,
            )
            for each in entry.violations
        ],
        sessions_sha256=[_digest(session_id) for session_id in entry.closed],
        outcome_unknown=entry.outcome_unknown,
        reason=entry.reason,
        count=entry.number,
        changed=dict(entry.changed),
        pid=entry.pid,
    )
    if entry.session_id:
        line.session = short(entry.session_id)
        line.session_sha256 = _digest(entry.session_id)
    if entry.admission is not None:
        line.tools = entry.admission.tool_names
        line.agent_id = entry.admission.agent_id or ""
        line.data_sensitivity = entry.admission.data_sensitivity or ""
    session = entry.session
    if session is not None:
        line.agent_id = session.grant.agent_id
        if entry.event in _TERMS_EVENTS:
            line.grant = session.grant
            line.revision = session.terms.rev
        made, in_window = session.usage.calls_made, session.usage.rate_window_calls
        line.before = Counters(made - entry.counted, in_window - entry.counted)
        line.after = line.before if entry.dry_run else Counters(made, in_window)
    return line
