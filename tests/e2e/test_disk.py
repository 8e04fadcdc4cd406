"""A durable store on a disk that is full, slow or broken: real processes and real faults."""

from __future__ import annotations

import asyncio
import os
import re
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.services import ROOT, StartService, running
from tests.support import session_request

pytestmark = pytest.mark.anyio

READ = {"tool_name": "read_file"}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


def start_in_vain(*command: str, store: str) -> str:
    """Return what the service prints when it fails to start."""
    done = subprocess.run(
        [*command, sys.executable, "-m", "app"],
        cwd=ROOT,
        env=os.environ | {"ARBITER_STORE_URL": store, "ARBITER_PORT": "0"},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    return done.stderr


class TestStart:
    """A failed start prints one clear sentence and nothing else."""

    def test_a_second_process_is_refused(self, start_service: StartService, file: Path) -> None:
        first = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        link = file.with_name("link.db")
        link.symlink_to(file)

        for path in (file, link):
            assert start_in_vain(store=f"sqlite://{path}") == (
                f"arbiter: cannot use {path}: another process (id {first.process.pid}) owns "
                "it; run one process per file\n"
            )
        assert httpx.get(f"{first.url}/readyz").status_code == 200

    def test_a_file_that_is_not_a_database_is_refused(self, file: Path) -> None:
        file.write_bytes(b"something else entirely\n" * 1000)

        said = start_in_vain(store=f"sqlite://{file}")

        assert said == (
            f"arbiter: cannot use {file}: the file is not a SQLite database; use another path "
            "(SQLITE_NOTADB)\n"
        )
        assert file.read_bytes() == b"something else entirely\n" * 1000

    def test_a_damaged_file_is_refused(self, start_service: StartService, file: Path) -> None:
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        with httpx.Client(base_url=service.url) as client:
            for _ in range(200):
                client.post("/sessions", json=session_request()).raise_for_status()
        service.stop()
        with file.open("r+b") as damaged:
            damaged.seek(file.stat().st_size // 2)
            damaged.write(b"\xff" * 10_000)

        said = start_in_vain(store=f"sqlite://{file}")

        assert said.startswith(f"arbiter: cannot use {file}: the file is damaged")
        assert said.count("\n") == 1

    def test_a_file_locked_by_another_program_is_refused(self, file: Path) -> None:
        with sqlite3.connect(file) as other:
            other.execute("PRAGMA locking_mode = EXCLUSIVE")
            other.execute("CREATE TABLE t (x)")
            other.commit()
            other.execute("BEGIN EXCLUSIVE")

            said = start_in_vain(store=f"sqlite://{file}")

        other.close()
        assert said == (
            f"arbiter: cannot use {file}: another program has locked the file; stop that "
            "program (SQLITE_BUSY)\n"
        )

    def test_a_read_only_file_is_refused(self, file: Path) -> None:
        file.touch()
        file.chmod(0o400)
        # Permissions do not stop root unless it drops the capability.
        powerless = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []

        said = start_in_vain(*powerless, store=f"sqlite://{file}")

        assert said == f"arbiter: cannot use {file}: permission denied\n"

    def test_a_missing_folder_is_refused(self, tmp_path: Path) -> None:
        file = tmp_path / "nowhere" / "sessions.db"

        assert start_in_vain(store=f"sqlite://{file}") == (
            f"arbiter: cannot use {file}: the file or its folder does not exist; check the "
            "path\n"
        )


class TestRunning:
    """While a fault lasts, 503 and no charge; afterwards, recovery without a restart."""

    def test_a_full_disk_is_503_until_there_is_room(
        self, start_service: StartService, file: Path
    ) -> None:
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        pid = service.process.pid
        with httpx.Client(base_url=service.url, timeout=30) as client:
            path = client.post("/sessions", json=session_request()).headers["location"]
            made = client.post(f"{path}/calls", json=READ).json()["calls_made"]
            # To this process, a limit on the size of files looks like a full disk.
            size = max(each.stat().st_size for each in file.parent.iterdir())
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            while (refused := client.post(f"{path}/calls", json=READ)).status_code == 200:
                made += 1

            assert refused.status_code == 503
            assert refused.json()["code"] == "store_unavailable"
            assert refused.headers["retry-after"] == "1"
            assert client.get("/readyz").status_code == 503
            assert client.get("/livez").status_code == 200
            assert "arbiter_store_up 0.0" in client.get("/metrics").text
            assert client.post("/sessions", json=session_request()).status_code == 503

            resource.prlimit(
                pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            assert client.get("/readyz").status_code == 200
            assert client.post(f"{path}/calls", json=READ).json()["calls_made"] == made + 1
            assert len(client.get("/sessions").json()["items"]) == 1

    def test_a_lock_of_another_program_is_503_until_released(
        self, start_service: StartService, file: Path
    ) -> None:
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        with httpx.Client(base_url=service.url, timeout=30) as client:
            path = client.post("/sessions", json=session_request()).headers["location"]
            other = sqlite3.connect(file, isolation_level=None)
            other.execute("BEGIN IMMEDIATE")

            assert client.post(f"{path}/calls", json=READ).status_code == 503
            assert client.get("/readyz").status_code == 503

            other.execute("ROLLBACK")
            other.close()
            assert client.get("/readyz").status_code == 200
            assert client.post(f"{path}/calls", json=READ).json()["calls_made"] == 1

    def test_a_moved_file_is_503_until_it_is_back(
        self, start_service: StartService, file: Path
    ) -> None:
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        away = file.with_name("away.db")
        with httpx.Client(base_url=service.url, timeout=30) as client:
            path = client.post("/sessions", json=session_request()).headers["location"]
            file.rename(away)
            assert client.post(f"{path}/calls", json=READ).status_code == 503
            assert client.get("/readyz").status_code == 503

            shutil.copy(away, file)
            assert client.get("/readyz").status_code == 503

            away.rename(file)
            assert client.post(f"{path}/calls", json=READ).json()["calls_made"] == 1

    def test_an_outage_is_logged_once(self, start_service: StartService, file: Path) -> None:
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        away = file.with_name("away.db")
        with httpx.Client(base_url=service.url, timeout=30) as client:
            file.rename(away)
            for _ in range(3):
                assert client.get("/readyz").status_code == 503
            away.rename(file)
            for _ in range(3):
                assert client.get("/readyz").status_code == 200
        service.stop()

        said = [line for line in service.log if "store " in line]
        assert len(said) == 2
        gone = "the file or its folder does not exist; check the path"
        assert f"store unavailable: {gone}" in said[0]
        assert "store available again" in said[1]


@contextmanager
def tampering(pid: int, calls: str, how: str) -> Iterator[None]:
    """Make system calls of a process slow or fail, with strace(1)."""
    if shutil.which("strace") is None:
        pytest.skip("SKIPPED: strace is not installed, so no disk fault can be injected")
    tamper = ["-e", f"trace={calls}", "-e", f"inject={calls}:{how}"]
    strace = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", os.devnull, *tamper, "-p", str(pid)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while any("TracerPid:\t0" in each.read_text() for each in _threads(pid)):
            if strace.poll() is not None:
                pytest.skip(f"SKIPPED: strace cannot attach: {strace.communicate()[1]}")
        yield
    finally:
        strace.terminate()
        strace.communicate(timeout=30)


def _threads(pid: int) -> list[Path]:
    return list(Path(f"/proc/{pid}/task").glob("*/status"))


class TestFaults:
    async def test_a_slow_disk_blocks_nobody_else_and_keeps_the_order(
        self, start_service: StartService, file: Path
    ) -> None:
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        limits = httpx.Limits(max_connections=50)
        async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=60) as client:
            created = await client.post("/sessions", json=session_request())
            path = created.headers["location"]
            with tampering(service.process.pid, "fsync,fdatasync", "delay_enter=1500000"):
                calls = []
                for _ in range(20):
                    calls.append(asyncio.create_task(client.post(f"{path}/calls", json=READ)))
                    # Answered after the call was read, while its commit is pending.
                    assert (await client.get("/livez")).status_code == 200
                assert not any(call.done() for call in calls)
                answers = await asyncio.gather(*calls)

        assert [answer.json()["calls_made"] for answer in answers] == list(range(1, 21))

    @pytest.mark.parametrize(
        ("calls", "error", "reason"),
        [
            (
                "fsync,fdatasync",
                "EIO",
                "the disk reported an error; check the disk (SQLITE_IOERR_FSYNC)",
            ),
            (
                "pwrite64",
                "EIO",
                "the disk reported an error; check the disk (SQLITE_IOERR_WRITE)",
            ),
            ("pwrite64", "ENOSPC", "the disk is full; free some space (SQLITE_FULL)"),
        ],
    )
    def test_a_commit_that_fails_charges_nothing(
        self, start_service: StartService, file: Path, calls: str, error: str, reason: str
    ) -> None:
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        with httpx.Client(base_url=service.url, timeout=30) as client:
            path = client.post("/sessions", json=session_request()).headers["location"]
            client.post(f"{path}/calls", json=READ).raise_for_status()
            with tampering(service.process.pid, calls, f"error={error}"):
                for _ in range(3):
                    assert client.post(f"{path}/calls", json=READ).status_code == 503
                assert client.post("/sessions", json=session_request()).status_code == 503
                assert client.delete(path).status_code == 503
                assert client.get("/livez").status_code == 200

            assert client.post(f"{path}/calls", json=READ).json()["calls_made"] == 2
            assert len(client.get("/sessions").json()["items"]) == 1
        assert any(reason in line for line in service.log)


class TestSizes:
    @pytest.mark.parametrize("name", ["sessions.db", "sessions.db-wal"])
    def test_a_file_that_is_cut_off_is_noticed(
        self, start_service: StartService, file: Path, name: str
    ) -> None:
        """Otherwise all was well until a restart, which found an empty store."""
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        path = httpx.post(f"{service.url}/sessions", json=session_request()).headers["location"]
        os.truncate(file.with_name(name), 0)

        refused = httpx.post(f"{service.url}{path}/calls", json=READ)

        assert refused.status_code == 503
        assert refused.json()["outcome"] == "not_recorded"
        assert httpx.get(f"{service.url}/readyz").status_code == 503
        assert any("another program has cut it off" in line for line in service.log)

    def test_a_checkpoint_by_another_program_does_no_harm(
        self, start_service: StartService, file: Path
    ) -> None:
        service = start_service(ARBITER_STORE_URL=f"sqlite://{file}")
        path = httpx.post(f"{service.url}/sessions", json=session_request()).headers["location"]
        other = sqlite3.connect(file)
        other.execute("PRAGMA wal_checkpoint").fetchall()
        other.close()

        assert httpx.post(f"{service.url}{path}/calls", json=READ).status_code == 200

    def test_the_log_shrinks_when_its_reader_has_gone(
        self, start_service: StartService, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        program = (
            "import app.store.sqlite.file as f; f.MAX_LOG_BYTES = 100_000;"
            "f.CHECKPOINT_PAGES = 10;"
            "import sys; from app.__main__ import main; sys.exit(main(['serve']))"
        )
        with (
            running("-c", program, ARBITER_STORE_URL=f"sqlite:///{file}") as service,
            httpx.Client(base_url=service.url) as client,
        ):

            def log_bytes() -> float:
                text = client.get("/metrics").text
                found = re.search(r"^arbiter_store_log_bytes (\S+)$", text, re.MULTILINE)
                assert found is not None
                return float(found[1])

            reader = sqlite3.connect(file)
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sessions").fetchall()
            while log_bytes() < 400_000:
                client.post("/sessions", json=session_request()).raise_for_status()
            reader.close()
            while log_bytes() > 100_000:
                client.post("/sessions", json=session_request()).raise_for_status()
