"""Group commit: jobs that arrive during a commit share the next one.

All database work runs on one thread, so the event loop never waits for the disk. Jobs run in
the order in which they were submitted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

Job = Callable[[], Any]


class GroupCommit:
    """Runs `commit` on groups of jobs, one group at a time, on a separate thread.

    `commit` runs the jobs of a group and returns their outcomes in the same order, once they
    are durable. An outcome that is an exception is raised where its job was submitted.
    """

    def __init__(self, commit: Callable[[Sequence[Job]], Sequence[Any]], name: str) -> None:
        self._commit = commit
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)
        self._waiting: list[tuple[Job, asyncio.Future[Any]]] = []
        self._committing: asyncio.Task[None] | None = None

    async def submit(self, job: Callable[[], T]) -> T:
        """Run `job` and return its result once its group is durable.

        If the caller is cancelled before the group starts, the job does not run. Later
        cancellation has no effect on it.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, future))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit_all())
        try:
            return await future
        finally:
            # The future holds the exception, whose traceback holds this frame.
            del future

    async def drain(self) -> None:
        """Wait for all submitted jobs, then stop the thread."""
        while self._committing is not None:
            await asyncio.wait([self._committing])
        self._thread.shutdown()

    async def _commit_all(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            group = [entry for entry in self._waiting if not entry[1].done()]
            self._waiting = []
            jobs = [job for job, _ in group]
            try:
                outcomes = await loop.run_in_executor(self._thread, self._commit, jobs)
            except Exception as error:  # noqa: BLE001 - raised to every caller
                outcomes = [error] * len(group)
            for (_, future), outcome in zip(group, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, BaseException):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
        self._committing = None
