"""The SQLite store alone: its file, its schema, and commits that fail."""

from __future__ import annotations

import asyncio
import re
import sqlite3
import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from app.domain.admission import Admitted
from app.domain.capacity import StoreLimits
from app.domain.errors import StoreUnavailable, StoreUnreachable, StoreUnusable
from app.domain.idempotency import IdempotencyKey
from app.domain.session import SessionStatus
from app.store import open_store
from app.store.contract import SessionFilter
from app.store.sqlite.backup import back_up
from app.store.sqlite.file import Location
from app.store.sqlite.schema import APPLICATION_ID, VERSION
from app.store.sqlite.store import SqliteStore
from tests.support import (
    AGENT,
    PAUSE,
    ManualClock,
    a_call,
    a_grant,
    change,
    close,
    count_active,
    create,
    kill,
    opened,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
async def store(file: Path, clock: ManualClock) -> AsyncIterator[SqliteStore]:
    made = SqliteStore(Location(file, "normal"), StoreLimits(retention_secs=0), clock)
    await made.open()
    yield made
    await made.aclose()


def database(store: SqliteStore) -> sqlite3.Connection:
    """The store's own connection, to inspect it or to make it fail."""
    return store._file.db


class TestUrl:
    @pytest.mark.parametrize(
        ("url", "path", "synchronous"),
        [
            ("sqlite:///var/lib/s.db", "/var/lib/s.db", "full"),
            ("sqlite:////var/lib/s.db", "/var/lib/s.db", "full"),
            ("sqlite:///var/with%20space/s.db", "/var/with space/s.db", "full"),
            ("sqlite:////s.db?synchronous=normal", "/s.db", "normal"),
            ("sqlite:////s.db?synchronous=full", "/s.db", "full"),
        ],
    )
    def test_a_url_gives_path_and_durability(
        self, url: str, path: str, synchronous: str
    ) -> None:
        assert Location.of_url(url) == (Path(path), synchronous)

    @pytest.mark.parametrize(
        "url",
        [
            "sqlite://",
            "sqlite:///",
            "sqlite://sessions.db",
            "sqlite://host/sessions.db",
            "sqlite:///folder/",
            "sqlite:///sessions.db",
            "sqlite:///./var/sessions.db",
            "sqlite:///../sessions.db",
            "sqlite:///s.db?synchronous=off",
            "sqlite:///s.db?synchronous=",
            "sqlite:///s.db?journal=off",
            "sqlite:///s.db#x",
            "sqlite:///a%00b",
            "sqlite:///a%ff",
            "sqlite:///a\tb",
            "sqlite:sessions.db",
            "sqlite:/sessions.db",
            "sqlite:///s.db?synchronous=full&synchronous=normal",
        ],
    )
    def test_any_other_url_is_rejected(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"sqlite:///|synchronous"):
            open_store(url, StoreLimits())

    @pytest.mark.parametrize(("option", "level"), [("", 2), ("?synchronous=normal", 1)])
    async def test_commits_are_as_durable_as_the_url_says(
        self, file: Path, option: str, level: int
    ) -> None:
        store = open_store(f"sqlite://{file}{option}", StoreLimits())
        assert isinstance(store, SqliteStore)
        await store.open()
        try:
            assert database(store).execute("PRAGMA synchronous").fetchone() == (level,)
            assert database(store).execute("PRAGMA journal_mode").fetchone() == ("wal",)
        finally:
            await store.aclose()


class TestFile:
    async def test_only_the_owner_can_read_the_files(
        self, store: SqliteStore, file: Path
    ) -> None:
        await opened(store)

        for each in file.parent.iterdir():
            assert stat.S_IMODE(each.stat().st_mode) == 0o600, each

    async def test_a_file_has_one_owner(self, store: SqliteStore, file: Path) -> None:
        second = SqliteStore(Location(file, "normal"), StoreLimits())

        with pytest.raises(StoreUnusable, match="another process"):
            await second.open()

        await opened(store)

    async def test_a_hard_link_to_the_file_is_refused(
        self, store: SqliteStore, file: Path
    ) -> None:
        """Under the second name it would have another owner and another log."""
        other = file.with_name("other.db")
        other.hardlink_to(file)

        with pytest.raises(StoreUnusable, match="hard link"):
            await SqliteStore(Location(other, "normal"), StoreLimits()).open()

        with pytest.raises(StoreUnavailable):
            await store.ping()
        other.unlink()
        await store.ping()

    @pytest.mark.parametrize("suffix", ["", "-wal", "-owner"])
    async def test_a_file_that_is_moved_away_is_noticed(
        self, store: SqliteStore, file: Path, suffix: str
    ) -> None:
        session = await opened(store)
        taken = Path(f"{file}{suffix}")
        away = taken.rename(file.with_name("away"))

        with pytest.raises(StoreUnavailable):
            await store.record(session.session_id, a_call())

        away.rename(taken)
        decision = await store.record(session.session_id, a_call())
        assert isinstance(decision, Admitted)
        assert decision.session.usage.calls_made == 1

    async def test_no_temporary_folder_is_needed(self, store: SqliteStore) -> None:
        in_memory = 2
        assert database(store).execute("PRAGMA temp_store").fetchone() == (in_memory,)

    async def test_a_damaged_session_is_unavailable_and_others_are_not(
        self, file: Path
    ) -> None:
        location = Location(file, "normal")
        store = SqliteStore(location, StoreLimits())
        await store.open()
        damaged, sound = await opened(store), await opened(store)
        database(store).execute("UPDATE grants SET terms = '{' WHERE id = 1")
        await store.aclose()
        store = SqliteStore(location, StoreLimits())
        await store.open()

        outcomes = await asyncio.gather(
            store.record(damaged.session_id, a_call()),
            store.record(sound.session_id, a_call()),
            return_exceptions=True,
        )
        await store.aclose()

        assert isinstance(outcomes[0], StoreUnavailable)
        assert isinstance(outcomes[1], Admitted)

    async def test_a_missing_clock_is_reported_as_damage(self, file: Path) -> None:
        store = SqliteStore(Location(file, "normal"), StoreLimits())
        await store.open()
        await store.aclose()
        db = sqlite3.connect(file)
        db.execute("DELETE FROM clock")
        db.commit()
        db.close()

        for _ in range(2):
            with pytest.raises(StoreUnusable, match="damaged"):
                await SqliteStore(Location(file, "normal"), StoreLimits()).open()

    async def test_a_wall_clock_far_behind_is_logged(
        self, file: Path, clock: ManualClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(2):
            store = SqliteStore(Location(file, "normal"), StoreLimits(), clock)
            await store.open()
            await store.aclose()
            clock.advance(-3600)

        assert "3600 seconds behind" in caplog.text

    async def test_a_closed_store_is_one_file_and_opens_again(self, file: Path) -> None:
        for _ in range(2):
            store = SqliteStore(Location(file, "normal"), StoreLimits())
            await store.open()
            await opened(store)
            await store.aclose()

        assert {each.name for each in file.parent.iterdir()} == {
            "sessions.db",
            "sessions.db-owner",
        }

    async def test_the_schema_itself_rejects_a_call_over_budget(
        self, store: SqliteStore
    ) -> None:
        await opened(store, a_grant(call_budget=3))

        with pytest.raises(sqlite3.IntegrityError):
            database(store).execute("UPDATE sessions SET calls_made = 4")


class TestSchema:
    def make(self, file: Path, *statements: str) -> None:
        db = sqlite3.connect(file)
        for statement in statements:
            db.execute(statement)
        db.commit()
        db.close()

    async def test_a_file_of_a_newer_version_is_refused_and_left_alone(
        self, file: Path
    ) -> None:
        newer = VERSION + 1
        self.make(
            file,
            f"PRAGMA application_id = {APPLICATION_ID}",
            f"PRAGMA user_version = {newer}",
            "CREATE TABLE sessions (x)",
        )
        before = file.read_bytes()

        with pytest.raises(StoreUnusable, match=f"version {newer}.* supports {VERSION}"):
            await SqliteStore(Location(file, "full"), StoreLimits()).open()

        assert file.read_bytes() == before

    async def test_the_database_of_another_program_is_refused_and_left_alone(
        self, file: Path
    ) -> None:
        self.make(file, "CREATE TABLE users (name TEXT)")
        before = file.read_bytes()

        with pytest.raises(StoreUnusable, match="another program"):
            await SqliteStore(Location(file, "full"), StoreLimits()).open()

        assert file.read_bytes() == before


class TestFailingCommits:
    async def test_a_failed_commit_admits_and_charges_nothing(self, store: SqliteStore) -> None:
        session = await opened(store)
        (pages,) = database(store).execute("PRAGMA page_count").fetchone()
        database(store).execute(f"PRAGMA max_page_count = {pages}")
        big = a_grant(*[f"tool_{n:0>100}" for n in range(200)])

        # The creation finds no room, and fails all jobs that share its commit.
        outcomes = await asyncio.gather(
            store.record(session.session_id, a_call()),
            create(store, big),
            close(store, session.session_id),
            return_exceptions=True,
        )

        assert [type(outcome) for outcome in outcomes] == [StoreUnreachable] * 3
        database(store).execute("PRAGMA max_page_count = 100000")
        decision = await store.record(session.session_id, a_call())
        assert isinstance(decision, Admitted)
        assert decision.session.usage.calls_made == 1
        assert await count_active(store) == 1

    async def test_counts_are_right_after_a_group_fails_at_its_end(
        self, store: SqliteStore
    ) -> None:
        def fail() -> None:
            raise sqlite3.OperationalError("disk I/O error")

        outcomes = await asyncio.gather(
            create(store, a_grant(), IdempotencyKey("a", "b")),
            store._commits.submit(fail),
            return_exceptions=True,
        )

        assert [type(outcome) for outcome in outcomes] == [StoreUnreachable] * 2
        assert await count_active(store) == 0
        tally = store._transactions._tally
        assert (tally.sessions, tally.open, tally.creations.total) == (0, 0, 0)

    async def test_the_outcome_of_a_commit_that_fails_is_unknown(
        self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is undone, but a machine that stops at once could find it in the log."""
        transaction = store._transactions.transaction

        @contextmanager
        def failing() -> Iterator[None]:
            with transaction():
                yield
                raise sqlite3.OperationalError("disk I/O error")

        monkeypatch.setattr(store._transactions, "transaction", failing)

        with pytest.raises(StoreUnavailable) as raised:
            await create(store)

        assert raised.value.outcome_unknown

    async def test_a_failed_creation_can_be_repeated(self, store: SqliteStore) -> None:
        (pages,) = database(store).execute("PRAGMA page_count").fetchone()
        database(store).execute(f"PRAGMA max_page_count = {pages}")
        big = a_grant(*[f"tool_{n:0>100}" for n in range(200)])
        with pytest.raises(StoreUnavailable):
            await create(store, big, IdempotencyKey("a", "b"))
        database(store).execute("PRAGMA max_page_count = 100000")

        made = await create(store, big, IdempotencyKey("a", "b"))

        assert isinstance(made, Admitted)
        assert not made.replayed
        assert await count_active(store) == 1

    async def test_a_defect_fails_its_own_request_and_rolls_back_the_group(
        self, store: SqliteStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        session = await opened(store)

        def defect(session_id: str) -> None:
            raise ZeroDivisionError

        monkeypatch.setattr(store._transactions, "get", defect)
        outcomes = await asyncio.gather(
            store.record(session.session_id, a_call()),
            store.get(session.session_id),
            store.record(session.session_id, a_call()),
            return_exceptions=True,
        )

        assert [type(outcome) for outcome in outcomes] == [
            StoreUnreachable,
            ZeroDivisionError,
            StoreUnreachable,
        ]
        monkeypatch.undo()
        after = await store.get(session.session_id)
        assert after is not None
        assert after.usage.calls_made == 0

    async def test_a_failed_commit_leaves_no_session(
        self, store: SqliteStore, clock: ManualClock
    ) -> None:
        """SQLite gives the row number of a rolled-back session to the next one."""
        ids: list[str] = []

        def fill_and_fail() -> None:
            created = store._transactions.create(a_grant("other"), None)
            assert isinstance(created, Admitted)
            ids.append(created.session.session_id)
            store._transactions.get(ids[0])
            raise sqlite3.OperationalError("disk I/O error")

        with pytest.raises(StoreUnavailable):
            await store._commits.submit(fill_and_fail)
        session = await opened(store, a_grant("mine"))

        assert await store.get(ids[0]) is None
        assert (await store.get(session.session_id)) == session


class TestCost:
    async def test_no_statement_scans_the_sessions(
        self, store: SqliteStore, clock: ManualClock
    ) -> None:
        db = database(store)
        statements: set[str] = set()
        db.set_trace_callback(statements.add)
        key = IdempotencyKey("a", "b")
        session = await opened(store)
        await create(store, a_grant(), key)
        await store.record(session.session_id, a_call(), key)
        for status in (None, *SessionStatus):
            for agent_id in (None, AGENT):
                await store.list_all(SessionFilter(agent_id, status), limit=1)
        await count_active(store)
        await count_active(store, AGENT)
        await change(store, session.session_id, PAUSE)
        await store.freeze(AGENT, "", "")
        await store.list_frozen(limit=1)
        await store.unfreeze(AGENT)
        await close(store, session.session_id)
        await kill(store, AGENT)
        clock.advance(10**6)
        await store.cleanup_expired(100)
        db.set_trace_callback(None)

        plans = {
            statement: [step[3] for step in db.execute(f"EXPLAIN QUERY PLAN {statement}")]
            for statement in statements
            if statement.split()[0] in {"SELECT", "UPDATE", "DELETE", "INSERT"}
        }
        assert len(plans) > 15
        scans = {
            statement: plan
            for statement, plan in plans.items()
            if any(step.startswith("SCAN") for step in plan)
            # One row, and few agents are frozen.
            and not re.search(r"\b(clock|frozen_agents)\b", statement)
        }
        assert scans == {}
        sorts = [plan for plan in plans.values() if any("TEMP B-TREE" in s for s in plan)]
        assert sorts == []


class TestBackup:
    async def test_a_backup_of_a_live_store_is_consistent_and_usable(
        self, store: SqliteStore, file: Path, clock: ManualClock
    ) -> None:
        copy = file.with_name("copy.db")
        session = await opened(store, a_grant(call_budget=100))
        stop = asyncio.Event()

        async def keep_calling() -> None:
            while not stop.is_set():
                await store.record(session.session_id, a_call())

        calling = asyncio.create_task(keep_calling())
        before = await store.get(session.session_id)
        copied = await asyncio.to_thread(back_up, f"sqlite://{file}", copy)
        after = await store.get(session.session_id)
        stop.set()
        await calling

        assert copied == 1
        assert stat.S_IMODE(copy.stat().st_mode) == 0o600
        assert not list(file.parent.glob("copy.db?*"))
        restored = SqliteStore(Location(copy, "full"), StoreLimits(), clock)
        await restored.open()
        found = await restored.get(session.session_id)
        await restored.aclose()
        assert before is not None
        assert after is not None
        assert found is not None
        assert before.usage.calls_made <= found.usage.calls_made <= after.usage.calls_made

    async def test_a_backup_never_overwrites_a_file(
        self, store: SqliteStore, file: Path
    ) -> None:
        copy = file.with_name("copy.db")
        copy.write_text("precious")

        with pytest.raises(StoreUnusable, match="already exists"):
            back_up(f"sqlite://{file}", copy)

        assert copy.read_text() == "precious"

    @pytest.mark.parametrize("name", ["", ".", "/"])
    async def test_a_target_without_a_name_is_refused(
        self, store: SqliteStore, file: Path, name: str
    ) -> None:
        with pytest.raises(StoreUnusable):
            back_up(f"sqlite://{file}", Path(name))

    @pytest.mark.parametrize("content", [None, b"", b"no database at all" * 100])
    def test_a_file_that_is_not_a_store_is_not_copied(
        self, file: Path, content: bytes | None
    ) -> None:
        copy = file.with_name("copy.db")
        if content is not None:
            file.write_bytes(content)

        with pytest.raises(StoreUnusable, match=str(file)):
            back_up(f"sqlite://{file}", copy)

        assert not list(file.parent.glob("copy.db*"))


async def test_remembered_answers_count_towards_a_slice(store: SqliteStore) -> None:
    """A busy session can have too many remembered answers for one slice of a sweep."""
    session = await opened(store)
    for number in range(25):
        await store.record(session.session_id, a_call(), IdempotencyKey("a", str(number)))
    await close(store, session.session_id)

    slices = [await store.cleanup_expired(10) for _ in range(3)]

    assert [each.closed for each in slices] == [0, 0, 1]
