"""SIGHUP, handled in the event loop."""

from __future__ import annotations

import asyncio
import signal
import threading

import pytest

from app.server.sighup import handle_sighup, sighup_held_back

pytestmark = pytest.mark.anyio


def hang_up() -> None:
    # To this thread: another one of the test run would die of it.
    signal.pthread_kill(threading.get_ident(), signal.SIGHUP)


async def test_every_action_runs_in_the_event_loop() -> None:
    ran: list[str] = []
    done = asyncio.Event()
    with handle_sighup(lambda: ran.append("first"), lambda: ran.append("second"), done.set):
        hang_up()
        assert ran == []
        await asyncio.wait_for(done.wait(), 10)

    assert ran == ["first", "second"]


async def test_signals_in_quick_succession_are_one() -> None:
    ran: list[int] = []
    done = asyncio.Event()
    with handle_sighup(lambda: ran.append(1), done.set):
        for _ in range(100):
            hang_up()
        await asyncio.wait_for(done.wait(), 10)
        done.clear()
        assert len(ran) == 1

        hang_up()
        await asyncio.wait_for(done.wait(), 10)

    assert len(ran) == 2


async def test_a_signal_that_was_held_back_arrives_with_the_handler() -> None:
    done = asyncio.Event()
    with sighup_held_back():
        hang_up()
        with handle_sighup(done.set):
            await asyncio.wait_for(done.wait(), 10)

    assert done.is_set()


async def test_the_former_handler_is_back_afterwards() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with handle_sighup():
        assert signal.getsignal(signal.SIGHUP) != before

    assert signal.getsignal(signal.SIGHUP) == before


async def test_other_threads_leave_the_signal_alone() -> None:
    before = signal.getsignal(signal.SIGHUP)

    async def lifespan() -> bool:
        with handle_sighup():
            return signal.getsignal(signal.SIGHUP) == before

    assert await asyncio.to_thread(lambda: asyncio.run(lifespan()))
