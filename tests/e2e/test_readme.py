"""README.md and docs/: commands print what the pages show, and everything they name exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from app.api.problem_types import PROBLEM_TYPES
from app.domain.advice import NextAction
from app.http.auth import Scope, new_key
from app.main import create_app
from app.observability.metrics import Metrics
from app.settings import PREFIX, Settings
from app.store.contract import Totals
from tests import engines
from tests.conftest import PATIENTLY
from tests.services import ROOT, Service, StartService
from tests.support import session_request

MAX_README_LINES = 199

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text()
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TYPED = re.compile(r"^\$ ((?:.*\\\n)*.*)$", re.MULTILINE)
"""A typed command. A backslash continues it on the next line."""

VOLATILE = [
    (re.compile(r"\b(?!7c9e6679)[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"), "ID"),
    (re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"), "INSTANT"),
    (re.compile(r"\b[0-9a-f]{12}-[0-9a-f]+\b"), "REQUEST"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "DIGEST"),
    (re.compile(r"\.[\w-]{43}$", re.MULTILINE), ".SECRET"),
    (re.compile(r"^date: .*$", re.MULTILINE), "date: DATE"),
    (re.compile(r'(?<="version":")[^"]+'), "VERSION"),
    (re.compile(r'(?<="pid":)\d+'), "PID"),
    (re.compile(r'(?<="session_ref":")[0-9a-f]+'), "REF"),
    (re.compile(r'(?<=;t=)\d+|(?<="retry_after_secs":)\d+'), "SECS"),
]

PROXY_KEY, PROXY_TOKEN = new_key("gate", Scope.PROXY)
OPERATOR_KEY, OPERATOR_TOKEN = new_key("ops", Scope.OPERATE)
ADMIN_KEY, ADMIN_TOKEN = new_key("boss", Scope.ADMIN)
TOKENS = {
    "PROXY_TOKEN": PROXY_TOKEN,
    "OPERATOR_TOKEN": OPERATOR_TOKEN,
    "ADMIN_TOKEN": ADMIN_TOKEN,
}
"""Shell variables of a page whose service has keys."""

WITH_KEYS = {"ARBITER_API_KEYS": f"{PROXY_KEY},{OPERATOR_KEY},{ADMIN_KEY}"}
KEY_FOLDER = "/etc/arbiter"
"""Where the key file is on the pages."""

WITH_KEY_FILE = {
    "ARBITER_API_KEYS": f"{OPERATOR_KEY},{ADMIN_KEY}",
    "ARBITER_API_KEYS_FILE": "{folder}/keys",
}
SETTINGS = {
    "docs/incidents.md": WITH_KEYS,
    "docs/operations.md": WITH_KEY_FILE | {"ARBITER_AUDIT_LOG": "{folder}/audit.log"},
    "docs/security.md": WITH_KEYS,
    "docs/stores.md": {"ARBITER_STORE_URL": "sqlite://{folder}/sessions.db"},
}
"""The settings of the service behind a page, if it has any. With keys, an agent already has two
sessions there, and was denied a tool in each."""


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in this language."""
    return [body for marked, body in BLOCK.findall(PAGES[page]) if marked == language]


def pages_with(language: str) -> list[str]:
    return [page for page in PAGES if blocks(page, language)]


def rows(page: str, columns: int) -> list[list[str]]:
    """Return the rows of all tables of a page with `columns` columns, headers included."""
    lines = re.findall(r"^\| (.*) \|$", PAGES[page], re.MULTILINE)
    cells = [re.split(r" *\| *", line) for line in lines]
    return [row for row in cells if len(row) == columns]


