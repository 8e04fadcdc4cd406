"""Metrics summed over several workers. Each worker writes its counts into a shared folder, and
the worker that is scraped reads the others'. The counts of an exited worker are kept.

Beside its counts a worker holds a lock on a file, which ends with the process. A process id
would not tell whether it still runs: another process may have got it.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from app import __version__
from app.observability.logs import get_logger
from app.observability.metrics import Counts, Metrics
from app.store.contract import Totals

LOCK = ".lock"
PUBLISH_EVERY_SECS = 1.0
"""How old another worker's counts can be at a scrape."""


class SharedMetrics:
    """The counts of the workers that share `folder`; without a folder, of this process."""

    def __init__(
        self,
        own: Metrics,
        folder: Path | None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.own = own
        self._sleep = sleep
        self._file = None if folder is None else folder / f"{os.getpid()}-{uuid.uuid4()}.json"
        self._published = b""
        self._lock = -1

    def render(self, totals: Totals | None) -> bytes:
        """Return the text of a scrape; `totals` is `None` if the store is down."""
        total = Metrics()
        total.add(self.own.counts())
        for others in self._others():
            total.add(others)
        return total.render(totals)

    def _others(self) -> list[Counts]:
        if self._file is None:
            return []
        files = [file for file in self._file.parent.glob("*.json") if file != self._file]
        found = []
        for file in files:
            try:
                counts = msgspec.json.decode(file.read_bytes(), type=Counts)
            except (OSError, msgspec.MsgspecError):
                # One bad file must not fail the scrape.
                get_logger().warning("cannot read counts", file=file.name)
                continue
            if counts.version == __version__:
                if not _is_locked(file.with_suffix(LOCK)):
                    # Its totals stay; its gauges ended with the process.
                    counts.connections = counts.requests_in_flight = 0
                found.append(counts)
        return found

    def publish(self) -> None:
        """Write the counts for the other workers, if they have changed."""
        encoded = msgspec.json.encode(self.own.counts())
        if self._file is None or (encoded == self._published and self._file.exists()):
            return
        # The folder may have been removed, and the lock with it.
        if not self._file.parent.exists():
            self._file.parent.mkdir(parents=True, exist_ok=True)
        if not self._file.with_suffix(LOCK).exists():
            self._take_lock(self._file.with_suffix(LOCK))
        # Readers never see a partial file.
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_bytes(encoded)
        unfinished.replace(self._file)
        self._published = encoded

    def _take_lock(self, file: Path) -> None:
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    async def run(self) -> None:
        """Publish every `PUBLISH_EVERY_SECS`, and once more when cancelled."""
        try:
            while self._file is not None:
                self._try_to_publish()
                await self._sleep(PUBLISH_EVERY_SECS)
        finally:
            self._try_to_publish()

    def _try_to_publish(self) -> None:
        try:
            self.publish()
        except OSError as error:
            get_logger().warning("cannot publish counts", reason=error.strerror)


def _is_locked(file: Path) -> bool:
    """Return whether the worker that made this file still runs."""
    try:
        with file.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
