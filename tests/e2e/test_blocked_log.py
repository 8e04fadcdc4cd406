"""Nobody reads standard error any more: the pipe is full."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys

import httpx

from tests.engines import until
from tests.services import ROOT
from tests.support import session_request

F_SETPIPE_SZ = 1031
"""Linux, fcntl.h; Python names it from 3.10 on, but not everywhere."""


def test_a_full_pipe_holds_up_nothing() -> None:
    reading, writing = os.pipe()
    fcntl.fcntl(writing, F_SETPIPE_SZ, 4096)
    process = subprocess.Popen(
        [sys.executable, "-m", "app"],
        cwd=ROOT,
        env=os.environ
        | {"ARBITER_PORT": "0", "ARBITER_LOG_FORMAT": "json", "ARBITER_LOG_LEVEL": "debug"},
        stderr=writing,
    )
    try:
        os.close(writing)
        address = json.loads(os.read(reading, 4096).splitlines()[0])["address"]
        with httpx.Client(base_url=address, timeout=30) as client:
            until(lambda: client.get("/readyz").status_code == 200)
            created = client.post("/sessions", json=session_request(call_budget=1000))
            calls = f"{created.headers['location']}/calls"
            statuses = {client.post(calls, json={"tool_name": "read_file"}).status_code}
            for _ in range(200):
                statuses.add(client.post(calls, json={"tool_name": "read_file"}).status_code)
            assert statuses == {200}
            assert client.get("/livez").status_code == 200
            lost = re.search(
                r"^arbiter_log_dropped_total (\S+)$", client.get("/metrics").text, re.MULTILINE
            )
            assert lost is not None
            assert float(lost[1]) > 100

            # Whoever reads again is told.
            os.read(reading, 4096)
            client.post(calls, json={"tool_name": "read_file"})
            said = os.read(reading, 4096).decode()
            assert "log lines lost" in said
            assert all(json.loads(line) for line in said.splitlines())
        process.terminate()
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait(timeout=30)
        os.close(reading)
