"""The command line, `arbiter` or `python -m app`: serve (the default), backup, config, keys
new, openapi."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import STARTUP_FAILURE

from app import __version__
from app.domain.errors import StoreUnusable
from app.http.auth import Scope, new_key
from app.main import create_app
from app.server.drain import DrainingServer
from app.server.protocol import LimitedProtocol
from app.server.supervisor import Supervisor
from app.settings import BadSettings, Settings, load_settings
from app.store import UnknownStore, back_up

BACKLOG = 2048

PROGRAM = "python -m app" if __name__ == "__main__" else "arbiter"
"""What the user typed, for the usage lines."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, which is 2 if the configuration or the command
    line is unusable."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen))
    except BadSettings as error:
        print(f"arbiter: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Issues and enforces agent task sessions."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(run=_serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    commands.add_parser("serve", help="serve HTTP (the default)").set_defaults(run=_serve)
    backup = commands.add_parser("backup", help="copy a durable store, live or stopped")
    backup.add_argument("file", type=Path, help="a file that does not exist yet")
    backup.set_defaults(run=_back_up)
    config = commands.add_parser("config", help="print the settings, secrets redacted")
    config.set_defaults(run=_config)
    openapi = commands.add_parser("openapi", help="print the OpenAPI document")
    openapi.set_defaults(run=_openapi)
    keys = commands.add_parser("keys", help="make API keys")
    new = keys.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "new", help="make a key; prints what to configure and what to send"
    )
    new.add_argument("--name", required=True, help="1 to 64 of A-Z a-z 0-9 _ -")
    new.add_argument("--scope", required=True, choices=[scope.value for scope in Scope])
    new.set_defaults(run=_new_key)
    return parser


def _serve(_: argparse.Namespace) -> int:
    settings = load_settings()
    settings.check_bind()
    # Workers read them again, but only their parent can end the service.
    settings.load_keys()
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listening = socket.create_server(
            (settings.host, settings.port), family=family, backlog=BACKLOG
        )
    except OSError as error:
        address = f"{settings.host}, port {settings.port}"
        # Python appends the address to the reason, in brackets.
        reason = str(error.strerror).partition(" (")[0]
        print(f"arbiter: cannot listen on {address}: {reason}", file=sys.stderr)
        return 1
    # Port 0 asks the system for a free port; the first line of the log names it.
    settings = settings.model_copy(update={"port": listening.getsockname()[1]})
    if settings.workers > 1:
        return _serve_by_workers(settings, listening)
    server = DrainingServer(server_config(create_app(settings), settings))
    # After a clean stop uvicorn raises the signal again, but stopping on request is success.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        return 0
    return 0 if server.started else 1


def _serve_by_workers(settings: Settings, listening: socket.socket) -> int:
    """Serve with several processes, each of which reads its settings from the environment."""
    with tempfile.TemporaryDirectory(prefix="arbiter-metrics-") as folder:
        os.environ["ARBITER_PORT"] = str(settings.port)
        os.environ["ARBITER_METRICS_DIR"] = str(settings.metrics_dir or folder)
        supervisor = Supervisor(server_config("app.main:app", settings), sockets=[listening])
        supervisor.run()
    return int(any(process.exitcode == STARTUP_FAILURE for process in supervisor.processes))


def server_config(app: ASGIApp | str, settings: Settings) -> uvicorn.Config:
    """The configuration of uvicorn. Several workers need the import path of `app`."""
    return uvicorn.Config(
        app,
        workers=settings.workers,
        http=LimitedProtocol,
        ws="none",
        backlog=BACKLOG,
        log_config=None,
        access_log=False,
        # Nothing here depends on the client's address.
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=settings.shutdown_grace_secs,
    )


def _back_up(chosen: argparse.Namespace) -> int:
    try:
        sessions = back_up(load_settings().store_url, chosen.file)
    except (UnknownStore, StoreUnusable) as error:
        print(f"arbiter: {error}", file=sys.stderr)
        return 1
    print(f"{chosen.file}: {sessions} sessions")
    return 0


def _config(_: argparse.Namespace) -> int:
    settings = load_settings()
    settings.load_keys()
    for name, value in settings.printable().items():
        print(f"{name}={value}")
    return 0


def _openapi(_: argparse.Namespace) -> int:
    print(json.dumps(create_app(Settings.model_construct()).framework.openapi(), indent=2))
    return 0


def _new_key(chosen: argparse.Namespace) -> int:
    try:
        key, token = new_key(chosen.name, Scope(chosen.scope))
    except ValueError as error:
        print(f"arbiter: {error}", file=sys.stderr)
        return 2
    print("# A line for ARBITER_API_KEYS_FILE; in ARBITER_API_KEYS a comma separates keys:")
    print(key)
    print(f"# Shown only now; the caller sends it with every request:\nBearer {token}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
