"""The contract tests: what `app/store/contract.py` promises, over every store."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from msgspec.structs import replace

from app.domain.admission import NO_SESSION, Admitted, Denied, key_conflict
from app.domain.advice import DenialCode as Code
from app.domain.errors import InvalidField, SessionLimitReached
from app.domain.idempotency import ChangeKey, CreationKey, IdempotencyKey
from app.domain.lifecycle import Amendment, Changed, amend, resume
from app.domain.session import MICROSECONDS, Freeze, Session, SessionStatus, Terms
from app.domain.tools import AllowList
from app.store.contract import InvalidCursor, SessionFilter, SessionStore
from tests.conftest import MakeStore
from tests.support import (
    AGENT,
    OTHER_AGENT,
    PAUSE,
    ManualClock,
    a_batch,
    a_call,
    a_grant,
    change,
    close,
    count_active,
    create,
    kill,
    new_id,
    opened,
)

pytestmark = pytest.mark.anyio

EVERYTHING = SessionFilter()


async def admit(store: SessionStore, session: Session, *tools: str, **more: Any) -> Session:
    decision = await store.record(session.session_id, a_batch(*tools or ("read_file",)), **more)
    assert isinstance(decision, Admitted), decision
    return decision.session


async def deny(store: SessionStore, session: Session, *tools: str, **more: Any) -> Denied:
    decision = await store.record(session.session_id, a_batch(*tools or ("read_file",)), **more)
    assert isinstance(decision, Denied), decision
    return decision


async def current(store: SessionStore, session: Session) -> Session:
    found = await store.get(session.session_id)
    assert found is not None
    return found


async def sweep(store: SessionStore) -> int:
    removed, more = 0, True
    while more:
        swept = await store.cleanup_expired(100)
        removed, more = removed + swept.expired + swept.closed, swept.more
    return removed


async def listed(store: SessionStore, which: SessionFilter = EVERYTHING) -> list[str]:
    page = await store.list_all(which, limit=500)
    return [session.session_id for session in page.sessions]


class TestOneSession:
    async def test_a_new_session_admits_and_counts_a_call(self, store: SessionStore) -> None:
        session = await opened(store)
        assert (session.usage.calls_made, session.is_active) == (0, True)

        decision = await store.record(session.session_id, a_call())

        assert isinstance(decision, Admitted)
        assert decision.session.usage.calls_made == 1
        assert await current(store, session) == decision.session

    async def test_a_spent_budget_denies_the_next_call(self, store: SessionStore) -> None:
        session = await opened(store, a_grant(call_budget=2))
        await admit(store, session)
        await admit(store, session)

        assert (await deny(store, session)).code is Code.BUDGET_EXCEEDED

    async def test_a_tool_off_the_allow_list_is_denied(self, store: SessionStore) -> None:
        session = await opened(store)
        await admit(store, session)

        assert (await deny(store, session, "delete_file")).code is Code.TOOL_NOT_AUTHORIZED

    async def test_a_session_with_no_time_is_expired_at_once(self, store: SessionStore) -> None:
        session = await opened(store, a_grant(time_limit_secs=0))

        assert (await deny(store, session)).code is Code.SESSION_EXPIRED
        assert (await current(store, session)).status is SessionStatus.EXPIRED

    async def test_a_session_expires_without_being_touched(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store, a_grant(time_limit_secs=10))

        clock.advance(10)

        assert (await current(store, session)).status is SessionStatus.EXPIRED

    async def test_a_closed_session_cannot_be_used(self, store: SessionStore) -> None:
        session = await opened(store)

        closed = await close(store, session.session_id)

        assert isinstance(closed, Session)
        assert closed.status is SessionStatus.CLOSED
        assert (await deny(store, session)).code is Code.SESSION_CLOSED

    async def test_a_session_can_be_closed_only_once(self, store: SessionStore) -> None:
        session = await opened(store)
        await close(store, session.session_id)

        again = await close(store, session.session_id)

        assert isinstance(again, Denied)
        assert again.code is Code.SESSION_CLOSED

    async def test_an_expired_session_can_be_closed(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store, a_grant(time_limit_secs=10))
        clock.advance(11)

        closed = await close(store, session.session_id)

        assert isinstance(closed, Session)
        assert closed.status is SessionStatus.CLOSED

    async def test_an_unknown_session_is_not_found(self, store: SessionStore) -> None:
        recorded = await store.record(new_id(), a_call("anything"))
        closed = await close(store, new_id())

        assert isinstance(recorded, Denied)
        assert recorded.code is Code.SESSION_NOT_FOUND
        assert isinstance(closed, Denied)
        assert closed.code is Code.SESSION_NOT_FOUND
        assert await store.get(new_id()) is None

    async def test_a_budget_of_zero_denies_the_first_call(self, store: SessionStore) -> None:
        session = await opened(store, a_grant(call_budget=0))

        assert (await deny(store, session)).code is Code.BUDGET_EXCEEDED

    async def test_the_rate_limit_holds_within_a_window(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store, a_grant(rate_limit_per_minute=3, call_budget=100))
        for _ in range(3):
            await admit(store, session)

        assert (await deny(store, session)).code is Code.RATE_LIMITED
        clock.advance(60)
        assert (await admit(store, session)).usage.rate_window_calls == 1

    async def test_without_a_rate_limit_all_calls_pass(self, store: SessionStore) -> None:
        session = await opened(store, a_grant(call_budget=100))

        for made in range(10):
            assert (await admit(store, session)).usage.calls_made == made + 1

    async def test_returned_sessions_are_snapshots(self, store: SessionStore) -> None:
        session = await opened(store)
        first = await admit(store, session)

        await admit(store, session)

        assert (session.usage.calls_made, first.usage.calls_made) == (0, 1)


class TestBatch:
    @pytest.mark.parametrize(
        ("terms", "tools", "code"),
        [
            ({}, ["read_file", "delete_file"], Code.TOOL_NOT_AUTHORIZED),
            ({"call_budget": 3}, ["read_file"] * 4, Code.BUDGET_EXCEEDED),
            ({"rate_limit_per_minute": 3}, ["read_file"] * 4, Code.RATE_LIMITED),
        ],
    )
    async def test_a_denied_batch_costs_nothing(
        self, store: SessionStore, terms: dict[str, Any], tools: list[str], code: Code
    ) -> None:
        session = await opened(store, a_grant(**terms))

        assert (await deny(store, session, *tools)).code is code

        after = await current(store, session)
        assert (after.usage.calls_made, after.usage.rate_window_calls) == (0, 0)

    async def test_an_empty_batch_succeeds_and_costs_nothing(self, store: SessionStore) -> None:
        session = await opened(store)

        decision = await store.record(session.session_id, a_batch())

        assert isinstance(decision, Admitted)
        assert decision.session.usage.calls_made == 0

    async def test_a_batch_after_an_elapsed_window_is_still_limited(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store, a_grant(rate_limit_per_minute=2))
        clock.advance(60)

        assert (await deny(store, session, *["read_file"] * 50)).code is Code.RATE_LIMITED


class TestDryRun:
    async def test_a_dry_run_answers_but_records_nothing(self, store: SessionStore) -> None:
        session = await opened(store, a_grant(call_budget=1))

        assert (await admit(store, session, dry_run=True)).usage.calls_made == 1

        assert (await current(store, session)).usage.calls_made == 0
        await admit(store, session)
        assert (await deny(store, session, dry_run=True)).code is Code.BUDGET_EXCEEDED

    async def test_a_dry_run_does_not_use_up_an_idempotency_key(
        self, store: SessionStore
    ) -> None:
        session = await opened(store)
        key = IdempotencyKey("proxy", "k")
        await store.record(session.session_id, a_call(), key, dry_run=True)

        decision = await store.record(session.session_id, a_call("list_dir"), key)

        assert isinstance(decision, Admitted)
        assert not decision.replayed

    async def test_a_dry_run_of_a_repeated_request_replays(self, store: SessionStore) -> None:
        session = await opened(store)
        key = IdempotencyKey("proxy", "k")
        first = await store.record(session.session_id, a_call(), key)

        again = await store.record(session.session_id, a_call(), key, dry_run=True)

        assert isinstance(first, Admitted)
        assert again == Admitted(first.session, replayed=True)


class TestIdempotency:
    KEY = IdempotencyKey("proxy", "key-1")

    async def test_a_repeated_call_is_charged_once(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store)
        first = await store.record(session.session_id, a_call(), self.KEY)
        await admit(store, session)
        clock.advance(30)

        again = await store.record(session.session_id, a_call(), self.KEY)

        assert isinstance(first, Admitted)
        assert again == Admitted(first.session, replayed=True)
        assert (await current(store, session)).usage.calls_made == 2

    @pytest.mark.parametrize(
        "other",
        [a_call("list_dir"), a_call(agent_id=AGENT), a_batch("read_file")],
    )
    async def test_another_request_with_the_same_key_is_a_conflict(
        self, store: SessionStore, other: Any
    ) -> None:
        session = await opened(store)
        await store.record(session.session_id, a_call(), self.KEY)

        conflict = await store.record(session.session_id, other, self.KEY)

        assert isinstance(conflict, Denied)
        assert conflict.code is Code.IDEMPOTENCY_CONFLICT
        assert (await current(store, session)).usage.calls_made == 1

    async def test_a_key_belongs_to_one_caller_and_one_session(
        self, store: SessionStore
    ) -> None:
        session, other = await opened(store), await opened(store)
        await store.record(session.session_id, a_call(), self.KEY)

        for target, key in ((session, IdempotencyKey("else", "key-1")), (other, self.KEY)):
            decision = await store.record(target.session_id, a_call("list_dir"), key)
            assert isinstance(decision, Admitted)
            assert not decision.replayed

    async def test_caller_and_key_are_not_simply_joined(self, store: SessionStore) -> None:
        session = await opened(store)
        await store.record(session.session_id, a_call(), IdempotencyKey("a:b", "c"))

        decision = await store.record(session.session_id, a_call(), IdempotencyKey("a", "b:c"))

        assert isinstance(decision, Admitted)
        assert not decision.replayed

    async def test_a_denial_is_not_remembered(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store, a_grant(rate_limit_per_minute=1))
        await admit(store, session)
        denied = await store.record(session.session_id, a_call(), self.KEY)
        clock.advance(60)

        decision = await store.record(session.session_id, a_call(), self.KEY)

        assert isinstance(denied, Denied)
        assert isinstance(decision, Admitted)
        assert not decision.replayed

    async def test_replays_end_with_the_session(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        closed, expired = await opened(store), await opened(store)
        for session in (closed, expired):
            await store.record(session.session_id, a_call(), self.KEY)
        await close(store, closed.session_id)
        assert (await deny(store, closed, idempotency=self.KEY)).code is Code.SESSION_CLOSED

        clock.advance(3600)

        denied = await store.record(expired.session_id, a_call(), self.KEY)
        assert isinstance(denied, Denied)
        assert denied.code is Code.SESSION_EXPIRED

    async def test_a_replay_is_denied_to_another_agent(self, store: SessionStore) -> None:
        session = await opened(store)
        await store.record(session.session_id, a_call(), self.KEY)

        denied = await store.record(session.session_id, a_call(agent_id=OTHER_AGENT), self.KEY)

        assert isinstance(denied, Denied)
        assert denied.code is Code.AGENT_MISMATCH

    async def test_a_repeated_creation_makes_one_session(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        first = await create(store, a_grant(), self.KEY)
        clock.advance(24 * 3600 - 1)

        again = await create(store, a_grant(), self.KEY)

        assert isinstance(first, Admitted)
        assert again == Admitted(first.session, replayed=True)
        assert len(await listed(store)) == 1

    async def test_a_creation_is_remembered_after_its_session_is_gone(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        first = await create(store, a_grant(time_limit_secs=1), self.KEY)
        clock.advance(1000)
        assert await sweep(store) == 1

        again = await create(store, a_grant(time_limit_secs=1), self.KEY)

        assert isinstance(first, Admitted)
        assert again == Admitted(first.session, replayed=True)

    @pytest.mark.parametrize("swept", [True, False])
    async def test_a_creation_is_forgotten_after_a_day(
        self, store: SessionStore, clock: ManualClock, swept: bool
    ) -> None:
        for _ in range(2):
            made = await create(store, a_grant(), self.KEY)
            assert isinstance(made, Admitted)
            assert not made.replayed
            clock.advance(24 * 3600)
            if swept:
                await sweep(store)

    async def test_a_creation_key_belongs_to_the_agent(self, store: SessionStore) -> None:
        first = await create(store, a_grant(), self.KEY)
        second = await create(store, a_grant(agent_id=OTHER_AGENT), self.KEY)

        assert isinstance(first, Admitted)
        assert isinstance(second, Admitted)
        assert not second.replayed
        assert len(await listed(store)) == 2

    async def test_a_creation_is_found_without_creating(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        key = CreationKey("proxy", "k", "request")
        unknown = await store.find_creation(AGENT, key)
        first = await store.create(a_grant(), key)
        assert isinstance(first, Admitted)

        found = await store.find_creation(AGENT, key)
        other = await store.find_creation(OTHER_AGENT, key)
        conflict = await store.find_creation(AGENT, key._replace(request="another"))
        clock.advance(24 * 3600)
        forgotten = await store.find_creation(AGENT, key)

        assert found == Admitted(first.session, replayed=True)
        assert isinstance(conflict, Denied)
        assert conflict.code is Code.IDEMPOTENCY_CONFLICT
        assert unknown is other is forgotten is None
        assert len(await listed(store)) == 1

    async def test_another_grant_with_the_same_key_is_a_conflict(
        self, store: SessionStore
    ) -> None:
        await create(store, a_grant(), self.KEY)

        conflict = await create(store, a_grant(call_budget=7), self.KEY)

        assert isinstance(conflict, Denied)
        assert conflict.code is Code.IDEMPOTENCY_CONFLICT
        assert len(await listed(store)) == 1


class TestAgents:
    async def test_closing_an_agents_sessions_leaves_others_alone(
        self, store: SessionStore
    ) -> None:
        mine = [await opened(store) for _ in range(3)]
        other = await opened(store, a_grant(agent_id=OTHER_AGENT))

        assert await kill(store, AGENT) == 3

        for session in mine:
            assert (await current(store, session)).status is SessionStatus.CLOSED
        assert (await current(store, other)).status is SessionStatus.ACTIVE
        assert await kill(store, AGENT) == 0

    async def test_only_active_sessions_are_counted_and_closed(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        await opened(store, a_grant(time_limit_secs=10))
        await close(store, (await opened(store)).session_id)
        clock.advance(10)
        await opened(store, a_grant(call_budget=0))

        assert await count_active(store, AGENT) == 1
        assert await count_active(store, OTHER_AGENT) == 0
        assert await kill(store, AGENT) == 1

    async def test_all_active_sessions_are_counted(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        await opened(store, a_grant(time_limit_secs=10))
        await opened(store, a_grant(agent_id=OTHER_AGENT))
        await close(store, (await opened(store)).session_id)
        assert await count_active(store) == 2

        clock.advance(10)

        assert await count_active(store) == 1


class TestCaps:
    async def test_the_cap_counts_active_sessions_of_one_agent(
        self, make_store: MakeStore
    ) -> None:
        store = await make_store(max_active_sessions_per_agent=2)
        first = await opened(store)
        await opened(store)
        await opened(store, a_grant(agent_id=OTHER_AGENT))

        denied = await create(store, a_grant())

        assert isinstance(denied, Denied)
        assert denied.code is Code.TOO_MANY_SESSIONS
        assert (denied.limit, denied.used) == (2, 2)
        assert len(await listed(store)) == 3
        await close(store, first.session_id)
        assert await opened(store)

    async def test_unswept_sessions_past_their_deadline_do_not_count(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(max_active_sessions_per_agent=1)
        await opened(store, a_grant(time_limit_secs=10))

        clock.advance(10)

        assert await opened(store)

    async def test_a_cap_of_zero_allows_no_sessions(self, make_store: MakeStore) -> None:
        store = await make_store(max_active_sessions_per_agent=0)

        assert isinstance(await create(store, a_grant()), Denied)

    async def test_a_repeated_creation_is_replayed_at_the_cap(
        self, make_store: MakeStore
    ) -> None:
        store = await make_store(max_active_sessions_per_agent=1, max_sessions=1)
        key = IdempotencyKey("proxy", "k")
        await create(store, a_grant(), key)

        again = await create(store, a_grant(), key)

        assert isinstance(again, Admitted)
        assert again.replayed

    async def test_racing_creations_never_exceed_the_cap(self, make_store: MakeStore) -> None:
        store = await make_store(max_active_sessions_per_agent=5)

        made = await asyncio.gather(*(create(store, a_grant()) for _ in range(50)))

        assert sum(isinstance(each, Admitted) for each in made) == 5
        assert await count_active(store, AGENT) == 5

    async def test_a_full_store_refuses_creations_until_sessions_are_removed(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(max_sessions=2, retention_secs=5)
        await opened(store, a_grant(time_limit_secs=10))
        await opened(store)

        with pytest.raises(SessionLimitReached):
            await create(store, a_grant())

        assert len(await listed(store)) == 2
        clock.advance(15)
        await sweep(store)
        assert await opened(store)

    async def test_remembered_creations_are_bounded_too(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(max_sessions=2, retention_secs=0)
        for key in "ab":
            await create(store, a_grant(time_limit_secs=1), IdempotencyKey("proxy", key))
        clock.advance(1)
        await sweep(store)

        with pytest.raises(SessionLimitReached):
            await create(store, a_grant(), IdempotencyKey("proxy", "c"))
        assert await opened(store)
        clock.advance(24 * 3600)
        await sweep(store)
        again = await create(store, a_grant(), IdempotencyKey("proxy", "c"))
        assert isinstance(again, Admitted)

    async def test_one_caller_leaves_room_for_the_creations_of_others(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(max_sessions=8, retention_secs=0)

        async def create_until_refused(caller: str) -> int:
            for number in range(9):
                key = IdempotencyKey(caller, str(number))
                try:
                    await create(store, a_grant(time_limit_secs=1), key)
                except SessionLimitReached:
                    return number
                clock.advance(1)
                await sweep(store)
            raise AssertionError("never refused")

        assert await create_until_refused("greedy") == 8
        assert await create_until_refused("late") == 4
        clock.advance(24 * 3600)
        await sweep(store)
        assert await create(store, a_grant(), IdempotencyKey("greedy", "last"))


class TestChange:
    async def test_a_transition_makes_the_next_revision(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store)
        await store.record(session.session_id, a_call())
        clock.advance(1)

        changed = await change(store, session.session_id, double_budget)

        assert isinstance(changed, Session)
        assert changed.terms.rev == 2
        assert changed.grant.call_budget == 2 * session.grant.call_budget
        assert changed.usage.calls_made == 1
        assert await store.get(session.session_id) == changed

    async def test_a_denied_transition_changes_nothing(self, store: SessionStore) -> None:
        session = await opened(store)

        refused = key_conflict(1)
        denied = await change(store, session.session_id, lambda *_: refused)

        assert denied is refused
        assert await store.get(session.session_id) == session

    async def test_no_session_no_change(self, store: SessionStore) -> None:
        assert await change(store, new_id(), double_budget) is NO_SESSION

    async def test_racing_changes_are_all_applied(self, store: SessionStore) -> None:
        session = await opened(store, a_grant(call_budget=1))

        await asyncio.gather(
            *(change(store, session.session_id, double_budget) for _ in range(8)),
            *(store.record(session.session_id, a_call()) for _ in range(8)),
        )

        after = await current(store, session)
        assert (after.terms.rev, after.grant.call_budget) == (9, 256)

    async def test_a_longer_deadline_moves_the_session_in_lists(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        first = await opened(store, a_grant(time_limit_secs=10))
        second = await opened(store, a_grant(time_limit_secs=20))

        await change(store, first.session_id, an_hour_longer)

        assert await listed(store) == [second.session_id, first.session_id]
        clock.advance(20)
        assert await count_active(store) == await count_active(store, AGENT) == 1
        assert isinstance(await store.record(first.session_id, a_call()), Admitted)

    async def test_a_budget_below_the_calls_made_admits_no_more(
        self, store: SessionStore
    ) -> None:
        session = await opened(store)
        for _ in range(3):
            await store.record(session.session_id, a_call())

        await change(store, session.session_id, no_budget)

        denied = await store.record(session.session_id, a_call())
        assert isinstance(denied, Denied)
        assert (denied.code, denied.limit, denied.used) == (Code.BUDGET_EXCEEDED, 0, 3)

    async def test_tools_can_be_replaced(self, store: SessionStore) -> None:
        session = await opened(store, a_grant("old", "both", "fs.*"))

        await change(store, session.session_id, other_tools)

        outcome = {
            tool: isinstance(await store.record(session.session_id, a_call(tool)), Admitted)
            for tool in ("old", "both", "fs.x", "new", "db.x")
        }
        assert outcome == {
            "old": False,
            "both": True,
            "fs.x": False,
            "new": True,
            "db.x": True,
        }


class TestFilters:
    async def test_sessions_are_found_by_what_they_allow(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        exact = await opened(store, a_grant("rm", call_budget=1, time_limit_secs=10))
        pattern = await opened(store, a_grant("r*", call_budget=5, time_limit_secs=20))
        other = await opened(store, a_grant("ls", agent_id=OTHER_AGENT, time_limit_secs=30))
        await store.record(exact.session_id, a_call("rm"))

        for which, expected in (
            (SessionFilter(tool="rm"), [exact, pattern]),
            (SessionFilter(tool="rx"), [pattern]),
            (SessionFilter(tool="none"), []),
            (SessionFilter(max_calls_remaining=0), [exact]),
            (SessionFilter(max_calls_remaining=5), [exact, pattern]),
            (SessionFilter(tool="rm", max_calls_remaining=0), [exact]),
            (SessionFilter(expires_before=other.terms.expires_at), [exact, pattern]),
            (SessionFilter(expires_before=other.terms.expires_at + 1), [exact, pattern, other]),
            (SessionFilter(AGENT, tool="ls"), []),
            (SessionFilter(OTHER_AGENT, tool="ls"), [other]),
            (SessionFilter(status=SessionStatus.PAUSED, tool="rm"), []),
        ):
            assert await listed(store, which) == [each.session_id for each in expected], which

    @pytest.mark.parametrize("which", [SessionFilter(tool="rm"), SessionFilter()])
    async def test_pages_of_a_filter_are_whole_and_bounded(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch, which: SessionFilter
    ) -> None:
        monkeypatch.setattr("app.store.listing.LOOKED_AT_MOST", 7)
        monkeypatch.setattr("app.store.listing.CHUNK", 3)
        wanted = []
        for number in range(40):
            tool = "rm" if number % 10 == 9 else "ls"
            session = await opened(store, a_grant(tool, time_limit_secs=number))
            if which.tool in (None, tool):
                wanted.append(session.session_id)

        found: list[str] = []
        cursor, pages = None, 0
        while True:
            page = await store.list_all(which, limit=2, cursor=cursor)
            found += [session.session_id for session in page.sessions]
            cursor, pages = page.next_cursor, pages + 1
            assert len(page.sessions) <= 2
            if cursor is None:
                break

        assert found == wanted
        assert pages == (6 if which.tool else 20)


def a_change(key: str = "k", request: str = "add 5") -> ChangeKey:
    return ChangeKey("ops", key, request)


def five_more(session: Session, now: int) -> Terms | Denied:
    return amend(Amendment(add_calls=5), 10**6)(session, now)


class TestAmend:
    async def test_a_change_with_a_key_is_made_once(self, store: SessionStore) -> None:
        session = await opened(store, a_grant(call_budget=1))

        made = await asyncio.gather(
            *(store.change(session.session_id, five_more, a_change()) for _ in range(5))
        )

        assert all(isinstance(each, Changed) for each in made)
        replayed = [each.replayed for each in made if isinstance(each, Changed)]
        assert sorted(replayed) == [False, True, True, True, True]
        after = await current(store, session)
        assert (after.grant.call_budget, after.terms.rev) == (6, 2)

    async def test_a_key_belongs_to_one_request(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store)
        await store.change(session.session_id, five_more, a_change())
        await store.record(session.session_id, a_call(), IdempotencyKey("ops", "call"))

        other = await store.change(session.session_id, five_more, a_change(request="other"))
        of_call = await store.change(session.session_id, five_more, a_change("call"))
        call = await store.record(session.session_id, a_call(), IdempotencyKey("ops", "k"))
        elsewhere = await store.change(
            session.session_id, five_more, a_change()._replace(caller="b")
        )

        assert other == of_call == call == key_conflict(clock.now)
        assert isinstance(elsewhere, Changed)
        assert not elsewhere.replayed

    async def test_a_retry_is_known_although_the_change_would_now_be_refused(
        self, store: SessionStore
    ) -> None:
        session = await opened(store, a_grant("a", "b"))
        remove = amend(Amendment(remove_tools=("a",)), 10**6)
        expecting = amend(Amendment(add_calls=1, expected_revision=2), 10**6)
        for key, transition in (("1", remove), ("2", expecting)):
            await store.change(session.session_id, transition, a_change(key))

        for key, transition in (("1", remove), ("2", expecting)):
            again = await store.change(session.session_id, transition, a_change(key))
            assert isinstance(again, Changed)
            assert again.replayed
        with pytest.raises(InvalidField):
            await store.change(session.session_id, remove, a_change("3"))
        conflict = await change(store, session.session_id, expecting)
        assert isinstance(conflict, Denied)
        assert conflict.code is Code.REVISION_CONFLICT

    async def test_a_refused_change_does_not_use_up_its_key(self, store: SessionStore) -> None:
        session = await opened(store)
        early = amend(Amendment(add_calls=1, expected_revision=9), 10**6)
        assert isinstance(
            await store.change(session.session_id, early, a_change(request="x")), Denied
        )

        made = await store.change(session.session_id, five_more, a_change())

        assert isinstance(made, Changed)
        assert not made.replayed

    async def test_an_ended_session_cannot_be_changed_not_even_by_a_retry(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        closed, expired = await opened(store), await opened(store, a_grant(time_limit_secs=9))
        for session in (closed, expired):
            await store.change(session.session_id, five_more, a_change())
        await close(store, closed.session_id)
        clock.advance(9)

        for session, code in (
            (closed, Code.SESSION_CLOSED),
            (expired, Code.SESSION_EXPIRED),
        ):
            for transition in (five_more, PAUSE, resume):
                for key in (None, a_change(), a_change("new")):
                    denied = await store.change(session.session_id, transition, key)
                    assert isinstance(denied, Denied)
                    assert denied.code is code

    async def test_what_changes_nothing_makes_no_revision(self, store: SessionStore) -> None:
        session = await opened(store)
        nothing = amend(Amendment(call_budget=session.grant.call_budget), 10**6)

        for key in (None, a_change(), a_change()):
            changed = await store.change(session.session_id, nothing, key)
            assert isinstance(changed, Changed)
            assert changed.session.terms.rev == 1

    async def test_a_time_limit_that_has_passed_expires_the_session_now(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(retention_secs=300)
        session = await opened(store)
        clock.advance(1000)

        changed = await change(
            store, session.session_id, amend(Amendment(time_limit_secs=10), 10**6)
        )

        assert isinstance(changed, Session)
        assert changed.status is SessionStatus.EXPIRED
        assert (await deny(store, session)).code is Code.SESSION_EXPIRED
        assert await count_active(store) == 0
        clock.advance(299)
        assert await sweep(store) == 0
        clock.advance(1)
        assert await sweep(store) == 1

    async def test_a_replayed_call_has_the_usage_of_then_and_the_terms_of_now(
        self, store: SessionStore
    ) -> None:
        session = await opened(store, a_grant(call_budget=10))
        key = IdempotencyKey("proxy", "k")
        await admit(store, session, idempotency=key)
        await admit(store, session)
        await change(store, session.session_id, five_more)

        again = await admit(store, session, idempotency=key)

        assert (again.usage.calls_made, again.grant.call_budget) == (1, 15)


class TestPause:
    async def test_a_paused_session_admits_nothing_until_it_is_resumed(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session = await opened(store, a_grant(time_limit_secs=10))
        key = IdempotencyKey("proxy", "k")
        await admit(store, session, idempotency=key)
        await change(store, session.session_id, PAUSE)
        clock.advance(9)

        for tools in (("read_file",), ()):
            denied = await store.record(session.session_id, a_batch(*tools))
            assert isinstance(denied, Denied)
            assert denied.code is Code.SESSION_PAUSED
        assert (await deny(store, session, idempotency=key)).code is Code.SESSION_PAUSED

        assert isinstance(await change(store, session.session_id, resume), Session)
        assert (await admit(store, session)).usage.calls_made == 2
        await change(store, session.session_id, PAUSE)
        clock.advance(1)
        assert (await deny(store, session)).code is Code.SESSION_EXPIRED

    async def test_pausing_and_resuming_twice_changes_nothing(
        self, store: SessionStore
    ) -> None:
        session = await opened(store)

        revisions = []
        for transition in (resume, PAUSE, PAUSE, resume, resume):
            changed = await change(store, session.session_id, transition)
            assert isinstance(changed, Session)
            revisions.append(changed.terms.rev)

        assert revisions == [1, 2, 2, 3, 3]

    async def test_a_paused_session_is_listed_and_counted_as_such(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(max_active_sessions_per_agent=2, retention_secs=0)
        held = await opened(store, a_grant(time_limit_secs=10))
        active = await opened(store)
        await change(store, held.session_id, PAUSE)

        for agent_id in (None, AGENT):
            for status, expected in (
                (SessionStatus.PAUSED, [held.session_id]),
                (SessionStatus.ACTIVE, [active.session_id]),
                (None, [held.session_id, active.session_id]),
                (SessionStatus.EXPIRED, []),
            ):
                assert await listed(store, SessionFilter(agent_id, status)) == expected
        agent = await store.get_agent(AGENT)
        assert (agent.active_sessions, agent.paused_sessions) == (1, 1)
        assert (await store.totals())[:3] == (1, 1, 0)
        # It counts for the cap.
        assert isinstance(await create(store, a_grant()), Denied)
        clock.advance(10)
        assert (await store.get_agent(AGENT)).paused_sessions == 0
        assert await listed(store, SessionFilter(None, SessionStatus.PAUSED)) == []
        assert await listed(store, SessionFilter(None, SessionStatus.EXPIRED)) == [
            held.session_id
        ]
        await sweep(store)
        assert (await store.totals())[:3] == (1, 0, 0)

    async def test_the_kill_switch_closes_paused_sessions(self, store: SessionStore) -> None:
        session = await opened(store)
        await change(store, session.session_id, PAUSE)

        assert await kill(store) == 1

        assert (await current(store, session)).status is SessionStatus.CLOSED
        assert (await store.totals())[:3] == (0, 0, 0)


class TestFreeze:
    async def test_a_frozen_agent_can_do_nothing(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        session, other = await opened(store), await opened(store, a_grant(agent_id=OTHER_AGENT))
        call_key, creation_key = IdempotencyKey("proxy", "k"), IdempotencyKey("proxy", "c")
        await admit(store, session, idempotency=call_key)
        await create(store, a_grant(), creation_key)
        clock.advance(1)

        state = await store.freeze(AGENT, "reads too much", "ops")

        assert state.freeze == Freeze(clock.now, "reads too much", "ops")
        assert state.active_sessions == 2
        for key in (None, creation_key):
            denied = await create(store, a_grant(), key)
            assert isinstance(denied, Denied)
            assert denied.code is Code.AGENT_FROZEN
        for tools in (("read_file",), ()):
            assert (await deny_batch(store, session, *tools)).code is Code.AGENT_FROZEN
        assert (await deny(store, session, idempotency=call_key)).code is Code.AGENT_FROZEN
        assert (await current(store, session)).status is SessionStatus.ACTIVE
        await admit(store, other)

    async def test_unfreezing_lets_it_go_on(self, store: SessionStore) -> None:
        session = await opened(store)
        await store.freeze(AGENT, "", "ops")

        state = await store.unfreeze(AGENT)

        assert state.freeze is None
        await admit(store, session)
        assert isinstance(await create(store, a_grant()), Admitted)
        assert (await store.unfreeze(AGENT)).freeze is None

    async def test_freezing_again_changes_only_the_reason(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        await store.freeze(AGENT, "first|", "ops")
        since = clock.now
        clock.advance(5)

        state = await store.freeze(AGENT, "second", "others")

        assert state.freeze == Freeze(since, "second", "ops")

    async def test_frozen_comes_after_expired_and_before_paused(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        paused, closed = await opened(store), await opened(store)
        expired = await opened(store, a_grant(time_limit_secs=1))
        await change(store, paused.session_id, PAUSE)
        await close(store, closed.session_id)
        await store.freeze(AGENT, "", "ops")
        clock.advance(1)

        codes = [(await deny(store, each)).code for each in (paused, closed, expired)]

        assert codes == [Code.AGENT_FROZEN, Code.SESSION_CLOSED, Code.SESSION_EXPIRED]

    async def test_sessions_of_a_frozen_agent_can_be_changed_and_closed(
        self, store: SessionStore
    ) -> None:
        first, second = await opened(store), await opened(store)
        await store.freeze(AGENT, "", "ops")

        for transition in (five_more, PAUSE, resume):
            assert isinstance(await change(store, first.session_id, transition), Session)
        assert isinstance(await close(store, first.session_id), Session)
        assert await kill(store) == 1
        assert (await current(store, second)).status is SessionStatus.CLOSED

    async def test_frozen_agents_are_listed_page_by_page(self, store: SessionStore) -> None:
        agents = sorted(new_id() for _ in range(7))
        for agent_id in agents:
            await store.freeze(agent_id, agent_id[:4], "ops")

        found: list[str] = []
        cursor = None
        while True:
            page = await store.list_frozen(limit=3, cursor=cursor)
            assert len(page.agents) <= 3
            found += [agent_id for agent_id, _ in page.agents]
            assert all(freeze.reason == agent_id[:4] for agent_id, freeze in page.agents)
            cursor = page.next_cursor
            if cursor is None:
                break

        assert found == agents
        assert (await store.totals()).frozen_agents == 7
        with pytest.raises(InvalidCursor):
            await store.list_frozen(limit=3, cursor="x")


async def deny_batch(store: SessionStore, session: Session, *tools: str) -> Denied:
    decision = await store.record(session.session_id, a_batch(*tools))
    assert isinstance(decision, Denied)
    return decision


def regranted(session: Session, **changes: Any) -> Terms:
    return session.terms.changed(grant=replace(session.grant, **changes))


def double_budget(session: Session, _: int) -> Terms:
    return regranted(session, call_budget=2 * session.grant.call_budget)


def no_budget(session: Session, _: int) -> Terms:
    return regranted(session, call_budget=0)


def other_tools(session: Session, _: int) -> Terms:
    return regranted(session, authorized_tools=AllowList.of(("new", "both", "db.*")))


def an_hour_longer(session: Session, _: int) -> Terms:
    return session.terms.changed(expires_at=session.terms.expires_at + 3600 * MICROSECONDS)


class TestSweep:
    async def test_without_retention_ended_sessions_are_removed_at_once(
        self, make_store: MakeStore
    ) -> None:
        store = await make_store(retention_secs=0)
        expired = await opened(store, a_grant(time_limit_secs=0))
        closed = await opened(store)
        alive = await opened(store)
        await close(store, closed.session_id)

        swept = await store.cleanup_expired(100)

        assert (swept.expired, swept.closed, swept.more) == (1, 1, False)
        assert await store.get(expired.session_id) is None
        assert await store.get(closed.session_id) is None
        assert await store.get(alive.session_id) is not None

    async def test_ended_sessions_are_reported_as_such_during_retention(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(retention_secs=300)
        expired = await opened(store, a_grant(time_limit_secs=10))
        closed = await opened(store)
        clock.advance(10)
        await close(store, closed.session_id)

        clock.advance(299)
        assert await sweep(store) == 0
        assert (await deny(store, expired)).code is Code.SESSION_EXPIRED
        assert (await deny(store, closed)).code is Code.SESSION_CLOSED

        clock.advance(1)
        assert await sweep(store) == 2
        assert (await deny(store, expired)).code is Code.SESSION_NOT_FOUND

    async def test_retention_counts_from_the_deadline_for_a_session_closed_after_it(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(retention_secs=300)
        session = await opened(store, a_grant(time_limit_secs=10))
        clock.advance(200)
        await close(store, session.session_id)

        clock.advance(110)

        assert await sweep(store) == 1
        clock.advance(1000)
        assert await sweep(store) == 0

    async def test_a_slice_removes_no_more_than_its_limit(self, make_store: MakeStore) -> None:
        store = await make_store(retention_secs=0)
        for _ in range(5):
            await opened(store, a_grant(time_limit_secs=0))
            await close(store, (await opened(store)).session_id)

        slices = [await store.cleanup_expired(3) for _ in range(4)]

        assert [each.expired + each.closed for each in slices] == [3, 3, 3, 1]
        assert [each.more for each in slices] == [True, True, True, False]

    async def test_a_sweep_removes_what_falls_due_while_it_runs(
        self, make_store: MakeStore, clock: ManualClock
    ) -> None:
        store = await make_store(retention_secs=0)
        for number, secs in enumerate([1, 1, 2, 2, 2]):
            await opened(store, a_grant(agent_id=f"agent-{number}", time_limit_secs=secs))
        clock.advance(1)
        first = await store.cleanup_expired(1)
        clock.advance(1)

        assert (first.expired, first.more) == (1, True)
        assert await sweep(store) == 4

    async def test_a_session_is_swept_with_its_idempotency_keys(
        self, make_store: MakeStore
    ) -> None:
        store = await make_store(retention_secs=0)
        session = await opened(store)
        for number in range(25):
            key = IdempotencyKey("proxy", str(number))
            await store.record(session.session_id, a_call(), key)
        await close(store, session.session_id)

        slices = [await store.cleanup_expired(10) for _ in range(3)]

        assert sum(each.closed for each in slices) == 1
        assert not slices[-1].more

    async def test_a_swept_session_leaves_nothing_to_count_or_list(
        self, make_store: MakeStore
    ) -> None:
        store = await make_store(retention_secs=0, max_active_sessions_per_agent=1)
        session = await opened(store)
        await store.record(session.session_id, a_call(), IdempotencyKey("proxy", "k"))
        await close(store, session.session_id)

        await sweep(store)

        assert await listed(store) == []
        assert await count_active(store) == 0
        assert await opened(store)


class TestListing:
    async def test_sessions_are_listed_in_order_of_deadline(self, store: SessionStore) -> None:
        late = await opened(store, a_grant(time_limit_secs=30))
        soon = await opened(store, a_grant(time_limit_secs=10))
        between = await opened(store, a_grant(time_limit_secs=20))
        await close(store, between.session_id)

        assert await listed(store) == [each.session_id for each in (soon, between, late)]

    async def test_sessions_are_filtered_by_agent_and_current_status(
        self, store: SessionStore, clock: ManualClock
    ) -> None:
        expired = await opened(store, a_grant(time_limit_secs=10))
        closed = await opened(store, a_grant(time_limit_secs=20))
        active = await opened(store, a_grant(time_limit_secs=30))
        other = await opened(store, a_grant(time_limit_secs=40, agent_id=OTHER_AGENT))
        await close(store, closed.session_id)
        clock.advance(10)

        async def found(agent_id: str | None, status: SessionStatus | None) -> list[str]:
            return await listed(store, SessionFilter(agent_id, status))

        ids = [each.session_id for each in (expired, closed, active, other)]
        assert await found(None, None) == ids
        assert await found(AGENT, None) == ids[:3]
        assert await found(None, SessionStatus.ACTIVE) == ids[2:]
        assert await found(AGENT, SessionStatus.ACTIVE) == [ids[2]]
        assert await found(AGENT, SessionStatus.EXPIRED) == [ids[0]]
        assert await found(AGENT, SessionStatus.CLOSED) == [ids[1]]
        assert await found(OTHER_AGENT, SessionStatus.CLOSED) == []

    @pytest.mark.parametrize("agent_id", [None, AGENT])
    async def test_pages_list_every_session_once_while_others_come_and_go(
        self, make_store: MakeStore, agent_id: str | None
    ) -> None:
        store = await make_store(retention_secs=0)
        staying = [(await opened(store)).session_id for _ in range(25)]
        seen: list[str] = []
        cursor, going = None, True
        while going:
            page = await store.list_all(SessionFilter(agent_id), limit=4, cursor=cursor)
            assert len(page.sessions) <= 4
            seen += [each.session_id for each in page.sessions]
            cursor, going = page.next_cursor, page.next_cursor is not None
            await close(store, (await opened(store)).session_id)
            await opened(store, a_grant(time_limit_secs=0))
            await sweep(store)
            await close(store, staying[-1])

        assert len(seen) == len(set(seen))
        assert set(staying[:-1]) <= set(seen)

    async def test_the_last_page_has_no_cursor(self, store: SessionStore) -> None:
        await opened(store)
        await opened(store)

        assert (await store.list_all(EVERYTHING, limit=2)).next_cursor is None

    @pytest.mark.parametrize("cursor", ["", "x", "!!", "MTIz", "é", "LTEu", "MSAuYQ=="])
    async def test_a_cursor_that_no_store_issued_is_rejected(
        self, store: SessionStore, cursor: str
    ) -> None:
        with pytest.raises(InvalidCursor):
            await store.list_all(EVERYTHING, limit=1, cursor=cursor)


class TestRaces:
    async def test_racing_calls_never_overspend(self, store: SessionStore) -> None:
        session = await opened(store, a_grant(call_budget=50))

        decisions = await asyncio.gather(
            *(store.record(session.session_id, a_call()) for _ in range(500))
        )

        made = [
            each.session.usage.calls_made for each in decisions if isinstance(each, Admitted)
        ]
        assert sorted(made) == list(range(1, 51))
        assert (await current(store, session)).usage.calls_made == 50

    async def test_racing_retries_of_one_call_are_charged_once(
        self, store: SessionStore
    ) -> None:
        session = await opened(store)
        key = IdempotencyKey("proxy", "k")

        decisions = await asyncio.gather(
            *(store.record(session.session_id, a_call(), key) for _ in range(50))
        )

        assert sum(not each.replayed for each in decisions if isinstance(each, Admitted)) == 1
        assert (await current(store, session)).usage.calls_made == 1

    async def test_racing_closes_close_a_session_once(self, store: SessionStore) -> None:
        session = await opened(store)

        outcomes = await asyncio.gather(*(close(store, session.session_id) for _ in range(10)))

        assert sum(isinstance(each, Session) for each in outcomes) == 1
