"""Metrics summed over workers, without real processes or waiting."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from app.observability.metrics import Metrics
from app.observability.workers import PUBLISH_EVERY_SECS, SharedMetrics
from app.store.contract import Totals
from tests.services import ROOT


def counted(calls: int) -> Metrics:
    """Return the metrics of a worker after `calls` calls."""
    metrics = Metrics()
    metrics.decisions["call", "admitted"] += calls
    metrics.created += calls
    metrics.ended["closed"] += calls
    metrics.changes["pause"] += calls
    for _ in range(calls):
        metrics.request("POST", "/sessions", 201).observe(0.002)
        metrics.sweeps.observe(0.5)
        metrics.loop_lag.observe(0.002)
    metrics.refused["overloaded"] += calls
    metrics.audit_dropped += calls
    metrics.connections += calls
    metrics.requests_in_flight += calls
    return metrics


def test_a_scrape_of_one_worker_sums_all(tmp_path: Path) -> None:
    workers = [SharedMetrics(counted(calls), tmp_path) for calls in (1, 2, 4)]
    for worker in workers:
        worker.publish()

    texts = {worker.render(Totals(3, 0, 0)) for worker in workers}

    assert texts == {SharedMetrics(counted(7), None).render(Totals(3, 0, 0))}


def test_counts_published_again_are_not_counted_twice(tmp_path: Path) -> None:
    first, second = (SharedMetrics(counted(1), tmp_path) for _ in range(2))
    for _ in range(3):
        first.own.decisions["call", "admitted"] += 1
        first.publish()
        first.publish()

    assert b'arbiter_decisions_total{operation="call",outcome="admitted"} 5.0' in (
        second.render(Totals(0, 0, 0))
    )
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_the_counts_of_an_exited_worker_are_kept(tmp_path: Path) -> None:
    async def sleep_once(secs: float) -> None:
        assert secs == PUBLISH_EVERY_SECS
        gone.own.created += 1
        raise asyncio.CancelledError

    gone = SharedMetrics(counted(2), tmp_path, sleep_once)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(gone.run())

    assert b"arbiter_sessions_created_total 3.0" in SharedMetrics(Metrics(), tmp_path).render(
        Totals(0, 0, 0)
    )


def test_the_gauges_of_a_killed_worker_are_dropped(tmp_path: Path) -> None:
    """Whoever has its process id now, and although the folder is kept."""
    program = (
        "import sys, os, signal; from pathlib import Path;"
        "from tests.observability.test_workers import counted, SharedMetrics;"
        "worker = SharedMetrics(counted(2), Path(sys.argv[1])); worker.publish();"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    command = [sys.executable, "-c", program, tmp_path]
    subprocess.run(command, check=False, cwd=ROOT, timeout=60)
    (file,) = tmp_path.glob("*.json")
    for suffix in (".json", ".lock"):
        file.with_suffix(suffix).rename(file.with_name(f"1-{file.stem[-36:]}{suffix}"))

    text = SharedMetrics(counted(1), tmp_path).render(Totals(0, 0, 0))

    assert b"arbiter_http_connections 1.0" in text
    assert b"arbiter_http_requests_in_flight 1.0" in text
    assert b"arbiter_audit_dropped_total 3.0" in text


def test_a_single_process_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    alone = SharedMetrics(counted(1), None)

    asyncio.run(alone.run())

    assert list(tmp_path.iterdir()) == []


def test_an_unreadable_file_does_not_fail_the_scrape(tmp_path: Path) -> None:
    worker = SharedMetrics(counted(1), tmp_path)
    worker.publish()
    (tmp_path / "half.json").write_text("{")
    other = SharedMetrics(counted(1), tmp_path)
    other.publish()
    for file in tmp_path.glob("*-*.json"):
        if file != worker._file:
            file.write_text(file.read_text().replace('"version":"', '"version":"old-'))

    assert worker.render(Totals(0, 0, 0)) == SharedMetrics(counted(1), None).render(
        Totals(0, 0, 0)
    )


def test_publishing_survives_the_loss_of_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "metrics"
    folder.mkdir()
    sleeps = 0

    async def sleep(secs: float) -> None:
        nonlocal sleeps
        sleeps += 1
        if sleeps == 1:
            shutil.rmtree(folder)
        if sleeps == 2:
            other = SharedMetrics(counted(0), folder).render(Totals(0, 0, 0))
            # The folder is there again, and the worker alive in it.
            assert b"arbiter_http_connections 1.0" in other
            worker.own.created += 1
        if sleeps == 3:
            raise asyncio.CancelledError

    worker = SharedMetrics(counted(1), folder, sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(worker.run())

    assert sleeps == 3
    assert b"arbiter_sessions_created_total 2.0" in worker.render(Totals(0, 0, 0))
