"""Clients generated from the committed document make one journey against a live server, and
understand the answers of a server that is newer than they are."""

from __future__ import annotations

import json
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.clients.tools import (
    HERE,
    environment,
    generator_jar,
    go_cache,
    need,
    node_modules,
    run,
)
from tests.e2e.test_readme import TOKENS, WITH_KEYS
from tests.services import ROOT, running

DOCUMENT = ROOT / "openapi.json"
JOURNEYS = HERE / "journeys"
STEPS = [
    "create",  # With the required fields only. A client that adds defaults is refused.
    "read",
    "call",
    "repeat",  # With agent, tier and key: the second answer is the first one, replayed.
    "minimal",
    "batch",
    "dry run",
    "denied",  # A typed error gives code, retryable, next action and violations.
    "rate limited",  # And the seconds to wait.
    "list",  # By agent, status and pages.
    "kill switch",
    "gone",  # 409 and 404 after it.
    "future",  # Unknown fields, values, codes and statuses.
]

SCHEMAS = json.loads(DOCUMENT.read_text())["components"]
LATER_SESSION = SCHEMAS["schemas"]["Session"]["examples"][0] | {
    "status": "dreaming",
    "data_sensitivity_ceiling": "cosmic",
    "colour": "blue",
}
LATER_PROBLEM = SCHEMAS["examples"]["tool_not_authorized"]["value"] | {
    "code": "wrong_moon",
    "next_action": "look_up",
    "violations": [{"code": "wrong_moon", "phase": 3}],
    "moon": "full",
}


class _Later(BaseHTTPRequestHandler):
    """A server of a later version, with fields, values, codes and statuses that are new."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/agents/"):
            self._problem(451)
        else:
            self._answer(200, "application/json", LATER_SESSION)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self._problem(403)

    def _problem(self, status: int) -> None:
        self._answer(status, "application/problem+json", LATER_PROBLEM | {"status": status})

    def _answer(self, status: int, kind: str, body: dict[str, Any]) -> None:
        encoded = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  # its name
        """Say nothing."""


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """The environment of a journey: a live service with keys, and one of a later version."""
    # Below the default, to which the server lowers a limit that is left out.
    settings = WITH_KEYS | {"ARBITER_MAX_TIME_LIMIT_SECS": "1800"}
    with (
        ThreadingHTTPServer(("127.0.0.1", 0), _Later) as later,
        running(**settings) as service,
    ):
        thread = threading.Thread(target=later.serve_forever)
        thread.start()
        yield TOKENS | {
            "ARBITER_URL": service.url,
            "FUTURE_URL": f"http://127.0.0.1:{later.server_port}",
        }
        later.shutdown()
        thread.join()


def openapi_generator(folder: Path, generator: str, *options: str) -> None:
    need("java")
    jar = ("java", "-jar", generator_jar(), "generate", "--input-spec", DOCUMENT)
    run(*jar, "--generator-name", generator, "--output", folder, *options)


def python(folder: Path) -> list[str | Path]:
    openapi_generator(folder, "python", "--package-name", "arbiter_client")
    return [environment() / "bin" / "python", JOURNEYS / "python.py"]


def python_client(folder: Path) -> list[str | Path]:
    tool = environment() / "bin"
    command = ("generate", "--path", DOCUMENT, "--meta", "none")
    run(tool / "openapi-python-client", *command, "--output-path", folder / "arbiter_client")
    return [tool / "python", JOURNEYS / "python_client.py"]


def java(folder: Path) -> list[str | Path]:
    need("javac")
    options = ("--library", "native", "--additional-properties", "openApiNullable=false")
    openapi_generator(folder, "java", *options)
    sources = [*(folder / "src" / "main").rglob("*.java"), *(JOURNEYS / "java").rglob("*.java")]
    run("javac", "-nowarn", "-d", folder / "classes", "-cp", generator_jar(), *sources)
    return ["java", "-cp", f"{folder / 'classes'}:{generator_jar()}", "Journey"]


def go(folder: Path) -> list[str | Path]:
    openapi_generator(folder / "client", "go", "--package-name", "arbiter")
    for generated in ("go.mod", "go.sum", "test"):
        path = folder / "client" / generated
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / "go.mod").write_text("module example.org/journey\n\ngo 1.23\n")
    shutil.copy(JOURNEYS / "go" / "main.go", folder)
    build = (environment() / "bin" / "go", "build", "-o", "journey", ".")
    settings = {"GOCACHE": go_cache(), "GOPATH": folder / "go", "GOENV": "off"}
    run(*build, folder=folder, GOPROXY="off", GOTOOLCHAIN="local", GOFLAGS="", **settings)
    return [folder / "journey"]


def typescript(journey: str, folder: Path) -> list[str | Path]:
    """Compile a journey and the client that it imports, strictly."""
    (folder / "node_modules").symlink_to(node_modules())
    shutil.copy(JOURNEYS / f"{journey}.ts", folder / "journey.ts")
    shutil.copy(JOURNEYS / "tsconfig.json", folder)
    run(node_modules() / ".bin" / "tsc", folder=folder)
    return ["node", folder / "built" / "journey.js"]


def typescript_fetch(folder: Path) -> list[str | Path]:
    openapi_generator(folder / "client", "typescript-fetch")
    return typescript("typescript_fetch", folder)


def openapi_fetch(folder: Path) -> list[str | Path]:
    tool = node_modules() / ".bin" / "openapi-typescript"
    run(tool, DOCUMENT, "--output", folder / "client.d.ts")
    return typescript("openapi_fetch", folder)


def hey_api(folder: Path) -> list[str | Path]:
    tool = node_modules() / ".bin" / "openapi-ts"
    run(tool, "--input", DOCUMENT, "--output", folder / "client", "--no-log-file")
    return typescript("hey_api", folder)


Build = Callable[[Path], list[str | Path]]
CLIENTS: dict[str, Build] = {
    build.__name__: build
    for build in (python, python_client, java, go, typescript_fetch, openapi_fetch, hey_api)
}
"""How each client is generated and built, and the command that then makes the journey."""


@pytest.mark.parametrize("client", CLIENTS)
def test_a_generated_client_makes_the_whole_journey(
    client: str, servers: dict[str, str], tmp_path: Path
) -> None:
    command = CLIENTS[client](tmp_path)

    steps = run(
        *command, folder=tmp_path, AGENT=str(uuid.uuid4()), PYTHONPATH=tmp_path, **servers
    )

    assert steps.splitlines() == STEPS
