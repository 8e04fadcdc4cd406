"""The command line: serve (the default), audit, backup, config, keys new, openapi."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import uvicorn
from starlette.types import ASGIApp

from app import __version__
from app.api.document import for_openapi_3_0
from app.api.problem_types import PROBLEM_TYPES
from app.api.schemas import canonical_uuid
from app.domain.errors import StoreUnusable
from app.http.auth import Scope, new_key
from app.main import create_app, open_log
from app.observability.audit import STDOUT
from app.observability.audit_search import (
    AuditSearch,
    Wanted,
    parse_session,
    parse_time,
    rotations,
)
from app.server.drain import DrainingServer
from app.server.protocol import LimitedProtocol
from app.server.supervisor import Supervisor
from app.settings import PREFIX, BadSettings, Settings, load_settings
from app.store import UnknownStore, back_up

BACKLOG = 2048
INTERRUPTED = 130
"""The exit code of a command that was interrupted, as shells have it."""

_OUTCOMES = ("admitted", "replayed", "done", *PROBLEM_TYPES)

_T = TypeVar("_T")


def run(program: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command of `program`, which is what the user typed, and return its exit code, which
    is 2 if the configuration or the command line is unusable."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if (setting := _setting_among(arguments)) is not None:
        print(f"arbiter: {setting}", file=sys.stderr)
        return 2
    chosen = _parser(program).parse_args(arguments)
    if chosen.run is not _serve:
        # Only the service handles it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    try:
        code = int(chosen.run(chosen))
        sys.stdout.flush()
    except BadSettings as error:
        print(f"arbiter: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader, such as head, has enough. Python would write the rest as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return code


def _setting_among(arguments: Sequence[str]) -> str | None:
    """What to say about an option that is a setting. Other programs have options for these."""
    for argument in arguments:
        option = argument.partition("=")[0]
        name = option.removeprefix("--").replace("-", "_").lower()
        if option.startswith("--") and name in Settings.model_fields:
            return (
                f"there is no option {option}; set the variable {PREFIX}{name.upper()} instead"
            )
    return None


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program, description="Issues and enforces agent task sessions."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(run=_serve)
    commands = parser.add_subparsers(metavar="COMMAND")
    commands.add_parser("serve", help="serve HTTP (the default)").set_defaults(run=_serve)
    _add_audit(commands.add_parser("audit", help="print lines of the audit log"))
    backup = commands.add_parser("backup", help="copy a SQLite store, live or stopped")
    backup.add_argument("file", type=Path, help="a file that does not exist yet")
    backup.set_defaults(run=_back_up)
    config = commands.add_parser("config", help="print the settings, secrets redacted")
    config.set_defaults(run=_config)
    openapi = commands.add_parser("openapi", help="print the OpenAPI document")
    openapi.add_argument(
        "--spec",
        choices=["3.1", "3.0"],
        default="3.1",
        help="the version of OpenAPI, for tools that do not know 3.1 (the default)",
    )
    openapi.set_defaults(run=_openapi)
    keys = commands.add_parser("keys", help="make API keys")
    new = keys.add_subparsers(required=True, metavar="COMMAND").add_parser(
        "new", help="make a key; prints what to configure and what to send"
    )
    new.add_argument("--name", required=True, help="1 to 64 of A-Z a-z 0-9 _ -")
    new.add_argument("--scope", required=True, choices=[scope.value for scope in Scope])
    new.set_defaults(run=_new_key)
    return parser


def _add_audit(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Prints the lines that match all options, as they are, the oldest file first. The exit "
        "code is 0 if there are any, 1 if there are none, 2 if a file cannot be read."
    )
    parser.add_argument(
        "--session",
        type=_checked(parse_session),
        metavar="ID",
        help="a whole id, its first 8 characters, or its SHA-256",
    )
    parser.add_argument("--agent", type=_checked(canonical_uuid), metavar="ID")
    parser.add_argument(
        "--outcome",
        type=_checked(_outcome),
        metavar="CODE",
        help="admitted, or the code of a denial",
    )
    parser.add_argument("--caller", metavar="NAME", help="the name of an API key")
    parser.add_argument("--request-id", metavar="ID", help="the request_id of an answer")
    for option, meaning in (("--since", "not before"), ("--until", "before")):
        parser.add_argument(
            option,
            type=_checked(lambda text: parse_time(text, datetime.now(UTC))),
            metavar="TIME",
            help=f"{meaning} an instant such as 2026-01-01T12:00:00Z, or 15m, 2h or 3d ago",
        )
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="read these, in this order, instead of ARBITER_AUDIT_LOG and its rotations",
    )
    parser.set_defaults(run=_audit)


def _checked(parse: Callable[[str], _T]) -> Callable[[str], _T]:
    """Let a `ValueError` be the message to the user. By itself argparse repeats the value."""

    def checked(text: str) -> _T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked


def _outcome(text: str) -> str:
    if text not in _OUTCOMES:
        raise ValueError(f"give one of {', '.join(_OUTCOMES)}")
    return text


def _serve(_: argparse.Namespace) -> int:
    settings = load_settings()
    settings.check_bind()
    # Workers read them again, but only their parent can end the service.
    settings.load_keys()
    try:
        listening = _listen(settings.host, settings.port)
    except OSError as error:
        # Python appends the address to the reason, in brackets.
        reason = str(error.strerror).partition(" (")[0]
        print(
            f"arbiter: cannot listen on {settings.host}, port {settings.port}: {reason}; "
            "ARBITER_HOST and ARBITER_PORT name another address",
            file=sys.stderr,
        )
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


def _listen(host: str, port: int) -> socket.socket:
    """Listen on an address. `::` is every address, of IPv4 too. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(
        (host, port), family=family, backlog=BACKLOG, dualstack_ipv6=both
    )


