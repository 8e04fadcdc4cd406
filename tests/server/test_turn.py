"""What a turn of the event loop does: it runs requests, without a task until they wait, and
writes responses."""

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
    return Turn(asyncio.get_running_loop(), tasks=False)


def join(turn: Turn, request: Coroutine[Any, Any, None]) -> Requester:
    requester = Requester()
    turn.run(requester, request)
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

    async def test_requests_that_wait_for_the_same_future_go_on_together_without_tasks(
        self, turn: Turn
    ) -> None:
        shared = asyncio.get_running_loop().create_future()
        noted: list[Any] = []
        transport = Transport(noted, "one")

        async def request(number: int) -> None:
            noted.append((await shared, number, asyncio.current_task()))
            turn.write(transport, b"%d" % number)

        requesters = [join(turn, request(number)) for number in range(3)]
        await next_turn()
        assert noted == []
        shared.set_result("done")
        await next_turn()

        assert noted[:3] == [("done", number, None) for number in range(3)]
        assert noted[3:] == [("one", b"%d" % number) for number in range(3)]
        assert [each.task for each in requesters] == [None] * 3

    async def test_a_request_may_wait_again(self, turn: Turn) -> None:
        loop = asyncio.get_running_loop()
        first, second = loop.create_future(), loop.create_future()
        seen = []

        async def request() -> None:
            seen.append(await first)
            seen.append(await second)

        join(turn, request())
        await next_turn()
        first.set_result(1)
        await next_turn()
        assert seen == [1]
        second.set_result(2)
        await next_turn()

        assert seen == [1, 2]

    async def test_an_error_of_the_future_is_raised_in_each_request(self, turn: Turn) -> None:
        shared = asyncio.get_running_loop().create_future()
        seen = []

        async def request(number: int) -> None:
            try:
                await shared
            except OSError:
                seen.append(number)

        for number in range(2):
            join(turn, request(number))
        await next_turn()
        shared.set_exception(OSError())
        await next_turn()

        assert seen == [0, 1]

    async def test_a_cancelled_future_ends_its_requests_and_no_other(self, turn: Turn) -> None:
        shared = asyncio.get_running_loop().create_future()
        ran = []

        async def waits() -> None:
            await shared

        async def goes_on() -> None:
            ran.append(1)

        join(turn, waits())
        await next_turn()
        shared.cancel()
        join(turn, goes_on())
        await next_turn()

        assert ran == [1]

    async def test_a_kept_request_gets_a_task_when_it_is_asked_for(self, turn: Turn) -> None:
        shared = asyncio.get_running_loop().create_future()
        seen = []

        async def request(number: int) -> None:
            seen.append((await shared, number))

        requester, other = join(turn, request(1)), join(turn, request(2))
        await next_turn()
        turn.give_tasks(requester)
        assert requester.task is not None
        shared.set_result("done")
        await requester.task

        assert sorted(seen) == [("done", 1), ("done", 2)]
        assert other.task is None

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

    @pytest.mark.parametrize("tasks", [False, True])
    async def test_a_request_does_not_see_the_context_of_the_one_that_started_it(
        self, tasks: bool
    ) -> None:
        turn = Turn(asyncio.get_running_loop(), tasks=tasks)
        number: ContextVar[int] = ContextVar("number", default=0)
        seen = []

        async def second() -> None:
            seen.append(number.get())

        async def first() -> None:
            number.set(1)
            join(turn, second())

        join(turn, first())
        await next_turn()
        await next_turn()

        assert seen == [0]

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
        turn.give_tasks(requester)
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


class Transport(asyncio.Transport):
    """Notes what is written."""

    def __init__(self, noted: list[Any], name: str) -> None:
        super().__init__()
        self.noted, self.name = noted, name
        self.closing = False

    def write(self, data: Any) -> None:
        self.noted.append((self.name, data))

    def is_closing(self) -> bool:
        return self.closing


class TestResponses:
    async def test_responses_are_written_together_when_all_requests_have_run(
        self, turn: Turn
    ) -> None:
        noted: list[Any] = []
        transport = Transport(noted, "one")

        async def request(number: int) -> None:
            noted.append(number)
            turn.write(transport, b"%d" % number)

        for number in (1, 2):
            join(turn, request(number))
        await next_turn()

        assert noted == [1, 2, ("one", b"1"), ("one", b"2")]

    async def test_the_response_of_a_task_is_written_in_the_next_turn(self, turn: Turn) -> None:
        noted: list[Any] = []
        turn.write(Transport(noted, "one"), b"1")
        turn.write(Transport(noted, "two"), b"2")
        assert noted == []
        await next_turn()

        assert noted == [("one", b"1"), ("two", b"2")]

    async def test_a_flush_writes_at_once_and_only_once(self, turn: Turn) -> None:
        noted: list[Any] = []
        turn.write(Transport(noted, "one"), b"1")
        turn.flush()
        assert noted == [("one", b"1")]
        await next_turn()

        assert noted == [("one", b"1")]

    async def test_nothing_is_written_to_a_client_that_has_gone(self, turn: Turn) -> None:
        noted: list[Any] = []
        gone, present = Transport(noted, "gone"), Transport(noted, "present")
        turn.write(gone, b"1")
        turn.write(present, b"2")
        gone.closing = True
        await next_turn()

        assert noted == [("present", b"2")]