def names_in(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def settled(text: str) -> list[str]:
    """Return the lines of `text` with placeholders for everything that differs between runs."""
    text = text.replace("\r", "")
    for pattern, name in VOLATILE:
        text = pattern.sub(name, text)
    return text.split("\n")


def shell_for(settings: dict[str, str], folder: Path) -> dict[str, str]:
    """Return the environment of a shell in which `arbiter` runs this program with the settings
    of the service."""
    commands = folder / "bin"
    commands.mkdir()
    arbiter = commands / "arbiter"
    arbiter.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m app "$@"\n')
    arbiter.chmod(0o755)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
    search = f"{commands}{os.pathsep}{os.environ['PATH']}"
    return inherited | settings | TOKENS | {"PATH": search, "PYTHONPATH": str(ROOT)}


@pytest.mark.parametrize("page", pages_with("console"))
def test_the_commands_of_a_page_print_what_it_shows(
    page: str, start_service: StartService, tmp_path: Path
) -> None:
    given = SETTINGS.get(page, {})
    settings = {name: value.format(folder=tmp_path) for name, value in given.items()}
    (tmp_path / "keys").write_text(f"# {page}\n{PROXY_KEY}\n")
    type_in(page, settings, start_service(**settings), tmp_path)


def test_the_runbook_works_over_sqlite(start_service: StartService, tmp_path: Path) -> None:
    settings = WITH_KEYS | {"ARBITER_STORE_URL": f"sqlite://{tmp_path}/sessions.db"}
    type_in("docs/incidents.md", settings, start_service(**settings), tmp_path)


def test_the_runbook_works_over_two_replicas(
    start_service: StartService, server: engines.Server, tmp_path: Path
) -> None:
    """What concerns agents and lists goes to one replica, the rest to the other."""
    settings = WITH_KEYS | {"ARBITER_STORE_URL": server.url + PATIENTLY}
    first, second = (start_service(**settings) for _ in range(2))
    type_in("docs/incidents.md", settings, first, tmp_path, second)


def type_in(
    page: str,
    settings: dict[str, str],
    service: Service,
    tmp_path: Path,
    other: Service | None = None,
) -> None:
    """Type the commands of a page and compare what they print with what it shows."""
    for _ in range(2 if "ARBITER_API_KEYS" in settings else 0):
        headers = {"authorization": f"Bearer {PROXY_TOKEN}"}
        made = httpx.post(f"{service.url}/sessions", json=session_request(), headers=headers)
        path = f"{service.url}{made.headers['location']}/calls"
        httpx.post(path, json={"tool_name": "delete_file"}, headers=headers)
    shown = "".join(blocks(page, "console"))
    commands = TYPED.findall(shown)
    script = "\n".join(f"echo '$' {number}\n{each}" for number, each in enumerate(commands))
    addresses = [each.url.removeprefix("http://") for each in (other or service, service)]
    script = re.sub(r"localhost:8000(?=/(agents|sessions\?))", addresses[0], script)
    script = script.replace("localhost:8000", addresses[1])

    typed = subprocess.run(
        ["bash", "-c", script.replace(KEY_FOLDER, str(tmp_path))],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        env=shell_for(settings, tmp_path) | {"SERVICE_PID": str(service.process.pid)},
        text=True,
        timeout=60,
    )

    numbers = iter(range(len(commands)))
    expected = TYPED.sub(lambda _: f"$ {next(numbers)}", shown)
    # curl prints no line break after a body; a page shows the next prompt on its own line.
    printed = re.sub(r"(?<=})\$ ", "\n$ ", typed.stdout).rstrip("\n")
    printed = printed.replace(str(tmp_path), KEY_FOLDER)
    assert settled(printed) == settled(expected.rstrip("\n"))
    assert typed.stderr == ""


@pytest.mark.parametrize("page", pages_with("python"))
def test_the_python_of_a_page_prints_what_it_shows(
    page: str, start_service: StartService
) -> None:
    """A text block after a Python block is its output. The example modules can be imported."""
    service = start_service()
    program = "\n".join(blocks(page, "python")).replace("http://localhost:8000", service.url)

    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT / "examples")},
        text=True,
        timeout=60,
    )

    assert ran.stderr == ""
    assert ran.stdout == "".join(blocks(page, "text"))


@pytest.mark.parametrize("page", pages_with("sh"))
def test_commands_that_no_test_runs_can_be_parsed(page: str) -> None:
    for block in blocks(page, "sh"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            assert shlex.split(line, comments=True) or not line or line.startswith("#"), line
        subprocess.run(["bash", "-n", "-c", block], check=True, timeout=60)


def test_targets_of_make_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", "\n".join(PAGES.values()), re.MULTILINE))

    assert {"serve", "test"} <= named
    assert named - targets == set()


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}


def links() -> Iterator[tuple[str, str]]:
    """Yield the page and the target of every link within this repository."""
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^()\s]+)\)", FENCED.sub("", text)):
            if not target.startswith(("http://", "https://")):
                yield page, target


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page, target in links():
        name, _, anchor = target.partition("#")
        file = (ROOT / page).parent / name if name else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append((page, target))

    assert broken == []
    assert len(list(links())) > 20


