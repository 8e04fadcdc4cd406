"""Group commit, with commits that last as long as the test wants."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from app.store.sqlite.group_commit import GroupCommit, Job

pytestmark = pytest.mark.anyio


class SlowDisk:
    """Commits when the test allows it."""

    def __init__(self) -> None:
        self.groups: list[list[Any]] = []
        self.committing = threading.Event()
        self.may_commit = threading.Event()

    def commit(self, jobs: Sequence[Job]) -> list[Any]:
        outcomes = [job() for job in jobs]
        self.groups.append(outcomes)
        self.committing.set()
        assert self.may_commit.wait(30)
        return outcomes


@pytest.fixture
def disk() -> SlowDisk:
    return SlowDisk()


@pytest.fixture
async def commits(disk: SlowDisk) -> AsyncIterator[GroupCommit]:
    made = GroupCommit(disk.commit, "test")
    yield made
    disk.may_commit.set()
    await made.drain()


def submit(commits: GroupCommit, outcome: Any) -> asyncio.Task[Any]:
    return asyncio.create_task(commits.submit(lambda: outcome))


async def started(disk: SlowDisk) -> None:
    """Wait until the first commit is under way."""
    assert await asyncio.to_thread(disk.committing.wait, 30)


async def test_jobs_that_arrive_during_a_commit_share_the_next_one_in_order(
    commits: GroupCommit, disk: SlowDisk
) -> None:
    first = submit(commits, "first")
    await started(disk)
    others = [submit(commits, number) for number in range(5)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert not first.done()
    disk.may_commit.set()

    assert await asyncio.gather(first, *others) == ["first", 0, 1, 2, 3, 4]
    assert disk.groups == [["first"], [0, 1, 2, 3, 4]]


async def test_an_error_is_raised_only_to_its_own_caller(
    commits: GroupCommit, disk: SlowDisk
) -> None:
    disk.may_commit.set()
    bad, good = submit(commits, ValueError("mine")), submit(commits, "good")

    assert await good == "good"
    with pytest.raises(ValueError, match="mine"):
        await bad


async def test_a_job_cancelled_before_its_commit_does_not_run(
    commits: GroupCommit, disk: SlowDisk
) -> None:
    first = submit(commits, "first")
    await started(disk)
    gone, stays = submit(commits, "gone"), submit(commits, "stays")
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    disk.may_commit.set()

    assert await asyncio.gather(first, stays) == ["first", "stays"]
    assert disk.groups == [["first"], ["stays"]]


async def test_a_job_cancelled_during_its_commit_affects_no_other(
    commits: GroupCommit, disk: SlowDisk
) -> None:
    gone, stays = submit(commits, "gone"), submit(commits, "stays")
    await started(disk)
    gone.cancel()
    disk.may_commit.set()

    assert await stays == "stays"
    assert disk.groups == [["gone", "stays"]]


async def test_draining_waits_for_every_job(disk: SlowDisk) -> None:
    commits = GroupCommit(disk.commit, "test")
    jobs = [submit(commits, number) for number in range(3)]
    await started(disk)
    draining = asyncio.create_task(commits.drain())
    await asyncio.sleep(0)
    assert not draining.done()
    disk.may_commit.set()

    await draining

    assert [await job for job in jobs] == [0, 1, 2]


async def test_a_failed_commit_is_raised_to_every_caller() -> None:
    def broken(jobs: Sequence[Job]) -> list[Any]:
        raise RuntimeError("no commit")

    commits = GroupCommit(broken, "test")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no commit"):
            await submit(commits, "job")
    await commits.drain()
