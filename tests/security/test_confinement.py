"""The service needs no privileges and writes only where it is configured to, so it can do
without what the image and the compose file take away."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import yaml

from tests.engines import until
from tests.services import ADDRESS, ROOT
from tests.support import session_request

STRACE = shutil.which("strace")
SETPRIV = shutil.which("setpriv")
NO_PRIVILEGES = ["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]
OPENED_TO_WRITE = re.compile(
    r'\b(?:openat\(AT_FDCWD, |open\(|creat\()"([^"]+)", [^)]*O_(?:WRONLY|RDWR|CREAT)'
)
CHANGED = re.compile(
    r'\b(?:mkdir|unlink|rename|chmod|symlink|link)\w*\((?:AT_FDCWD, )?"([^"]+)"'
)


@pytest.mark.skipif(STRACE is None, reason="strace is missing: apt-get install strace")
def test_it_writes_only_where_it_is_configured_to(tmp_path: Path) -> None:
    """It runs without capabilities, as in the compose file, with everything on that writes."""
    data, trace, log = tmp_path / "data", tmp_path / "trace", tmp_path / "log"
    data.mkdir()
    # Only root has capabilities to drop.
    shed = [str(SETPRIV), *NO_PRIVILEGES] if SETPRIV and os.geteuid() == 0 else []
    with log.open("w") as stderr:
        watched = [str(STRACE), "-f", "-qq", "-e", "trace=%file", "-o", str(trace)]
        process = subprocess.Popen(
            [*shed, *watched, sys.executable, "-m", "app"],
            cwd=ROOT,
            env=os.environ
            | {
                "ARBITER_PORT": "0",
                "ARBITER_LOG_FORMAT": "json",
                "ARBITER_STORE_URL": f"sqlite://{data}/sessions.db",
                "ARBITER_AUDIT_LOG": f"{data}/audit.log",
                "ARBITER_METRICS_DIR": str(data),
                "ARBITER_CLEANUP_INTERVAL_SECS": "0.1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            stderr=stderr,
            start_new_session=True,
        )
    try:
        until(lambda: ADDRESS.search(log.read_text()))
        found = ADDRESS.search(log.read_text())
        assert found is not None
        path = httpx.post(f"{found[1]}/sessions", json=session_request()).headers["location"]
        for tool in ("read_file", "rm"):
            httpx.post(f"{found[1]}{path}/calls", json={"tool_name": tool})
        httpx.get(f"{found[1]}/metrics")
        httpx.delete(f"{found[1]}{path}")
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=60)

    calls = trace.read_text()
    written = {*OPENED_TO_WRITE.findall(calls), *CHANGED.findall(calls)}
    assert str(data / "sessions.db") in written
    assert str(data / "audit.log") in written
    assert [each for each in written if not each.startswith((f"{data}/", "/dev/"))] == []


def test_the_image_runs_unprivileged() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())

    assert re.findall(r"^USER (.*)$", dockerfile, re.MULTILINE) == ["10001:10001"]
    assert dockerfile.index("USER ") < dockerfile.index("CMD [")
    for service in compose["services"].values():
        assert service["read_only"] is True
        assert "privileged" not in service
        assert "cap_add" not in service