def defined_tests(file: Path) -> set[str]:
    defined = re.findall(
        r"^ *(?:async )?(?:def|class) (test_\w+|Test\w+)", file.read_text(), re.MULTILINE
    )
    return {*defined, file.stem}


def test_every_test_that_is_named_exists() -> None:
    text = "\n".join(PAGES.values())
    named = set(re.findall(r"`(?:tests/\S+/)?(test_\w+|Test\w+)(?:\.py)?`", text))
    files = list((ROOT / "tests").rglob("test_*.py"))
    existing = set().union(*map(defined_tests, files))
    linked = re.findall(r"\[`(test_\w+|Test\w+)(?:\.py)?`\]\(\.\./(tests/[^)]+)\)", text)

    assert len(named) > 15
    assert named - existing == set()
    assert [each for each in linked if each[0] not in defined_tests(ROOT / each[1])] == []


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= MAX_README_LINES


def test_the_routes_of_the_readme_are_those_of_the_document() -> None:
    listed = {
        (method, path, scopes)
        for methods, paths, _, scopes in rows("README.md", 4)
        for method in names_in(methods)
        for path in names_in(paths)
    }
    document: dict[str, Any] = create_app(Settings.model_construct()).framework.openapi()
    served = {
        (method.upper(), path, ", ".join(_scopes(operation)) or "none")
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }

    assert listed == served


def _scopes(operation: dict[str, Any]) -> list[str]:
    """The scopes that may use a route besides admin, or admin if there are none."""
    allowed = operation.get("x-scopes", [])
    return [scope for scope in allowed if scope != Scope.ADMIN] or allowed


def test_the_table_of_settings_has_every_default_and_range() -> None:
    listed = {
        name.removeprefix(PREFIX).lower(): (default, limits)
        for cell, default, limits, _ in rows("docs/operations.md", 4)
        for name in names_in(cell)
        if name.startswith(PREFIX)
    }
    fields = Settings.model_fields

    assert {name: limits for name, (_, limits) in listed.items()} == {
        name: _range(field) for name, field in fields.items()
    }
    assert {name: listed[name][0] for name in fields if not fields[name].default_factory} == {
        name: _default(field) for name, field in fields.items() if not field.default_factory
    }


def _range(field: FieldInfo) -> str:
    bounds = [each for each in field.metadata if isinstance(each, Ge | Le)]
    return " to ".join(str(each.ge if isinstance(each, Ge) else each.le) for each in bounds)


def _default(field: FieldInfo) -> str:
    if field.default in (None, ()):
        return "none"
    written = json.dumps(field.default).strip('"')
    return f"`{written}`"


def test_every_setting_that_is_mentioned_exists() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    mentioned = set(re.findall(rf"\b{PREFIX}\w+", "\n".join(PAGES.values())))

    assert mentioned - known == set()


def test_every_code_and_next_action_is_explained() -> None:
    page = "docs/integration.md"
    codes = {
        name: status
        for cell, status, *_ in rows(page, 4)
        for name in names_in(cell)
        if status.isdecimal()
    }
    actions = {name for cell, _ in rows(page, 2) for name in names_in(cell)}
    rules = {names_in(cell)[0]: status for _, _, cell, status, _ in rows("README.md", 5)[1:]}

    assert list(rules) == list(PROBLEM_TYPES)[: len(rules)]
    assert rules.items() <= codes.items()
    assert codes == {code: str(kind.status) for code, kind in PROBLEM_TYPES.items()}
    assert actions == {action.value for action in NextAction}


def test_every_metric_that_is_named_is_exported() -> None:
    text = Metrics().render(Totals(0, 0, 0, 0)).decode()
    exported = set(re.findall(r"^# HELP (\S+)", text, re.MULTILINE))
    named = {
        name.partition("{")[0]
        for names, _ in rows("docs/operations.md", 2)
        for name in names_in(names)
        if name.startswith("arbiter_")
    }

    assert named == exported


def test_every_name_in_the_guide_to_the_code_is_in_it() -> None:
    sources = [ROOT / "pyproject.toml"]
    for folder in ("app", "tests"):
        sources += (
            path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".lua"}
        )
    written = set().union(*(re.findall(r"\w+", path.read_text()) for path in sources))
    named = set(re.findall(r"`(?!test_)(\w*[A-Z_]\w*)(?:\(\))?`", PAGES["docs/extending.md"]))

    assert len(named) > 20
    assert named - written == set()
