"""Load from one process on a separate core. It is wrk if installed, else a closed-loop asyncio
client, which is slower than the servers it measures; the report names the one in use."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

SERVER_CORE, LOAD_CORE = "0", "1"
CONNECTIONS = 32
WRK = shutil.which("wrk")
_UNITS_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0}
_LUA = r"""
local paths = {}
for line in io.lines(os.getenv("BENCH_PATHS")) do paths[#paths + 1] = line end
local headers = { ["authorization"] = os.getenv("BENCH_AUTHORIZATION") }
for name, value in os.getenv("BENCH_HEADERS"):gmatch("([^:\n]+): ([^\n]+)") do
  headers[name] = value
end
local method, body = os.getenv("BENCH_METHOD"), os.getenv("BENCH_BODY")
local keyed = os.getenv("BENCH_KEYED")
if body == "" then body = nil end
local sent, run = 0, ""
function init()
  math.randomseed(os.time())
  run = tostring(math.random(1000000000))
end
function request()
  if keyed == "yes" then
    sent = sent + 1
    headers["idempotency-key"] = run .. "-" .. sent
  end
  return wrk.format(method, paths[math.random(#paths)], headers, body)
end
"""


class Load(NamedTuple):
    """The result of one round of load."""

    per_sec: float
    p99_ms: float
    cpu_us: float = 0.0
    """Processor time of the server for each request; 0 if its process is not known."""
    refused_per_sec: float = 0.0


class Target(NamedTuple):
    """Where to send requests: each goes to a random path from a file."""

    port: int
    paths: Path
    body: str
    authorization: str
    connections: int = CONNECTIONS
    pid: int = 0
    """The server's process."""
    method: str = "POST"
    headers: str = "content-type: application/json"
    """One a line."""
    keyed: bool = False
    """Whether each request has an idempotency key of its own."""
    denied: bool = False
    """Whether every response is expected to be a refusal."""
    overloaded: bool = False
    """Whether some responses may be refusals. Only the others count then."""


def pinned(cores: str) -> list[str]:
    """Return the prefix that pins a command to cores, or nothing where that is impossible."""
    return ["taskset", "-c", cores] if shutil.which("taskset") and os.cpu_count() != 1 else []


def press(target: Target, secs: float, scratch: Path) -> Load:
    """Put load on a server for `secs` seconds. Raises `RuntimeError` if any response is not
    2xx: refusals are cheaper than the calls being measured."""
    environment = os.environ | {
        "BENCH_PATHS": str(target.paths),
        "BENCH_BODY": target.body,
        "BENCH_AUTHORIZATION": target.authorization,
        "BENCH_METHOD": target.method,
        "BENCH_HEADERS": target.headers,
        "BENCH_KEYED": "yes" if target.keyed else "no",
    }
    before = cpu_secs(target.pid)
    url = f"http://127.0.0.1:{target.port}/"
    if WRK is None:
        command = [sys.executable, "-m", "bench.load", url, str(secs), str(target.connections)]
    else:
        script = scratch / "load.lua"
        script.write_text(_LUA)
        # wrk takes whole seconds only.
        connections = ["-t1", f"-c{target.connections}", f"-d{math.ceil(secs)}s", "--latency"]
        command = [WRK, *connections, "-s", str(script), url]
    output = subprocess.run(
        [*pinned(LOAD_CORE), *command],
        env=environment,
        capture_output=True,
        check=True,
        text=True,
        timeout=secs + 60,
    ).stdout
    load, requests = _parse_own(output, target) if WRK is None else _parse_wrk(output, target)
    return load._replace(cpu_us=(cpu_secs(target.pid) - before) / requests * 1e6)


def cpu_secs(pid: int) -> float:
    """Return the processor time that a process has used, 0 for none."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _parse_wrk(output: str, target: Target) -> tuple[Load, int]:
    refused = re.search(r"Non-2xx or 3xx responses: (\d+)", output)
    if not target.overloaded and (
        "Socket errors" in output or (refused is not None) != target.denied
    ):
        raise RuntimeError(f"not every response to {target} was as expected:\n{output}")
    rate = re.search(r"Requests/sec:\s+([\d.]+)", output)
    p99 = re.search(r"99%\s+([\d.]+)(us|ms|s)", output)
    requests = re.search(r"(\d+) requests in", output)
    if rate is None or p99 is None or requests is None:
        raise RuntimeError(f"unexpected output from wrk:\n{output}")
    per_sec, answered, shed = float(rate[1]), int(requests[1]), 0.0
    if target.overloaded and refused is not None:
        shed = per_sec * int(refused[1]) / answered
    p99_ms = float(p99[1]) * _UNITS_MS[p99[2]]
    return Load(per_sec - shed, p99_ms, refused_per_sec=shed), answered


def _parse_own(output: str, target: Target) -> tuple[Load, int]:
    found = json.loads(output)
    refused, answered = found["refused"], found["requests"]
    if refused and not target.overloaded:
        raise RuntimeError(f"{refused} calls were not admitted")
    shed = found["per_sec"] * refused / answered
    return Load(found["per_sec"] - shed, found["p99_ms"], refused_per_sec=shed), answered


async def _connection(
    port: int, requests: list[bytes], until: float, times: list[float]
) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    refused = 0
    while (started := time.perf_counter()) < until:
        writer.write(random.choice(requests))
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        await reader.readexactly(int(length[1]) if length else 0)
        refused += not head.startswith(b"HTTP/1.1 2")
        times.append(time.perf_counter() - started)
    writer.close()
    return refused


async def _own_client(port: int, secs: float, connections: int, paths: list[str]) -> None:
    body = os.environ["BENCH_BODY"].encode()
    headers = (
        f"host: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: {os.environ['BENCH_AUTHORIZATION']}\r\ncontent-length: {len(body)}"
    )
    requests = [f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body for path in paths]
    times: list[float] = []
    until = time.perf_counter() + secs
    workers = [_connection(port, requests, until, times) for _ in range(connections)]
    refused = sum(await asyncio.gather(*workers))
    times.sort()
    p99_ms = times[int(len(times) * 0.99)] * 1000
    found = {"per_sec": len(times) / secs, "p99_ms": p99_ms, "refused": refused}
    print(json.dumps(found | {"requests": len(times)}))


if __name__ == "__main__":
    asyncio.run(
        _own_client(
            int(sys.argv[1].strip("/").rpartition(":")[2]),
            float(sys.argv[2]),
            int(sys.argv[3]),
            Path(os.environ["BENCH_PATHS"]).read_text().split(),
        )
    )
