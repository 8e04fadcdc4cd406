"""The linters and generators that the tests of this folder run.

They are installed where the user's caches are, once for each state of the lock files, and never
into the tree or the environment of the service.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MINIMUM_NODE = 20
NOT_TESTED = "GENERATED CLIENTS AND LINTERS ARE NOT TESTED"
INSTALL_SECS = 400
RUN_SECS = 240

_CACHES = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "arbiter-clients"


def need(*programs: str) -> None:
    """Skip the test, with one line, if a program is missing. With `--no-skips` that fails."""
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"{NOT_TESTED}: install {', '.join(missing)}")


def run(
    *command: str | Path, folder: Path = HERE, secs: int = RUN_SECS, **variables: str | Path
) -> str:
    """Run a program and return what it printed. It fails the test if it fails."""
    quiet = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true", "CI": "true"}
    more = {name: str(value) for name, value in variables.items()}
    ran = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        check=False,
        cwd=folder,
        env=os.environ | quiet | more,
        text=True,
        timeout=secs,
    )
    said = f"{ran.stdout[-6000:]}\n{ran.stderr[-6000:]}"
    assert ran.returncode == 0, f"{' '.join(map(str, command))}\n{said}"
    return ran.stdout


@cache
def node_modules() -> Path:
    """The folder of the packages of package-lock.json."""
    need("node", "npm")
    version = run("node", "--version").strip()
    if int(version[1:].partition(".")[0]) < MINIMUM_NODE:
        pytest.skip(f"{NOT_TESTED}: install Node {MINIMUM_NODE}; this is {version}")
    sources = ("package.json", "package-lock.json", ".npmrc")

    def install(folder: Path) -> None:
        for name in sources:
            shutil.copy(HERE / name, folder)
        run("npm", "ci", folder=folder, secs=INSTALL_SECS)

    return _installed("npm", sources, install) / "node_modules"


@cache
def environment() -> Path:
    """The Python environment with the packages of requirements.lock."""

    def install(folder: Path) -> None:
        run(sys.executable, "-m", "venv", folder, secs=INSTALL_SECS)
        pip = (folder / "bin" / "python", "-m", "pip", "install", "--quiet")
        lock = ("--require-hashes", "--requirement", HERE / "requirements.lock")
        run(*pip, *lock, "--disable-pip-version-check", secs=INSTALL_SECS)

    return _installed(f"python{sys.version_info.minor}", ("requirements.lock",), install)


@cache
def generator_jar() -> Path:
    """The program of openapi-generator. It carries the JSON library of its Java clients."""
    return next(environment().glob("lib/python*/site-packages/openapi_generator_cli/*.jar"))


def go_cache() -> Path:
    """Where Go keeps its compiled standard library, which takes it half a minute."""
    return _CACHES / "go"


_failures: dict[str, str] = {}
"""Why something could not be installed. Without internet each attempt takes a while."""


def _installed(name: str, sources: tuple[str, ...], install: Callable[[Path], None]) -> Path:
    """Return the folder that `install` filled for these sources, now or in an earlier run."""
    if name in _failures:
        pytest.skip(_failures[name])
    state = hashlib.sha256(b"".join((HERE / each).read_bytes() for each in sources))
    folder = _CACHES / f"{name}-{state.hexdigest()[:16]}"
    done = folder / "installed"
    with _locked(name):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            try:
                install(folder)
            except (AssertionError, subprocess.TimeoutExpired) as error:
                said = [line for line in str(error).splitlines() if "error" in line.lower()]
                reason = said[0] if said else f"it took over {INSTALL_SECS} s"
                _failures[name] = f"{NOT_TESTED}: cannot install {name}: {reason}"
                pytest.skip(_failures[name])
            done.touch()
    return folder


@contextmanager
def _locked(name: str) -> Iterator[None]:
    """Let one process of the test run install, while the others wait."""
    _CACHES.mkdir(parents=True, exist_ok=True)
    with (_CACHES / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
