"""Finding lines in audit files, rotated and compressed ones too.

Files are streamed, so memory does not grow with them. A line that matches is passed on as it
is, byte for byte.
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple, cast

import msgspec

from app.observability.logs import SHORT_ID_CHARS

MAX_LINE_BYTES = 1_048_576
"""More than the service ever writes in a line, whose largest part is a request of 64 KiB."""

COMPRESSED = ".gz"

_Instant = Annotated[datetime, msgspec.Meta(tz=True)]
_ROTATED = r"([.-]\d[\w:.+-]*)?"
"""What logrotate and the like append: `.1`, `.2.gz`, `-20260101`, `.2026-01-01T12:00:00Z`."""

_HEX = re.compile(rf"[0-9a-f]{{{SHORT_ID_CHARS}}}|[0-9a-f]{{64}}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_DURATION = re.compile(r"([0-9]{1,12})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class _Line(msgspec.Struct):
    """The fields of a line that filters look at."""

    at: _Instant
    event: str
    outcome: str = ""
    caller: str = ""
    request_id: str = ""
    session: str = ""
    session_sha256: str = ""
    agent_id: str = ""
    sessions_sha256: list[str] = []


_DECODER = msgspec.json.Decoder(_Line)


class Wanted(NamedTuple):
    """Filters, all of which a line must match. `None` matches every line."""

    session: str | None = None
    """What `parse_session` returned."""
    agent_id: str | None = None
    outcome: str | None = None
    caller: str | None = None
    request_id: str | None = None
    since: datetime | None = None
    """The first instant wanted."""
    until: datetime | None = None
    """The first instant no longer wanted."""

    def matches(self, line: _Line) -> bool:
        """Whether the line matches all filters."""
        return (
            (self.outcome is None or line.outcome == self.outcome)
            and (self.caller is None or line.caller == self.caller)
            and (self.request_id is None or line.request_id == self.request_id)
            and (self.agent_id is None or line.agent_id == self.agent_id)
            and (self.session is None or _is_about(line, self.session))
            and (self.since is None or line.at >= self.since)
            and (self.until is None or line.at < self.until)
        )


def _is_about(line: _Line, session: str) -> bool:
    return session in (line.session, line.session_sha256) or session in line.sessions_sha256


def parse_session(text: str) -> str:
    """Return what lines have of a session: the SHA-256 of a whole id; or `text` itself if it is
    that, or the start of an id. Raises `ValueError`."""
    if _UUID.fullmatch(text):
        return sha256(text.encode()).hexdigest()
    if _HEX.fullmatch(text):
        return text
    raise ValueError(
        f"give a whole session id in lower case, its first {SHORT_ID_CHARS} characters, or its "
        "SHA-256"
    )


def parse_time(text: str, now: datetime) -> datetime:
    """Return an instant: RFC 3339, section 5.6, or a duration before `now`. Raises
    `ValueError`."""
    try:
        if duration := _DURATION.fullmatch(text):
            return now - timedelta(**{_UNITS[duration[2]]: int(duration[1])})
        return msgspec.convert(text, _Instant)
    except (msgspec.ValidationError, OverflowError):
        raise ValueError(
            "give an instant such as 2026-01-01T12:00:00Z, or a duration such as 15m, 2h or 3d"
        ) from None


def rotations(file: Path) -> list[Path]:
    """Return the files of this log that exist, the oldest first.

    The first instant in a file says how old it is: names can count up, down, or be dates.
    """
    name = re.compile(re.escape(file.name) + _ROTATED)
    found = [each for each in file.parent.glob("*") if name.fullmatch(each.name)]
    return sorted((each for each in found if each.is_file()), key=_first_instant)


def _first_instant(file: Path) -> datetime:
    search = AuditSearch(Wanted())
    for line in search.lines([file]):
        return _DECODER.decode(line).at
    return datetime.min.replace(tzinfo=UTC)


@dataclass
class AuditSearch:
    """A search for lines that match `wanted`."""

    wanted: Wanted
    damaged: int = 0
    """Lines skipped so far because they cannot be understood."""
    unreadable: list[str] = field(default_factory=list)
    """Files that could not be read, or not to their end, and why."""

    def lines(self, files: Iterable[Path]) -> Iterator[bytes]:
        """Yield the lines that match, in the order of the files, each with its line feed."""
        for file in files:
            try:
                with _opened(file) as stream:
                    for line in self._sound_lines(stream):
                        if self._matches(line):
                            yield line if line.endswith(b"\n") else line + b"\n"
            except (gzip.BadGzipFile, EOFError, zlib.error):
                self.unreadable.append(f"{file}: its compressed content is damaged")
            except OSError as error:
                self.unreadable.append(f"{file}: {error.strerror}")

    def _sound_lines(self, stream: BinaryIO) -> Iterator[bytes]:
        """Yield the lines of a bearable length."""
        while line := stream.readline(MAX_LINE_BYTES):
            if len(line) < MAX_LINE_BYTES or line.endswith(b"\n"):
                yield line
                continue
            self.damaged += 1
            while line and not line.endswith(b"\n"):
                line = stream.readline(MAX_LINE_BYTES)

    def _matches(self, line: bytes) -> bool:
        if line.isspace():
            return False
        try:
            return self.wanted.matches(_DECODER.decode(line))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.damaged += 1
            return False


def _opened(file: Path) -> BinaryIO:
    if file.suffix == COMPRESSED:
        return cast("BinaryIO", gzip.open(file))
    return file.open("rb")
