"""Requests that run without a task, until they wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

import pytest

from app.server.turn import Turn

pytestmark = pytest.mark.anyio


class Requester:
    """A connection. Its task, if its request got one."""

    task: asyncio.Task[None] | None = None

    def on_task(self, task: asyncio.Task[None]) -> None:
        self.task = task


@pytest.fixture
async def turn() -> Turn:
    return Turn(asyncio.get_running_loop())


def join(turn: Turn, request: Coroutine[Any, Any, None]) -> Requester:
    requester = Requester()
    turn.join(requester, request)
    return requester


async def next_turn() -> None:
    await asyncio.sleep(0)


class TestTurn:
    async def test_requests_run_in_the_next_turn_in_order(self, turn: Turn) -> None:
        ran = []

        async def request(number: int) -> None:
            ran.append((number, asyncio.current_task()))

        requesters = [join(turn, request(number)) for number in range(3)]
        assert ran == []
        await next_turn()

        assert ran == [(0, None), (1, None), (2, None)]
        assert [each.task for each in requesters] == [None] * 3

    async def test_a_request_that_waits_goes_on_in_a_task(self, turn: Turn) -> None:
        lock = asyncio.Event()
        seen = []

        async def request() -> None:
            await lock.wait()
            seen.append(asyncio.current_task())

        requester = join(turn, request())
        await next_turn()
        assert requester.task is not None
        lock.set()
        await requester.task

        assert seen == [requester.task]

    async def test_a_bare_yield_gives_a_task(self, turn: Turn) -> None:
        seen = []

        async def request() -> None:
            await asyncio.sleep(0)
            seen.append(asyncio.current_task())

        requester = join(turn, request())
        await next_turn()
        assert requester.task is not None
        await requester.task

        assert seen == [requester.task]

    async def test_each_request_has_one_context(self, turn: Turn) -> None:
        number: ContextVar[int] = ContextVar("number", default=0)
        seen = []

        async def request(own: int) -> None:
            before, token = number.get(), number.set(own)
            await asyncio.sleep(0)
            seen.append((before, number.get()))
            # A token works only in the context that made it.
            number.reset(token)

        requesters = [join(turn, request(own)) for own in (1, 2)]
        await next_turn()
        await asyncio.gather(*(each.task for each in requesters if each.task is not None))

        assert seen == [(0, 1), (0, 2)]
        assert number.get() == 0

    async def test_the_task_can_be_cancelled(self, turn: Turn) -> None:
        seen = []

        async def request() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append("cancelled")
                raise

        requester = join(turn, request())
        await next_turn()
        assert requester.task is not None
        requester.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await requester.task

        assert seen == ["cancelled"]

    async def test_a_failed_request_is_reported_and_the_others_run(self, turn: Turn) -> None:
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: reported.append(context["exception"])
        )
        error = RuntimeError("broken")

        async def broken() -> None:
            raise error

        async def sound() -> None:
            reported.append("the other ran")

        join(turn, broken())
        join(turn, sound())
        await next_turn()

        assert reported == [error, "the other ran"]

    async def test_a_request_that_joins_during_a_turn_runs_in_the_next(
        self, turn: Turn
    ) -> None:
        ran = []

        async def second() -> None:
            ran.append(2)

        async def first() -> None:
            join(turn, second())
            ran.append(1)

        join(turn, first())
        await next_turn()
        assert ran == [1]
        await next_turn()

        assert ran == [1, 2]
