"""The command line, run both ways."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app import __version__
from tests.services import ROOT

BOTH_WAYS = {
    "arbiter": ["-c", "import sys; from app.__main__ import main; sys.exit(main())"],
    "python -m app": ["-m", "app"],
}
"""What the user typed, and what runs then. The console script runs the first."""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run in an empty folder, without a .env."""
    monkeypatch.chdir(tmp_path)


def run(program: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *BOTH_WAYS[program], *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("program", BOTH_WAYS)
def test_usage_names_the_program_as_typed(program: str) -> None:
    helped = run(program, "keys", "new", "--help")
    refused = run(program, "keys", "old")

    assert helped.stdout.startswith(f"usage: {program} keys new ")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"usage: {program} keys ")


@pytest.mark.parametrize("program", BOTH_WAYS)
def test_the_version_is_printed(program: str) -> None:
    assert run(program, "--version").stdout == f"{__version__}\n"


def test_a_service_without_keys_says_how_to_make_one() -> None:
    ended = run("arbiter", "serve", ARBITER_HOST="0.0.0.0")

    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1
    for command in ("with: arbiter keys new ", "docker run --rm arbiter keys new "):
        assert f"{command}--name NAME --scope SCOPE" in ended.stderr


def test_a_reader_that_has_enough_gets_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, *BOTH_WAYS["arbiter"], "openapi"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"{"
    process.stdout.close()
    assert process.stderr is not None
    said = process.stderr.read()
    process.stderr.close()

    assert (process.wait(timeout=60), said) == (0, b"")


def test_an_option_that_is_a_setting_is_named() -> None:
    ended = run("arbiter", "--port", "8001")

    assert ended.returncode == 2
    assert ended.stderr == (
        "arbiter: there is no option --port; set the variable ARBITER_PORT instead\n"
    )


def test_a_bad_name_of_a_key_is_what_is_wrong() -> None:
    ended = run("arbiter", "keys", "new", "--name", "a:b", "--scope", "proxy")

    assert ended.returncode == 2
    assert ended.stderr == (
        "arbiter: an API key's name must be 1 to 64 characters A-Z a-z 0-9 _ -\n"
    )


def test_an_engine_that_is_not_there_says_what_to_do() -> None:
    ended = run("arbiter", ARBITER_STORE_URL="redis://127.0.0.1:1", ARBITER_PORT="0")

    assert "there is no connection to it; start the engine, or correct" in ended.stderr
