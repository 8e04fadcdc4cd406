"""More calls than the service can handle, many clients that wait for their answers, and clients
that only hold connections.

What is offered at a rate comes from an open-loop client: it sends at a fixed rate and does not
wait for responses, so a slow server cannot slow it down. Latency counts from when a request was
due, not from when it was sent. `python -m bench.overload PORT RATE SECS` prints the result.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, cast

import httpx
import uvloop

from bench.load import LOAD_CORE, Load, Target, pinned, press
from bench.servers import SESSION, ours

TICK_SECS = 0.001
CONNECTIONS = 3072
CAPACITY_CONNECTIONS = 256
"""For measuring the capacity: many, as offered, but few enough that none is refused."""
IDLE_CONNECTIONS = 500
WAITING_CLIENTS = (256, 1000, 3000)
"""Numbers of clients that ask again as soon as they are answered."""


class Offered(NamedTuple):
    """The result of offering calls at a fixed rate."""

    offered: float
    """Calls per second that were due."""
    admitted: float
    refused: float
    p99_ms: float
    """Of admitted calls."""
    refused_p99_ms: float

    def row(self, name: str) -> str:
        """Return a row of the table."""
        return (
            f"| {name} | {self.offered:,.0f} | {self.admitted:,.0f} | {self.p99_ms:.1f} "
            f"| {self.refused:,.0f} | {self.refused_p99_ms:.1f} |"
        )


def offer(target: Target, rate: float, secs: float) -> Offered:
    """Offer `rate` calls per second for `secs` seconds, from the load generator's core."""
    command = [sys.executable, "-m", "bench.overload", str(target.port), str(rate), str(secs)]
    environment = os.environ | {
        "BENCH_PATHS": str(target.paths),
        "BENCH_BODY": target.body,
        "BENCH_AUTHORIZATION": target.authorization,
    }
    output = subprocess.run(
        [*pinned(LOAD_CORE), *command],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        timeout=secs + 60,
    ).stdout
    return Offered(**json.loads(output))


class Overload(NamedTuple):
    """The results at capacity and at twice the capacity."""

    capacity: Offered
    twice: Offered

    @property
    def ratio(self) -> float:
        """How many times longer admitted calls take at twice the capacity."""
        return self.twice.p99_ms / self.capacity.p99_ms


def overload(scratch: Path, secs: float) -> Overload:
    """Measure the capacity, then offer it, twice it, and it again. The result at capacity is
    the mean of the two runs."""
    with ours(scratch) as plain:
        target = _costly(plain, scratch)
        many = target._replace(connections=CAPACITY_CONNECTIONS)
        per_sec = press(many, secs / 5, scratch).per_sec
        before = offer(target, per_sec, secs / 3)
        twice = offer(target, 2 * per_sec, secs)
        after = offer(target, per_sec, secs / 3)
    mean = [statistics.fmean(pair) for pair in zip(before, after, strict=True)]
    return Overload(Offered(*mean), twice)


def _costly(plain: Target, scratch: Path) -> Target:
    """Requests that cost some 100 µs each: the service handles plain calls faster than this
    client can offer twice as many."""
    made = httpx.post(
        f"http://127.0.0.1:{plain.port}/sessions",
        json=SESSION | {"authorized_tools": ["*.*.*"]},
        headers={"authorization": plain.authorization},
    )
    paths = scratch / f"costly-{plain.port}.paths"
    paths.write_text(f"{made.headers['location']}/batch\n")
    names = [f"files.local.read_{number}" for number in range(64)]
    return plain._replace(paths=paths, body=json.dumps({"tool_names": names}))


def waiting_clients(scratch: Path, rounds: int, secs: float) -> dict[int, list[Load]]:
    """Load the service with plain calls by growing numbers of clients, in turns. Clients that
    are refused ask again at once."""
    found: dict[int, list[Load]] = {number: [] for number in WAITING_CLIENTS}
    with ours(scratch) as target:
        press(target, 1.0, scratch)
        for _ in range(rounds):
            for number, loads in found.items():
                many = target._replace(connections=number, overloaded=True)
                loads.append(press(many, secs, scratch))
    return found


