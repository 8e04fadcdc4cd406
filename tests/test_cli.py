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
