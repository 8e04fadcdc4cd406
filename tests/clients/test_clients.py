"""The clients that docs/integration.md shows: generated as it says, each makes one journey
against a live server, and understands the answers of a server of a later version."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import httpx
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
from tests.e2e.test_readme import BLOCK, TOKENS, WITH_KEYS
from tests.services import ROOT, StartService, running

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

SCHEMAS = json.loads((ROOT / "openapi.json").read_text())["components"]
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["content-length"]))

    def answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:  # noqa: A002  # its name
        """Say nothing."""


class _Later(_Handler):
    """A server of a later version, with fields, values, codes and statuses that are new."""

    def do_GET(self) -> None:
        if self.path.startswith("/agents/"):
            self._problem(451)
        else:
            self.answer(200, "application/json", json.dumps(LATER_SESSION).encode())

    def do_POST(self) -> None:
        self.body()
        self._problem(403)

    def _problem(self, status: int) -> None:
        encoded = json.dumps(LATER_PROBLEM | {"status": status}).encode()
        self.answer(status, "application/problem+json", encoded)


class _Unreliable(_Handler):
    """A proxy: the first call does not reach the service, and the second gets no answer."""

    service = ""
    calls: ClassVar[list[str]]
    """The idempotency keys of the calls."""

    def do_POST(self) -> None:
        body = self.body()
        if self.path.endswith("/calls"):
            self.calls.append(self.headers["idempotency-key"])
            if len(self.calls) == 1:
                problem = SCHEMAS["examples"]["store_unavailable"]["value"]
                self.answer(503, "application/problem+json", json.dumps(problem).encode())
                return
        # What belongs to the connection is not passed on.
        passed = {"authorization", "content-type", "idempotency-key"}
        headers = {
            name: value for name, value in self.headers.items() if name.lower() in passed
        }
        answer = httpx.post(self.service + self.path, content=body, headers=headers)
        if len(self.calls) == 2:
            # It was counted, and the client cannot know.
            self.close_connection = True
        else:
            self.answer(answer.status_code, answer.headers["content-type"], answer.content)


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, str]]:
    """The environment of a journey: a live service with keys, and one of a later version."""
    # Below the default, to which the server lowers a limit that is left out.
    settings = WITH_KEYS | {"ARBITER_MAX_TIME_LIMIT_SECS": "1800"}
    with serving(_Later) as later, running(**settings) as service:
        yield TOKENS | {"ARBITER_URL": service.url, "FUTURE_URL": later}


PAGE = (ROOT / "docs" / "integration.md").read_text()
PRINTED = "".join(body for language, body in BLOCK.findall(PAGE) if language == "output")


COMPILE = "npx tsc "


def shown(heading: str) -> tuple[str, str]:
    """Return the command of a section that generates a client, and its example."""
    section = re.split(r"^##", PAGE.partition(f"### {heading}\n")[2], flags=re.MULTILINE)[0]
    (_, commands), (_, program) = BLOCK.findall(section)
    generate = [line for line in commands.splitlines() if not line.startswith(COMPILE)]
    return generate[-1], program


def python(folder: Path, program: Path) -> list[str | Path]:
    return [environment() / "bin" / "python", program]


def java(folder: Path, program: Path) -> list[str | Path]:
    need("javac")
    classes = folder / f"classes-{program.stem}"
    sources = [*(folder / "client" / "src" / "main").rglob("*.java"), program]
    sources += (JOURNEYS / "java" / "javax").rglob("*.java")
    run("javac", "-nowarn", "-d", classes, "-cp", generator_jar(), *sources)
    return ["java", "-cp", f"{classes}:{generator_jar()}", program.stem]


def go(folder: Path, program: Path) -> list[str | Path]:
    (folder / "go.mod").write_text("module example.org/proxy\n\ngo 1.24\n")
    built = folder / program.stem
    settings = {"GOCACHE": go_cache(), "GOPATH": folder / "go", "GOENV": "off", "GOFLAGS": ""}
    build = (environment() / "bin" / "go", "build", "-o", built, program)
    run(*build, folder=folder, GOPROXY="off", GOTOOLCHAIN="local", **settings)
    return [built]


def typescript(folder: Path, program: Path) -> list[str | Path]:
    """Compile a program and the client that it imports, strictly."""
    settings = json.loads((JOURNEYS / "tsconfig.json").read_text())
    (folder / "tsconfig.json").write_text(json.dumps(settings | {"files": [program.name]}))
    run(node_modules() / ".bin" / "tsc", folder=folder)
    return ["node", folder / "built" / f"{program.stem}.js"]


class Client(NamedTuple):
    """A client of the page."""

    heading: str
    journey: str
    build: Callable[[Path, Path], list[str | Path]]
    """Compiles a program in the folder of its client. Returns the command that runs it."""
    retries: bool = False
    """Whether its example shows how to retry."""


CLIENTS = [
    Client("Python, with openapi-generator", "python.py", python, retries=True),
    Client("Python, with openapi-python-client", "python_client.py", python),
    Client("Java, with openapi-generator", "java/Journey.java", java, retries=True),
    Client("Go, with openapi-generator", "main.go", go, retries=True),
    Client(
        "TypeScript, with openapi-generator", "typescript_fetch.ts", typescript, retries=True
    ),
    Client("TypeScript, with openapi-fetch", "openapi_fetch.ts", typescript, retries=True),
    Client("TypeScript, with hey-api", "hey_api.ts", typescript),
]


@pytest.fixture(scope="module", params=CLIENTS, ids=[each.heading for each in CLIENTS])
def generated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Client, Path]:
    """A client, generated by the command of the page as it is written, and its folder."""
    client: Client = request.param
    folder = tmp_path_factory.mktemp("client")
    shutil.copy(ROOT / "openapi.json", folder)
    command, _ = shown(client.heading)
    programs = os.environ["PATH"]
    if client.build is typescript:
        (folder / "node_modules").symlink_to(node_modules())
    if not command.startswith("npx"):
        need("java")
        programs = f"{environment() / 'bin'}{os.pathsep}{programs}"
    run("bash", "-c", command, folder=folder, PATH=programs)
    return client, folder


def test_a_generated_client_makes_the_whole_journey(
    generated: tuple[Client, Path], servers: dict[str, str]
) -> None:
    client, folder = generated
    journey = Path(shutil.copy(JOURNEYS / client.journey, folder))

    steps = run(
        *client.build(folder, journey),
        folder=folder,
        AGENT=str(uuid.uuid4()),
        PYTHONPATH=f"{folder}:{folder / 'client'}",
        **servers,
    )

    assert steps.splitlines() == STEPS


def test_the_example_of_a_client_prints_what_the_page_shows(
    generated: tuple[Client, Path], start_service: StartService
) -> None:
    """One that retries does so with the key, so that a call counts once."""
    client, folder = generated

    class Proxy(_Unreliable):
        service = start_service().url
        calls: ClassVar[list[str]] = []

    _, program = shown(client.heading)
    example = folder / f"Example{Path(client.journey).suffix}"
    with serving(Proxy) as proxy:
        url = proxy if client.retries else Proxy.service
        example.write_text(program.replace("http://localhost:8000", url))
        printed = run(
            *client.build(folder, example),
            folder=folder,
            PYTHONPATH=f"{folder}:{folder / 'client'}",
        )

    assert printed == PRINTED
    for line in PAGE.splitlines():
        if line.startswith(COMPILE) and client.journey == "openapi_fetch.ts":
            fresh = folder / "fresh"
            fresh.mkdir()
            (fresh / "node_modules").symlink_to(node_modules())
            shutil.copy(folder / "client.d.ts", fresh)
            (fresh / "example.ts").write_text(program)
            assert run("bash", "-c", line, folder=fresh) == ""
    if client.retries:
        first, again, once_more, other = Proxy.calls
        assert first == again == once_more != other
