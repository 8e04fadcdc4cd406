"""The wheel, in a fresh environment and started from an empty folder."""

from __future__ import annotations

import os
import signal
import subprocess
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from email.parser import BytesParser
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from app import __version__
from tests import engines
from tests.conftest import PATIENTLY
from tests.engines import until
from tests.services import ADDRESS, ROOT
from tests.support import session_request
from tests.wheel import build, copy, files_of_the_project, pip

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone of git")


class Built(NamedTuple):
    names: list[str]
    """The files of the project when it was built."""
    source: Path
    wheel: Path


class Installed(NamedTuple):
    environment: Path
    folder: Path
    """Where commands run: an empty folder."""

    def popen(self, *command: str, stderr: int, **variables: str) -> subprocess.Popen[str]:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ARBITER_", "PYTHON"))
        }
        return subprocess.Popen(
            [self.environment / "bin" / command[0], *command[1:]],
            cwd=self.folder,
            env=inherited | variables,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )

    def run(self, *command: str, **variables: str) -> str:
        """Run a command, which must succeed, and return what it prints."""
        process = self.popen(*command, stderr=subprocess.PIPE, **variables)
        printed, complaints = process.communicate(timeout=60)
        assert process.returncode == 0, complaints
        return printed

    @contextmanager
    def serving(
        self, log: Path, **variables: str
    ) -> Iterator[tuple[str, subprocess.Popen[str]]]:
        """Start `arbiter`, yield its address and its process, and stop it."""
        with log.open("w") as stderr:
            process = self.popen(
                "arbiter", stderr=stderr.fileno(), ARBITER_PORT="0", **variables
            )

        def started() -> bool:
            assert process.poll() is None, log.read_text()
            return bool(ADDRESS.search(log.read_text()))

        with process:
            try:
                until(started)
                address = ADDRESS.search(log.read_text())
                assert address
                yield address[1], process
            finally:
                # SIGKILL would leave its workers running.
                process.terminate()
                process.wait(timeout=60)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    source = tmp_path_factory.mktemp("source")
    names = files_of_the_project()
    copy(names, source)
    return Built(names, source, build(source, tmp_path_factory.mktemp("wheels")))


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, symlinks=True)
    python = environment / "bin/python"
    pip("--python", str(python), "install", "--no-deps", "--no-index", str(built.wheel))
    (packages,) = environment.glob("lib/python*/site-packages")
    # The dependencies come from the environment of the tests. Python does not follow .pth
    # files there, so an editable install of this project stays out.
    lines = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (packages / "dependencies.pth").write_text("\n".join(sorted(lines)) + "\n")
    return Installed(environment, tmp_path_factory.mktemp("empty"))


def test_every_file_of_the_package_is_in_the_wheel(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        packed = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert packed == {name for name in built.names if name.startswith("app/")}
    assert "app/py.typed" in packed
    assert "app/store/redis/lua/admit.lua" in packed


def test_a_build_leaves_nothing_in_the_tree(built: Built) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=built.source, check=True)

    assert files_of_the_project(built.source) == built.names


def test_the_metadata_names_the_licence(built: Built) -> None:
    with zipfile.ZipFile(built.wheel) as wheel:
        (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        metadata = BytesParser().parsebytes(wheel.read(f"{info}/METADATA"))
        licence = wheel.read(f"{info}/licenses/LICENSE").decode()

    assert (metadata["Name"], metadata["Version"]) == ("arbiter-sessions", __version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert licence == (ROOT / "LICENSE").read_text()


def test_the_application_is_that_of_the_wheel(installed: Installed) -> None:
    where = installed.run("python", "-c", "import app; print(app.__file__)")

    assert Path(where.strip()).is_relative_to(installed.environment)


def test_the_commands_work_in_an_empty_folder(installed: Installed) -> None:
    made = installed.run("arbiter", "keys", "new", "--name", "gate", "--scope", "proxy")
    settings = installed.run("arbiter", "config", ARBITER_API_KEYS=made.splitlines()[1])

    assert installed.run("arbiter", "--version") == f"{__version__}\n"
    assert "ARBITER_API_KEYS=gate:proxy:***\n" in settings
    assert '"openapi": "3.1' in installed.run("arbiter", "openapi")
    assert list(installed.folder.iterdir()) == []


@pytest.mark.parametrize("store", ["memory", "sqlite", "valkey", "valkey by two workers"])
def test_it_serves_and_stops(installed: Installed, tmp_path: Path, store: str) -> None:
    variables = {"ARBITER_STORE_URL": "memory://"}
    if store == "sqlite":
        variables["ARBITER_STORE_URL"] = f"sqlite://{tmp_path}/sessions.db"
    if store.startswith("valkey"):
        variables["ARBITER_STORE_URL"] = engines.single().url + PATIENTLY
    if "workers" in store:
        variables["ARBITER_WORKERS"] = "2"

    with (
        installed.serving(tmp_path / "log", **variables) as (address, process),
        httpx.Client(base_url=address, timeout=30) as client,
    ):
        created = client.post("/sessions", json=session_request())
        call = client.post(
            f"{created.headers['location']}/calls", json={"tool_name": "read_file"}
        )

        assert call.json()["calls_made"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
