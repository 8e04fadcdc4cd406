"""`ARBITER_API_KEYS_FILE`: API keys, one a line, that are read again when the file changes.

A line is a key as in `ARBITER_API_KEYS`, and may end in the most that the key may grant:

    gate:proxy:<sha256 hex> max_call_budget=1000 max_time_limit_secs=3600 tools=fs.*,read_*
    gate:proxy:<sha256 hex> max_tier=internal

Blank lines, and lines that start with `#`, are skipped.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from app.domain.ceilings import Ceilings
from app.domain.session import MAX_INT32, DataSensitivity
from app.domain.tools import MAX_ENTRIES, TOOL_ENTRY_PATTERN, AllowList
from app.http.auth import ApiKey, Authenticator, KeyRing
from app.observability.logs import get_logger

POLL_EVERY_SECS = 2.0
"""A change is read at the second poll that sees it, so within 5 s: a file that is still being
written is left alone."""

MAX_BYTES = 4 * 1024 * 1024
"""Of the file: about 40,000 keys."""

_NUMBER = re.compile(r"[0-9]{1,10}")
_ENTRY = re.compile(TOOL_ENTRY_PATTERN)


class BadKeyFile(Exception):
    """The file cannot be used. The message says why in one sentence, without its text."""


def read_keys(path: Path, others: Iterable[ApiKey]) -> tuple[ApiKey, ...]:
    """Return `others` and the keys in the file. Raises `BadKeyFile`, also if there would be
    no keys at all."""
    try:
        text = _read(path).decode("utf-8")
    except OSError as error:
        raise BadKeyFile(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BadKeyFile(f"{path} is not UTF-8") from None
    ring = KeyRing(others)
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            ring.add(_parse(line))
        except ValueError as error:
            raise BadKeyFile(f"{path}, line {number}: {error}") from None
    if not ring.by_name:
        raise BadKeyFile(f"{path} has no API keys")
    return ring.keys


def _read(path: Path) -> bytes:
    """Return the bytes of the file. Raises `BadKeyFile` and `OSError`."""
    # Opening a FIFO would otherwise wait for a writer.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise BadKeyFile(f"{path} is not a regular file")
        found = file.read(MAX_BYTES + 1)
    if len(found) > MAX_BYTES:
        raise BadKeyFile(f"{path} is larger than {MAX_BYTES} bytes")
    return found


def _parse(line: str) -> ApiKey:
    """Parse a line. Raises `ValueError`, whose message does not repeat the text."""
    key, *words = line.split()
    return replace(ApiKey.parse(key), ceilings=_ceilings(words) if words else None)


def _ceilings(words: list[str]) -> Ceilings:
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        if name not in _PARSERS:
            raise ValueError(f"what follows an API key must be one of {', '.join(_USAGE)}")
        field, parse = _PARSERS[name]
        if field in found:
            raise ValueError(f"{name} is there twice")
        found[field] = parse(name, value)
    return Ceilings(**found)


def _number(name: str, value: str) -> int:
    if not _NUMBER.fullmatch(value) or int(value) > MAX_INT32:
        raise ValueError(f"{name} must be a whole number from 0 to {MAX_INT32}")
    return int(value)


def _tools(name: str, value: str) -> AllowList:
    entries = value.split(",")
    if len(entries) > MAX_ENTRIES or not all(map(_ENTRY.fullmatch, entries)):
        raise ValueError(
            f"{name} must be 1 to {MAX_ENTRIES} tool names or patterns with commas between them"
        )
    return AllowList.of(entries)


def _tier(name: str, value: str) -> DataSensitivity:
    if value not in list(DataSensitivity):
        raise ValueError(f"{name} must be one of {', '.join(DataSensitivity)}")
    return DataSensitivity(value)


_PARSERS: dict[str, tuple[str, Callable[[str, str], Any]]] = {
    "max_call_budget": ("call_budget", _number),
    "max_time_limit_secs": ("time_limit_secs", _number),
    "tools": ("authorized_tools", _tools),
    "max_tier": ("data_sensitivity_ceiling", _tier),
}
_USAGE = [f"{name}=…" for name in _PARSERS]

_Stamp = tuple[int, ...] | None


def _stamp(path: Path) -> _Stamp:
    """Return what changes with the content of a file; `None` if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    # The last one changes with the permissions too, which may have been what was wrong.
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class KeyFile:
    """Gives an authenticator the keys of a file whenever it changes, beside `others`. A faulty
    file changes nothing but the log."""

    def __init__(
        self,
        path: Path,
        others: tuple[ApiKey, ...],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._path = path
        self._others = others
        self._sleep = sleep
        # Before the file is read, at the start as later: a change in between is noticed.
        self._used = self._seen = _stamp(path)
        self._one_at_a_time = asyncio.Lock()
        self._reloads: set[asyncio.Task[None]] = set()

    def reload_soon(self, authenticator: Authenticator) -> None:
        """Start to read the file."""
        task = asyncio.get_running_loop().create_task(self.reload(authenticator))
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def reload(self, authenticator: Authenticator) -> None:
        """Read the file now, in a thread: a disk can take its time."""
        async with self._one_at_a_time:
            self._used = self._seen = await asyncio.to_thread(_stamp, self._path)
            try:
                keys = await asyncio.to_thread(read_keys, self._path, self._others)
            except BadKeyFile as error:
                get_logger().error("API keys not reloaded", reason=str(error))
                return
            authenticator.replace_keys(keys)
            get_logger().info("API keys reloaded", keys=len(keys))

    async def poll(self, authenticator: Authenticator) -> None:
        """Read the file if it has changed since it was read, but not since the last poll."""
        seen_before = self._seen
        self._seen = await asyncio.to_thread(_stamp, self._path)
        if self._seen != self._used and self._seen == seen_before:
            await self.reload(authenticator)

    async def run(self, authenticator: Authenticator) -> None:
        """Poll until cancelled."""
        while True:
            await self._sleep(POLL_EVERY_SECS)
            await self.poll(authenticator)
