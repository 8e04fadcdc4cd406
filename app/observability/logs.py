"""Structured logs on standard error: one JSON object per line, or text for a terminal.

Nothing a client sends can break or forge a line. JSON escapes it, and the terminal format
escapes control characters in every string except tracebacks. Ids are shortened, since a whole
session id is a capability.
"""

from __future__ import annotations

import logging
import os
import select
import stat
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TextIO, cast, get_args

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["json", "console"]
LogLevel = Literal["debug", "info", "warning", "error"]
"""The most verbose first."""

SHORT_ID_CHARS = 8


def short(identifier: str) -> str:
    """Return enough of an id to tell log lines apart, but too little to use it."""
    return identifier[:SHORT_ID_CHARS]


def _escape_controls(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    for key, value in event.items():
        if isinstance(value, str) and not value.isprintable() and key != "exception":
            event[key] = value.encode("unicode_escape").decode("ascii")
    return event


class LogLimit:
    """Lets through a few log lines of each kind a second, and counts those it leaves out."""

    def __init__(self, per_sec: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_sec = per_sec
        self._clock = clock
        self._second = 0
        self._lines: dict[str, int] = {}

    def admits(self, kind: str) -> bool:
        """Whether a line of this kind may be written now."""
        second = int(self._clock())
        if second != self._second:
            self._report()
            self._second = second
        lines = self._lines[kind] = self._lines.get(kind, 0) + 1
        return lines <= self._per_sec

    def _report(self) -> None:
        for kind, lines in self._lines.items():
            if lines > self._per_sec:
                get_logger().info(
                    "log lines left out", reason=kind, lines=lines - self._per_sec
                )
        self._lines.clear()


class _StandardError:
    """Standard error, which nobody may be reading. What cannot be written at once is lost and
    counted, because waiting would stop every request, and the health checks with them."""

    def __init__(self) -> None:
        self.dropped = 0
        """Lines lost so far."""
        self._unreported = 0
        self._is_torn = False

    def write(self, text: str) -> None:
        stream = sys.stderr
        try:
            number = _not_waiting(stream.fileno())
        except (OSError, ValueError):
            # A test has put something else in its place, or it is closed.
            with suppress(OSError, ValueError):
                stream.write(text)
            return
        if self._unreported and _takes_more(number):
            lines, self._unreported = self._unreported, 0
            # structlog holds a lock while it writes; the standard library's can be taken again.
            logging.getLogger("arbiter").error("log lines lost: %d", lines)
        data = text.encode("utf-8", "backslashreplace")
        if self._is_torn:
            data = b"\n" + data
        written = _write_at_once(number, data)
        if written < len(data):
            self.dropped += 1
            self._unreported += 1
        self._is_torn = 0 < written < len(data) or (self._is_torn and not written)

    def flush(self) -> None:
        """Do nothing: nothing is held back here."""


def _write_at_once(number: int, data: bytes) -> int:
    """Write what a file takes without waiting. Return how many bytes that was."""
    done = 0
    while done < len(data) and _takes_more(number):
        try:
            done += os.write(number, data[done : done + select.PIPE_BUF])
        except OSError:
            break
    return done


def _takes_more(number: int) -> bool:
    """Whether a file takes `PIPE_BUF` bytes without waiting (poll(2), pipe(7))."""
    poll = select.poll()
    poll.register(number, select.POLLOUT)
    return any(event & select.POLLOUT for _, event in poll.poll(0))


_reopened: dict[tuple[int, int], int] = {}


def _not_waiting(number: int) -> int:
    """The same terminal or pipe, opened so that writes never wait: a terminal takes less than
    it promises, and another worker can fill a pipe meanwhile. Other files as they are. Raises
    `OSError`."""
    status = os.fstat(number)
    if not (stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        return number
    known = _reopened.get((status.st_dev, status.st_ino))
    if known is None:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        try:
            known = os.open(f"/proc/self/fd/{number}", flags)
        except OSError:
            # Without /proc, or without the permission.
            known = number
        _reopened[status.st_dev, status.st_ino] = known
    return known


_standard_error = _StandardError()


def dropped_lines() -> int:
    """How many lines of the log this process has lost."""
    return _standard_error.dropped


def configure_logs(log_format: LogFormat, level: LogLevel, *more_processors: Processor) -> None:
    """Send the service's and uvicorn's logs to standard error in one format."""
    shared: list[Processor] = [
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *more_processors,
    ]
    rendered: list[Processor]
    if log_format == "json":
        rendered = [
            structlog.processors.format_exc_info,
            structlog.processors.JSONRenderer(),
        ]
    else:
        rendered = [
            structlog.processors.format_exc_info,
            _escape_controls,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ]
    handler = logging.StreamHandler(cast("TextIO", _standard_error))
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendered],
            foreign_pre_chain=shared,
        )
    )
    logging.getLogger().handlers = [handler]
    # Access lines would hold whole session ids.
    access = logging.getLogger("uvicorn.access")
    access.handlers, access.propagate = [], False
    # Our own lines skip the standard library's logging, which takes longer than a whole denial.
    structlog.configure(
        processors=[*shared, *rendered],
        logger_factory=structlog.WriteLoggerFactory(cast("TextIO", _standard_error)),
        # So that loggers that exist already follow a change of the level.
        cache_logger_on_first_use=False,
    )
    apply_log_level(level)


def apply_log_level(level: LogLevel) -> None:
    """Change the level of the whole process. `Events.apply_log_level` also makes the events
    follow."""
    root = logging.getLogger()
    root.setLevel(level.upper())
    # At info they repeat our own lines; at debug they print request data.
    for name in ("uvicorn", "uvicorn.error", "asyncio"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(root.level))


def log_level() -> LogLevel:
    """The level of the process now."""
    return cast("LogLevel", logging.getLevelName(logging.getLogger().level).lower())


def is_more_verbose(level: LogLevel, than: LogLevel) -> bool:
    """Whether more is logged at `level`."""
    levels = get_args(LogLevel)
    return bool(levels.index(level) < levels.index(than))


def get_logger() -> Any:
    """Return the logger of the service."""
    return structlog.get_logger("arbiter")