def waiting_row(clients: int, rounds: list[Load]) -> str:
    """Return a row of the table: medians."""
    admitted = statistics.median(each.per_sec for each in rounds)
    refused = statistics.median(each.refused_per_sec for each in rounds)
    p99_ms = statistics.median(each.p99_ms for each in rounds)
    return f"| {clients:,} | {admitted:,.0f} | {refused:,.0f} | {p99_ms:.1f} |"


def beside_idle(scratch: Path, rounds: int, secs: float) -> float:
    """Return the p99 of calls beside connections that send nothing or half a request, divided
    by the p99 without them: the median of `rounds` rounds."""
    ratios = []
    with ours(scratch) as target:
        for _ in range(rounds):
            alone = press(target, secs, scratch)
            with ExitStack() as stack:
                for number in range(IDLE_CONNECTIONS):
                    address = ("127.0.0.1", target.port)
                    held = stack.enter_context(socket.create_connection(address))
                    held.sendall(b"GET /livez HTTP/1.1\r\n" if number % 2 else b"")
                ratios.append(press(target, secs, scratch).p99_ms / alone.p99_ms)
    return statistics.median(ratios)


class _Connection(asyncio.Protocol):
    """A connection with one request at a time. Responses are delimited by their length."""

    def __init__(self, idle: deque[_Connection], found: dict[bytes, list[float]]) -> None:
        self._idle = idle
        self._found = found
        self._due = 0.0
        self._received = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._idle.append(self)

    def send(self, request: bytes, due: float) -> None:
        self._due = due
        assert self._transport is not None
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data if self._received else data
        head = received.find(b"\r\n\r\n")
        if head < 0:
            return
        at = received.find(b"content-length: ", 0, head)
        length = int(received[at + 16 : received.find(b"\r", at)]) if at >= 0 else 0
        if len(received) < head + 4 + length:
            return
        self._received = b""
        self._found.setdefault(received[9:12], []).append(time.perf_counter() - self._due)
        self._idle.append(self)

    def connection_lost(self, exc: Exception | None) -> None:
        raise SystemExit(f"a connection was lost: {exc}")


async def _offer(port: int, paths: list[str], rate: float, secs: float) -> Offered:
    body = os.environ["BENCH_BODY"].encode()
    headers = (
        f"host: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: {os.environ['BENCH_AUTHORIZATION']}\r\ncontent-length: {len(body)}"
    )
    requests = [f"POST {path} HTTP/1.1\r\n{headers}\r\n\r\n".encode() + body for path in paths]
    loop = asyncio.get_running_loop()
    idle: deque[_Connection] = deque()
    found: dict[bytes, list[float]] = {}
    for _ in range(CONNECTIONS):
        await loop.create_connection(lambda: _Connection(idle, found), "127.0.0.1", port)
    started = time.perf_counter()
    waiting: deque[float] = deque()
    sent = 0
    while (now := time.perf_counter() - started) < secs:
        while sent < now * rate:
            waiting.append(started + sent / rate)
            sent += 1
        while waiting and idle:
            idle.popleft().send(random.choice(requests), waiting.popleft())
        await asyncio.sleep(TICK_SECS)
    admitted, refused = found.pop(b"200", []), found.pop(b"503", [])
    if found:
        raise SystemExit(f"unexpected statuses: {list(found)}")
    return Offered(
        rate, len(admitted) / secs, len(refused) / secs, _p99_ms(admitted), _p99_ms(refused)
    )


def _p99_ms(durations: list[float]) -> float:
    return sorted(durations)[int(len(durations) * 0.99)] * 1000 if durations else 0.0


if __name__ == "__main__":
    _port, _rate, _secs = sys.argv[1:]
    _paths = Path(os.environ["BENCH_PATHS"]).read_text().split()
    result = uvloop.run(_offer(int(_port), _paths, float(_rate), float(_secs)))
    print(json.dumps(result._asdict()))
