"""Metrics of several workers added up: each writes its counts into a folder that all share, and
whoever is scraped reads the others'. What a worker that is gone has counted stays counted."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from app import __version__
from app.observability.logs import get_logger
from app.observability.metrics import Counts, Metrics

PUBLISH_EVERY_SECS = 1.0
"""How old another worker's counts can be in a scrape."""


class SharedMetrics:
    """The counts of the workers that share `folder`; without one, of this process."""

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

    def render(self, active_sessions: int | None) -> bytes:
        """The text of a scrape; `None` says that the store does not answer."""
        total = Metrics()
        total.add(self.own.counts())
        for others in self._others():
            total.add(others)
        return total.render(active_sessions)

    def _others(self) -> list[Counts]:
        if self._file is None:
            return []
        files = [file for file in self._file.parent.glob("*.json") if file != self._file]
        found = []
        for file in files:
            try:
                counts = msgspec.json.decode(file.read_bytes(), type=Counts)
            except (OSError, msgspec.MsgspecError):
                # It must not cost the scrape.
                get_logger().warning("counts cannot be read", file=file.name)
                continue
            if counts.version == __version__:
                if not _is_running(file.name.partition("-")[0]):
                    # What it counted stays; what it held at the moment went with it.
                    counts.connections = counts.requests_in_flight = 0
                found.append(counts)
        return found

    def publish(self) -> None:
        """Let the other workers see the counts, if they have changed."""
        encoded = msgspec.json.encode(self.own.counts())
        if self._file is None or encoded == self._published:
            return
        # Nobody reads half of it.
        unfinished = self._file.with_suffix(".unfinished")
        unfinished.write_bytes(encoded)
        unfinished.replace(self._file)
        self._published = encoded

    async def run(self) -> None:
        """Publish for ever, and once more when cancelled."""
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
            get_logger().warning("counts cannot be shared", reason=error.strerror)


def _is_running(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError):
        return False
    return True