def _serve_by_workers(settings: Settings, listening: socket.socket) -> int:
    """Serve with several processes, each of which reads its settings from the environment."""
    with tempfile.TemporaryDirectory(prefix="arbiter-metrics-") as folder:
        os.environ["ARBITER_PORT"] = str(settings.port)
        os.environ["ARBITER_METRICS_DIR"] = str(settings.metrics_dir or folder)
        open_log(settings)
        config = server_config("app.main:app", settings)
        supervisor = Supervisor(config, [listening], settings.start_timeout_secs)
        # It has handlers now.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        supervisor.run()
    return int(supervisor.has_failed)


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


def _audit(chosen: argparse.Namespace) -> int:
    search = AuditSearch(
        Wanted(
            chosen.session,
            chosen.agent,
            chosen.outcome,
            chosen.caller,
            chosen.request_id,
            chosen.since,
            chosen.until,
        )
    )
    try:
        matched = _print_lines(search, chosen.files or _audit_files())
    except KeyboardInterrupt:
        return INTERRUPTED
    if search.damaged:
        lines = "1 damaged line" if search.damaged == 1 else f"{search.damaged} damaged lines"
        print(f"arbiter: skipped {lines}", file=sys.stderr)
    for each in search.unreadable:
        print(f"arbiter: cannot read all of {each}", file=sys.stderr)
    return 2 if search.unreadable else int(not matched)


def _print_lines(search: AuditSearch, files: Sequence[Path]) -> bool:
    """Print what is found and return whether there is any."""
    matched, out, at_once = False, sys.stdout.buffer, sys.stdout.isatty()
    for line in search.lines(files):
        matched = True
        out.write(line)
        if at_once:
            out.flush()
    out.flush()
    return matched


def _audit_files() -> list[Path]:
    """The files of the configured audit log. Raises `BadSettings`."""
    target = load_settings().audit_log
    if target is None or target == STDOUT:
        raise BadSettings(f"name the files: ARBITER_AUDIT_LOG is {target or 'not set'}")
    files = rotations(Path(target))
    if not files:
        raise BadSettings(f"there is no audit log {target}")
    return files


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


def _openapi(chosen: argparse.Namespace) -> int:
    document = create_app(Settings.model_construct()).framework.openapi()
    if chosen.spec == "3.0":
        document = for_openapi_3_0(document)
    print(json.dumps(document, indent=2))
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
